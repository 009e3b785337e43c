"""Losses of the tasks of image sets: a head's numbers and an image's labels in, sums and counts out. Called by map_heads.py.

Each is a sum in float32 over what is valid and a count that the targets alone decide, so it adds up over any split of the
images. Invalid target values may be anything, NaN too: `torch.where` takes them out before any arithmetic, as 0 * NaN is NaN
and would reach every weight. Nothing here makes the host wait for the device.

Axes: B images, C channels, D dimensions of an embedding, H W rows and columns, N cells of an image, P cells drawn from them.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from modsquad_ds.model.heads.base import LossTerm
from modsquad_ds.model.heads.segmentation import pixel_loss, resize
from modsquad_ds.targets import Loss, TargetKind
from modsquad_ds.tasks import SetTask

Targets = Mapping[str, Tensor]
"""One task's entry of `SubBatch.targets`."""

SHORT = 1e-8
"""Added to the square of a predicted direction's length, so that a length near 0 has a gradient of at most 1e4, not infinity."""

PAIRED_CELLS = 300
"""Cells of an image whose pairs are compared, as in Taskonomy's `num_pixels`."""

TOUCHING = 1e-4
"""Added to the squared distance of a pair of different segments, whose loss would be infinite at 0 (Taskonomy clips there)."""


# ---------------------------------------------------------------- one answer per image


def soft_mse(output_BC: Tensor, probabilities_BC: Tensor, valid_B: Tensor) -> LossTerm:
    """Mean over images and classes of (output - probability)^2: Mod-Squad's loss, the head's output taken as it is."""
    error_BC = torch.where(valid_B[:, None], output_BC.float() - probabilities_BC, 0.0)
    return LossTerm(error_BC.square().sum(), valid_B.sum().float() * output_BC.shape[1], 1.0)


def soft_cross_entropy(logits_BC: Tensor, probabilities_BC: Tensor, valid_B: Tensor) -> LossTerm:
    """Mean over images of -sum of p log softmax."""
    wanted_BC = torch.where(valid_B[:, None], probabilities_BC, 0.0)
    return LossTerm(-(wanted_BC * logits_BC.float().log_softmax(dim=1)).sum(), valid_B.sum().float(), 1.0)


# ---------------------------------------------------------------- numbers per pixel


def map_l1(map_BCHW: Tensor, values_BCHW: Tensor, valid_BHW: Tensor) -> LossTerm:
    """Mean absolute error over the channels of the valid pixels."""
    return LossTerm(_error(map_BCHW, values_BCHW, valid_BHW).abs().sum(), _elements(map_BCHW, valid_BHW), 1.0)


def map_mse(map_BCHW: Tensor, values_BCHW: Tensor, valid_BHW: Tensor) -> LossTerm:
    """Mean square error over the channels of the valid pixels."""
    return LossTerm(_error(map_BCHW, values_BCHW, valid_BHW).square().sum(), _elements(map_BCHW, valid_BHW), 1.0)


def direction_l1(map_BCHW: Tensor, values_BCHW: Tensor, valid_BHW: Tensor) -> LossTerm:
    """Mean absolute difference of the components of the direction predicted and the true one.

    Over the components of the valid pixels, as M3ViT and arXiv 2004.13379 count; InvPT counts pixels and so has three times
    the value, with the same weight of 10 in both.
    """
    return map_l1(_direction(map_BCHW), values_BCHW, valid_BHW)


def direction_cosine(map_BCHW: Tensor, values_BCHW: Tensor, valid_BHW: Tensor) -> LossTerm:
    """Mean over the valid pixels of 1 - cosine of the angle between prediction and truth (Mod-Squad)."""
    wanted_BCHW = torch.where(valid_BHW[:, None], values_BCHW, 0.0)
    cosine_BHW = (_direction(map_BCHW) * wanted_BCHW).sum(dim=1)
    return LossTerm(torch.where(valid_BHW, 1 - cosine_BHW, 0.0).sum(), valid_BHW.sum().float(), 1.0)


def _error(map_BCHW: Tensor, values_BCHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """Difference where valid, else 0. A subtraction hands gradients on as they are, so NaN does no harm on its way out."""
    return torch.where(valid_BHW[:, None], map_BCHW - values_BCHW, 0.0)


def _elements(map_BCHW: Tensor, valid_BHW: Tensor) -> Tensor:
    return valid_BHW.sum().float() * map_BCHW.shape[1]


def _direction(map_BCHW: Tensor) -> Tensor:
    """Length 1; a vector shorter than about 1e-4 stays shorter, and 0 stays 0."""
    return map_BCHW * (map_BCHW.square().sum(dim=1, keepdim=True) + SHORT).rsqrt()


ERRORS: dict[tuple[TargetKind, Loss], Callable[[Tensor, Tensor, Tensor], LossTerm]] = {
    ("regression", "l1"): map_l1,
    ("regression", "mse"): map_mse,
    ("unit_vectors", "l1"): direction_l1,
    ("unit_vectors", "cosine"): direction_cosine,
}


# ---------------------------------------------------------------- yes or no per pixel


def balanced(
    logits_BHW: Tensor, values_BHW: Tensor, valid_BHW: Tensor, positive_weight: float | None
) -> dict[str, LossTerm]:
    """Mean cross-entropy of the sigmoid over the valid pixels, positive ones weighted by w, others by 1 - w (arXiv 1504.06375).

    `positive_weight` None: w is the share of negative pixels in the micro-batches of all ranks together. Each of the two
    terms then leaves it to the sums over all ranks to make its weight: the other class's share.
    """
    is_positive_BHW = values_BHW > 0.5
    positive_BHW, negative_BHW = valid_BHW & is_positive_BHW, valid_BHW & ~is_positive_BHW
    positive = torch.where(positive_BHW, F.softplus(-logits_BHW), 0.0).sum()
    negative = torch.where(negative_BHW, F.softplus(logits_BHW), 0.0).sum()
    count = valid_BHW.sum().float()
    if positive_weight is not None:
        return {"balanced": LossTerm(positive_weight * positive + (1 - positive_weight) * negative, count, 1.0)}
    return {
        "positive": LossTerm(positive, count, 1.0, negative_BHW.sum().float()),
        "negative": LossTerm(negative, count, 1.0, positive_BHW.sum().float()),
    }


# ---------------------------------------------------------------- which pixels belong together


def pairs(embedding_BDHW: Tensor, labels_BHW: Tensor) -> LossTerm:
    """Mean over pairs of an image's cells of the cross-entropy of "one segment or two" (arXiv 1703.10277, equation 1; Taskonomy).

    Two cells whose embeddings lie d^2 = |a - b|^2 apart are called one segment with probability s = 2 / (1 + exp(d^2)). A
    cell's label is that of the pixel at its centre. Pairs are of different cells, each pair once, among `paired_cells`.
    """
    stride = labels_BHW.shape[1] // embedding_BDHW.shape[2]
    labels_BN = labels_BHW[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1)
    cell_BP = paired_cells(labels_BN, PAIRED_CELLS)
    label_BP = labels_BN.gather(1, cell_BP)
    flat_BDN = embedding_BDHW.float().flatten(2)
    d2_BPP = _squared_distances(flat_BDN.gather(2, cell_BP[:, None].expand(-1, flat_BDN.shape[1], -1)))
    same_BPP = label_BP[:, :, None] == label_BP[:, None, :]
    valid_BP = label_BP >= 0
    counted_BPP = (valid_BP[:, :, None] & valid_BP[:, None, :]).triu(diagonal=1)
    loss_BPP = torch.where(same_BPP, -log_same(d2_BPP), -log_different(d2_BPP + TOUCHING))
    return LossTerm(torch.where(counted_BPP, loss_BPP, 0.0).sum(), counted_BPP.sum().float(), 1.0)


def log_same(d2: Tensor) -> Tensor:
    """log(2 / (1 + exp(d2))) for any d2 of 0 or more."""
    return math.log(2.0) - F.softplus(d2)


def log_different(d2: Tensor) -> Tensor:
    """log(1 - 2 / (1 + exp(d2))) for any d2 above 0: the log of (1 - exp(-d2)) / (1 + exp(-d2))."""
    return torch.log(-torch.expm1(-d2)) - torch.log1p(torch.exp(-d2))


def paired_cells(labels_BN: Tensor, most: int) -> Tensor:
    """Up to `most` cells of each image, drawn without replacement, those with a label before those without: `[B, P]` indices.

    The draw is a hash of a cell's index and of the image's labels. So it is another one for each image, crop and flip, but
    the same for any number of ranks, any neighbours in the batch and any resumption, which no random generator of a rank's
    own could be.
    """
    cell_N = _mixed(torch.arange(labels_BN.shape[1], device=labels_BN.device))
    seed_B1 = (cell_N * (labels_BN + 1)).sum(dim=1, keepdim=True)
    # Mixing maps no two 32-bit numbers to one, so the keys of an image's labelled cells are all different.
    key_BN = torch.where(labels_BN >= 0, _mixed((cell_N + seed_B1) & _BITS), _BITS + 1)
    return key_BN.topk(min(most, labels_BN.shape[1]), dim=1, largest=False).indices


_BITS = 2**32 - 1


def _mixed(x: Tensor) -> Tensor:
    """A permutation of the 32-bit numbers without visible order, in int64: its products stay below 2^63."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _BITS
    return x ^ (x >> 16)


def _squared_distances(x_BDP: Tensor) -> Tensor:
    """`[B, P, P]` by one product, whose memory does not grow with D. Around their mean, large numbers do not cancel."""
    x_BDP = x_BDP - x_BDP.mean(dim=2, keepdim=True)
    square_BP = x_BDP.square().sum(dim=1)
    return (square_BP[:, :, None] + square_BP[:, None, :] - 2 * x_BDP.transpose(1, 2) @ x_BDP).clamp(min=0)


# ---------------------------------------------------------------- by task


def image_terms(spec: SetTask, output_BC: Tensor, targets: Targets) -> dict[str, LossTerm]:
    """Terms of a `soft_classification` task."""
    measure = soft_mse if spec.loss == "mse" else soft_cross_entropy
    return {spec.loss: measure(output_BC, targets["probabilities"], targets["valid"])}


def map_terms(spec: SetTask, map_BCHW: Tensor, targets: Targets) -> dict[str, LossTerm]:
    """Terms of every other kind of task. `map_BCHW` has the head's stride; all but `segments` compare at the labels' pixels."""
    if spec.kind == "segments":
        return {"pairs": pairs(map_BCHW, targets["labels"])}
    if spec.kind == "semantic":
        return {"cross_entropy": pixel_loss(map_BCHW, targets["labels"], 1.0)}
    values, valid_BHW = targets["values"], targets["valid"]
    full_BCHW = resize(map_BCHW.float(), valid_BHW.shape[1:])
    if spec.kind == "binary":
        return balanced(full_BCHW[:, 0], values, valid_BHW, spec.row.positive_weight)
    return {spec.loss: ERRORS[spec.kind, spec.loss](full_BCHW, values, valid_BHW)}
