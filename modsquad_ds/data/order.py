"""Which sample is read where: step -> active tasks -> positions -> (epoch, shard, sample). First stop after the shards.

Everything here is a pure function of the seed and a counter: no state is carried from step to step, so any rank, any
worker and any resumed run that asks for a step gets the same samples, at the cost of one window's permutation.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modsquad_ds.errors import UserError

Sampling = Literal["packed", "weighted"]
"""`packed`: every step holds every task. `weighted`: every step holds one task, drawn by weight."""

_SCHEDULE_BLOCK = 4096
"""Steps whose task is drawn at once with weighted sampling."""


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed that is a hash of `parts`: the same on every machine, unrelated for any two different lists."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _raw(count: int, *parts: int | str) -> NDArray[np.uint64]:
    """`count` random 64-bit words keyed by `parts`. Philox's raw stream is fixed for good, Generator's is not."""
    return np.random.Philox(key=derive_seed(*parts)).random_raw(count)


def permutation(count: int, *parts: int | str) -> NDArray[np.int64]:
    """A random permutation of range(count), int64 `[count]`, that is a pure function of `parts`."""
    return np.argsort(_raw(count, *parts), kind="stable")


class Place(NamedTuple):
    """Where a position of a task's endless stream lies."""

    epoch: int
    shard: int
    sample: int


class _Epoch(NamedTuple):
    shards: NDArray[np.int64]
    """Shards of the epoch in the order of reading `[n]`."""
    starts: NDArray[np.int64]
    """First offset in the epoch of each of them, and the epoch's length `[n + 1]`."""


class SampleOrder:
    """The endless stream of a task's samples, addressable at any position.

    Position p is offset p mod N of epoch p div N, N samples in all. Each epoch permutes the shards, cuts that list into
    windows of `shuffle_window` shards and shuffles the samples inside each window: every epoch is an exact permutation,
    and readers touch only the few shards of a window at a time.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, shuffle_window: int) -> None:
        """`shard_sizes` are samples per shard, zeros allowed. UserError if there is no sample or no window."""
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if sizes.sum() == 0:
            raise UserError(f"no samples: {len(sizes)} shards, all empty")
        if shuffle_window < 1:
            raise UserError(f"train.shuffle_window: {shuffle_window} shards; expected 1 or more")
        self._sizes = sizes
        # Empty shards would only thin out the windows that hold them.
        self._filled = np.flatnonzero(sizes)
        self._seed = seed
        self._window = shuffle_window
        self.samples = int(sizes.sum())
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[tuple[int, int], NDArray[np.int64]] = {}

    def locate(self, position: int) -> Place:
        """The sample at `position` >= 0 of the stream."""
        epoch, offset = divmod(position, self.samples)
        order = self._epoch(epoch)
        rank = bisect_right(order.starts, offset) - 1
        window = rank // self._window
        first = window * self._window
        base = int(order.starts[first])
        length = int(order.starts[min(first + self._window, len(order.shards))]) - base
        shuffled = _cached(
            self._windows, (epoch, window), 3, lambda: permutation(length, "window", self._seed, epoch, window)
        )
        source = base + int(shuffled[offset - base])
        rank = bisect_right(order.starts, source) - 1
        return Place(epoch, int(order.shards[rank]), source - int(order.starts[rank]))

    def upcoming(self, position: int, windows: int) -> tuple[int, ...]:
        """Shards of the window that `position` lies in and of the `windows` after it, in the order of reading, each once."""
        epoch, offset = divmod(position, self.samples)
        first = (bisect_right(self._epoch(epoch).starts, offset) - 1) // self._window
        per_epoch = -(-len(self._filled) // self._window)
        found: dict[int, None] = {}
        for later, window in (divmod(number, per_epoch) for number in range(first, first + windows + 1)):
            shards = self._permute_shards(epoch + later).shards if later else self._epoch(epoch).shards
            found |= dict.fromkeys(shards[window * self._window : (window + 1) * self._window].tolist())
        return tuple(found)

    def _epoch(self, epoch: int) -> _Epoch:
        return _cached(self._epochs, epoch, 2, lambda: self._permute_shards(epoch))

    def _permute_shards(self, epoch: int) -> _Epoch:
        shards = self._filled[permutation(len(self._filled), "shards", self._seed, epoch)]
        return _Epoch(shards, np.concatenate([[0], np.cumsum(self._sizes[shards])]))


def _cached(cache: dict[Any, Any], key: Any, keep: int, make: Callable[[], Any]) -> Any:
    """`cache[key]`, made on a miss; only the last `keep` made stay."""
    if key not in cache:
        while len(cache) >= keep:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]


def step_positions(step: int, batch_size: int) -> range:
    """Positions of the stream that make up step `step` of a task with `batch_size` images per step."""
    return range(step * batch_size, (step + 1) * batch_size)


def rank_slice(batch_size: int, rank: int, world: int) -> slice:
    """The contiguous part of a batch that belongs to `rank`. UserError if the batch cannot be cut into equal parts."""
    if batch_size % world:
        raise UserError(
            f"a batch of {batch_size} images cannot be divided over {world} ranks: "
            f"take a multiple of {world} or another number of ranks"
        )
    share = batch_size // world
    return slice(rank * share, (rank + 1) * share)


class TaskSchedule:
    """Which tasks are active at a step, and how often each has been active before: pure functions of (seed, step)."""

    def __init__(self, sampling: Sampling, seed: int, weights: dict[str, float]) -> None:
        """`weights` maps every task to its relative frequency (> 0); they only matter with `weighted` sampling."""
        self._sampling = sampling
        self._seed = seed
        self.tasks = tuple(weights)
        shares = np.cumsum(np.array([weights[task] for task in self.tasks], dtype=np.float64))
        self._edges = shares / shares[-1]
        self._draws: list[NDArray[np.int64]] = []
        """Per block of steps: the index of each step's task."""
        self._before: list[NDArray[np.int64]] = [np.zeros(len(self.tasks), dtype=np.int64)]
        """Active steps of each task before each block `[T]`."""

    def active(self, step: int) -> tuple[str, ...]:
        """Names of the tasks of step `step`, in the order of the recipe."""
        if self._sampling == "packed":
            return self.tasks
        block, offset = divmod(step, _SCHEDULE_BLOCK)
        self._draw_until(block)
        return (self.tasks[self._draws[block][offset]],)

    def task_step(self, task: str, step: int) -> int:
        """How many of the steps 0 .. step-1 held `task`: its own step counter, which fixes its sample positions."""
        if self._sampling == "packed":
            return step
        block, offset = divmod(step, _SCHEDULE_BLOCK)
        self._draw_until(block)
        index = self.tasks.index(task)
        return int(self._before[block][index] + np.count_nonzero(self._draws[block][:offset] == index))

    def _draw_until(self, block: int) -> None:
        for new in range(len(self._draws), block + 1):
            # The top 53 bits are a uniform double in [0, 1), which never reaches the last edge.
            uniform = (_raw(_SCHEDULE_BLOCK, "tasks", self._seed, new) >> np.uint64(11)) * 2.0**-53
            draws = np.searchsorted(self._edges, uniform, side="right")
            self._draws.append(draws)
            self._before.append(self._before[-1] + np.bincount(draws, minlength=len(self.tasks)))
