"""What every held-out metric is: predictions and labels of one task -> numbers. The end of the data's way at evaluation.

Every rank fills its own accumulator; the `state`s of all ranks are gathered and merged, and `compute` sees the whole
evaluation. Results do not depend on how the images were spread over ranks: counts are integers, sums over images are rounded
once (`math.fsum`), and detections are put in the order of their images' keys before anything is summed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from modsquad_ds.targets import Target

State = dict[str, Any]
"""What one rank has accumulated; JSON-able."""


class Evaluated(Protocol):
    """What a metric reads of a `SubBatch`."""

    @property
    def targets(self) -> dict[str, Any]: ...
    @property
    def keys(self) -> tuple[str, ...]: ...
    @property
    def meta(self) -> tuple[dict[str, Any], ...]: ...


class Metric(ABC):
    """Accumulates one task's evaluation. `merge` replaces its own state, so gather first, its own state included."""

    @abstractmethod
    def add(self, prediction: Mapping[str, Any], sub_batch: Evaluated, index: int) -> None:
        """Count in a prediction (`Head.predict`) of image `index` of a batch."""

    def update(self, predictions: Sequence[Mapping[str, Any]], sub_batch: Evaluated) -> None:
        """Count in the predictions of a batch, without the images that only fill it up."""
        for index, prediction in enumerate(predictions):
            if sub_batch.meta[index]["valid"]:
                self.add(prediction, sub_batch, index)

    @abstractmethod
    def state(self) -> State:
        """What has been counted so far."""

    @abstractmethod
    def merge(self, states: Sequence[State]) -> None:
        """Take on the sum of the states of all ranks."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Metric -> value, for the metrics of the task. NaN where the data hold nothing to measure.

        A file of JSON has no NaN: writers put null.
        """


class MapMetric(Metric):
    """Part of the metrics of an image set's task."""

    def __init__(self, row: Target) -> None:
        self.row = row

    def add(self, prediction: Mapping[str, Any], sub_batch: Evaluated, index: int) -> None:
        """Count in an image, whose label is in its `meta`."""
        meta = sub_batch.meta[index]
        self.add_image(prediction, meta["label"], meta)

    @abstractmethod
    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Count in a prediction and its label of the same size."""


class CountMetric(MapMetric):
    """One whose whole state is a table of whole numbers, `counts`, int64 of the class's `shape`."""

    shape: tuple[int, ...]

    def __init__(self, row: Target) -> None:
        super().__init__(row)
        self.counts = torch.zeros(self.shape, dtype=torch.int64)

    def state(self) -> State:
        """The counts."""
        return {"counts": self.counts.tolist()}

    def merge(self, states: Sequence[State]) -> None:
        """Sums of the counts."""
        self.counts = torch.tensor([s["counts"] for s in states], dtype=torch.int64).sum(dim=0)


class MeanMetric(MapMetric):
    """One that divides sums over all pixels of all images by their number: `names` are the sums."""

    names: tuple[str, ...]

    def __init__(self, row: Target) -> None:
        super().__init__(row)
        self.pixels = 0
        self.sums: dict[str, list[float]] = {name: [] for name in self.names}

    def count(self, **per_pixel: Tensor) -> None:
        """Count in an image: for each of `names` a float64 tensor `[pixels]`."""
        for name in self.names:
            self.sums[name].append(per_pixel[name].sum().item())
        self.pixels += per_pixel[self.names[0]].numel()

    def mean(self, name: str) -> float:
        """Mean over the pixels; NaN without any."""
        return math.fsum(self.sums[name]) / self.pixels if self.pixels else math.nan

    def state(self) -> State:
        """Number of pixels, and each image's sums."""
        return {"pixels": self.pixels, **self.sums}

    def merge(self, states: Sequence[State]) -> None:
        """All images of all ranks."""
        self.pixels = sum(s["pixels"] for s in states)
        self.sums = {name: [value for s in states for value in s[name]] for name in self.names}
