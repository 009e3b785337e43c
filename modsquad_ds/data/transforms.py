"""Decoded sample -> float image and target that the model sees: augmentation by kind, between decoding and the batch.

`TRANSFORMS` has one row per kind: a training and an evaluation transform and the function that makes a batch of their
results. The transforms draw from torch's global generator and nothing else; the caller seeds it per sample (`seeded`),
so a sample's augmentation depends on its place in the stream and on no worker, rank or batch size.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from modsquad_ds.data.decode import IGNORE_INDEX, Decoded, DetectionLabel
from modsquad_ds.data.order import derive_seed
from modsquad_ds.data.types import SubBatch
from modsquad_ds.tasks import (
    CLASSIFICATION,
    DETECTION,
    SEGMENTATION,
    ClassificationTransform,
    DetectionTransform,
    SegmentationTransform,
    Size,
)

_CROP_DRAWS = 10
"""Extra draws of a segmentation crop in which one class covers too much."""


class Pixels(NamedTuple):
    """How pixels become the model's input."""

    mean: tuple[float, float, float]
    """RGB, scale 0..255."""
    std: tuple[float, float, float]
    patch_size: int
    """Side of a token in pixels: canvases are multiples of it."""


class Ready(NamedTuple):
    """One transformed sample."""

    image: Tensor
    """float32 `[3, h, w]`, normalised."""
    target: dict[str, Any]
    """The sample's part of `SubBatch.targets`, keys in the singular of one image."""
    meta: dict[str, Any]
    """The sample's part of `SubBatch.meta`; empty in training."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `seed`; afterwards it is where it was.

    `torch.manual_seed` would also reseed the accelerators' generators, which fork_rng(devices=[]) does not bring back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def eval_resize(spec: ClassificationTransform) -> int:
    """Short side of the image before the centre crop at evaluation, in pixels."""
    return round(spec.image_size * 256 / 224) if spec.eval_resize is None else spec.eval_resize


def step_canvas(spec: DetectionTransform, seed: int, task: str, step: int) -> Size:
    """The canvas (height, width) of every training image of one step: a pure function of (seed, task, step)."""
    return spec.canvases[derive_seed("canvas", seed, task, step) % len(spec.canvases)]


@functools.lru_cache
def _mean_and_std(pixels: Pixels) -> tuple[Tensor, Tensor]:
    """float32 `[3, 1, 1]` each."""
    return torch.tensor(pixels.mean)[:, None, None], torch.tensor(pixels.std)[:, None, None]


def _normalize(image: Tensor, pixels: Pixels) -> Tensor:
    """uint8 image `[3, h, w]` -> normalised float32. On small images v2's own spends most of its time on checks."""
    mean, std = _mean_and_std(pixels)
    return (image - mean) / std


def _fits(image: Tensor, canvas: Size) -> float:
    """The largest scale at which the image lies inside the canvas."""
    height, width = image.shape[-2:]
    return min(canvas[0] / height, canvas[1] / width)


def _scaled(image: Tensor, scale: float) -> list[int]:
    """Height and width of the image at `scale`, rounded, at least 1."""
    height, width = image.shape[-2:]
    return [max(round(height * scale), 1), max(round(width * scale), 1)]


def _uniform(bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low + (high - low) * torch.rand(()).item()


def _at_most(largest: int) -> int:
    """A random whole number in 0 .. largest."""
    return int(torch.randint(largest + 1, ()))


def _original(image: Tensor) -> dict[str, Any]:
    return {"valid": True, "size": (image.shape[-2], image.shape[-1])}


# ---------------------------------------------------------------- classification


@functools.lru_cache
def _classification_pipelines(spec: ClassificationTransform, pixels: Pixels) -> tuple[v2.Compose, v2.Compose]:
    """(before, after) normalisation of training."""
    size, bicubic = (spec.image_size, spec.image_size), InterpolationMode.BICUBIC
    before: list[v2.Transform] = [
        v2.RandomResizedCrop(size, spec.scale, spec.ratio, interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(spec.flip),
    ]
    if spec.rand_augment_ops:
        fill = [round(value) for value in pixels.mean]
        before.append(
            v2.RandAugment(
                spec.rand_augment_ops, spec.rand_augment_magnitude, interpolation=InterpolationMode.BILINEAR, fill=fill
            )
        )
    # Area, ratio and noise of the field's ImageNet recipes (timm's and mmpretrain's "rand" mode).
    erasing = v2.RandomErasing(spec.erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")
    return v2.Compose(before), v2.Compose([erasing])


def classification_train(sample: Decoded, spec: ClassificationTransform, pixels: Pixels, canvas: Size) -> Ready:
    """RandomResizedCrop, flip, RandAugment, normalise, RandomErasing. Target: `label` int."""
    before, after = _classification_pipelines(spec, pixels)
    return Ready(after(_normalize(before(sample.image), pixels)), {"label": sample.label}, {})


def classification_eval(sample: Decoded, spec: ClassificationTransform, pixels: Pixels) -> Ready:
    """Short side to `eval_resize`, centre crop, normalise. Target: `label` int."""
    short = eval_resize(spec)
    scale = short / min(sample.image.shape[-2:])
    image = F.resize(sample.image, _scaled(sample.image, scale), interpolation=InterpolationMode.BICUBIC)
    image = F.center_crop(image, [spec.image_size, spec.image_size])
    return Ready(_normalize(image, pixels), {"label": sample.label}, _original(sample.image))


def collate_classification(samples: Sequence[Ready], keys: Sequence[str]) -> SubBatch:
    """Targets: `labels` int64 `[B]`."""
    labels = torch.tensor([sample.target["label"] for sample in samples], dtype=torch.int64)
    return SubBatch(_stack(samples), {"labels": labels}, tuple(keys), tuple(sample.meta for sample in samples))


# ---------------------------------------------------------------- detection


def _place(sample: Decoded, size: Sequence[int], window: Sequence[int], flip: bool, pixels: Pixels) -> Ready:
    """Resize to `size`, flip, and look through `window` (top, left, height, width), which may lie beyond the image.

    Boxes are clipped first to the image and then to the window; those left with less than 1 px of a side are dropped.
    What lies beyond the image is 0 after normalisation: the mean colour.
    """
    label, (height, width) = sample.label, sample.image.shape[-2:]
    assert isinstance(label, DetectionLabel)
    everything = torch.cat([label.boxes, label.ignore])
    boxes = tv_tensors.BoundingBoxes(everything, format="XYXY", canvas_size=(height, width))
    image = F.resize(sample.image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    boxes = F.resize(boxes, list(size))
    if flip:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
    image = F.crop(_normalize(image, pixels), *window)
    corners = F.crop(F.clamp_bounding_boxes(boxes), *window).as_subclass(Tensor)
    kept = (corners[:, 2:] - corners[:, :2] >= 1).all(1)
    objects = len(label.boxes)
    target = {
        "boxes": corners[:objects][kept[:objects]],
        "labels": label.labels[kept[:objects]],
        "ignore": corners[objects:][kept[objects:]],
    }
    return Ready(image, target, {})


def detection_train(sample: Decoded, spec: DetectionTransform, pixels: Pixels, canvas: Size) -> Ready:
    """Random scale of the largest that fits the canvas, random place on it, flip.

    Above scale 1 the canvas shows a random part of the image. Targets: `boxes` `[n, 4]`, `labels` `[n]`, `ignore`
    `[m, 4]`.
    """
    size = _scaled(sample.image, _fits(sample.image, canvas) * _uniform(spec.scale))
    corner = []
    for side, room in zip(size, canvas, strict=True):
        offset = _at_most(abs(room - side))
        corner.append(offset if side > room else -offset)
    flip = bool(torch.rand(()) < spec.flip)
    return _place(sample, size, (corner[0], corner[1], *canvas), flip, pixels)


def detection_eval(sample: Decoded, spec: DetectionTransform, pixels: Pixels) -> Ready:
    """The largest scale that fits `eval_canvas`, turned for upright images; image at its top left. Targets as in training."""
    upright = sample.image.shape[-2] > sample.image.shape[-1]
    canvas = sorted(spec.eval_canvas, reverse=upright)
    size = _scaled(sample.image, _fits(sample.image, (canvas[0], canvas[1])))
    ready = _place(sample, size, (0, 0, *canvas), False, pixels)
    assert isinstance(sample.label, DetectionLabel)
    meta = {"content": (size[0], size[1]), "canvas": (canvas[0], canvas[1]), "annotations": sample.label.annotations}
    return ready._replace(meta=_original(sample.image) | meta)


def collate_detection(samples: Sequence[Ready], keys: Sequence[str]) -> SubBatch:
    """Pads to the largest of the batch. Targets: lists of B tensors `boxes`, `labels`, `ignore`."""
    targets = {name: [sample.target[name] for sample in samples] for name in ("boxes", "labels", "ignore")}
    return SubBatch(_padded(samples), targets, tuple(keys), tuple(sample.meta for sample in samples))


# ---------------------------------------------------------------- segmentation


class _PhotometricDistort(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation, hue, each with probability 1/2, as mmsegmentation's PhotoMetricDistortion.

    torchvision's own also swaps the colour channels, as SSD did for boxes; no segmentation recipe does.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


_PHOTOMETRIC = _PhotometricDistort()


def _fit_scale(image: Tensor, spec: SegmentationTransform) -> float:
    """The scale at which the image's sides fit `resize` (short, long)."""
    height, width = image.shape[-2:]
    short, long = sorted(spec.resize)
    return min(short / min(height, width), long / max(height, width))


def _resize_pair(image: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Image and mask `[h, w]` at `scale`. Nearest-exact, unlike nearest, does not shift the mask by half a pixel."""
    size = _scaled(image, scale)
    resized = F.resize(image, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
    return resized, F.resize(mask[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]


def _class_share(mask: Tensor) -> float:
    """Share of the commonest class among the pixels that are not ignored; 1 if all are."""
    counts = torch.bincount(mask.flatten(), minlength=256)[:IGNORE_INDEX]
    return (counts.max() / counts.sum()).item() if counts.any() else 1.0


def _random_crop(mask: Tensor, spec: SegmentationTransform) -> tuple[slice, slice]:
    """Rows and columns of a crop in which no class covers more than `max_class_share`, or of the last one drawn."""
    height, width = min(mask.shape[0], spec.crop[0]), min(mask.shape[1], spec.crop[1])
    for _ in range(1 + _CROP_DRAWS):
        top, left = _at_most(mask.shape[0] - height), _at_most(mask.shape[1] - width)
        rows, columns = slice(top, top + height), slice(left, left + width)
        if spec.max_class_share == 1 or _class_share(mask[rows, columns]) <= spec.max_class_share:
            break
    return rows, columns


def _pad(image: Tensor, size: Sequence[int], fill: float) -> Tensor:
    """`[..., h, w]` -> `[..., *size]`, filled at the bottom and on the right."""
    right, bottom = size[1] - image.shape[-1], size[0] - image.shape[-2]
    return torch.nn.functional.pad(image, (0, right, 0, bottom), value=fill)


def segmentation_train(sample: Decoded, spec: SegmentationTransform, pixels: Pixels, canvas: Size) -> Ready:
    """Random scale, random crop, flip, photometric distortion, normalise, pad. Target: `labels` uint8 `[H, W]`."""
    assert isinstance(sample.label, Tensor)
    scale = _fit_scale(sample.image, spec) * _uniform(spec.ratio)
    image, mask = _resize_pair(sample.image, sample.label, scale)
    rows, columns = _random_crop(mask, spec)
    image, mask = image[:, rows, columns], mask[rows, columns]
    if torch.rand(()) < spec.flip:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    if spec.photometric:
        image = _PHOTOMETRIC(image)
    return Ready(_pad(_normalize(image, pixels), spec.crop, 0.0), {"labels": _pad(mask, spec.crop, IGNORE_INDEX)}, {})


def segmentation_eval(sample: Decoded, spec: SegmentationTransform, pixels: Pixels) -> Ready:
    """Scale to fit `resize`, pad to whole patches. Target: `labels` as in training; meta: `label` at original size."""
    assert isinstance(sample.label, Tensor)
    image, mask = _resize_pair(sample.image, sample.label, _fit_scale(sample.image, spec))
    content = (image.shape[-2], image.shape[-1])
    size = [-(-side // pixels.patch_size) * pixels.patch_size for side in content]
    meta = _original(sample.image) | {"label": sample.label, "content": content, "canvas": (size[0], size[1])}
    return Ready(_pad(_normalize(image, pixels), size, 0.0), {"labels": _pad(mask, size, IGNORE_INDEX)}, meta)


def collate_segmentation(samples: Sequence[Ready], keys: Sequence[str]) -> SubBatch:
    """Pads to the largest of the batch. Targets: `labels` int64 `[B, H, W]`."""
    images = _padded(samples)
    labels = torch.stack([_pad(sample.target["labels"], images.shape[-2:], IGNORE_INDEX) for sample in samples])
    return SubBatch(images, {"labels": labels.long()}, tuple(keys), tuple(sample.meta for sample in samples))


def _padded(samples: Sequence[Ready]) -> Tensor:
    """Images `[B, 3, H, W]`, the smaller ones padded with 0, the mean colour."""
    size = [max(sample.image.shape[axis] for sample in samples) for axis in (-2, -1)]
    return torch.stack([_pad(sample.image, size, 0.0) for sample in samples])


def _stack(samples: Sequence[Ready]) -> Tensor:
    return torch.stack([sample.image for sample in samples])


# ---------------------------------------------------------------- the table


class KindTransforms(NamedTuple):
    """What a kind of task does to its samples."""

    train: Callable[[Decoded, Any, Pixels, Size], Ready]
    """(sample, transform section of the recipe, pixels, the step's canvas) -> ready sample."""
    evaluate: Callable[[Decoded, Any, Pixels], Ready]
    collate: Callable[[Sequence[Ready], Sequence[str]], SubBatch]
    """(ready samples, their keys) -> batch."""
    canvas: Callable[[Any, int, str, int], Size]
    """(transform section, seed, task, step) -> (height, width) of the training images of a step."""


TRANSFORMS: dict[str, KindTransforms] = {
    CLASSIFICATION: KindTransforms(
        classification_train,
        classification_eval,
        collate_classification,
        lambda spec, seed, task, step: (spec.image_size, spec.image_size),
    ),
    DETECTION: KindTransforms(detection_train, detection_eval, collate_detection, step_canvas),
    SEGMENTATION: KindTransforms(
        segmentation_train, segmentation_eval, collate_segmentation, lambda spec, seed, task, step: spec.crop
    ),
}
"""Kind -> its transforms."""
