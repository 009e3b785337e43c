"""Checks and members of one sample of an image set: its image and its targets' files -> bytes for the shard.

    label file -> `read_map`, `read_scores`: checked to its end -> the bytes as they are (PNG), float32 probabilities (`.npy`)

The layouts (`taskonomy.py`, `pascal_context.py`) say which files belong to a sample; whatever is wrong with one target's file
leaves that target out, and is listed beside the members, while the image stays with its other targets.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.io import encode_png

from modsquad_ds.data.samples import BadSample, BadSampleError, Size, examine, read_file, size_text
from modsquad_ds.data.target_files import decode_target_png, npy_bytes, read_npy
from modsquad_ds.errors import UserError
from modsquad_ds.targets import IGNORE_CLASS, Target

SUM_TOLERANCE = 1e-3
"""Scores whose sum is this near to 1 are probabilities already."""


class Encoded(NamedTuple):
    """One sample, ready to be written."""

    members: dict[str, bytes]
    """Field -> bytes."""
    bad: list[BadSample]
    """Files of labels that cannot be used; their targets are not among the members."""


class SetImage(NamedTuple):
    """The image of a sample, checked."""

    data: bytes
    size: Size


def chosen_targets(
    layout: str, names: tuple[str, ...] | None, rows: tuple[Target, ...], more: tuple[Target, ...] = ()
) -> tuple[str, ...]:
    """The targets to read, in the table's order; without `names` those of `rows`, but none of `more`.

    UserError for one that the layout does not have, and for one given twice.
    """
    if names is None:
        return tuple(row.name for row in rows)
    known = [row.name for row in (*rows, *more)]
    for place, name in enumerate(names):
        if name not in known:
            raise UserError(f"--targets: {layout} has no {name!r}; it has {', '.join(sorted(known))}")
        if name in names[:place]:
            raise UserError(f"--targets: {name!r} is there twice")
    return tuple(name for name in known if name in names)


def read_image(root: Path, file: str) -> SetImage:
    """Read an image that many labels lie on. BadSampleError if it does not decode, or would have to be turned."""
    data = read_file(root, file)
    picture = examine(data, file)
    if picture.orientation != 1:
        reason = f"EXIF orientation {picture.orientation}: its labels may mean the stored or the upright pixels"
        raise BadSampleError(file, f"{reason}, nothing tells which: turn the pixels for good and drop the tag")
    return SetImage(data, picture.size)


def read_map(root: Path, file: str, row: Target, size: Size) -> tuple[bytes, Tensor]:
    """A target's PNG: its bytes and its values `[C, H, W]`. BadSampleError if it is damaged, or of another format or size."""
    data = read_file(root, file)
    try:
        values = decode_target_png(data, row.stored, deep=True)
    except ValueError as error:
        raise BadSampleError(file, str(error)) from error
    found = (values.shape[1], values.shape[2])
    if found != size:
        raise BadSampleError(file, f"has {size_text(found)} pixels (width x height), its image has {size_text(size)}")
    return data, values


def read_scores(root: Path, file: str, row: Target) -> bytes:
    """A target's `.npy` as the float32 probabilities that a shard holds. BadSampleError if it is damaged or does not fit."""
    data = read_file(root, file)
    try:
        return npy_bytes(probabilities(torch.from_numpy(read_npy(data).astype("float64")), row.channels))
    except ValueError as error:
        raise BadSampleError(file, str(error)) from error


def probabilities(scores: Tensor, length: int) -> Tensor:
    """Scores of classes, float64 `[length]` or with axes of length 1 besides -> probabilities, float64 `[length]`.

    Taskonomy's own code takes one file for logits and the other for probabilities, later code takes both for probabilities,
    and the files do not say: any negative score makes it logits (softmax); what sums to 1 within 1e-3 stays as it is; other
    scores are divided by their sum. ValueError for another length, and for scores that are not finite or all 0.
    """
    if scores.numel() != length or max(scores.shape, default=1) != length:
        raise ValueError(f".npy of shape {tuple(scores.shape)}, expected {length} scores")
    scores = scores.flatten()
    if not scores.isfinite().all():
        raise ValueError("holds scores that are not finite")
    if (scores < 0).any():
        return scores.softmax(0)
    total = float(scores.sum())
    if total == 0:
        raise ValueError("holds scores that are all 0")
    return scores if abs(total - 1) <= SUM_TOLERANCE else scores / total


def classes_from_one(values: Tensor, file: str, row: Target) -> bytes:
    """A map `[1, H, W]` of 1..n, 0 where there is no class -> PNG of 0..n-1 and 255. BadSampleError for larger values."""
    highest = int(values.max())
    if highest > row.channels:
        raise BadSampleError(file, f"holds the value {highest}, expected 0..{row.channels}")
    return bytes(encode_png(torch.where(values == 0, IGNORE_CLASS, values - 1).to(torch.uint8)).numpy())
