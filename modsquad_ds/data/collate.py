"""Transformed samples -> batch: the stop between a sample's transform and the loader's batch.

Images lie in memory row by row, the three bytes of a pixel side by side, as decoders and resizing leave them: the copy
into the batch then is one of whole rows.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from modsquad_ds.data.types import Finish, SubBatch
from modsquad_ds.tasks import IGNORE_INDEX, Size

_HUGE = 32 * 2**20
"""Bytes from which the C library returns memory to the kernel as soon as it is freed, so that every batch is fresh."""

Rectangle = tuple[int, int, int, int]
"""Top, left, bottom and right in pixels, the last two exclusive."""


class Pixels(NamedTuple):
    """How pixels become the model's input."""

    mean: tuple[float, float, float]
    """RGB, scale 0..255."""
    std: tuple[float, float, float]
    patch_size: int
    """Side of a token in pixels: canvases are multiples of it."""


class Erased(NamedTuple):
    """Noise for a rectangle of an image."""

    place: Rectangle
    noise: Tensor
    """float32 `[3, h, w]` in normalised units."""


class Ready(NamedTuple):
    """One transformed sample."""

    image: Tensor
    """uint8 `[3, h, w]`."""
    target: dict[str, Any]
    """The sample's part of `SubBatch.targets`, keys in the singular of one image."""
    meta: dict[str, Any]
    """The sample's part of `SubBatch.meta`; empty in training."""
    area: Rectangle | None = None
    """The part of `image` that shows something; None: all of it, for every sample of the task."""
    erased: Erased | None = None
    """With an empty rectangle if it is not this sample's turn; None: the task erases nothing."""


class Collate(Protocol):
    """Ready samples -> batch."""

    def __call__(self, samples: Sequence[Ready], keys: Sequence[str], pixels: Pixels, images: Tensor | None = None) -> SubBatch:
        """`images` `[B, 3, H, W]`: where the samples' images lie already, else they are copied together."""


def canvas_memory(size: Size) -> Tensor:
    """Room for an image, uint8 `[3, height, width]`, not yet written to."""
    return torch.empty(*size, 3, dtype=torch.uint8).permute(2, 0, 1)


def batch_memory(images: int, canvas: Size) -> Tensor:
    """Room for a batch's images, uint8 `[images, 3, *canvas]`, that transforms write to, a pixel's bytes side by side.

    In a worker process it is the memory that the batch travels in, as in torch's own collate: no copy on the way. Elsewhere the
    kernel is asked for huge pages, which it hands out several times faster.
    """
    size = images * 3 * canvas[0] * canvas[1]
    if get_worker_info() is not None:
        flat = room((size,), torch.uint8)
    elif size < _HUGE:
        flat = torch.empty(size, dtype=torch.uint8)
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat.view(images, *canvas, 3).permute(0, 3, 1, 2)


def room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Room for a batch's numbers, not yet written to; in a worker process in the memory that the batch travels in."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    memory = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(memory).view(shape)


def fill(out: Tensor, image: Tensor) -> Tensor:
    """`out.copy_(image)` for uint8 `[3, h, w]` on the CPU, several times as fast where the two differ in their order of axes."""
    if out.stride(0) == image.stride(0):
        return out.copy_(image)
    for to, channel in zip(out.numpy(), image.numpy(), strict=True):
        np.copyto(to, channel)
    return out


def pad(image: Tensor, size: Sequence[int], value: float) -> Tensor:
    """`[..., h, w]` -> `[..., *size]`, filled at the bottom and on the right."""
    right, bottom = size[1] - image.shape[-1], size[0] - image.shape[-2]
    return torch.nn.functional.pad(image, (0, right, 0, bottom), value=value)


def collate_classification(
    samples: Sequence[Ready], keys: Sequence[str], pixels: Pixels, images: Tensor | None = None
) -> SubBatch:
    """Targets: `labels` int64 `[B]`."""
    labels = torch.tensor([sample.target["label"] for sample in samples], dtype=torch.int64)
    return assemble(samples, keys, pixels, images, {"labels": labels})


def collate_detection(samples: Sequence[Ready], keys: Sequence[str], pixels: Pixels, images: Tensor | None = None) -> SubBatch:
    """Pads to the largest of the batch. Targets: lists of B tensors `boxes`, `labels`, `ignore`."""
    targets = {name: [sample.target[name] for sample in samples] for name in ("boxes", "labels", "ignore")}
    return assemble(samples, keys, pixels, images, targets)


def collate_segmentation(
    samples: Sequence[Ready], keys: Sequence[str], pixels: Pixels, images: Tensor | None = None
) -> SubBatch:
    """Pads to the largest of the batch. Targets: `labels` int64 `[B, H, W]`."""
    images = _padded(samples) if images is None else images
    labels = torch.stack([pad(sample.target["labels"], images.shape[-2:], IGNORE_INDEX) for sample in samples])
    return assemble(samples, keys, pixels, images, {"labels": labels.long()})


def assemble(
    samples: Sequence[Ready], keys: Sequence[str], pixels: Pixels, images: Tensor | None, targets: dict[str, Any]
) -> SubBatch:
    """Samples, with the targets of them all -> the batch. `images` as for `Collate`."""
    finish = Finish(pixels.mean, pixels.std)
    areas = [sample.area for sample in samples if sample.area is not None]
    if areas:
        finish = finish._replace(area_B4=torch.tensor(areas))
    erased = [sample.erased for sample in samples if sample.erased is not None]
    if erased:
        noise = torch.cat([one.noise.flatten() for one in erased])
        finish = finish._replace(erased_B4=torch.tensor([one.place for one in erased]), noise=noise)
    images = _padded(samples) if images is None else images
    return SubBatch(images, targets, tuple(keys), tuple(sample.meta for sample in samples), finish)


def _padded(samples: Sequence[Ready]) -> Tensor:
    """Images uint8 `[B, 3, H, W]`, the smaller ones filled up with 0 at the bottom and on the right."""
    height, width = (max(sample.image.shape[axis] for sample in samples) for axis in (-2, -1))
    images = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for image, sample in zip(images, samples, strict=True):
        fill(image[:, : sample.image.shape[-2], : sample.image.shape[-1]], sample.image)
    return images
