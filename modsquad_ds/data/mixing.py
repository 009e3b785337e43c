"""Mixup and CutMix: what is mixed of a classification batch, and its class probabilities, the last step in the loader.

Images are mixed in pairs of neighbours of the global batch, each pair from its own seed. A pair lies on one rank, so
the global batch is the same for any number of ranks; mixing across the whole of a rank's batch would break that.
The pixels themselves are mixed on the device (`finish.py`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from modsquad_ds.data.collate import Rectangle
from modsquad_ds.data.transforms import seeded
from modsquad_ds.data.types import SubBatch
from modsquad_ds.tasks import ClassificationTask, TaskSpec


class Mixing(NamedTuple):
    """Mixup and CutMix of one task."""

    mixup: float
    cutmix: float
    num_classes: int


def mixing_of(spec: TaskSpec) -> Mixing | None:
    """Mixup and CutMix of a task, if it has any."""
    if isinstance(spec, ClassificationTask) and (spec.transform.mixup > 0 or spec.transform.cutmix > 0):
        return Mixing(spec.transform.mixup, spec.transform.cutmix, spec.num_classes)
    return None


class _Mixed(NamedTuple):
    """How the two images of a pair are mixed."""

    place: Rectangle
    kept: float
    """Share of its own pixels that an image keeps inside `place`."""
    own: float
    """Share of its own label."""


@functools.lru_cache
def _mixers(mixing: Mixing) -> list[v2.MixUp | v2.CutMix]:
    mixers: list[v2.MixUp | v2.CutMix] = []
    if mixing.mixup > 0:
        mixers.append(v2.MixUp(alpha=mixing.mixup))
    if mixing.cutmix > 0:
        mixers.append(v2.CutMix(alpha=mixing.cutmix))
    return mixers


def mix_pairs(batch: SubBatch, mixing: Mixing, pair_seeds: Sequence[int]) -> SubBatch:
    """Mix images 2i and 2i+1 with each other by `pair_seeds[i]`; targets become `probabilities` float32 `[B, classes]`.

    With Mixup and CutMix both on, each pair draws one of the two. The batch is even (checked before training).
    """
    mixed = []
    for seed in pair_seeds:
        with seeded(seed):
            mixed += [_draw(_mixers(mixing), batch.images_BCHW)] * 2
    places_B4, kept_B = torch.tensor([one.place for one in mixed]), torch.tensor([one.kept for one in mixed])
    labels_B1 = batch.targets["labels"][:, None]
    partners_B1 = labels_B1.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    probabilities = torch.zeros(len(mixed), mixing.num_classes)
    probabilities.scatter_add_(1, labels_B1, torch.tensor([[one.own] for one in mixed]))
    probabilities.scatter_add_(1, partners_B1, torch.tensor([[1 - one.own] for one in mixed]))
    finish = batch.finish._replace(mixed_B4=places_B4, kept_B=kept_B)
    return batch._replace(targets={"probabilities": probabilities}, finish=finish)


def _draw(mixers: Sequence[v2.MixUp | v2.CutMix], images_BCHW: Tensor) -> _Mixed:
    """One of the mixers and its parameters, as torchvision draws them."""
    mixer = mixers[int(torch.randint(len(mixers), ()))]
    drawn = mixer.make_params([images_BCHW])
    if isinstance(mixer, v2.MixUp):
        height, width = images_BCHW.shape[-2:]
        return _Mixed((0, 0, height, width), drawn["lam"], drawn["lam"])
    left, top, right, bottom = drawn["box"]
    return _Mixed((top, left, bottom, right), 0.0, drawn["lam_adjusted"])
