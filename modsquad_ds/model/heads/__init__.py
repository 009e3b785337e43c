"""Heads by type: what turns a task's feature map into its losses and predictions.

Adding a head is one section in `tasks.py` and one row in `HEADS`.
"""

from collections.abc import Callable

from modsquad_ds.model.heads.anchor_free import AnchorFree
from modsquad_ds.model.heads.base import Head, LossTerm, Outputs, Prediction
from modsquad_ds.model.heads.linear import Linear
from modsquad_ds.model.heads.map_heads import ConvMap, Patch, Pooled
from modsquad_ds.model.heads.retinanet import RetinaNet
from modsquad_ds.model.heads.segmentation import Segmentation, check_norm
from modsquad_ds.tasks import TaskSpec

__all__ = ["HEADS", "Head", "LossTerm", "Outputs", "Prediction", "build_head", "check_norm"]

HEADS: dict[str, Callable[..., Head]] = {
    "linear": Linear,
    "anchor_free": AnchorFree,
    "retinanet": RetinaNet,
    "upernet": Segmentation,
    "fcn": Segmentation,
    "pooled": Pooled,
    "patch": Patch,
    "conv_map": ConvMap,
}
"""`head.type` of the recipe -> class, built as `(task, dim, patch_size)`."""


def build_head(spec: TaskSpec, dim: int, patch_size: int) -> Head:
    """The head of a recipe's task on feature maps `[B, dim, h, w]` whose cells are `patch_size` pixels.

    Raises `UserError` where the head's strides, classes or norm do not fit.
    """
    return HEADS[spec.head.type](spec, dim, patch_size)
