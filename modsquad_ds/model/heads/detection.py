"""What both detectors share: the ends of their towers, and scores and boxes of all cells -> detections.

Axes: B images, C classes, G boxes of an image (padded), M cells or anchors of all levels, N candidates of an image.
Boxes are x1, y1, x2, y2 in pixels of the canvas.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import batched_nms, clip_boxes_to_image

from modsquad_ds.model.heads.base import Prediction
from modsquad_ds.tasks import AnchorFreeHead, RetinaNetHead

CANDIDATES_PER_LEVEL = 1000
"""Best (location, class) pairs of a level that go into non-maximum suppression (arXiv 1708.02002, section 4.1)."""

PRIOR = 0.01
"""Score of every class before training, so that background does not swamp the first steps (arXiv 1708.02002, 3.3)."""


DetectorSpec = AnchorFreeHead | RetinaNetHead


class Truth(NamedTuple):
    """The boxes of a batch in rectangular tensors. At least one per image is padding: all zero, label -1."""

    boxes_BG4: Tensor
    labels_BG: Tensor
    ignore_BG4: Tensor


def pad_truth(targets: dict[str, Any], device: torch.device) -> Truth:
    """`SubBatch.targets` of a detection task as rectangles, without waiting for the device."""

    def padded(rows: Sequence[Tensor], value: float) -> Tensor:
        pad = rows[0].new_full((1, *rows[0].shape[1:]), value)
        return pad_sequence([torch.cat([row, pad]) for row in rows], batch_first=True, padding_value=value).to(device)

    boxes = [boxes.float() for boxes in targets["boxes"]]
    ignore = [boxes.float() for boxes in targets["ignore"]]
    return Truth(padded(boxes, 0.0), padded(targets["labels"], -1), padded(ignore, 0.0))


def predictor(channels: int, out: int, bias: float = 0.0) -> nn.Conv2d:
    """The 3x3 convolution that ends a tower, with RetinaNet's initialisation (arXiv 1708.02002, 4.1)."""
    conv = nn.Conv2d(channels, out, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, bias)
    return conv


def class_predictor(channels: int, out: int) -> nn.Conv2d:
    """As `predictor`, with the bias at which every score starts as `PRIOR`."""
    return predictor(channels, out, bias=-math.log((1 - PRIOR) / PRIOR))


def flatten_levels(maps: Sequence[Tensor], width: int) -> Tensor:
    """Level maps `[B, A * width, h, w]` -> `[B, M, width]` float32; M runs over levels, rows, columns, then A."""
    rows = [map_BXHW.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3) for map_BXHW in maps]
    return torch.cat(rows, dim=1).float()


def one_hot(labels_BM: Tensor, classes: int) -> Tensor:
    """`[B, M, C]` float32; a label of -1 gives a row of zeros."""
    return (labels_BM[..., None] == torch.arange(classes, device=labels_BM.device)).float()


def _candidates(logits_MC: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, labels and scores of one level's pairs above `threshold`, at most the best `CANDIDATES_PER_LEVEL`."""
    scores = logits_MC.sigmoid().flatten()
    pairs = torch.where(scores > threshold)[0]
    pairs = pairs[scores[pairs].sort(descending=True, stable=True).indices[:CANDIDATES_PER_LEVEL]]
    classes = logits_MC.shape[1]
    return pairs // classes, pairs % classes, scores[pairs]


def _suppress(boxes_N4: Tensor, labels: Tensor, scores: Tensor, head: DetectorSpec) -> Prediction:
    """Non-maximum suppression among boxes of one label; empty boxes go first, the best `max_detections` stay."""
    real = (boxes_N4[:, 2:] > boxes_N4[:, :2]).all(dim=1)
    boxes_N4, labels, scores = boxes_N4[real], labels[real], scores[real]
    keep = batched_nms(boxes_N4, scores, labels, head.nms_threshold)[: head.max_detections]
    return {"boxes": boxes_N4[keep].cpu(), "scores": scores[keep].cpu(), "labels": labels[keep].cpu()}


def _to_original(boxes_N4: Tensor, image: dict[str, Any]) -> Tensor:
    """Canvas pixels -> pixels of the original image, clipped to it. Each side has its scale, as sizes are rounded."""
    (height, width), (content_height, content_width) = image["size"], image["content"]
    scale_4 = boxes_N4.new_tensor([width / content_width, height / content_height] * 2)
    return clip_boxes_to_image(boxes_N4 * scale_4, (height, width))


def detections(
    logits_BMC: Tensor,
    boxes_BM4: Tensor,
    level_sizes: Sequence[int],
    meta: Sequence[dict[str, Any]],
    head: DetectorSpec,
) -> list[Prediction]:
    """Class logits and decoded boxes of all levels (`level_sizes` rows each) -> detections in original pixels."""
    out = []
    for logits_MC, boxes_M4, image in zip(logits_BMC, boxes_BM4, meta, strict=True):
        levels = zip(logits_MC.split(list(level_sizes)), boxes_M4.split(list(level_sizes)), strict=True)
        picked = []
        for logits_of_level, boxes_of_level in levels:
            rows, labels, scores = _candidates(logits_of_level, head.score_threshold)
            picked.append((boxes_of_level[rows], labels, scores))
        boxes_N4, labels, scores = (torch.cat(parts) for parts in zip(*picked, strict=True))
        out.append(_suppress(_to_original(boxes_N4, image), labels, scores, head))
    return out
