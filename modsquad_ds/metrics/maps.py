"""Metrics of class vectors, class maps, real-valued maps and directions of an image set's tasks, as the field defines them.

Definitions: papers and loaders of Taskonomy (arXiv 1804.08328), Mod-Squad (arXiv 2212.08066), ASTMT (arXiv 1904.08918), the
survey of dense multi-task learning (arXiv 2004.13379) and ATRC (arXiv 2104.13874).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modsquad_ds.metrics.base import CountMetric, MapMetric, MeanMetric, State
from modsquad_ds.metrics.image import areas
from modsquad_ds.targets import DEPTH_HOLE, Scale, Target


class TopAgreement(CountMetric):
    """`top1`: images whose likeliest class is the likeliest of the label, which is another network's answer, not the truth.

    So it measures agreement with the teacher, as Mod-Squad's figure does. Of equal scores the lower class counts.
    """

    shape = (2,)

    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Prediction: `probabilities` `[C]`. Label: `probabilities` `[C]`, `valid`."""
        if label["valid"]:
            same = _likeliest(prediction["probabilities"]) == _likeliest(label["probabilities"])
            self.counts += torch.tensor([1, int(same)])

    def compute(self) -> dict[str, float]:
        """Share of the images."""
        images, same = self.counts.tolist()
        return {"top1": same / images if images else math.nan}


def _likeliest(scores_C: Tensor) -> int:
    return int(scores_C.argsort(descending=True, stable=True)[0])


class ClassMaps(MapMetric):
    """`mIoU`: intersection over union per class, pixels pooled over the images, mean over all classes of the row.

    As the PASCAL-Context benchmarks have it: a class that neither labels nor predictions hold counts as 0, where
    `image.Segmentation`, as mmsegmentation does, leaves it out. The two differ on small sets only.
    """

    def __init__(self, row: Target) -> None:
        super().__init__(row)
        self.areas = torch.zeros(4, row.channels, dtype=torch.int64)

    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Prediction: `mask` uint8 `[h, w]`. Label: `labels` int64 `[h, w]`, 255 = ignored."""
        self.areas += areas(prediction["mask"], label["labels"].to(torch.uint8), self.row.channels)

    def state(self) -> State:
        """Pixels per class."""
        return {"areas": self.areas.tolist()}

    def merge(self, states: Sequence[State]) -> None:
        """Sums of the pixels."""
        self.areas = torch.tensor([s["areas"] for s in states], dtype=torch.int64).sum(dim=0)

    def compute(self) -> dict[str, float]:
        """Mean over all classes."""
        right_C, either_C = self.areas[0].double(), self.areas[1].double()
        if not either_C.sum():
            return {"mIoU": math.nan}
        return {"mIoU": (right_C / either_C.clamp(min=1)).mean().item()}


class Directions(MeanMetric):
    """`mErr`: mean angle in degrees between predicted and true direction over the valid pixels of all images.

    2 atan2(|p - g|, |p + g|) of the unit vectors, which loses no digits near 0 and 180 degrees as acos does (ATRC). Nothing is
    rounded to 8 bits first, as in the benchmarks that read predictions from pictures. A vector of length 0 is 90 degrees off.
    """

    names = ("angle",)

    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Prediction: `values` `[3, h, w]`. Label: `values` `[3, h, w]`, `valid` bool `[h, w]`."""
        p, g = (F.normalize(side["values"][:, label["valid"]].double(), dim=0) for side in (prediction, label))
        self.count(angle=torch.rad2deg(2 * torch.atan2((p - g).norm(dim=0), (p + g).norm(dim=0))))

    def compute(self) -> dict[str, float]:
        """Degrees."""
        return {"mErr": self.mean("angle")}


class ScaledMaps(MeanMetric):
    """`L1` and `MSE`: mean absolute and square error of the scaled map (`Target.scale`) over channels and valid pixels."""

    names = ("L1", "MSE")

    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Prediction: `values` `[C, h, w]`. Label: `values` `[C, h, w]`, `valid` bool `[h, w]`."""
        p, g = (side["values"][:, label["valid"]].double().flatten() for side in (prediction, label))
        self.count(L1=(p - g).abs(), MSE=(p - g).square())

    def compute(self) -> dict[str, float]:
        """Both, in scaled units."""
        return {name: self.mean(name) for name in self.names}


class Depth(MeanMetric):
    """`rmse` in metres and `delta1`, the share of pixels off by a factor below 1.25, over the valid pixels of all images.

    Pixels are pooled, so an image with many holes counts less; not the mean over images that ASTMT reports. Predictions and
    labels are those of `metres_of`, so that no ratio is infinite.
    """

    names = ("square", "within")

    def __init__(self, row: Target) -> None:
        super().__init__(row)
        if row.scale is None or row.metres is None:
            raise ValueError(f"target {row.name}: rmse and delta1 are for depths, which have a scale and metres")

    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Prediction: `values` `[1, h, w]`. Label: `values` `[1, h, w]`, `valid` bool `[h, w]`; scaled units."""
        p, g = (metres_of(side["values"][:, label["valid"]].double(), self.row)[0] for side in (prediction, label))
        within = torch.maximum(p / g, g / p) < 1.25
        self.count(square=(p - g).square(), within=within.double())

    def compute(self) -> dict[str, float]:
        """Metres and share."""
        return {"rmse": math.sqrt(self.mean("square")), "delta1": self.mean("within")}


def metres_of(values: Tensor, row: Target) -> Tensor:
    """Scaled depths `[1, ...]` -> metres: at least 1 raw step and at most the last before the mark of a hole.

    Which is what a label can say; of Taskonomy 2 mm and 128 m.
    """
    assert row.scale is not None and row.metres is not None
    return raw_of(values, row.scale).clamp(1, DEPTH_HOLE - 1) * row.metres


def raw_of(values: Tensor, scale: Scale) -> Tensor:
    """Scaled numbers `[C, ...]` -> raw ones, the inverse of `Scale` between `low` and `high` and beyond."""
    ends = torch.tensor([scale.low, scale.high], dtype=values.dtype, device=values.device)
    low, high = (ends.log1p() if scale.log else ends).reshape(2, -1, *[1] * (values.dim() - 1))
    line = low + (values - scale.to[0]) / (scale.to[1] - scale.to[0]) * (high - low)
    return line.expm1() if scale.log else line
