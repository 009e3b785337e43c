"""What the loader has to load, and whether recipe and shards fit: the plan of one rank, made before the first batch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from modsquad_ds.config import CacheSpec
from modsquad_ds.data.collate import Pixels
from modsquad_ds.data.mixing import mixing_of
from modsquad_ds.data.order import Sampling
from modsquad_ds.data.shards import DEFAULT_CACHE, ShardSet
from modsquad_ds.data.transforms import eval_resize
from modsquad_ds.data.types import RawSample
from modsquad_ds.errors import UserError
from modsquad_ds.location import Location
from modsquad_ds.targets import VALID_FIELD
from modsquad_ds.tasks import (
    MULTILABEL,
    ClassificationTransform,
    DetectionTransform,
    SegmentationTransform,
    SetTask,
    SetTransform,
    TaskSpec,
    section_of,
    streams_of,
)

TRAIN, VAL = "train", "val"
"""Names of the splits' folders below a task's `data`."""


class SampleStore(Protocol):
    """Random access to the samples of one split; `ShardSet` is the real one."""

    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def shard_sizes(self) -> Sequence[int]: ...
    @property
    def details(self) -> Mapping[str, Any]:
        """As in the shards' index; of an image set, `targets`: the number of samples that have each target."""
    def fields(self, shard: int, sample: int) -> Collection[str]:
        """Names of a sample's members, without reading them."""
    def read(self, shard: int, sample: int) -> RawSample: ...


OpenStore = Callable[[Location], SampleStore]
"""Shard folder, or URL, -> its samples."""
IN_ORDER = 2
"""Shards that stay open where samples are read one after the other."""


@dataclass(frozen=True)
class LoaderPlan:
    """Everything that decides what is loaded."""

    tasks: dict[str, TaskSpec]
    root: Location
    """Folder or URL that relative `data` paths of the tasks start from."""
    seed: int
    sampling: Sampling
    shuffle_window: int
    """Shards whose samples are shuffled together."""
    patch_size: int
    mean: tuple[float, float, float]
    """RGB, scale 0..255."""
    std: tuple[float, float, float]
    rank: int = 0
    world: int = 1
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    open_store: OpenStore = ShardSet
    cache: CacheSpec = DEFAULT_CACHE
    """How shards that come by URL are kept."""

    @property
    def pixels(self) -> Pixels:
        """The part that the transforms need."""
        return Pixels(self.mean, self.std, self.patch_size)

    @property
    def streams(self) -> dict[str, tuple[str, ...]]:
        """What a step takes images of: image sets, and tasks with images of their own -> the tasks that read them."""
        return streams_of(self.tasks)

    @property
    def sampling_weights(self) -> dict[str, float]:
        """Relative frequency of each stream's steps with `sampling: weighted`."""
        return {stream: self.tasks[tasks[0]].sampling_weight for stream, tasks in self.streams.items()}

    def section(self, task: str) -> str:
        """The recipe's section that says where the task's images are, how many a step has and how they are transformed."""
        return section_of(task, self.tasks[task])

    def classes(self, task: str, split: str) -> list[str]:
        """Names of what the task's head tells apart, one for each of its outputs; numbers where they have none."""
        spec = self.tasks[task]
        if isinstance(spec, SetTask):
            return list(spec.row.classes) or [str(index) for index in range(spec.num_classes)]
        return list(self.store(task, split).classes)

    def folder(self, task: str, split: str) -> Location:
        """Shard folder of a task's split, or its URL."""
        return self.root / self.tasks[task].data / split

    def store(self, task: str, split: str) -> SampleStore:
        """The samples of a task's split; of an image set's labels only the task's own is read."""
        return self._open(task, split, IN_ORDER, (task,))

    def train_store(self, task: str) -> SampleStore:
        """The training samples of a task's stream. Shards of two windows stay open: a batch can lie across their border."""
        return self._open(task, TRAIN, 2 * self.shuffle_window, self.streams[self.tasks[task].stream or task])

    def _open(self, task: str, split: str, open_shards: int, readers: Sequence[str]) -> SampleStore:
        folder = self.folder(task, split)
        if self.open_store is not ShardSet:
            return self.open_store(folder)
        rows = [spec.row for spec in map(self.tasks.__getitem__, readers) if isinstance(spec, SetTask)]
        labels = frozenset({VALID_FIELD, *(row.field for row in rows)}) if rows else None
        return ShardSet(folder, open_shards, self.cache, labels=labels)

    def step_images(self, task: str) -> int:
        """Images of `task` in one of its optimizer steps, over all ranks and micro-batches."""
        spec = self.tasks[task]
        if spec.batch_size is not None:
            return spec.batch_size
        assert spec.batch_size_per_rank is not None
        return spec.batch_size_per_rank * self.world * self.accumulation

    def rank_images(self, task: str) -> int:
        """Images of `task` in one micro-batch of one rank. UserError if the step's images cannot be divided evenly."""
        images, parts = self.step_images(task), self.world * self.accumulation
        if images % parts:
            raise UserError(
                f"{self.section(task)}.batch_size: {images} images cannot be divided over {self.world} ranks "
                f"x {self.accumulation} micro-batches: take a multiple of {parts}"
            )
        return images // parts


# ---------------------------------------------------------------- checks before training


def check_data(plan: LoaderPlan, splits: Sequence[str] = (TRAIN, VAL)) -> None:
    """Meet every mismatch of recipe and data that needs no decoding. UserError with field, file and numbers."""
    for name, spec in plan.tasks.items():
        images = plan.rank_images(name)
        if mixing_of(spec) is not None and images % 2:
            raise UserError(
                f"tasks.{name}: mixup and cutmix mix pairs, but a rank's micro-batch holds {images} images "
                f"({plan.step_images(name)} over {plan.world} ranks x {plan.accumulation} micro-batches): make it even"
            )
    for split in splits:
        check_split(plan, split)


def check_split(plan: LoaderPlan, split: str) -> None:
    """The part of `check_data` that evaluation needs, on any number of ranks: kinds, numbers of classes and sizes."""
    for first, *others in plan.streams.values():
        _check_transform(plan.section(first), plan.tasks[first], plan.patch_size)
        store = plan.store(first, split)
        for name in (first, *others):
            _check_store(name, plan.tasks[name], plan.folder(name, split), store)
        if sum(store.shard_sizes) == 0:
            raise UserError(f"{plan.section(first)}.data: {plan.folder(first, split)} holds no samples")


def _check_store(name: str, spec: TaskSpec, folder: Location, store: SampleStore) -> None:
    if isinstance(spec, SetTask):
        if store.kind != MULTILABEL:
            raise UserError(f"sets.{spec.set}.data: {folder} holds {store.kind} shards; an image set's are {MULTILABEL}")
        found = store.details.get("targets", {})
        if sum(store.shard_sizes) and not found.get(spec.target):
            there = ", ".join(target for target, samples in found.items() if samples)
            raise UserError(f"tasks.{name}.target: no sample of {folder} has {spec.target}; they have {there or 'no targets'}")
        return
    if store.kind != spec.kind:
        raise UserError(f"tasks.{name}.kind: the recipe says {spec.kind}, but {folder} holds {store.kind} shards")
    found = len(store.classes)
    if found != spec.num_classes:
        raise UserError(f"tasks.{name}.num_classes: the recipe says {spec.num_classes}, but {folder} has {found}")


def _check_set(section: str, transform: SetTransform) -> None:
    resize, crop = transform.resize, transform.crop
    if resize is None:
        return
    found = f"{section}.transform.resize: {resize[0]} x {resize[1]} px"
    if min(resize) < 1:
        raise UserError(f"{found}; expected 1 or more")
    if transform.score_at == "original" and (resize[0] > crop[0] or resize[1] > crop[1]):
        raise UserError(
            f"{found} is larger than crop {crop[0]} x {crop[1]}, so score_at: original would not see the whole image; "
            "give a larger crop, a smaller resize, or score_at: input"
        )


def _check_transform(section: str, spec: TaskSpec, patch_size: int) -> None:
    transform = spec.transform
    sizes: dict[str, tuple[int, ...]] = {}
    ranges: dict[str, tuple[float, float]] = {}
    match transform:
        case ClassificationTransform():
            sizes["image_size"] = (transform.image_size,)
            ranges |= {"scale": transform.scale, "ratio": transform.ratio}
            if eval_resize(transform) < transform.image_size:
                raise UserError(
                    f"{section}.transform.eval_resize: {transform.eval_resize} px is less than "
                    f"image_size {transform.image_size}: the centre crop would reach beyond the image"
                )
        case DetectionTransform():
            sizes |= {f"canvases[{index}]": canvas for index, canvas in enumerate(transform.canvases)}
            sizes["eval_canvas"] = transform.eval_canvas
            ranges["scale"] = transform.scale
            if not transform.canvases:
                raise UserError(f"{section}.transform.canvases: empty; give at least one (height, width)")
        case SegmentationTransform():
            sizes["crop"] = transform.crop
            if min(transform.resize) < 1:
                found = f"{section}.transform.resize: {' x '.join(map(str, transform.resize))} px"
                raise UserError(f"{found}; expected 1 or more")
            ranges["ratio"] = transform.ratio
        case SetTransform():
            sizes["crop"] = transform.crop
            ranges["zoom"] = transform.zoom
            _check_set(section, transform)
    for field, sides in sizes.items():
        if any(side < 1 or side % patch_size for side in sides):
            found = f"{section}.transform.{field}: {' x '.join(map(str, sides))} px"
            raise UserError(f"{found}; expected multiples of the patch size {patch_size}")
    for field, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise UserError(f"{section}.transform.{field}: {low} to {high}; expected 0 < low <= high")
