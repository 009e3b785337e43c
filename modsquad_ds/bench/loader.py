"""`bench loader`: images per second of the training pipeline in one process, beside bare decoding of the very same files.

Cases: every task of a recipe as it trains, the same without its changes of colour and content, all tasks together, and all
tasks through one worker process. The peer decodes the files that the case has read, and does nothing else, on one core.

The pipeline's product is a batch of bytes. What the training device does to it (`data.finish`) is timed too, on one core of
this machine's processor, as the share of bare decoding would be if the pipeline's own core did that as well.
"""

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.io import ImageReadMode, decode_image

from modsquad_ds.bench.measure import (
    Row,
    Seconds,
    interleave,
    print_environment,
    print_rows,
    ratio,
    spread,
    spread_fields,
    with_environment,
)
from modsquad_ds.bench.photos import write_shards
from modsquad_ds.config import load_recipe
from modsquad_ds.data.decode import IMAGE_FIELDS
from modsquad_ds.data.finish import finished_images
from modsquad_ds.data.loader import BatchLoader, StepDataset
from modsquad_ds.data.loader_plan import TRAIN, LoaderPlan, check_data
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.data.types import RawSample, SubBatch
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from modsquad_ds.tasks import ClassificationTransform, DetectionTransform, SegmentationTransform, SetTransform, TaskSpec

PHOTO_RECIPE = "heterogeneous"
"""The recipe that is measured on photographs when the user names none."""
FILES = 64
"""Photographs per task."""
PLAIN = {"rand_augment_ops": 0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "photometric": False}
"""Fields of the transforms that change colour or content, and their values without."""
WORKER_STEPS = 4
"""Fewest micro-steps that a worker process is timed over."""


@dataclass
class Case:
    """One way through the loader."""

    name: str
    plan: LoaderPlan
    steps: range
    """Micro-steps of a round."""
    beyond: str
    """What the case does besides decoding."""
    files: list[bytes] = field(default_factory=list)
    """Image files that a round decodes, in its order."""
    batches: list[SubBatch] = field(default_factory=list)
    """What a round makes of them."""
    workers: int = 0


class _Recorder:
    """A split's samples; keeps the image file of each one that is read."""

    def __init__(self, store: ShardSet, files: list[bytes]) -> None:
        self._store, self._files = store, files
        self.kind, self.classes, self.shard_sizes, self.details = store.kind, store.classes, store.shard_sizes, store.details

    def fields(self, shard: int, sample: int) -> Collection[str]:
        return self._store.fields(shard, sample)

    def read(self, shard: int, sample: int) -> RawSample:
        raw = self._store.read(shard, sample)
        self._files += [raw.fields[name] for name in IMAGE_FIELDS if name in raw.fields]
        return raw


def measure_loader(recipe: str | None, overrides: Sequence[str], images: int, repeat: int, show: bool = True) -> list[Row]:
    """Rows of every case. Without a recipe, photographs of the real sets' sizes with the augmentation of `heterogeneous`.

    Args:
        images: fewest images of a round.
    Raises UserError where the recipe is wrong or its shards are missing or do not fit.
    """
    with one_thread(), measured_plan(recipe, overrides) as plan:
        return _measure(plan, images, repeat, show)


@contextmanager
def measured_plan(recipe: str | None, overrides: Sequence[str]) -> Iterator[LoaderPlan]:
    """The plan of a recipe, or inside the block that of photographs. Raises UserError as `measure_loader`."""
    if recipe is not None:
        plan = loader_plan(load_recipe(recipe, overrides), Ranks())
        check_data(plan, splits=(TRAIN,))
        yield plan
        return
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), FILES)
        with measured_plan(PHOTO_RECIPE, [f"data_root={folder}/shards", *overrides]) as plan:
            yield plan


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's operators, as in a worker process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(plan: LoaderPlan, images: int, repeat: int, show: bool) -> list[Row]:
    cases = list(cases_of(plan, images))
    runs: dict[str, Callable[[], Any]] = {}
    for case in cases:
        record_files(case)
        runs[case.name] = _runner(case)
        runs[_peer(case)] = decoder(case.files)
        runs[_finish(case)] = _finisher(case.batches)
    seconds = interleave(runs, repeat, warmup=1, label="loader", show=show)
    return with_environment([_row(case, seconds) for case in cases])


def cases_of(plan: LoaderPlan, images: int) -> Iterator[Case]:
    """The cases of a plan, each with enough micro-steps for `images` images or more."""
    first: Case | None = None
    for name, tasks in plan.streams.items():
        spec = plan.tasks[tasks[0]]
        kept = spec.transform.model_copy(update={key: PLAIN[key] for key in PLAIN if hasattr(spec.transform, key)})
        versions = {f"{name}, plain": kept, name: spec.transform} if kept != spec.transform else {name: kept}
        for title, transform in versions.items():
            alone = replace(plan, tasks={task: plan.tasks[task].model_copy(update={"transform": transform}) for task in tasks})
            micro_steps = range(-(-images // alone.rank_images(tasks[0])))
            case = Case(title, alone, micro_steps, beyond_decoding(alone.tasks[tasks[0]]))
            first = first or case
            yield case
    assert first is not None
    yield _in_worker(first)
    if len(plan.streams) > 1:
        steps = -(-images // max(plan.rank_images(name) for name in plan.tasks))
        together = Case("all tasks", plan, range(steps), "all of the above, in one batch")
        yield together
        yield _in_worker(together)


def _in_worker(case: Case) -> Case:
    """The same through one worker process. Its first batch includes its start, so it is left out."""
    later = range(1, 1 + max(len(case.steps), WORKER_STEPS))
    return replace(case, name=f"{case.name}, worker", steps=later, beyond="the same, and the way to this process", workers=1)


def beyond_decoding(spec: TaskSpec) -> str:
    """What the pipeline does to an image of the task after decoding it, in words."""
    match spec.transform:
        case ClassificationTransform() as t:
            extras = {
                f"RandAugment x {t.rand_augment_ops}": t.rand_augment_ops,
                "erasing": t.erasing,
                "Mixup": t.mixup,
                "CutMix": t.cutmix,
            }
            parts = [f"random crop to {t.image_size} px (bicubic)", "flip", *(name for name, on in extras.items() if on)]
        case DetectionTransform() as t:
            sides = {side for canvas in t.canvases for side in canvas}
            parts = ["boxes", f"random scale and place on a canvas of sides {min(sides)} to {max(sides)} px", "flip"]
        case SegmentationTransform() as t:
            parts = ["mask decoded", f"random scale, crop to {t.crop[0]} x {t.crop[1]} px of both", "flip"]
            parts += ["photometric distortion"] if t.photometric else []
        case SetTransform() as t:
            parts = ["maps decoded", f"zoom, crop to {t.crop[0]} x {t.crop[1]} px of all", "flip"]
            parts += [name for name, on in {"turned": t.rotate, "photometric distortion": t.photometric}.items() if on]
    return ", ".join(["read", *parts, "batch"])


def record_files(case: Case) -> None:
    """Run the case once and keep the image files that it reads, in its order, and the batches."""
    files: list[bytes] = []
    dataset = StepDataset(replace(case.plan, open_store=lambda folder: _Recorder(ShardSet(folder, cache=case.plan.cache), files)))
    case.batches = [sub for step in case.steps for sub in dataset[step].values()]
    case.files = files


def run_steps(dataset: StepDataset, steps: range) -> None:
    """Make the batches and keep none."""
    for step in steps:
        dataset[step]


def _runner(case: Case) -> Callable[[], Any]:
    dataset = StepDataset(case.plan)
    return (lambda: _through_workers(case, dataset)) if case.workers else (lambda: run_steps(dataset, case.steps))


def _through_workers(case: Case, dataset: StepDataset) -> Seconds:
    """Seconds from the arrival of the batch before the case's first to that of its last."""
    batches = iter(BatchLoader(dataset, range(case.steps.start - 1, case.steps.stop), case.workers))
    next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return Seconds(time.perf_counter() - began)


def decoder(files: Sequence[bytes]) -> Callable[[], Any]:
    """Bare decoding of the files, none of whose images is kept."""
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]

    def decode() -> None:
        for data in encoded:
            decode_image(data, ImageReadMode.RGB)

    return decode


def _finisher(batches: Sequence[SubBatch]) -> Callable[[], Any]:
    def finish() -> None:
        for sub in batches:
            finished_images(sub)

    return finish


def _peer(case: Case) -> str:
    return f"{case.name}: decoding"


def _finish(case: Case) -> str:
    return f"{case.name}: finishing"


def _row(case: Case, seconds: dict[str, list[float]]) -> Row:
    images = len(case.files)
    rates = {name: spread([images / value for value in seconds[name]]) for name in (case.name, _peer(case))}
    finish, peer = seconds[_finish(case)], seconds[_peer(case)]
    alone = [theirs / (ours + after) for theirs, ours, after in zip(peer, seconds[case.name], finish, strict=True)]
    return {
        "case": case.name,
        "images": images,
        "pixels": _mean_size(case.files),
        "kilobytes": sum(map(len, case.files)) / images / 1000,
        "workers": case.workers,
        "beyond": case.beyond,
        **spread_fields("images_per_s", rates[case.name]),
        "peer": "bare decoding",
        **spread_fields("peer_images_per_s", rates[_peer(case)]),
        **spread_fields("ratio", ratio(seconds, _peer(case), case.name)),
        "finish_ms": 1000 * spread(finish).median / images,
        "ratio_finished": spread(alone).median,
    }


def _mean_size(files: Sequence[bytes]) -> str:
    """Mean height and width of the images."""
    sizes = [decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB).shape[-2:] for data in files]
    return " x ".join(str(round(sum(size[axis] for size in sizes) / len(sizes))) for axis in (0, 1))


def print_loader(rows: Sequence[Row]) -> None:
    """The rows as a table, and what each of them reads and does."""
    columns = {
        "case": "case",
        "images_per_s": "images/s",
        "peer_images_per_s": "bare decoding, images/s",
        "ratio": "share of bare decoding",
    }
    print_rows("The training pipeline in one process, beside bare decoding of the same files", rows, columns)
    device = {"case": "case", "finish_ms": "ms per image", "ratio_finished": "share of bare decoding with it"}
    print_rows("What is left to the device (normalise, erase, mix), done by one core of this processor", rows, device)
    for row in rows:
        files = f"{row['images']} images, mean {row['pixels']} px and {row['kilobytes']:.3g} kB"
        print(f"{row['case']} ({files}): {row['beyond']}")
    print_environment(rows)
