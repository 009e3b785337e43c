"""Metric of segments: do two pixels belong together? Distances between embeddings against the label's ids."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modsquad_ds.metrics.base import CountMetric

PIXELS = 300
"""Pixels of an image whose pairs count, as many as Taskonomy's loss draws."""
FARTHEST = math.sqrt(math.log(3))
"""Distance below which two pixels are called one segment: there 2 / (1 + exp(d^2)), Taskonomy's probability, is above 1/2."""


class PairAccuracy(CountMetric):
    """`pair_acc`: the mean of two shares over the pairs of all images: of pairs in one segment that are called so, and of others.

    An image gives all pairs among at most 300 of its cells, spread evenly (in order of rows) over those that are labelled: no
    draw. Ids are compared within an image only. NaN unless both kinds of pairs occur. This project's own figure: the field's
    code scores the arbitrary ids themselves.
    """

    shape = (2, 2)
    """Pairs in one segment and others; of each: all, and rightly called."""

    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Prediction: `embedding` `[D, h', w']`, cells that tile the canvas. Label: `labels` int64 `[h, w]`, -1 = ignored."""
        embedding_DN, ids_N = labelled_cells(prediction["embedding"], label["labels"], meta)
        chosen = torch.arange(PIXELS) * len(ids_N) // PIXELS if len(ids_N) > PIXELS else torch.arange(len(ids_N))
        vectors_ND, ids_N = embedding_DN[:, chosen].T.double(), ids_N[chosen]
        distance = torch.cdist(vectors_ND, vectors_ND, compute_mode="donot_use_mm_for_euclid_dist")
        first, second = torch.triu_indices(len(chosen), len(chosen), offset=1)
        same, called = ids_N[first] == ids_N[second], distance[first, second] < FARTHEST
        self.counts += torch.stack([_all_and_right(same, called), _all_and_right(~same, ~called)])

    def compute(self) -> dict[str, float]:
        """Mean of the two shares; 0 / 0 is NaN."""
        pairs, right = self.counts.double().T
        return {"pair_acc": (right / pairs).mean().item()}


def _all_and_right(kind: Tensor, called: Tensor) -> Tensor:
    return torch.stack([kind.sum(), (kind & called).sum()])


def labelled_cells(embedding_DHW: Tensor, labels: Tensor, meta: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Embeddings `[D, N]` and ids `[N]` of the cells whose centre lies on a labelled pixel, in order of rows.

    `meta`: `window` (top, left, height, width) of the canvas that the label covers, with the size of the `canvas`; or `window`
    None, where the label covers it all.
    """
    canvas = labels.shape if meta["window"] is None else meta["canvas"]
    top, left, height, width = meta["window"] or (0, 0, *canvas)
    rows = _pixels(embedding_DHW.shape[1], canvas[0], top, height, labels.shape[0])
    columns = _pixels(embedding_DHW.shape[2], canvas[1], left, width, labels.shape[1])
    inside = (rows >= 0)[:, None] & (columns >= 0)
    ids = labels[rows.clamp(min=0)][:, columns.clamp(min=0)].masked_fill(~inside, -1)
    return embedding_DHW[:, ids >= 0], ids[ids >= 0]


def _pixels(cells: int, canvas: int, start: float, length: float, pixels: int) -> Tensor:
    """Per cell of an axis the label's pixel under its centre, or -1 outside the window."""
    centres = (torch.arange(cells).double() + 0.5) * (canvas / cells) - start
    inside = (centres >= 0) & (centres < length)
    return (centres * (pixels / length)).floor().long().clamp(max=pixels - 1).masked_fill(~inside, -1)
