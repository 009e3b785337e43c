"""Mixup and CutMix: a classification batch -> mixed images and class probabilities, the last step before the model.

Images are mixed in pairs of neighbours of the global batch, each pair from its own seed. A pair lies on one rank, so
the global batch is the same for any number of ranks; mixing across the whole of a rank's batch would break that.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from modsquad_ds.data.transforms import seeded
from modsquad_ds.data.types import SubBatch


class Mixing(NamedTuple):
    """Mixup and CutMix of one task."""

    mixup: float
    cutmix: float
    num_classes: int


@functools.lru_cache
def _mixers(mixing: Mixing) -> list[v2.Transform]:
    mixers: list[v2.Transform] = []
    if mixing.mixup > 0:
        mixers.append(v2.MixUp(alpha=mixing.mixup, num_classes=mixing.num_classes))
    if mixing.cutmix > 0:
        mixers.append(v2.CutMix(alpha=mixing.cutmix, num_classes=mixing.num_classes))
    return mixers


def mix_pairs(batch: SubBatch, mixing: Mixing, pair_seeds: Sequence[int], out: Tensor | None = None) -> SubBatch:
    """Mix images 2i and 2i+1 with each other by `pair_seeds[i]`; targets become `probabilities` float32 `[B, classes]`.

    With Mixup and CutMix both on, each pair draws one of the two. The batch is even (checked before training).
    Mixed images are written to `out`, which may be the batch's own; to fresh memory if None.
    """
    mixers, rows = _mixers(mixing), []
    images = torch.empty_like(batch.images_BCHW) if out is None else out
    for index, seed in enumerate(pair_seeds):
        pair = slice(2 * index, 2 * index + 2)
        with seeded(seed):
            mixer = mixers[int(torch.randint(len(mixers), ()))]
            images[pair], row = mixer(batch.images_BCHW[pair], batch.targets["labels"][pair])
        rows.append(row)
    return batch._replace(images_BCHW=images, targets={"probabilities": torch.cat(rows)})
