"""Undecoded sample of an image set -> pixels and raw label maps: the second stop of its samples, before their transform.

Only the targets that are asked for are decoded; one that the sample lacks is left out. Values stay as they are stored: what
they mean, `set_transforms.py` says. Errors are UserErrors that name shard, key and field.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modsquad_ds.data.decode import by, decode_image_of, refuse
from modsquad_ds.data.target_files import decode_target_npy, decode_target_png
from modsquad_ds.data.types import RawSample
from modsquad_ds.targets import IGNORE_CLASS, VALID_FIELD, Stored, Target


class SetSample(NamedTuple):
    """One image with labels, in memory."""

    image: Tensor
    """uint8 RGB `[3, H, W]`, upright."""
    targets: dict[str, Tensor]
    """By name: map `[C, H, W]`, uint8 or int32 (16 bits), or vector float32 `[C]`."""
    valid: Tensor | None
    """bool `[H, W]`: where `masked` targets mean something; None: everywhere."""


def decode_set_sample(raw: RawSample, rows: Sequence[Target]) -> SetSample:
    """Image, mask of validity and those of the targets `rows` that the sample has."""
    image = decode_image_of(raw)
    size = image.shape[1:]
    targets = {row.name: _target(raw, row, size) for row in rows if row.field in raw.fields}
    masked = any(row.masked for row in rows if row.name in targets) and VALID_FIELD in raw.fields
    valid = _map(raw, VALID_FIELD, "grey8", size)[0] > 127 if masked else None
    return SetSample(image, targets, None if valid is None or bool(valid.all()) else valid)


def _target(raw: RawSample, row: Target, size: Sequence[int]) -> Tensor:
    if row.stored == "npy":
        try:
            return decode_target_npy(raw.fields[row.field], row.channels)
        except ValueError as error:
            refuse(raw, row.field, str(error))
    values = _map(raw, row.field, row.stored, size)
    if row.kind == "semantic":
        largest = int(torch.where(values == IGNORE_CLASS, 0, values).max())
        if largest >= row.channels:
            refuse(raw, row.field, f"class {largest} is out of range, the target has {row.channels} classes (0-based, or 255)")
    # Principal curvature has two numbers in a file of three channels.
    return values[: row.channels] if row.kind == "regression" else values


def _map(raw: RawSample, field: str, stored: Stored, size: Sequence[int]) -> Tensor:
    try:
        values = decode_target_png(raw.fields[field], stored)
    except ValueError as error:
        refuse(raw, field, f"the map cannot be decoded ({error})")
    if values.shape[1:] != size:
        refuse(raw, field, f"the map is {by(values.shape[1:])} but the image is {by(size)} (height x width)")
    return values
