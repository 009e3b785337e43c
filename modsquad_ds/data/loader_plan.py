"""What the loader has to load, and whether recipe and shards fit: the plan of one rank, made before the first batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from modsquad_ds.config import CacheSpec
from modsquad_ds.data.collate import Pixels
from modsquad_ds.data.mixing import mixing_of
from modsquad_ds.data.order import Sampling
from modsquad_ds.data.shards import DEFAULT_CACHE, ShardSet
from modsquad_ds.data.transforms import eval_resize
from modsquad_ds.data.types import RawSample
from modsquad_ds.errors import UserError
from modsquad_ds.location import Location
from modsquad_ds.tasks import ClassificationTransform, DetectionTransform, SegmentationTransform, TaskSpec

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

    def folder(self, task: str, split: str) -> Location:
        """Shard folder of a task's split, or its URL."""
        return self.root / self.tasks[task].data / split

    def store(self, task: str, split: str, open_shards: int = IN_ORDER) -> SampleStore:
        """The samples of a task's split, of which so many shards stay open."""
        folder = self.folder(task, split)
        return ShardSet(folder, open_shards, self.cache) if self.open_store is ShardSet else self.open_store(folder)

    def train_store(self, task: str) -> SampleStore:
        """A task's training samples. Shards of two windows stay open, since a batch can lie across their border."""
        return self.store(task, TRAIN, open_shards=2 * self.shuffle_window)

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
                f"tasks.{task}.batch_size: {images} images cannot be divided over {self.world} ranks "
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
    for name, spec in plan.tasks.items():
        _check_transform(name, spec, plan.patch_size)
        _check_store(name, spec, plan.folder(name, split), plan.store(name, split))


def _check_store(name: str, spec: TaskSpec, folder: Location, store: SampleStore) -> None:
    if store.kind != spec.kind:
        raise UserError(f"tasks.{name}.kind: the recipe says {spec.kind}, but {folder} holds {store.kind} shards")
    found = len(store.classes)
    if found != spec.num_classes:
        raise UserError(f"tasks.{name}.num_classes: the recipe says {spec.num_classes}, but {folder} has {found}")
    if sum(store.shard_sizes) == 0:
        raise UserError(f"tasks.{name}.data: {folder} holds no samples")


def _check_transform(name: str, spec: TaskSpec, patch_size: int) -> None:
    transform = spec.transform
    sizes: dict[str, tuple[int, ...]] = {}
    ranges: dict[str, tuple[float, float]] = {}
    match transform:
        case ClassificationTransform():
            sizes["image_size"] = (transform.image_size,)
            ranges |= {"scale": transform.scale, "ratio": transform.ratio}
            if eval_resize(transform) < transform.image_size:
                raise UserError(
                    f"tasks.{name}.transform.eval_resize: {transform.eval_resize} px is less than "
                    f"image_size {transform.image_size}: the centre crop would reach beyond the image"
                )
        case DetectionTransform():
            sizes |= {f"canvases[{index}]": canvas for index, canvas in enumerate(transform.canvases)}
            sizes["eval_canvas"] = transform.eval_canvas
            ranges["scale"] = transform.scale
            if not transform.canvases:
                raise UserError(f"tasks.{name}.transform.canvases: empty; give at least one (height, width)")
        case SegmentationTransform():
            sizes["crop"] = transform.crop
            if min(transform.resize) < 1:
                found = f"tasks.{name}.transform.resize: {' x '.join(map(str, transform.resize))} px"
                raise UserError(f"{found}; expected 1 or more")
            ranges["ratio"] = transform.ratio
    for field, sides in sizes.items():
        if any(side < 1 or side % patch_size for side in sides):
            found = f"tasks.{name}.transform.{field}: {' x '.join(map(str, sides))} px"
            raise UserError(f"{found}; expected multiples of the patch size {patch_size}")
    for field, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise UserError(f"tasks.{name}.transform.{field}: {low} to {high}; expected 0 < low <= high")
