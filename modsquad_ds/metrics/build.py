"""Which metric a task has: by its kind, or for an image set's task by the metrics that its row in `targets.py` names."""

from collections.abc import Mapping, Sequence
from typing import Any

from modsquad_ds.metrics.base import Evaluated, MapMetric, Metric, State
from modsquad_ds.metrics.boundaries import Boundaries
from modsquad_ds.metrics.image import METRICS
from modsquad_ds.metrics.maps import ClassMaps, Depth, Directions, ScaledMaps, TopAgreement
from modsquad_ds.metrics.saliency import SaliencyF, SaliencyIoU
from modsquad_ds.metrics.segments import PairAccuracy
from modsquad_ds.targets import Target, TargetKind
from modsquad_ds.tasks import SetTask, TaskSpec

MAP_METRICS: dict[tuple[TargetKind, str], type[MapMetric]] = {
    ("soft_classification", "top1"): TopAgreement,
    ("semantic", "mIoU"): ClassMaps,
    ("regression", "rmse"): Depth,
    ("regression", "delta1"): Depth,
    ("regression", "L1"): ScaledMaps,
    ("regression", "MSE"): ScaledMaps,
    ("unit_vectors", "mErr"): Directions,
    ("binary", "mIoU"): SaliencyIoU,
    ("binary", "maxF"): SaliencyF,
    ("binary", "odsF"): Boundaries,
    ("segments", "pair_acc"): PairAccuracy,
}
"""Kind of target and key of `targets.METRICS` -> what computes it."""


class RowMetrics(Metric):
    """All metrics that a row names, in its order."""

    def __init__(self, row: Target) -> None:
        self.names = row.metrics
        kinds = dict.fromkeys(MAP_METRICS[row.kind, name] for name in row.metrics)
        self.parts = {part.__name__: part(row) for part in kinds}

    def add(self, prediction: Mapping[str, Any], sub_batch: Evaluated, index: int) -> None:
        """Count in an image, in every part."""
        for part in self.parts.values():
            part.add(prediction, sub_batch, index)

    def state(self) -> State:
        """Every part's."""
        return {name: part.state() for name, part in self.parts.items()}

    def merge(self, states: Sequence[State]) -> None:
        """Part by part."""
        for name, part in self.parts.items():
            part.merge([s[name] for s in states])

    def compute(self) -> dict[str, float]:
        """The row's metrics, the headline first."""
        values: dict[str, float] = {}
        for part in self.parts.values():
            values |= part.compute()
        return {name: values[name] for name in self.names}


def build_metric(spec: TaskSpec) -> Metric:
    """The accumulator of a task's held-out metrics (`tasks.metrics_of`), empty."""
    return RowMetrics(spec.row) if isinstance(spec, SetTask) else METRICS[spec.kind](spec.num_classes)
