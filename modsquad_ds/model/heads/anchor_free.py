"""Detection without anchors: pyramid -> shared tower -> class scores and distances to the four sides, per cell.

After FCOS (arXiv 1904.01355) with the GIoU loss and centre sampling of its second version (arXiv 2006.09214), but
without a centre-ness branch.

Axes: B images, C classes, D width, G boxes of an image (padded), M cells of all levels, H W rows and columns.
Boxes are x1, y1, x2, y2 in pixels of the canvas; `ltrb` are distances to the left, top, right and bottom side.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from modsquad_ds.model.heads.base import Head, LossTerm, Outputs, Prediction
from modsquad_ds.model.heads.detection import (
    Truth,
    class_predictor,
    detections,
    flatten_levels,
    one_hot,
    pad_truth,
    predictor,
)
from modsquad_ds.model.heads.pyramid import SimpleFeaturePyramid, group_norm
from modsquad_ds.tasks import AnchorFreeHead, DetectionTask

CENTRE_RADIUS = 1.5
"""A cell learns a box only if their centres lie less than this many strides apart, in x and in y (arXiv 2006.09214)."""

STRIDES_PER_LEVEL = 8
"""A level learns boxes whose farthest side is at most this many strides away (arXiv 1904.01355: 64 px at stride 8)."""

MAX_EXPONENT = math.log(4096.0)
"""Bound on the exponent of a distance: beyond any canvas, and far from overflow."""


class Cells(NamedTuple):
    """Where the outputs of all levels sit."""

    centres_M2: Tensor
    strides_M: Tensor
    reach_M2: Tensor
    """Least (exclusive) and greatest (inclusive) distance to the farthest side of a box that the cell may learn."""


class Assignment(NamedTuple):
    """What each cell is to learn."""

    positive_BM: Tensor
    box_BM: Tensor
    """Index of the positive cell's box; meaningless elsewhere."""
    counted_BM: Tensor
    """False where a cell is neither an object nor background: in a crowd box and in no real one."""


def cells(sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> Cells:
    """Cells of levels of `sizes` (rows, columns). The first level also learns smaller boxes, the last larger ones."""
    centres, steps, reach = [], [], []
    for level, ((rows, columns), stride) in enumerate(zip(sizes, strides, strict=True)):
        y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        centres.append((torch.stack([x.flatten(), y.flatten()], dim=1) + 0.5) * stride)
        low = 0.0 if level == 0 else float(STRIDES_PER_LEVEL * strides[level - 1])
        high = math.inf if level == len(strides) - 1 else float(STRIDES_PER_LEVEL * stride)
        steps.append(centres[-1].new_full((rows * columns,), stride))
        reach.append(torch.stack([torch.full_like(steps[-1], low), torch.full_like(steps[-1], high)], dim=1))
    return Cells(torch.cat(centres), torch.cat(steps), torch.cat(reach))


def distances(points: Tensor, boxes: Tensor) -> Tensor:
    """ltrb from points `[..., 2]` to boxes `[..., 4]` (broadcast); all positive exactly where a point lies inside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def assign(places: Cells, truth: Truth) -> Assignment:
    """Each cell's box: the smallest of those it lies in, near whose centre it is and whose size its level learns."""
    boxes_BG4 = truth.boxes_BG4
    centres_M12 = places.centres_M2[:, None]
    ltrb_BMG4 = distances(centres_M12, boxes_BG4[:, None])
    inside_BMG = ltrb_BMG4.amin(dim=-1) > 0
    farthest_BMG = ltrb_BMG4.amax(dim=-1)
    in_reach_BMG = (farthest_BMG > places.reach_M2[:, :1]) & (farthest_BMG <= places.reach_M2[:, 1:])
    # From a box's centre a point is half the difference between its distances to opposite sides.
    offset_BMG = (ltrb_BMG4[..., :2] - ltrb_BMG4[..., 2:]).abs().amax(dim=-1) / 2
    central_BMG = offset_BMG < CENTRE_RADIUS * places.strides_M[:, None]
    area_BG = (boxes_BG4[..., 2:] - boxes_BG4[..., :2]).prod(dim=-1)
    candidate_BMG = inside_BMG & in_reach_BMG & central_BMG
    smallest = torch.where(candidate_BMG, area_BG[:, None], math.inf).min(dim=-1)
    in_crowd_BM = (distances(centres_M12, truth.ignore_BG4[:, None]).amin(dim=-1) > 0).any(dim=-1)
    return Assignment(smallest.values < math.inf, smallest.indices, ~in_crowd_BM | inside_BMG.any(dim=-1))


def around_origin(ltrb: Tensor) -> Tensor:
    """The box `[..., 4]` that lies at distances `ltrb` around the point (0, 0)."""
    return torch.cat([-ltrb[..., :2], ltrb[..., 2:]], dim=-1)


class AnchorFree(Head):
    """One tower of 3x3 convolutions for all levels and both outputs; focal loss on classes, GIoU loss on boxes."""

    def __init__(self, spec: DetectionTask, dim: int, patch_size: int) -> None:
        super().__init__()
        assert isinstance(spec.head, AnchorFreeHead)
        self.spec = spec.head
        self.classes = spec.num_classes
        channels = spec.head.channels
        self.pyramid = SimpleFeaturePyramid(dim, patch_size, spec.head.strides, channels)
        self.tower = nn.Sequential()
        for _ in range(spec.head.convs):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.tower.extend([conv, group_norm(channels), nn.ReLU()])
        self.class_logits = class_predictor(channels, spec.num_classes)
        self.box_exponents = predictor(channels, 4)
        self.level_scales = nn.Parameter(torch.ones(len(spec.head.strides)))

    def forward(self, map_BDHW: Tensor) -> Outputs:
        """Per level: `logits` `[B, C, h, w]` and `exponents` `[B, 4, h, w]`, whose exp() are ltrb in strides."""
        features = [self.tower(level) for level in self.pyramid(map_BDHW)]
        exponents = [self.box_exponents(f) * scale for f, scale in zip(features, self.level_scales, strict=True)]
        return {"logits": [self.class_logits(f) for f in features], "exponents": exponents}

    def _decode(self, outputs: Outputs) -> tuple[Cells, Tensor]:
        """All cells and their ltrb `[B, M, 4]` in pixels, float32."""
        sizes = [(logits.shape[2], logits.shape[3]) for logits in outputs["logits"]]
        places = cells(sizes, self.spec.strides, outputs["logits"][0].device)
        exponents_BM4 = flatten_levels(outputs["exponents"], 4).clamp(max=MAX_EXPONENT)
        return places, exponents_BM4.exp() * places.strides_M[:, None]

    def losses(self, outputs: Outputs, targets: dict[str, Any]) -> dict[str, LossTerm]:
        """`focal` over the counted cells and `giou` over the positive ones; both are counted by positive cells."""
        places, ltrb_BM4 = self._decode(outputs)
        truth = pad_truth(targets, ltrb_BM4.device)
        found = assign(places, truth)
        labels_BM = torch.where(found.positive_BM, truth.labels_BG.gather(1, found.box_BM), -1)
        logits_BMC = flatten_levels(outputs["logits"], self.classes)
        focal_BMC = sigmoid_focal_loss(logits_BMC, one_hot(labels_BM, self.classes))
        focal = (focal_BMC * found.counted_BM[..., None]).sum()
        boxes_BM4 = truth.boxes_BG4.gather(1, found.box_BM[..., None].expand(-1, -1, 4))
        # Masks instead of selections keep the host from waiting; a cell without a box gets a harmless one, weighted 0.
        wanted_BM4 = torch.where(found.positive_BM[..., None], distances(places.centres_M2, boxes_BM4), 1.0)
        giou_BM = generalized_box_iou_loss(around_origin(ltrb_BM4), around_origin(wanted_BM4))
        count = found.positive_BM.sum().float()
        return {
            "focal": LossTerm(focal, count, 1.0),
            "giou": LossTerm((giou_BM * found.positive_BM).sum(), count, self.spec.box_weight),
        }

    @torch.no_grad()
    def predict(self, outputs: Outputs, meta: Sequence[dict[str, Any]]) -> list[Prediction]:
        """`boxes`, `scores`, `labels` of each image."""
        places, ltrb_BM4 = self._decode(outputs)
        boxes_BM4 = around_origin(ltrb_BM4) + places.centres_M2.repeat(1, 2)
        level_sizes = [logits.shape[2] * logits.shape[3] for logits in outputs["logits"]]
        return detections(flatten_levels(outputs["logits"], self.classes), boxes_BM4, level_sizes, meta, self.spec)
