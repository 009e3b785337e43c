"""Metrics of saliency: a probability per pixel against a mask. Two figures of the field that must not be compared."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modsquad_ds.metrics.base import CountMetric, MapMetric, State
from modsquad_ds.targets import Target

# float32 as probabilities are, so that a probability of 0.7 is not below the threshold 0.7.
IOU_THRESHOLDS = torch.linspace(0.2, 0.9, 15, dtype=torch.float64).float()
F_THRESHOLDS = torch.arange(1, 20, dtype=torch.float64).mul(0.05).float()
BETA_SQUARED = 0.3


def flat(prediction: Mapping[str, Any], label: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Probabilities float32 and truth bool, both `[pixels]`, of the valid pixels.

    Prediction: `probability` `[h, w]`. Label: `values` `[h, w]` of 0 and 1, `valid` bool `[h, w]`.
    """
    valid = label["valid"]
    return prediction["probability"][valid].float(), label["values"][valid] > 0.5


class SaliencyIoU(MapMetric):
    """`mIoU`: the best over 15 thresholds of the mean over images of one image's intersection over union.

    As ASTMT, the survey (arXiv 2004.13379) and M3ViT have it: above a threshold of 0.2, 0.25, ... 0.9 is predicted; an image
    without a salient pixel, predicted or true, has 1. Probabilities are not rounded to 8 bits first.
    """

    def __init__(self, row: Target) -> None:
        super().__init__(row)
        self.images: list[list[float]] = []

    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Count in one image; one without a valid pixel says nothing."""
        probability, truth = flat(prediction, label)
        if not len(truth):
            return
        said = [probability > threshold for threshold in IOU_THRESHOLDS]
        pairs = [(int((one & truth).sum()), int((one | truth).sum())) for one in said]
        self.images.append([both / either if either else 1.0 for both, either in pairs])

    def state(self) -> State:
        """Every image's figure at every threshold."""
        return {"images": self.images}

    def merge(self, states: Sequence[State]) -> None:
        """All images of all ranks."""
        self.images = [image for s in states for image in s["images"]]

    def compute(self) -> dict[str, float]:
        """The best threshold's mean."""
        if not self.images:
            return {"mIoU": math.nan}
        return {"mIoU": max(math.fsum(column) / len(column) for column in zip(*self.images, strict=True))}


class SaliencyF(CountMetric):
    """`maxF`: F-measure with beta^2 = 0.3 of pixels pooled over all images, at the best of the thresholds 0.05, 0.1, ... 0.95.

    As ATRC (arXiv 2104.13874) has it: at or above a threshold is predicted. NaN where no pixel is salient.
    """

    shape = (3, len(F_THRESHOLDS))

    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Count in one image."""
        probability, truth = flat(prediction, label)
        said = [probability >= threshold for threshold in F_THRESHOLDS]
        rows = [[int((one & truth).sum()), int(one.sum()), int(truth.sum())] for one in said]
        self.counts += torch.tensor(rows).T

    def compute(self) -> dict[str, float]:
        """(1 + b) P R / (b P + R) with P = right / predicted and R = right / true, written without the quotients."""
        right, predicted, true = self.counts.double()
        if not true[0]:
            return {"maxF": math.nan}
        return {"maxF": ((1 + BETA_SQUARED) * right / (predicted + BETA_SQUARED * true)).max().item()}
