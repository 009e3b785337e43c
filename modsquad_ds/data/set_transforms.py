"""Decoded sample of an image set -> uint8 image and targets: one geometry for the picture and all its labels.

The picture is resized, turned, mirrored and looked at through a window of the crop's size. Labels go the same way: numbers and
directions by an average over the pixels that mean something, so that none of the others ever changes a value; classes, ids and
yes-or-no maps by the nearest pixel. Beyond the picture nothing is valid.

Axes: x to the right, y down; a direction's channels 0 and 1 are its x and y. Everything random is drawn from torch's global
generator (`transforms.seeded`), for all labels at once and whichever of them are wanted.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from modsquad_ds.data.collate import Pixels, Ready, canvas_memory, fill
from modsquad_ds.data.photometric import PhotometricDistort
from modsquad_ds.data.set_decode import SetSample
from modsquad_ds.data.transforms import Window, at_most, channels_apart, look, original, uniform
from modsquad_ds.targets import DEPTH_HOLE, IGNORE_CLASS, Scale, Target
from modsquad_ds.tasks import SetTransform, Size

Entries = dict[str, Tensor]
"""One image's part of a task's targets, as `SubBatch.targets` describes them, without the axis B."""

_NO_DIRECTION = 0.1
"""A stored vector shorter than this is none; the middle of the bytes, (128, 128, 128), has length 0.007."""
_HALF = 0.4999
"""Half of a pixel's weight, less what rounding may take from it."""
_PHOTOMETRIC = PhotometricDistort()


class Geometry(NamedTuple):
    """Where an image's pixels go: resized to `size`, turned about the middle, mirrored, seen through `window`."""

    zoom: float
    """What `size` is of the size without it."""
    size: Size
    angle: float | None
    """Degrees, anticlockwise as one looks at the picture, whose corners are lost; None: it is not turned."""
    flip: bool
    window: Window
    """Top, left, height and width; may reach beyond the picture."""


def random_geometry(image: Size, spec: SetTransform) -> Geometry:
    """A draw of the training transform for an image of this size."""
    zoom = uniform(spec.zoom)
    angle = uniform((-spec.rotate, spec.rotate)) if spec.rotate else None
    flip = bool(torch.rand(()) < spec.flip)
    size = _zoomed(spec.resize or image, zoom)
    top, left = (_random_offset(side, room) for side, room in zip(size, spec.crop, strict=True))
    return Geometry(zoom, size, angle, flip, (top, left, *spec.crop))


def middle_geometry(image: Size, spec: SetTransform) -> Geometry:
    """The evaluation's: the middle of the whole picture, which lies in the middle of a larger crop."""
    size = spec.resize or image
    top, left = ((side - room) // 2 for side, room in zip(size, spec.crop, strict=True))
    return Geometry(1.0, size, None, False, (top, left, *spec.crop))


def set_train(
    sample: SetSample, rows: Sequence[Target], spec: SetTransform, pixels: Pixels, out: Tensor | None = None
) -> Ready:
    """One training sample; the image goes to `out` `[3, *crop]` if given. Target: `Entries` by name of the target."""
    geometry = random_geometry(_size(sample), spec)
    image, area = picture(sample.image, geometry, spec.photometric, pixels, out)
    # With turned pictures no rectangle says what is shown: their corners are of the mean colour already.
    return Ready(image, labels(sample, rows, geometry, spec.depth_by_zoom), {}, None if geometry.angle is not None else area)


def set_eval(sample: SetSample, rows: Sequence[Target], spec: SetTransform, pixels: Pixels) -> Ready:
    """One sample to be scored: no augmentation. Meta: `label` is that of all of `rows`, by name of the target.

    ValueError if labels are scored as they are stored and the crop does not show the whole image.
    """
    stored = _size(sample)
    geometry = middle_geometry(stored, spec)
    image, area = picture(sample.image, geometry, False, pixels)
    target = label = labels(sample, rows, geometry)
    window = None
    if spec.score_at == "original":
        if any(side > room for side, room in zip(geometry.size, spec.crop, strict=True)):
            raise ValueError(
                f"the image of {geometry.size[0]}x{geometry.size[1]} is larger than transform.crop "
                f"{spec.crop[0]}x{spec.crop[1]}, so score_at: original cannot see all of it; give a larger crop, or a resize"
            )
        label = labels(sample, rows, Geometry(1.0, stored, None, False, (0, 0, *stored)))
        window = (-geometry.window[0], -geometry.window[1], *geometry.size)
    meta = original(sample.image) | {"canvas": spec.crop, "label": label, "window": window}
    return Ready(image, target, meta, area)


def _size(sample: SetSample) -> Size:
    return sample.image.shape[-2], sample.image.shape[-1]


def _zoomed(size: Size, zoom: float) -> Size:
    return max(round(size[0] * zoom), 1), max(round(size[1] * zoom), 1)


def _random_offset(side: int, room: int) -> int:
    """Where a window of `room` pixels begins in a picture of `side`: before it, if it is the larger."""
    offset = at_most(abs(side - room))
    return offset if side > room else -offset


# ---------------------------------------------------------------- the picture


def picture(
    image: Tensor, geometry: Geometry, photometric: bool, pixels: Pixels, out: Tensor | None = None
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The image `[3, H, W]` as seen through the window, uint8 `[3, h, w]`, and the rectangle of it that is not padding.

    Padding is 0, which `finish` makes the mean colour; what turning uncovers is of the mean colour already.
    """
    top, left, height, width = geometry.window
    shown = canvas_memory((height, width)) if out is None else out
    if tuple(image.shape[-2:]) != geometry.size:
        image = F.resize(image, list(geometry.size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    if geometry.angle is not None:
        image = _PHOTOMETRIC(channels_apart(image)) if photometric else image
        mean = torch.tensor(pixels.mean)[:, None, None]
        turned = _sampled(image - mean, geometry, "bilinear").add_(mean)
        fill(shown, turned.round_().clamp_(0, 255).to(torch.uint8))
        return shown, (0, 0, height, width)
    image = image.flip(-1) if geometry.flip else image
    if photometric:
        image = image[:, max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
        top, left, image = min(top, 0), min(left, 0), _PHOTOMETRIC(channels_apart(image))
    return shown, look(image, (top, left, height, width), shown)


# ---------------------------------------------------------------- the labels


def labels(sample: SetSample, rows: Sequence[Target], geometry: Geometry, depth_by_zoom: bool = False) -> dict[str, Entries]:
    """What the heads learn of those of `rows` that the sample has, by name, in the order of `rows`."""
    there = [row for row in rows if row.name in sample.targets]
    averaged = [row for row in there if row.kind in ("regression", "unit_vectors")]
    nearest = [row for row in there if row.kind in ("semantic", "segments", "binary")]
    zoom = geometry.zoom if depth_by_zoom else 1.0
    found = _averaged(sample, averaged, geometry, zoom) if averaged else {}
    found |= _nearest(sample, nearest, geometry) if nearest else {}
    for row in there:
        if row.kind == "soft_classification":
            found[row.name] = {"probabilities": sample.targets[row.name], "valid": torch.tensor(True)}
    return {row.name: found[row.name] for row in there}


def scale_of(row: Target) -> Scale:
    """How a regression target's raw numbers are scaled."""
    return row.scale or Scale((0.0,), (65535.0 if row.stored == "grey16" else 255.0,), to=(0.0, 1.0))


def _averaged(sample: SetSample, rows: Sequence[Target], geometry: Geometry, zoom: float) -> dict[str, Entries]:
    """Regression and unit vectors: averages of the valid pixels, all maps in one go."""
    stack = torch.empty(sum(row.channels for row in rows), *_size(sample))
    channels = [row.channels for row in rows]
    masks: list[Tensor] = []  # bool [H, W], each once
    mask_of: list[int | None] = []
    for row, values in zip(rows, stack.split(channels), strict=True):
        mask = _prepare(values.copy_(sample.targets[row.name]), row, sample.valid if row.masked else None, zoom)
        if mask is None and geometry.angle is not None:  # at the edge, what lies beyond it has to be left out
            mask = torch.ones(_size(sample), dtype=torch.bool)
        mask_of.append(None if mask is None else _place_of(mask, masks))
    known = torch.stack(masks).to(torch.float32) if masks else stack[:0]
    for values, index in zip(stack.split(channels), mask_of, strict=True):
        if index is not None:
            values.mul_(known[index])
    moved, weights = _moved(stack, geometry, "bilinear"), _moved(known, geometry, "bilinear")
    inside, found = _inside(geometry), {}
    for row, values, index in zip(rows, moved.split(channels), mask_of, strict=True):
        valid = inside if index is None else inside & (weights[index] >= _HALF)
        if index is not None:
            values = values / weights[index].clamp(min=_HALF)
        values, valid = _directions(values, valid, geometry) if row.kind == "unit_vectors" else (_scaled(values, row), valid)
        found[row.name] = {"values": values.mul_(valid), "valid": valid}
    return found


def _prepare(values: Tensor, row: Target, valid: Tensor | None, zoom: float) -> Tensor | None:
    """Whatever is not linear, in place, on the raw map `[C, H, W]`.

    The result is where the map is valid, None for everywhere.
    """
    if row.kind == "unit_vectors":
        values.div_(127.5).sub_(1)
        length = _length(values)
        valid = _and(length >= _NO_DIRECTION, valid)
        values.div_(length.clamp_(min=_NO_DIRECTION))
    elif row.metres is not None:
        valid = _and(values[0] != DEPTH_HOLE, valid)
    if row.kind == "regression":
        scale = scale_of(row)
        if scale.blur:
            _blur(values, valid, scale.blur * min(values.shape[-2:]))
        if row.metres is not None and zoom != 1:
            values.div_(zoom)
        if scale.clip:
            low, high = (torch.tensor(bound)[:, None, None] for bound in (scale.low, scale.high))
            values.clamp_(low, high)
        if scale.log:
            values.log1p_()
    return valid


def _and(own: Tensor, valid: Tensor | None) -> Tensor | None:
    """Both masks in one; None where nothing is masked."""
    both = own if valid is None else own & valid
    return None if both.all() else both


def _place_of(mask: Tensor, masks: list[Tensor]) -> int:
    """Index of an equal mask in `masks`, where it is put if there is none."""
    for index, other in enumerate(masks):
        if mask is other or torch.equal(mask, other):
            return index
    masks.append(mask)
    return len(masks) - 1


def _scaled(values: Tensor, row: Target) -> Tensor:
    """The linear part of the row's scale; averaging and it may change places, and here are fewer pixels."""
    scale = scale_of(row)
    low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (scale.low, scale.high))
    if scale.log:
        low, high = low.log1p(), high.log1p()
    slope = (scale.to[1] - scale.to[0]) / (high - low)
    offset = scale.to[0] - low * slope
    return values * slope.float()[:, None, None] + offset.float()[:, None, None]


def _directions(values: Tensor, valid: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Vectors turned and mirrored with the picture, of length 1; where they cancelled each other they are not valid."""
    x, y, z = values
    if geometry.angle is not None:
        cos, sin = _cos_sin(geometry.angle)
        x, y = x * cos + y * sin, y * cos - x * sin
    turned = torch.stack([-x if geometry.flip else x, y, z])
    length = _length(turned)
    return turned / length.clamp(min=_NO_DIRECTION), valid & (length >= _NO_DIRECTION)


def _nearest(sample: SetSample, rows: Sequence[Target], geometry: Geometry) -> dict[str, Entries]:
    """Classes, ids and yes-or-no maps: each pixel's nearest one."""
    maps = [sample.targets[row.name][0] for row in rows]
    masked = sample.valid is not None and any(row.masked for row in rows)
    if masked and sample.valid is not None:
        maps.append(sample.valid.to(torch.uint8))
    moved = _moved(torch.stack(maps), geometry, "nearest-exact")
    inside, found = _inside(geometry), {}
    for row, values in zip(rows, moved, strict=False):
        valid = inside & (moved[-1] > 0) if row.masked and masked else inside
        if row.kind == "binary":
            found[row.name] = {"values": ((values > 127) & valid).to(torch.float32), "valid": valid}
        else:
            ignored = IGNORE_CLASS if row.kind == "semantic" else -1
            found[row.name] = {"labels": values.long().masked_fill_(~valid, ignored)}
    return found


# ---------------------------------------------------------------- moving maps


def _moved(maps: Tensor, geometry: Geometry, mode: str) -> Tensor:
    """Maps `[n, H, W]` -> `[n, h, w]` of the window, 0 beyond the picture; averages are antialiased."""
    if geometry.angle is not None and mode == "nearest-exact":  # from the stored map: its nearest pixel, found once
        return _sampled(maps.float(), geometry, "nearest").to(maps.dtype)
    if len(maps) and tuple(maps.shape[-2:]) != geometry.size:
        smooth = {"antialias": True} if mode == "bilinear" else {}
        maps = interpolate(maps[None], geometry.size, mode=mode, **smooth)[0]
    if geometry.angle is not None:
        return _sampled(maps, geometry, "bilinear")
    maps = maps.flip(-1) if geometry.flip else maps
    top, left, height, width = geometry.window
    bottom, right = top + height - maps.shape[-2], left + width - maps.shape[-1]
    return pad(maps, (-left, right, -top, bottom))


def _inside(geometry: Geometry) -> Tensor:
    """bool `[h, w]`: the pixels of the window whose middle lies in the picture."""
    if geometry.angle is not None:
        return (_grid(geometry).abs() <= 1).all(-1)
    top, left, height, width = geometry.window
    rows, columns = torch.arange(top, top + height), torch.arange(left, left + width)
    rows_in, columns_in = ((at >= 0) & (at < side) for at, side in zip((rows, columns), geometry.size, strict=True))
    return rows_in[:, None] & columns_in


def _sampled(maps: Tensor, geometry: Geometry, mode: str) -> Tensor:
    """float32 maps `[n, H, W]` of the whole picture turned and mirrored: `[n, h, w]` of the window, 0 beyond the picture."""
    return grid_sample(maps[None], _grid(geometry)[None], mode=mode, padding_mode="zeros", align_corners=False)[0]


@functools.lru_cache(maxsize=1)
def _grid(geometry: Geometry) -> Tensor:
    """`[h, w, 2]`: x and y of what each pixel of the window shows; the picture reaches from -1 to 1."""
    top, left, height, width = geometry.window
    y = (torch.arange(top, top + height, dtype=torch.float64) + 0.5 - geometry.size[0] / 2)[:, None]
    x = torch.arange(left, left + width, dtype=torch.float64) + 0.5 - geometry.size[1] / 2
    x = -x if geometry.flip else x
    cos, sin = _cos_sin(geometry.angle)
    across, down = x * cos - y * sin, y * cos + x * sin
    return torch.stack([across * (2 / geometry.size[1]), down * (2 / geometry.size[0])], dim=-1).float()


def _cos_sin(angle: float | None) -> tuple[float, float]:
    angle = angle or 0.0
    return math.cos(math.radians(angle)), math.sin(math.radians(angle))


def _length(vectors: Tensor) -> Tensor:
    """`[C, H, W]` -> `[H, W]`; torch's own norm is fifty times slower along this axis."""
    return vectors.square().sum(0).sqrt_()


@functools.lru_cache
def _gaussian(deviation: float) -> list[float]:
    """Weights of a Gaussian at whole pixels out to four deviations, their sum 1."""
    reach = math.ceil(4 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / deviation) ** 2)
    return (weights / weights.sum()).tolist()


def _blur(values: Tensor, valid: Tensor | None, deviation: float) -> None:
    """Smooth `[C, H, W]` in place; the weights of invalid pixels and of what lies beyond the edge go to the others."""
    known = torch.ones(1, *values.shape[-2:]) if valid is None else valid[None].to(torch.float32)
    maps = torch.cat([values * known, known])
    for axis in (1, 2):
        maps = _smoothed(maps, _gaussian(deviation), axis)
    torch.div(maps[:-1], maps[-1:].clamp_(min=1e-6), out=values)


def _smoothed(maps: Tensor, weights: Sequence[float], axis: int) -> Tensor:
    """Sum of the weighted neighbours along an axis, 0 beyond the edge. torch's convolution of one channel is far slower."""
    side, reach, smoothed = maps.shape[axis], len(weights) // 2, torch.zeros_like(maps)
    for shift, weight in zip(range(-reach, reach + 1), weights, strict=True):
        length = side - abs(shift)
        if length > 0:
            seen = maps.narrow(axis, max(shift, 0), length)
            smoothed.narrow(axis, max(-shift, 0), length).add_(seen, alpha=weight)
    return smoothed
