"""Held-out metrics: `build_metric(task)` is all that the evaluation needs. The end of the data's way."""

from modsquad_ds.metrics.base import Metric
from modsquad_ds.metrics.build import MAP_METRICS, build_metric
from modsquad_ds.metrics.image import METRICS

__all__ = ["MAP_METRICS", "METRICS", "Metric", "build_metric"]
