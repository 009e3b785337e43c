"""What an image can be labelled with: one row per target of the datasets whose images carry many labels. Read by all stops.

A row says how a target lies in a shard, what kind of task predicts it, how its numbers become what a head regresses, and
which loss and metrics it has in the field. Adding a task is one row here and one line under a recipe's `tasks:`.

Sources: Taskonomy's data/README.md and training code (arXiv 1804.08328), Mod-Squad's (arXiv 2212.08066); for PASCAL-Context
the loaders and losses that M3ViT (arXiv 2210.14793) and the field share (arXiv 2004.13379).
"""

from dataclasses import dataclass
from typing import Literal

MaskKind = Literal["semantic", "regression", "unit_vectors", "binary", "segments"]
TargetKind = Literal["soft_classification", "semantic", "regression", "unit_vectors", "binary", "segments"]
"""What a task does with its target.

soft_classification: a vector of class scores for the whole image. semantic: a class per pixel. regression: real numbers per
pixel. unit_vectors: a direction per pixel, camera frame. binary: yes or no per pixel, answered with a probability. segments:
which pixels belong together; the ids themselves mean nothing.
"""
Stored = Literal["npy", "grey8", "grey16", "rgb8", "grey8_or_rgb8"]
"""`npy`: one float32 vector. Others: a PNG of that many channels and bits; of `grey8_or_rgb8` grey counts as three equal ones."""
Loss = Literal["mse", "l1", "cross_entropy", "cosine", "balanced", "pairs"]

LOSSES: dict[TargetKind, tuple[Loss, ...]] = {
    "soft_classification": ("mse", "cross_entropy"),
    "semantic": ("cross_entropy",),
    "regression": ("l1", "mse"),
    "unit_vectors": ("cosine", "l1"),
    "binary": ("balanced",),
    "segments": ("pairs",),
}
"""The losses that a kind can have (`model/heads/map_losses.py`)."""

IGNORE_CLASS = 255
"""Value of a `semantic` target's pixels that belong to no class."""
DEPTH_HOLE = 65535
"""Raw depth of a pixel where the mesh has none."""
DEPTH_UNIT = 1 / 512
"""Metres per raw step of Taskonomy's depth."""
VALID_FIELD = "valid.png"
"""Member of a shard's sample: grey8, 255 where `masked` targets mean something, else 0. Absent: everywhere."""


@dataclass(frozen=True)
class Scale:
    """Raw numbers -> what a head regresses: `low` becomes `to[0]`, `high` becomes `to[1]`, linear in between and beyond."""

    low: tuple[float, ...]
    """Per channel, or one for all."""
    high: tuple[float, ...]
    to: tuple[float, float] = (-1.0, 1.0)
    log: bool = False
    """Linear in log(1 + raw) instead."""
    clip: bool = False
    """Raw numbers beyond `low` and `high` count as these."""
    blur: float = 0.0
    """Standard deviation of the Gaussian that a map is smoothed with first, as a share of the map's shorter side."""


@dataclass(frozen=True)
class Target:
    """One row of the table."""

    name: str
    kind: TargetKind
    channels: int
    """Numbers that a head gives per pixel, or per image: classes, components, dimensions of an embedding."""
    stored: Stored
    loss: Loss
    metrics: tuple[str, ...]
    """Keys of `METRICS`; the first is the headline, which delta-m compares."""
    masked: bool = False
    """Whether only the pixels of `VALID_FIELD` mean something."""
    scale: Scale | None = None
    """For regression; None: raw numbers divided by the largest that the storage holds."""
    loss_weight: float = 1.0
    positive_weight: float | None = None
    """`balanced` loss: weight of the positive pixels, 1 minus it of the others. None: the share of negative ones in the step."""
    metres: float | None = None
    """Metres per raw step: a depth, scored in metres. None: no depth."""
    classes: tuple[str, ...] = ()
    """Names, where there are any."""
    maxdist: float = 0.0075
    """`odsF`: largest distance of matched boundary pixels, as a share of the image's diagonal."""

    @property
    def field(self) -> str:
        """Name of its member in a shard's sample."""
        return f"{self.name}.npy" if self.stored == "npy" else f"{self.name}.png"


@dataclass(frozen=True)
class MetricRow:
    """What a metric's numbers mean."""

    unit: str
    """Empty: a share in [0, 1] or a number without unit."""
    higher_is_better: bool
    meaning: str


METRICS: dict[str, MetricRow] = {
    "top1": MetricRow("", True, "share of the images whose likeliest class is the label's likeliest"),
    "mIoU": MetricRow("", True, "mean intersection over union; saliency: the best of the thresholds' means over images"),
    "maxF": MetricRow("", True, "F-measure, beta^2 = 0.3, of pixels pooled over the images, at the best threshold"),
    "odsF": MetricRow("", True, "F-measure of matched boundary pixels at the best threshold of the dataset"),
    "mErr": MetricRow("degrees", False, "mean angle between predicted and true direction over the valid pixels"),
    "rmse": MetricRow("m", False, "root mean square error of depth over the valid pixels of all images"),
    "delta1": MetricRow("", True, "share of valid pixels whose depth is off by less than a factor of 1.25"),
    "L1": MetricRow("", False, "mean absolute error of the scaled map over the valid pixels"),
    "MSE": MetricRow("", False, "mean square error of the scaled map over the valid pixels"),
    "pair_acc": MetricRow("", True, "share of pixel pairs rightly called one segment or two, the mean of both kinds"),
}


# ---------------------------------------------------------------- Taskonomy

_DEPTH = Scale((0.0,), (65535.0,), to=(0.0, 1.0), log=True)
# Mean and standard deviation of the two principal curvatures, raw: they become 0 and 1.
_CURVATURE = Scale((123.572 - 31.922, 120.1 - 21.658), (123.572 + 31.922, 120.1 + 21.658))


def _full(high: float, clip: bool = False, blur: float = 0.0) -> Scale:
    return Scale((0.0,), (high,), clip=clip, blur=blur)


def _map(name: str, channels: int, stored: Stored, scale: Scale, masked: bool, loss: Loss = "l1") -> Target:
    metrics = ("MSE", "L1") if loss == "mse" else ("L1",)
    return Target(name, "regression", channels, stored, loss, metrics, masked, scale)


TASKONOMY: tuple[Target, ...] = (
    Target("class_object", "soft_classification", 1000, "npy", "mse", ("top1",)),
    Target("class_scene", "soft_classification", 365, "npy", "mse", ("top1",)),
    Target("depth_euclidean", "regression", 1, "grey16", "l1", ("rmse", "delta1"), True, _DEPTH, metres=DEPTH_UNIT),
    Target("depth_zbuffer", "regression", 1, "grey16", "l1", ("rmse", "delta1"), True, _DEPTH, metres=DEPTH_UNIT),
    # Taskonomy's code and Mod-Squad's blur by 4 pixels, after resizing to 256 x 256.
    _map("edge_occlusion", 1, "grey16", _full(0.00625 * 65535, blur=4 / 256), masked=True),
    _map("edge_texture", 1, "grey16", _full(0.08 * 65535, clip=True), masked=False),
    _map("keypoints2d", 1, "grey16", _full(0.005 * 65535, clip=True), masked=False),
    _map("keypoints3d", 1, "grey16", _full(65535.0), masked=True),
    Target("normal", "unit_vectors", 3, "rgb8", "cosine", ("mErr",), True),
    _map("principal_curvature", 2, "rgb8", _CURVATURE, masked=True, loss="mse"),
    _map("reshading", 3, "grey8_or_rgb8", _full(255.0), masked=True),
    Target("segment_unsup2d", "segments", 64, "grey8", "pairs", ("pair_acc",)),
    Target("segment_unsup25d", "segments", 64, "grey8", "pairs", ("pair_acc",), True),
)
"""The 13 tasks of Mod-Squad's Taskonomy."""

ROOM_CLASSES = (
    "background", "bottle", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase",
)  # fmt: skip
TASKONOMY_MORE: tuple[Target, ...] = (
    Target("segment_semantic", "semantic", 17, "grey8", "cross_entropy", ("mIoU",), classes=ROOM_CLASSES),
)
"""What Taskonomy has besides, for those who ask for it by name."""


# ---------------------------------------------------------------- PASCAL-Context

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PART_CLASSES = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")

PASCAL_CONTEXT: tuple[Target, ...] = (
    Target("semseg", "semantic", 21, "grey8", "cross_entropy", ("mIoU",), classes=VOC_CLASSES),
    Target("human_parts", "semantic", 7, "grey8", "cross_entropy", ("mIoU",), loss_weight=2.0, classes=PART_CLASSES),
    Target("sal", "binary", 1, "grey8", "balanced", ("mIoU", "maxF"), loss_weight=5.0),
    Target("normals", "unit_vectors", 3, "rgb8", "l1", ("mErr",), True, loss_weight=10.0),
    Target("edge", "binary", 1, "grey8", "balanced", ("odsF",), loss_weight=50.0, positive_weight=0.95),
)
"""The 5 tasks of PASCAL-Context, with the loss weights that M3ViT and the field use."""

TARGETS: dict[str, Target] = {row.name: row for row in (*TASKONOMY, *TASKONOMY_MORE, *PASCAL_CONTEXT)}
