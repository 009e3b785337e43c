"""The order of samples and tasks: exact permutations, pure functions of the position, few shards at a time."""

import pickle
from collections import Counter

import pytest

from modsquad_ds.data.order import (
    SampleOrder,
    TaskSchedule,
    derive_seed,
    permutation,
    rank_slice,
    step_positions,
)
from modsquad_ds.errors import UserError

WEIGHTS = {"cls": 15.0, "det": 10.0, "seg": 5.0}


@pytest.mark.parametrize("sizes", [[5, 7, 3, 9], [4], [1, 1, 1], [0, 6, 0, 2, 0], [100, 1, 50]])
@pytest.mark.parametrize("window", [1, 2, 8])
def test_every_epoch_is_an_exact_permutation(sizes: list[int], window: int) -> None:
    order = SampleOrder(sizes, seed=3, shuffle_window=window)
    everything = sorted((shard, sample) for shard, size in enumerate(sizes) for sample in range(size))
    for epoch in range(3):
        places = [order.locate(epoch * order.samples + offset) for offset in range(order.samples)]
        assert {place.epoch for place in places} == {epoch}
        assert sorted((place.shard, place.sample) for place in places) == everything


def test_position_alone_decides_whatever_was_asked_before() -> None:
    sizes = [5, 7, 3, 9, 2, 2]
    forward = SampleOrder(sizes, seed=1, shuffle_window=2)
    expected = [forward.locate(position) for position in range(200)]
    backward = SampleOrder(sizes, seed=1, shuffle_window=2)
    assert [backward.locate(position) for position in reversed(range(200))] == expected[::-1]
    assert pickle.loads(pickle.dumps(backward)).locate(123) == expected[123]
    assert SampleOrder(sizes, seed=1, shuffle_window=2).locate(199) == expected[199]


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        samples = SampleOrder([10] * 5, seed, shuffle_window=2)
        return [samples.locate(epoch * 50 + offset)[1:] for offset in range(50)]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(one) for one in orders}) == len(orders)
    assert orders[0] != sorted(orders[0])


def test_a_window_touches_only_its_shards() -> None:
    order = SampleOrder([10] * 23, seed=0, shuffle_window=4)
    for epoch in (0, 1):
        for window in range(6):
            start, stop = epoch * 230 + 40 * window, epoch * 230 + min(40 * (window + 1), 230)
            touched = {order.locate(position).shard for position in range(start, stop)}
            assert len(touched) == (stop - start) // 10
    # A stretch that crosses from one epoch into the next meets the last window of one and the first of the other.
    assert len({order.locate(position).shard for position in range(220, 250)}) <= 8


def test_samples_of_a_window_are_mixed_across_its_shards() -> None:
    order = SampleOrder([100] * 8, seed=0, shuffle_window=4)
    counts = Counter(order.locate(position).shard for position in range(100))
    assert len(counts) == 4 and max(counts.values()) < 50


def test_seek_deep_into_training_is_immediate() -> None:
    order = SampleOrder([1000] * 1300, seed=0, shuffle_window=8)
    place = order.locate(10**12 + 7)
    assert place.epoch == 10**12 // 1_300_000 and 0 <= place.sample < 1000
    assert len(order._windows) <= 3 and len(order._epochs) <= 2


def test_refusals() -> None:
    with pytest.raises(UserError, match="no samples: 2 shards"):
        SampleOrder([0, 0], seed=0, shuffle_window=1)
    with pytest.raises(UserError, match="shuffle_window: 0"):
        SampleOrder([1], seed=0, shuffle_window=0)
    with pytest.raises(UserError, match="10 images cannot be divided over 4 ranks"):
        rank_slice(10, 0, 4)


def test_steps_and_ranks_tile_the_stream() -> None:
    positions = [list(step_positions(step, 12)) for step in range(3)]
    assert [*positions[0], *positions[1], *positions[2]] == list(range(36))
    for world in (1, 2, 3, 4):
        parts = [positions[1][rank_slice(12, rank, world)] for rank in range(world)]
        assert [position for part in parts for position in part] == positions[1]
        assert {len(part) for part in parts} == {12 // world}


def test_seed_is_fixed_across_machines_and_versions() -> None:
    assert derive_seed("a", 1) == 12444202034427101082  # b2sum -l 64 of ('a', 1)
    assert derive_seed("a", 1) != derive_seed("a", 1, 0) != derive_seed("a1")
    assert permutation(8, "x", 0).tolist() == [3, 7, 6, 4, 2, 5, 0, 1]


def test_packed_steps_hold_every_task() -> None:
    schedule = TaskSchedule("packed", 0, WEIGHTS)
    assert schedule.active(7) == ("cls", "det", "seg")
    assert schedule.task_step("det", 7) == 7


def test_weighted_steps_follow_the_weights() -> None:
    schedule = TaskSchedule("weighted", 5, WEIGHTS)
    drawn = [schedule.active(step) for step in range(12000)]
    assert all(len(tasks) == 1 for tasks in drawn)
    counts = Counter(tasks[0] for tasks in drawn)
    for task, share in zip(WEIGHTS, (1 / 2, 1 / 3, 1 / 6), strict=True):
        # 4 standard deviations of a binomial of 12000 draws are below 0.02.
        assert counts[task] / 12000 == pytest.approx(share, abs=0.02)


def test_weighted_task_counter_is_the_count_of_earlier_steps() -> None:
    schedule = TaskSchedule("weighted", 5, WEIGHTS)
    seen = Counter(dict.fromkeys(WEIGHTS, 0))
    for step in range(9000):
        if step % 37 == 0 or step in (4095, 4096, 4097, 8192):
            fresh = TaskSchedule("weighted", 5, WEIGHTS) if step % 3700 == 0 else schedule
            assert {task: fresh.task_step(task, step) for task in WEIGHTS} == dict(seen)
        seen[schedule.active(step)[0]] += 1
    assert TaskSchedule("weighted", 5, WEIGHTS).active(8999) == schedule.active(8999)


@pytest.mark.parametrize(("sizes", "window"), [([5, 0, 3, 4, 2], 2), ([3], 4), ([2, 2, 2], 1), ([1, 4, 2, 3, 2, 5, 1], 3)])
def test_upcoming_shards_are_those_that_are_read(sizes: list[int], window: int) -> None:
    order = SampleOrder(sizes, 3, window)
    per_epoch = -(-sum(size > 0 for size in sizes) // window)
    read: list[set[int]] = []  # shards of each window, epoch after epoch
    number_of: list[int] = []  # window of each position
    for epoch in range(4):
        shards: list[int] = []
        for position in range(epoch * order.samples, (epoch + 1) * order.samples):
            shard = order.locate(position).shard
            shards += [shard] if shard not in shards else []
            number_of.append(epoch * per_epoch + (len(shards) - 1) // window)
        # A window's samples are all read before the next one's, so its shards are met together.
        read += [set(shards[first : first + window]) for first in range(0, len(shards), window)]
    for position in range(2 * order.samples):
        start = position
        while start and order.locate(start - 1).epoch == order.locate(position).epoch and start > position - sum(sizes):
            start -= 1
        for windows in (0, 1, per_epoch + 1):
            found = order.upcoming(position, windows)
            first = window_of(order, position, sizes, window) + order.locate(position).epoch * per_epoch
            assert set(found) == set().union(*read[first : first + windows + 1]) and len(found) == len(set(found))
            assert set(found[: len(read[first])]) == read[first]
            assert order.locate(position).shard in read[first]


def window_of(order: SampleOrder, position: int, sizes: list[int], window: int) -> int:
    """Count the windows that end in the epoch before `position`."""
    epoch = order.locate(position).epoch
    seen: list[int] = []
    for earlier in range(epoch * order.samples, (epoch + 1) * order.samples):
        shard = order.locate(earlier).shard
        seen += [shard] if shard not in seen else []
    place = seen.index(order.locate(position).shard)
    return place // window
