"""RetinaNet (arXiv 1708.02002): pyramid -> two towers -> class logits and box deltas of every anchor. COCO's detector.

Anchors, matching, box coding and losses are torchvision's; what is counted and left out follows mmdetection, which
arXiv 2306.17165 trained with: both losses are divided by the positive anchors of the whole batch.

Axes: A anchors of a cell, B images, C classes, D width, G boxes of an image, M anchors of all levels, H W cells.
Boxes are x1, y1, x2, y2 in pixels of the canvas.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou, sigmoid_focal_loss

from modsquad_ds.model.heads.base import Head, LossTerm, Outputs, Prediction
from modsquad_ds.model.heads.detection import class_predictor, detections, flatten_levels, one_hot, predictor
from modsquad_ds.model.heads.pyramid import SimpleFeaturePyramid
from modsquad_ds.tasks import DetectionTask
from modsquad_ds.tasks import RetinaNetHead as RetinaNetSpec

RATIOS = (0.5, 1.0, 2.0)
"""Height by width of the anchors of a cell."""

SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
"""Sizes of the anchors of a cell, three per octave."""

POSITIVE, NEGATIVE = 0.5, 0.4
"""IoU from which an anchor learns a box, and below which it is background; between the two it is left out."""


def anchor_generator(spec: RetinaNetSpec) -> AnchorGenerator:
    """Nine anchors per cell of each level, of sides `anchor_scale * stride` times `SCALES`, rounded to pixels."""
    sizes = tuple(tuple(spec.anchor_scale * stride * scale for scale in SCALES) for stride in spec.strides)
    return AnchorGenerator(sizes, (RATIOS,) * len(sizes))


def match(anchors_M4: Tensor, boxes_G4: Tensor, ignore_G4: Tensor) -> Tensor:
    """`[M]`: index of the anchor's box, or -1 for background, or -2 for neither.

    An anchor also learns when it is some box's best one, whatever their overlap, as long as they do overlap:
    torchvision's matcher alone makes every anchor positive for a box that none of them touches. An anchor that is not
    positive and overlaps a crowd box by more than `POSITIVE` is neither.
    """
    matches_M = torch.full((len(anchors_M4),), Matcher.BELOW_LOW_THRESHOLD, device=anchors_M4.device)
    if len(boxes_G4):
        iou_GM = box_iou(boxes_G4, anchors_M4)
        matched_M = Matcher(POSITIVE, NEGATIVE, allow_low_quality_matches=True)(iou_GM)
        matches_M = torch.where(iou_GM.amax(dim=0) > 0, matched_M, matches_M)
    if len(ignore_G4):
        crowd_M = box_iou(ignore_G4, anchors_M4).amax(dim=0) > POSITIVE
        matches_M = torch.where(crowd_M & (matches_M < 0), Matcher.BETWEEN_THRESHOLDS, matches_M)
    return matches_M


def _tower(channels: int, convs: int) -> nn.Sequential:
    tower = nn.Sequential()
    for _ in range(convs):
        tower.extend([predictor(channels, channels), nn.ReLU()])
    return tower


class RetinaNet(Head):
    """Separate towers without normalisation for classes and boxes, shared by all levels (as torchvision's heads)."""

    def __init__(self, spec: DetectionTask, dim: int, patch_size: int) -> None:
        super().__init__()
        assert isinstance(spec.head, RetinaNetSpec)
        self.spec = spec.head
        self.classes = spec.num_classes
        self.pyramid = SimpleFeaturePyramid(dim, patch_size, spec.head.strides, spec.head.channels)
        self.anchors = anchor_generator(spec.head)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        per_cell = len(RATIOS) * len(SCALES)
        channels, convs = spec.head.channels, spec.head.convs
        self.class_tower, self.box_tower = _tower(channels, convs), _tower(channels, convs)
        self.class_logits = class_predictor(channels, per_cell * spec.num_classes)
        self.box_deltas = predictor(channels, per_cell * 4)

    def forward(self, map_BDHW: Tensor) -> Outputs:
        """Per level: `logits` `[B, A * C, h, w]` and `deltas` `[B, A * 4, h, w]`."""
        levels = self.pyramid(map_BDHW)
        return {
            "logits": [self.class_logits(self.class_tower(level)) for level in levels],
            "deltas": [self.box_deltas(self.box_tower(level)) for level in levels],
        }

    def _anchors(self, outputs: Outputs) -> list[Tensor]:
        """`[h * w * A, 4]` of each level, float32; the first sits around pixel (0, 0)."""
        device = outputs["logits"][0].device
        self.anchors.set_cell_anchors(torch.float32, device)
        sizes = [list(logits.shape[2:]) for logits in outputs["logits"]]
        return self.anchors.grid_anchors(sizes, [[stride, stride] for stride in self.spec.strides])

    def losses(self, outputs: Outputs, targets: dict[str, Any]) -> dict[str, LossTerm]:
        """`focal` over all anchors not left out, `l1` over the positives' deltas; both are counted by positives."""
        anchors_M4 = torch.cat(self._anchors(outputs))
        logits_BMC = flatten_levels(outputs["logits"], self.classes)
        deltas_BM4 = flatten_levels(outputs["deltas"], 4)
        focal, l1, count = [], [], []
        for image, (boxes, labels, ignore) in enumerate(
            zip(targets["boxes"], targets["labels"], targets["ignore"], strict=True)
        ):
            matches_M = match(anchors_M4, boxes, ignore)
            positive_M = matches_M >= 0
            # A padding row stands in for "no box", so that masks can do without selections of unknown size.
            index_M = torch.where(positive_M, matches_M, len(boxes))
            labels_M = torch.cat([labels, labels.new_full((1,), -1)])[index_M]
            terms_MC = sigmoid_focal_loss(logits_BMC[image], one_hot(labels_M, self.classes))
            focal.append((terms_MC * (matches_M != Matcher.BETWEEN_THRESHOLDS)[:, None]).sum())
            wanted_M4 = torch.where(positive_M[:, None], torch.cat([boxes, boxes.new_zeros(1, 4)])[index_M], anchors_M4)
            error_M4 = F.l1_loss(deltas_BM4[image], self.coder.encode_single(wanted_M4, anchors_M4), reduction="none")
            l1.append((error_M4 * positive_M[:, None]).sum())
            count.append(positive_M.sum().float())
        total = torch.stack(count).sum()
        return {
            "focal": LossTerm(torch.stack(focal).sum(), total, 1.0),
            "l1": LossTerm(torch.stack(l1).sum(), total, 1.0),
        }

    @torch.no_grad()
    def predict(self, outputs: Outputs, meta: Sequence[dict[str, Any]]) -> list[Prediction]:
        """`boxes`, `scores`, `labels` of each image."""
        anchors = self._anchors(outputs)
        deltas_BM4 = flatten_levels(outputs["deltas"], 4)
        anchors_BM4 = torch.cat(anchors).expand(len(deltas_BM4), -1, -1)
        boxes_BM4 = self.coder.decode_single(deltas_BM4.flatten(0, 1), anchors_BM4.flatten(0, 1)).view_as(deltas_BM4)
        level_sizes = [len(level) for level in anchors]
        return detections(flatten_levels(outputs["logits"], self.classes), boxes_BM4, level_sizes, meta, self.spec)
