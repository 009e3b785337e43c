"""Shards -> batches: what training and evaluation iterate over, the last stop of the data before the model.

A training batch is a pure function of (seed, micro-step, rank, world): the dataset below is indexed by micro-step, the
sampler is a plain range, and worker processes only compute ahead. Whatever a user has to mend arrives as a UserError.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modsquad_ds.data.collate import Pixels, Ready, batch_memory
from modsquad_ds.data.decode import decode_sample, refuse
from modsquad_ds.data.loader_plan import LoaderPlan, SampleStore
from modsquad_ds.data.mixing import mix_pairs, mixing_of
from modsquad_ds.data.order import Place, SampleOrder, TaskSchedule, derive_seed, rank_slice, step_positions
from modsquad_ds.data.set_batch import Pattern, collate_set, collate_task, deal
from modsquad_ds.data.set_decode import decode_set_sample
from modsquad_ds.data.set_transforms import set_eval, set_train
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.data.transforms import TRANSFORMS, seeded
from modsquad_ds.data.types import Batch, Finish, RawSample, Rows, SubBatch
from modsquad_ds.errors import UserError
from modsquad_ds.signals import ignore_in_worker
from modsquad_ds.tasks import SetTask, SetTransform, TaskSpec

# ---------------------------------------------------------------- training


class _Stream:
    """What the training batches of a task and of an image set have in common: samples in their order."""

    def __init__(self, plan: LoaderPlan, name: str) -> None:
        self.plan, self.name, self.tasks = plan, name, plan.streams[name]
        self.store = plan.train_store(self.tasks[0])
        self.order = SampleOrder(self.store.shard_sizes, derive_seed("order", plan.seed, name), plan.shuffle_window)

    def positions(self, stream_step: int, micro: int) -> range:
        """Positions in the stream of a micro-step, over all ranks."""
        images = self.plan.rank_images(self.tasks[0]) * self.plan.world
        return step_positions(stream_step * self.plan.accumulation + micro, images)

    def announce(self, position: int) -> None:
        """What is read from this position on is fetched ahead, if it has to be."""
        if isinstance(self.store, ShardSet):
            self.store.announce(self.order.upcoming(position, self.plan.cache.ahead))

    def sample_seed(self, place: Place, position: int) -> int:
        """What the augmentation of the sample there is drawn from."""
        return derive_seed("sample", self.plan.seed, self.name, place.epoch, position)


class TaskStream(_Stream):
    """A task with images of its own."""

    def __init__(self, plan: LoaderPlan, name: str) -> None:
        super().__init__(plan, name)
        self.spec = plan.tasks[name]
        self.mixing = mixing_of(self.spec)

    def batch(self, step: int, stream_step: int, micro: int) -> SubBatch:
        """This rank's part of micro-batch `micro` of `step`, which is the stream's own step `stream_step`."""
        plan, rows = self.plan, TRANSFORMS[self.spec.kind]
        everyone = self.positions(stream_step, micro)
        positions = everyone[rank_slice(len(everyone), plan.rank, plan.world)]
        canvas = rows.canvas(self.spec.transform, plan.seed, self.name, step)
        self.announce(positions[0])
        images = batch_memory(len(positions), canvas)
        samples, keys = [], []
        for position, image in zip(positions, images, strict=True):
            place = self.order.locate(position)
            raw = self.store.read(place.shard, place.sample)
            decoded = decode_sample(raw, self.spec.kind, self.spec.num_classes)
            with seeded(self.sample_seed(place, position)):
                samples.append(rows.train(decoded, self.spec.transform, plan.pixels, canvas, image))
            keys.append(raw.key)
        batch = rows.collate(samples, keys, plan.pixels, images)
        if self.mixing is None:
            return batch
        return mix_pairs(batch, self.mixing, [derive_seed("mix", plan.seed, self.name, first) for first in positions[::2]])


class _SetStream(_Stream):
    """An image set: every image is decoded once for all its tasks."""

    def __init__(self, plan: LoaderPlan, name: str) -> None:
        super().__init__(plan, name)
        specs = {task: plan.tasks[task] for task in self.tasks}
        self.rows = {task: spec.row for task, spec in specs.items() if isinstance(spec, SetTask)}
        transform = specs[self.tasks[0]].transform
        assert isinstance(transform, SetTransform)
        self.transform = transform

    def batch(self, step: int, stream_step: int, micro: int) -> SubBatch:
        """As `TaskStream.batch`. A rank's images are those that `deal` gives it."""
        plan, everyone = self.plan, self.positions(stream_step, micro)
        self.announce(everyone[0])
        places = [self.order.locate(position) for position in everyone]
        share = deal([self._pattern(place) for place in places], plan.world)[plan.rank]
        images = batch_memory(len(share.images), self.transform.crop)
        wanted = tuple(dict.fromkeys(self.rows.values()))
        samples, keys = [], []
        for index, image in zip(share.images, images, strict=True):
            place = places[index]
            raw = self.store.read(place.shard, place.sample)
            decoded = decode_set_sample(raw, wanted)
            with seeded(self.sample_seed(place, everyone[index])):
                samples.append(set_train(decoded, wanted, self.transform, plan.pixels, image))
            keys.append(raw.key)
        pairs = zip(self.rows.items(), share.readers, strict=True)
        readers = {task: (row, those) for (task, row), those in pairs if those is not None}
        return collate_set(samples, keys, plan.pixels, readers, images)

    def _pattern(self, place: Place) -> Pattern:
        fields = self.store.fields(place.shard, place.sample)
        return tuple(row.field in fields for row in self.rows.values())


def _stream(plan: LoaderPlan, name: str) -> TaskStream | _SetStream:
    return TaskStream(plan, name) if plan.tasks[plan.streams[name][0]].stream is None else _SetStream(plan, name)


class StepDataset(Dataset[Batch]):
    """Micro-step -> this rank's Batch. Micro-step m is micro-batch m mod A of optimizer step m div A."""

    def __init__(self, plan: LoaderPlan) -> None:
        self._accumulation = plan.accumulation
        self._schedule = TaskSchedule(plan.sampling, plan.seed, plan.sampling_weights)
        self._streams = {name: _stream(plan, name) for name in plan.streams}

    def __getitem__(self, micro_step: int) -> Batch:
        """UserError if a sample cannot be read, decoded or used; it names shard, key and field."""
        step, micro = divmod(micro_step, self._accumulation)
        return {
            name: self._streams[name].batch(step, self._schedule.task_step(name, step), micro)
            for name in self._schedule.active(step)
        }


def train_loader(plan: LoaderPlan, start_step: int, steps: int, workers: int) -> "BatchLoader[Batch]":
    """Batches of the optimizer steps `start_step` .. `steps` - 1, `accumulation` of them per step, in order."""
    micro_steps = range(start_step * plan.accumulation, steps * plan.accumulation)
    return BatchLoader(StepDataset(plan), micro_steps, workers)


# ---------------------------------------------------------------- evaluation


class EvalDataset(Dataset[SubBatch]):
    """Index -> batch of this rank's part of a split; over all ranks every sample is valid exactly once.

    Rank r holds a contiguous block of the split in shard order. All ranks have the same number of batches of the same
    sizes; where samples run out the last one is repeated with `valid` False in its meta. Of an image set, only the samples
    count that have the task's label.
    """

    def __init__(self, plan: LoaderPlan, task: str, split: str, batch_size: int) -> None:
        self._spec, self._pixels = plan.tasks[task], plan.pixels
        self._store, self._ahead = plan.store(task, split), plan.cache.ahead
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(self._store.shard_sizes, dtype=np.int64))])
        self._chosen = _having(self._store, self._spec) if isinstance(self._spec, SetTask) else None
        self._samples = int(self._starts[-1]) if self._chosen is None else len(self._chosen)
        if self._samples == 0:
            raise UserError(f"{plan.folder(task, split)}: no samples to evaluate task {task!r} on")
        self._share = -(-self._samples // plan.world)
        self._first = plan.rank * self._share
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._share // self._batch_size)

    def __getitem__(self, index: int) -> SubBatch:
        """UserError as in StepDataset. IndexError beyond the last batch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        samples: list[Ready] = []
        keys: list[str] = []
        if isinstance(self._store, ShardSet):
            self._store.announce(self._upcoming(index))
        for offset in range(index * self._batch_size, min((index + 1) * self._batch_size, self._share)):
            wanted = self._first + offset
            raw = self._store.read(*self._place(wanted))
            ready = scored(raw, self._spec, self._pixels)
            samples.append(ready._replace(meta=ready.meta | {"valid": wanted < self._samples}))
            keys.append(raw.key)
        if isinstance(self._spec, SetTask):
            return collate_task(samples, keys, self._pixels, self._spec.row)
        return TRANSFORMS[self._spec.kind].collate(samples, keys, self._pixels)

    def _upcoming(self, index: int) -> range:
        """Shards from that of the batch's first sample on."""
        shard, _ = self._place(self._first + index * self._batch_size)
        return range(shard, min(shard + self._ahead + 1, len(self._starts) - 1))

    def _place(self, wanted: int) -> tuple[int, int]:
        """Shard and place in it of the split's sample `wanted`, or of its last one."""
        position = min(wanted, self._samples - 1)
        position = position if self._chosen is None else int(self._chosen[position])
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        return shard, position - int(self._starts[shard])


def _having(store: SampleStore, spec: SetTask) -> NDArray[np.int64] | None:
    """Places in the split, shard after shard, of the samples that have the task's label; None: all of them."""
    places, place = [], 0
    if store.details.get("targets", {}).get(spec.target) == sum(store.shard_sizes):
        return None
    for shard, size in enumerate(store.shard_sizes):
        places += [place + sample for sample in range(size) if spec.row.field in store.fields(shard, sample)]
        place += size
    return np.array(places, dtype=np.int64)


def scored(raw: RawSample, spec: TaskSpec, pixels: Pixels) -> Ready:
    """One sample of a task as evaluation sees it. UserError that names shard, key and field."""
    if not isinstance(spec, SetTask):
        decoded = decode_sample(raw, spec.kind, spec.num_classes)
        return TRANSFORMS[spec.kind].evaluate(decoded, spec.transform, pixels)
    try:
        ready = set_eval(decode_set_sample(raw, (spec.row,)), (spec.row,), spec.transform, pixels)
    except ValueError as error:
        refuse(raw, "image", str(error))
    return ready._replace(meta=ready.meta | {"label": ready.meta["label"].get(spec.target)})


def eval_batches(plan: LoaderPlan, task: str, split: str, batch_size: int, workers: int = 0) -> "BatchLoader[SubBatch]":
    """This rank's batches of `split` in order, no shuffling, no augmentation; the same number on every rank."""
    dataset = EvalDataset(plan, task, split, batch_size)
    return BatchLoader(dataset, range(len(dataset)), workers)


# ---------------------------------------------------------------- worker processes

T = TypeVar("T")


@dataclass
class _Parcel(Generic[T]):
    """What a worker sends: a batch, or the message of a UserError.

    An exception raised in a worker would arrive with the worker's traceback in its message, so it travels as data.
    """

    content: T | None = None
    failure: str | None = None

    def pin_memory(self) -> "_Parcel[T]":
        """Called by DataLoader; its own way through nested data would turn the tuples of SubBatch into lists."""
        return _Parcel(_pin(self.content), self.failure)


def _pin(content: Any) -> Any:
    """Page-locked copies of images, what finishes them, targets and rows, anything else as it is."""
    if isinstance(content, Tensor):
        return content.pin_memory()
    if isinstance(content, SubBatch):
        images, targets = _pin(content.images_BCHW), _pin(content.targets)
        return content._replace(images_BCHW=images, targets=targets, finish=_pin(content.finish), rows=_pin(content.rows))
    if isinstance(content, Finish | Rows):
        return type(content)(*map(_pin, content))
    if isinstance(content, dict):
        return {name: _pin(value) for name, value in content.items()}
    return [_pin(value) for value in content] if isinstance(content, list) else content


class _Parcels(Dataset[_Parcel[T]]):
    def __init__(self, dataset: Dataset[T]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> _Parcel[T]:
        try:
            return _Parcel(self._dataset[index])
        except UserError as error:
            return _Parcel(failure=str(error))


def _as_is(item: T) -> T:
    return item


def _start_worker(worker: int) -> None:
    """Signals are the main process's to answer. (torch sets one thread per worker.)"""
    ignore_in_worker()


class BatchLoader(Generic[T]):
    """`dataset[i] for i in indices`, computed ahead by `workers` processes (0: in this one). Has a length.

    Iterating raises UserError, message intact, when a worker met one. The workers live as long as one iteration.
    """

    def __init__(self, dataset: Dataset[T], indices: range, workers: int) -> None:
        self._loader: DataLoader[_Parcel[T]] = DataLoader(
            _Parcels(dataset),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            # Without its own generator DataLoader draws a seed from the one that training uses.
            generator=torch.Generator(),
            prefetch_factor=2 if workers > 0 else None,
        )
        self._length = len(indices)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        parcels = iter(self._loader)
        try:
            for parcel in parcels:
                if parcel.failure is not None:
                    raise UserError(parcel.failure)
                assert parcel.content is not None
                yield parcel.content
        finally:
            # The last reference: the workers end here and now. Left to the garbage collector, which breaks their queues
            # first, torch waits five seconds for each.
            del parcels
