"""Samples of an image set -> batch: which rank takes which image, and what each task learns from it.

Not every image has every label. Images are dealt to the ranks by what they have, so that a task's images are spread as evenly as
can be, and a rank with fewer than the others fills up with rows that count for nothing: shapes are the same everywhere, and the
pairs of image and task that count are those of the whole micro-step, whatever the number of ranks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modsquad_ds.data.collate import Pixels, Ready, assemble, room
from modsquad_ds.data.set_transforms import Entries
from modsquad_ds.data.types import Rows, SubBatch
from modsquad_ds.targets import IGNORE_CLASS, Target
from modsquad_ds.tasks import Size

Pattern = tuple[bool, ...]
"""Which of the set's tasks have a label on an image, in the recipe's order."""


class Readers(NamedTuple):
    """The images of a rank that one task reads."""

    images: tuple[int, ...]
    """Places among the rank's images: those that have the label, then as many others as some rank has more."""
    counted: int
    """How many have it."""


class Share(NamedTuple):
    """What one rank takes of a micro-step."""

    images: tuple[int, ...]
    """Places among all images of the micro-step."""
    readers: tuple[Readers | None, ...]
    """By task; None for one that no image of the micro-step has, on any rank."""


def deal(patterns: Sequence[Pattern], world: int) -> tuple[Share, ...]:
    """The shares of all ranks, of equally many images each: sorted by what they have, the images are dealt in turns.

    A task's rows are as many on every rank. Where no image has any label, the first task has one row that does not count: a
    step without any token could not be computed.

    Args:
        patterns: what each image of the micro-step has, over all ranks, in the order of the stream; a multiple of `world`.
    """
    assert patterns and len(patterns) % world == 0, f"{len(patterns)} images for {world} ranks"
    ordered = sorted(range(len(patterns)), key=lambda image: (patterns[image], image))
    images = [tuple(sorted(ordered[rank::world])) for rank in range(world)]
    readers: list[tuple[Readers | None, ...]] = [() for _ in range(world)]
    for task in range(len(patterns[0])):
        having = [[place for place, image in enumerate(of_rank) if patterns[image][task]] for of_rank in images]
        rows = max(map(len, having))
        if not rows and task == 0 and not any(map(any, patterns)):
            rows = 1
        for rank, those in enumerate(having):
            others = sorted(set(range(len(images[rank]))) - set(those))
            taken = Readers((*those, *others[: rows - len(those)]), len(those)) if rows else None
            readers[rank] = (*readers[rank], taken)
    return tuple(Share(*both) for both in zip(images, readers, strict=True))


def collate_set(
    samples: Sequence[Ready],
    keys: Sequence[str],
    pixels: Pixels,
    readers: Mapping[str, tuple[Target, Readers]],
    images: Tensor | None = None,
) -> SubBatch:
    """Samples of `set_train` -> batch. Targets and rows by task, in the order of `readers`: a task's target and its rows.

    `images` as for `Collate`.
    """
    size = (samples[0].image.shape[-2], samples[0].image.shape[-1])
    targets, rows = {}, {}
    for task, (row, those) in readers.items():
        empty = filler(row, size)
        entries = [samples[place].target.get(row.name, empty) for place in those.images]
        targets[task] = {name: _stacked([entry[name] for entry in entries]) for name in empty}
        rows[task] = Rows(torch.tensor(those.images, dtype=torch.int64), those.counted)
    return assemble(samples, keys, pixels, images, targets)._replace(rows=rows)


def collate_task(samples: Sequence[Ready], keys: Sequence[str], pixels: Pixels, row: Target) -> SubBatch:
    """Samples of `set_eval`, all of which have the target -> the batch of one task, as if it had images of its own."""
    targets = {name: _stacked([sample.target[row.name][name] for sample in samples]) for name in samples[0].target[row.name]}
    return assemble(samples, keys, pixels, None, targets)


def filler(row: Target, size: Size) -> Entries:
    """The target of an image of this size that has none: nothing of it is valid."""
    if row.kind == "soft_classification":
        return {"probabilities": torch.zeros(row.channels), "valid": torch.tensor(False)}
    if row.kind in ("semantic", "segments"):
        return {"labels": torch.full(size, IGNORE_CLASS if row.kind == "semantic" else -1)}
    shape = size if row.kind == "binary" else (row.channels, *size)
    return {"values": torch.zeros(shape), "valid": torch.zeros(size, dtype=torch.bool)}


def _stacked(entries: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(entries), out=room((len(entries), *entries[0].shape), entries[0].dtype))
