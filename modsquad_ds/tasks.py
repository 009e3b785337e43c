"""What a task is: one row per kind of task, and one typed section per task in the recipe. First stop of every recipe.

A kind fixes the label field that a shard must hold, the metrics that are reported and which of them is the headline. A task
is an instance of a kind with its own data, head, augmentation and weight. Adding a task to a recipe is one entry under
`tasks:`; adding a kind is one `Kind` row here, one head in `model/heads`, one transform in `data/transforms.py` and one
metric in `metrics/`.

Tasks whose labels lie on the same images share an image set (`sets:` of the recipe), which says where the images are, how many
a step has and how they are transformed; what each of these tasks is, `targets.py` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from modsquad_ds.location import DataPlace
from modsquad_ds.targets import LOSSES, METRICS, TARGETS, Loss, Target, TargetKind


@dataclass(frozen=True)
class Kind:
    """One row of the table of kinds."""

    name: str
    label_field: str
    """Name of the label's member in a shard, after the sample's key: `cls`, `json` or `seg.png`."""
    metrics: tuple[str, ...]
    """Keys of the held-out metrics, each in [0, 1]; the first is the headline."""


CLASSIFICATION, DETECTION, SEGMENTATION = "classification", "detection", "segmentation"

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(CLASSIFICATION, "cls", ("top1", "top5")),
        Kind(DETECTION, "json", ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")),
        Kind(SEGMENTATION, "seg.png", ("mIoU", "mAcc", "aAcc")),
    )
}

MULTILABEL = "multilabel"
"""Kind of the shards of an image set: every image with all its labels."""
SHARD_KINDS, TASK_KINDS = (*KINDS, MULTILABEL), (*KINDS, *LOSSES)

IGNORE_INDEX = 255
"""Segmentation label of the pixels that count neither in the loss nor in the metrics."""


class Strict(BaseModel):
    """Base of every recipe section: typed, unchangeable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, protected_namespaces=())


Size = tuple[int, int]
"""Height and width in pixels."""


# ---------------------------------------------------------------- transforms


class ClassificationTransform(Strict):
    """RandomResizedCrop, flip, RandAugment, RandomErasing per image; Mixup or CutMix per pair of neighbours in the batch."""

    image_size: int = 224
    """Side of the square that the model sees, in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's area as a share of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(0.5, ge=0, le=1)
    rand_augment_ops: int = Field(0, ge=0)
    """Operations of RandAugment per image; 0 turns it off."""
    rand_augment_magnitude: int = Field(9, ge=0, le=30)
    erasing: float = Field(0.0, ge=0, le=1)
    mixup: float = Field(0.0, ge=0)
    """Alpha of Mixup's beta distribution; 0 turns it off. With `cutmix` also on, each pair draws one of the two evenly."""
    cutmix: float = Field(0.0, ge=0)
    eval_resize: int | None = None
    """Short side before the centre crop at evaluation; default image_size * 256 / 224."""

    @property
    def train_sizes(self) -> tuple[Size, ...]:
        """Sizes of training images; a step has one of them, each equally often."""
        return ((self.image_size, self.image_size),)


class DetectionTransform(Strict):
    """Random resize onto a canvas that is the same for every image of the step, flip, boxes clipped, empty ones dropped."""

    canvases: tuple[Size, ...] = ((640, 640),)
    """Training canvases (height, width), multiples of the patch size. Each step draws one for all its images, on all ranks."""
    scale: tuple[float, float] = (0.6, 1.0)
    """Range of the image's scale relative to the largest that fits the canvas."""
    flip: float = Field(0.5, ge=0, le=1)
    eval_canvas: Size = (800, 1344)
    """At evaluation the image is resized to fit this canvas (the short side first, turned for upright images), ratio kept, and
    padded to it."""

    @property
    def train_sizes(self) -> tuple[Size, ...]:
        """Sizes of training images; a step has one of them, each equally often."""
        return self.canvases


class SegmentationTransform(Strict):
    """Resize by a random ratio, crop, flip, photometric distortion; the label's padding is 255 (ignored)."""

    crop: Size = (512, 512)
    resize: Size = (512, 2048)
    """Short and long side that the ratio multiplies: the image is scaled to fit both. Evaluation uses ratio 1."""
    ratio: tuple[float, float] = (0.5, 2.0)
    flip: float = Field(0.5, ge=0, le=1)
    photometric: bool = True
    max_class_share: float = Field(0.75, gt=0, le=1)
    """A crop in which one class covers more than this is drawn again, up to ten times."""

    @property
    def train_sizes(self) -> tuple[Size, ...]:
        """Sizes of training images; a step has one of them, each equally often."""
        return (self.crop,)


class SetTransform(Strict):
    """Zoom, rotation, crop, flip of an image and all its labels together; beyond the image's edge labels do not count."""

    crop: Size = (224, 224)
    """What the model sees: a random window in training, the middle at evaluation, filled up where the image is smaller."""
    resize: Size | None = None
    """Size of the whole image before all else, whatever its ratio; None: its own size."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the factor that `resize`, or the image's own size, is multiplied by in training."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Largest angle in degrees, either way."""
    flip: float = Field(0.5, ge=0, le=1)
    photometric: bool = False
    depth_by_zoom: bool = False
    """Divide depths by the zoom: a larger picture of a thing is one from nearer by. Some benchmarks' loaders do so."""
    score_at: Literal["input", "original"] = "input"
    """Resolution of the evaluation: of `crop`, or of the stored labels, to which predictions are then resized."""

    @property
    def train_sizes(self) -> tuple[Size, ...]:
        """Sizes of training images; a step has one of them, each equally often."""
        return (self.crop,)


# ---------------------------------------------------------------- heads


class LinearHead(Strict):
    """Mean of the patch tokens, then one linear layer."""

    type: Literal["linear"] = "linear"
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class AnchorFreeHead(Strict):
    """FCOS-style detector: focal loss on classes, GIoU on boxes, on a simple feature pyramid."""

    type: Literal["anchor_free"] = "anchor_free"
    strides: tuple[int, ...] = (8, 16, 32)
    """Pixels per feature cell of each pyramid level; each a power of two times or part of the patch size."""
    channels: int = 256
    convs: int = 4
    box_weight: float = 1.0
    score_threshold: float = 0.05
    nms_threshold: float = 0.6
    max_detections: int = 100


class RetinaNetHead(Strict):
    """RetinaNet (torchvision's anchors, matcher, coder and losses) on a simple feature pyramid."""

    type: Literal["retinanet"] = "retinanet"
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    channels: int = 256
    convs: int = 4
    anchor_scale: float = 4.0
    """Side of the smallest anchor in cells; three scales per octave, ratios 1/2, 1, 2."""
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100


class UPerNetHead(Strict):
    """mmsegmentation's UPerHead on a simple feature pyramid, with an auxiliary FCNHead."""

    type: Literal["upernet"] = "upernet"
    strides: tuple[int, ...] = (4, 8, 16, 32)
    channels: int = 512
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    norm: Literal["group", "batch", "sync_batch"] = "group"
    aux_weight: float = 0.4
    aux_channels: int = 256


class FCNSegHead(Strict):
    """mmsegmentation's FCNHead on one level of a simple feature pyramid, with an auxiliary FCNHead."""

    type: Literal["fcn"] = "fcn"
    stride: int = 8
    channels: int = 256
    convs: int = 2
    dropout: float = 0.1
    norm: Literal["group", "batch", "sync_batch"] = "group"
    aux_weight: float = 0.4
    aux_channels: int = 256


class PooledHead(Strict):
    """Mean of the patch tokens, two layer norms, one linear layer (Mod-Squad's head of image-level tasks)."""

    type: Literal["pooled"] = "pooled"


class PatchHead(Strict):
    """Layer norm, then one linear layer per token whose outputs are the pixels of its patch (Mod-Squad's head of maps)."""

    type: Literal["patch"] = "patch"
    stride: int | None = Field(None, gt=0)
    """Pixels per cell of the output; default 1, for `segments` 8."""


class ConvMapHead(Strict):
    """A light convolutional head: a simple feature pyramid's level, 3 x 3 convolutions with group norm, bilinear upsampling."""

    type: Literal["conv_map"] = "conv_map"
    stride: int = Field(4, gt=0)
    channels: int = Field(64, gt=0)
    convs: int = Field(2, gt=0)


# ---------------------------------------------------------------- tasks


class _Images(Strict):
    """Where images come from, and how many a step has."""

    data: DataPlace
    """Folder or URL with the shard folders of the splits (`train/`, `val/`), as `modsquad-ds shards` writes them."""
    batch_size: int | None = Field(None, gt=0)
    """Images per optimizer step over all ranks. Exactly one of this and `batch_size_per_rank`."""
    batch_size_per_rank: int | None = Field(None, gt=0)
    """Images per rank and micro-batch."""
    sampling_weight: float = Field(1.0, gt=0)
    """Relative frequency of the task's steps with `sampling: weighted`."""

    @model_validator(mode="after")
    def _one_batch_size(self) -> Self:
        if (self.batch_size is None) == (self.batch_size_per_rank is None):
            raise ValueError("give exactly one of batch_size (whole step, all ranks) and batch_size_per_rank")
        return self


class _Task(_Images):
    num_classes: int = Field(gt=0)
    loss_weight: float = Field(1.0, ge=0)

    @property
    def stream(self) -> str | None:
        """The image set that the task shares; None: its images are its own."""
        return None


class ClassificationTask(_Task):
    """Images with one class each."""

    kind: Literal["classification"]
    head: LinearHead = LinearHead()
    transform: ClassificationTransform = ClassificationTransform()


class DetectionTask(_Task):
    """Images with boxes."""

    kind: Literal["detection"]
    head: Annotated[AnchorFreeHead | RetinaNetHead, Field(discriminator="type")] = RetinaNetHead()
    transform: DetectionTransform = DetectionTransform()


class SegmentationTask(_Task):
    """Images with a class per pixel."""

    kind: Literal["segmentation"]
    head: Annotated[UPerNetHead | FCNSegHead, Field(discriminator="type")] = UPerNetHead()
    transform: SegmentationTransform = SegmentationTransform()


class ImageSet(_Images):
    """One entry of a recipe's `sets:` section: images that carry the labels of several tasks."""

    transform: SetTransform = SetTransform()


class SetTask(_Images):
    """One of the tasks of an image set. A recipe states `set`, and what differs from the task's row in `targets.py`."""

    kind: TargetKind
    set: str
    """The image set; data, batch size, transform and sampling weight are its."""
    target: str
    """Row in `targets.py`; default the task's name."""
    transform: SetTransform = SetTransform()
    head: Annotated[PooledHead | PatchHead | ConvMapHead, Field(discriminator="type")]
    """Default `pooled` for soft_classification, else `patch`."""
    loss: Loss
    loss_weight: float = Field(ge=0)

    @model_validator(mode="after")
    def _fits_its_row(self) -> Self:
        if self.kind != self.row.kind:
            raise ValueError(f"kind {self.kind}: target {self.target} is of kind {self.row.kind}")
        if self.loss not in LOSSES[self.kind]:
            raise ValueError(f"loss {self.loss}: kind {self.kind} has {', '.join(LOSSES[self.kind])}")
        if (self.kind == "soft_classification") != isinstance(self.head, PooledHead):
            raise ValueError(f"head.type {self.head.type}: does not fit kind {self.kind}")
        return self

    @property
    def row(self) -> Target:
        """What the task is."""
        return TARGETS[self.target]

    @property
    def num_classes(self) -> int:
        """Numbers that the head gives per pixel or image."""
        return self.row.channels

    @property
    def stream(self) -> str | None:
        """The image set."""
        return self.set


def completed_set_task(name: str, given: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, Any]:
    """A set task's section as it stands in a recipe, with what its image set and its row say. ValueError for unknown ones."""
    target, of_set, own_head = given.get("target", name), given["set"], given.get("head")
    if not isinstance(target, str) or target not in TARGETS:
        raise ValueError(f"tasks.{name}.target: {target!r} has no row in targets.py, which has {', '.join(TARGETS)}")
    if not isinstance(of_set, str) or of_set not in sets:
        raise ValueError(f"tasks.{name}.set: {of_set!r} is not under sets: {', '.join(map(str, sets)) or 'which is empty'}")
    images = sets[of_set]
    if not isinstance(images, Mapping):
        raise ValueError(f"sets.{of_set}: expected keys and values, found {images!r}")
    own = [key for key in _OF_SET if key in given and given[key] != images.get(key)]
    if own:
        raise ValueError(f"tasks.{name}.{own[0]}: is the image set's to say: sets.{of_set}.{own[0]}")
    if not isinstance(own_head, Mapping | None):
        raise ValueError(f"tasks.{name}.head: expected keys and values such as type: conv_map, found {own_head!r}")
    row = TARGETS[target]
    head = {"type": "pooled" if row.kind == "soft_classification" else "patch"}
    head |= own_head or {}
    of_row = {"kind": row.kind, "target": target, "loss": row.loss, "loss_weight": row.loss_weight}
    return of_row | {key: images[key] for key in _OF_SET if key in images} | dict(given) | {"head": head}


def set_of(spec: SetTask) -> ImageSet:
    """The image set of a task."""
    return ImageSet(**{key: getattr(spec, key) for key in _OF_SET})


_OF_SET = tuple(ImageSet.model_fields)
TaskSpec = Annotated[ClassificationTask | DetectionTask | SegmentationTask | SetTask, Field(discriminator="kind")]
"""One entry of a recipe's `tasks:` section."""


def metrics_of(spec: TaskSpec) -> tuple[str, ...]:
    """Keys of a task's held-out metrics; the first is the headline."""
    return spec.row.metrics if isinstance(spec, SetTask) else KINDS[spec.kind].metrics


def higher_is_better(spec: TaskSpec, metric: str) -> bool:
    """Whether a larger value of one of the task's metrics is the better one."""
    return not isinstance(spec, SetTask) or METRICS[metric].higher_is_better


def section_of(task: str, spec: TaskSpec) -> str:
    """The recipe's section that says where a task's images are: its own, or that of its image set."""
    return f"tasks.{task}" if spec.stream is None else f"sets.{spec.stream}"


def streams_of(tasks: Mapping[str, TaskSpec]) -> dict[str, tuple[str, ...]]:
    """Image set -> its tasks, in the recipe's order; a task with images of its own is a stream of its own name."""
    streams: dict[str, tuple[str, ...]] = {}
    for name, spec in tasks.items():
        stream = spec.stream or name
        streams[stream] = (*streams.get(stream, ()), name)
    return streams
