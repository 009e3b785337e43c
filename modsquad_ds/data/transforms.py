"""Decoded sample -> uint8 image and target: augmentation by kind, between decoding and the batch.

`TRANSFORMS` has one row per kind: a training and an evaluation transform and the function that makes a batch of their
results. Pixels stay bytes: what needs real numbers is only drawn here and done on the device (`finish.py`). The
transforms draw from torch's global generator and nothing else; the caller seeds it per sample (`seeded`), so a sample's
augmentation depends on its place in the stream and on no worker, rank or batch size.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from modsquad_ds.data.collate import (
    Collate,
    Erased,
    Pixels,
    Ready,
    Rectangle,
    canvas_memory,
    collate_classification,
    collate_detection,
    collate_segmentation,
    fill,
    pad,
)
from modsquad_ds.data.decode import Decoded, DetectionLabel
from modsquad_ds.data.order import derive_seed
from modsquad_ds.data.photometric import PhotometricDistort
from modsquad_ds.tasks import (
    CLASSIFICATION,
    DETECTION,
    IGNORE_INDEX,
    SEGMENTATION,
    ClassificationTransform,
    DetectionTransform,
    SegmentationTransform,
    Size,
)

_CROP_DRAWS = 10
"""Extra draws of a segmentation crop in which one class covers too much."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `seed`; afterwards it is where it was.

    `torch.manual_seed` would also reseed the accelerators' generators.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def eval_resize(spec: ClassificationTransform) -> int:
    """Short side of the image before the centre crop at evaluation, in pixels."""
    return round(spec.image_size * 256 / 224) if spec.eval_resize is None else spec.eval_resize


def step_canvas(spec: DetectionTransform, seed: int, task: str, step: int) -> Size:
    """The canvas (height, width) of every training image of one step: a pure function of (seed, task, step)."""
    return spec.canvases[derive_seed("canvas", seed, task, step) % len(spec.canvases)]


def channels_apart(image: Tensor) -> Tensor:
    """One channel after the other in memory: torch's kernels that change colours are several times faster then."""
    return fill(torch.empty(image.shape, dtype=torch.uint8), image)


def contiguous(image: Tensor) -> Tensor:
    """A window of an image in memory of its own, in the order of axes that the decoder gave it: resizing is fastest then."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if image.stride(0) == 1 else image.contiguous()


def _fits(image: Tensor, canvas: Size) -> float:
    """The largest scale at which the image lies inside the canvas."""
    height, width = image.shape[-2:]
    return min(canvas[0] / height, canvas[1] / width)


def _scaled(image: Tensor, scale: float) -> list[int]:
    """Height and width of the image at `scale`, rounded, at least 1."""
    height, width = image.shape[-2:]
    return [max(round(height * scale), 1), max(round(width * scale), 1)]


def uniform(bounds: tuple[float, float]) -> float:
    """A random number between the two."""
    low, high = bounds
    return low + (high - low) * torch.rand(()).item()


def at_most(largest: int) -> int:
    """A random whole number in 0 .. largest."""
    return int(torch.randint(largest + 1, ()))


def original(image: Tensor) -> dict[str, Any]:
    """What an evaluated sample's meta says whatever the kind."""
    return {"valid": True, "size": (image.shape[-2], image.shape[-1])}


# ---------------------------------------------------------------- classification


class _Augmentation(NamedTuple):
    """The random parts of classification's training."""

    crop: v2.RandomResizedCrop
    color: v2.RandAugment | None
    erasing: v2.RandomErasing | None


@functools.lru_cache
def augmentation(spec: ClassificationTransform, pixels: Pixels) -> _Augmentation:
    """Made once for a task: making them costs more than calling them."""
    crop = v2.RandomResizedCrop(spec.image_size, spec.scale, spec.ratio)
    color = erasing = None
    if spec.rand_augment_ops:
        grey, bilinear = [round(value) for value in pixels.mean], InterpolationMode.BILINEAR
        color = v2.RandAugment(spec.rand_augment_ops, spec.rand_augment_magnitude, interpolation=bilinear, fill=grey)
    if spec.erasing:
        # Area, ratio and noise of the field's ImageNet recipes (timm's and mmpretrain's "rand" mode).
        erasing = v2.RandomErasing(spec.erasing, (0.02, 1 / 3), (0.3, 1 / 0.3), value="random")
    return _Augmentation(crop, color, erasing)


def _erased(erasing: v2.RandomErasing, image: Tensor) -> Erased:
    """Rectangle and noise, drawn as `erasing` itself would; an empty rectangle if it would leave the image alone."""
    if torch.rand(1) < erasing.p:
        drawn = erasing.make_params([image])
        top, left, height, width, noise = (drawn[name] for name in "ijhwv")
        if noise is not None:  # None: no rectangle fitted
            return Erased((top, left, top + height, left + width), noise)
    return Erased((0, 0, 0, 0), torch.empty(3, 0, 0))


def classification_train(
    sample: Decoded, spec: ClassificationTransform, pixels: Pixels, canvas: Size, out: Tensor | None = None
) -> Ready:
    """RandomResizedCrop, flip, RandAugment; RandomErasing's noise is drawn, not yet placed. Target: `label` int."""
    crop, color, erasing = augmentation(spec, pixels)
    place = crop.make_params([sample.image])
    top, left, height, width = (place[name] for name in ("top", "left", "height", "width"))
    # torch resizes an image a third faster than a window of one.
    window = contiguous(sample.image[:, top : top + height, left : left + width])
    image = F.resize(window, list(canvas), interpolation=InterpolationMode.BICUBIC, antialias=True)
    if torch.rand(()) < spec.flip:
        image = image.flip(-1)
    if color is not None:
        image = color(channels_apart(image))
    image = image if out is None else fill(out, image)
    return Ready(image, {"label": sample.label}, {}, erased=None if erasing is None else _erased(erasing, image))


def classification_eval(sample: Decoded, spec: ClassificationTransform, pixels: Pixels) -> Ready:
    """Short side to `eval_resize`, centre crop. Target: `label` int."""
    short = eval_resize(spec)
    scale = short / min(sample.image.shape[-2:])
    image = F.resize(sample.image, _scaled(sample.image, scale), interpolation=InterpolationMode.BICUBIC)
    image = F.center_crop(image, [spec.image_size, spec.image_size])
    return Ready(image, {"label": sample.label}, original(sample.image))


# ---------------------------------------------------------------- detection


Window = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def look(image: Tensor, window: Window, out: Tensor) -> Rectangle:
    """Fill `out` `[3, height, width]` with what the window shows, 0 beyond the image; the part that is image."""
    top, left, height, width = window
    rows = slice(max(-top, 0), min(image.shape[-2] - top, height))
    columns = slice(max(-left, 0), min(image.shape[-1] - left, width))
    out[:, : rows.start] = 0
    out[:, rows.stop :] = 0
    out[:, rows, : columns.start] = 0
    out[:, rows, columns.stop :] = 0
    seen = image[:, rows.start + top : rows.stop + top, columns.start + left : columns.stop + left]
    fill(out[:, rows, columns], seen)
    return rows.start, columns.start, rows.stop, columns.stop


def _place(sample: Decoded, size: Sequence[int], window: Window, flip: bool, out: Tensor | None) -> Ready:
    """Resize to `size`, flip, and look through `window` (top, left, height, width), which may lie beyond the image.

    Boxes are clipped first to the image and then to the window; those left with less than 1 px of a side are dropped.
    """
    label, (height, width) = sample.label, sample.image.shape[-2:]
    assert isinstance(label, DetectionLabel)
    everything = torch.cat([label.boxes, label.ignore])
    boxes = tv_tensors.BoundingBoxes(everything, format="XYXY", canvas_size=(height, width))
    image = F.resize(sample.image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    boxes = F.resize(boxes, list(size))
    if flip:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
    shown = canvas_memory(window[2:]) if out is None else out
    area = look(image, window, shown)
    corners = F.crop(F.clamp_bounding_boxes(boxes), *window).as_subclass(Tensor)
    kept = (corners[:, 2:] - corners[:, :2] >= 1).all(1)
    objects = len(label.boxes)
    target = {
        "boxes": corners[:objects][kept[:objects]],
        "labels": label.labels[kept[:objects]],
        "ignore": corners[objects:][kept[objects:]],
    }
    return Ready(shown, target, {}, area)


def detection_train(sample: Decoded, spec: DetectionTransform, pixels: Pixels, canvas: Size, out: Tensor | None = None) -> Ready:
    """Random scale of the largest that fits the canvas, random place on it, flip.

    Above scale 1 the canvas shows a random part of the image. Targets: `boxes` `[n, 4]`, `labels` `[n]`, `ignore`
    `[m, 4]`.
    """
    size = _scaled(sample.image, _fits(sample.image, canvas) * uniform(spec.scale))
    corner = []
    for side, room in zip(size, canvas, strict=True):
        offset = at_most(abs(room - side))
        corner.append(offset if side > room else -offset)
    flip = bool(torch.rand(()) < spec.flip)
    return _place(sample, size, (corner[0], corner[1], *canvas), flip, out)


def detection_eval(sample: Decoded, spec: DetectionTransform, pixels: Pixels) -> Ready:
    """The largest scale that fits `eval_canvas`, turned for upright images; image at its top left. Targets as in training."""
    upright = sample.image.shape[-2] > sample.image.shape[-1]
    canvas = sorted(spec.eval_canvas, reverse=upright)
    size = _scaled(sample.image, _fits(sample.image, (canvas[0], canvas[1])))
    ready = _place(sample, size, (0, 0, canvas[0], canvas[1]), False, None)
    assert isinstance(sample.label, DetectionLabel)
    meta = {"content": (size[0], size[1]), "canvas": (canvas[0], canvas[1]), "annotations": sample.label.annotations}
    return ready._replace(meta=original(sample.image) | meta)


# ---------------------------------------------------------------- segmentation


_PHOTOMETRIC = PhotometricDistort()


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
        top, left = at_most(mask.shape[0] - height), at_most(mask.shape[1] - width)
        rows, columns = slice(top, top + height), slice(left, left + width)
        if spec.max_class_share == 1 or _class_share(mask[rows, columns]) <= spec.max_class_share:
            break
    return rows, columns


def segmentation_train(
    sample: Decoded, spec: SegmentationTransform, pixels: Pixels, canvas: Size, out: Tensor | None = None
) -> Ready:
    """Random scale, random crop, flip, photometric distortion, pad. Target: `labels` uint8 `[H, W]`."""
    assert isinstance(sample.label, Tensor)
    scale = _fit_scale(sample.image, spec) * uniform(spec.ratio)
    image, mask = _resize_pair(sample.image, sample.label, scale)
    rows, columns = _random_crop(mask, spec)
    image, mask = image[:, rows, columns], mask[rows, columns]
    if torch.rand(()) < spec.flip:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    if spec.photometric:
        image = _PHOTOMETRIC(channels_apart(image))
    shown = canvas_memory(spec.crop) if out is None else out
    area = look(image, (0, 0, *spec.crop), shown)
    return Ready(shown, {"labels": pad(mask, spec.crop, IGNORE_INDEX)}, {}, area)


def segmentation_eval(sample: Decoded, spec: SegmentationTransform, pixels: Pixels) -> Ready:
    """Scale to fit `resize`, pad to whole patches. Target: `labels` as in training; meta: `label` at original size."""
    assert isinstance(sample.label, Tensor)
    image, mask = _resize_pair(sample.image, sample.label, _fit_scale(sample.image, spec))
    content = (image.shape[-2], image.shape[-1])
    size = [-(-side // pixels.patch_size) * pixels.patch_size for side in content]
    meta = original(sample.image) | {"label": sample.label, "content": content, "canvas": (size[0], size[1])}
    labels = {"labels": pad(mask, size, IGNORE_INDEX)}
    return Ready(pad(image, size, 0), labels, meta, (0, 0, *content))


# ---------------------------------------------------------------- the table


class TrainTransform(Protocol):
    """Augmentation of one sample."""

    def __call__(self, sample: Decoded, spec: Any, pixels: Pixels, canvas: Size, out: Tensor | None = None) -> Ready:
        """`spec`: transform section of the recipe. `canvas`: the step's. The image goes to `out` `[3, *canvas]` if given."""


class KindTransforms(NamedTuple):
    """What a kind of task does to its samples."""

    train: TrainTransform
    evaluate: Callable[[Decoded, Any, Pixels], Ready]
    collate: Collate
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
