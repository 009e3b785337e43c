"""The loader: one global batch whatever the ranks and workers, exact resume and coverage, errors that arrive whole."""

import multiprocessing
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from memory import (
    KIND_OF,
    SIZES,
    BadLabelStore,
    EmptyStore,
    MemoryStore,
    assert_equal,
    classification,
    joined,
    plan,
    tasks,
)
from modsquad_ds.data import collate, loader
from modsquad_ds.data.decode import decode_sample
from modsquad_ds.data.loader import StepDataset, _Parcel, eval_batches, train_loader
from modsquad_ds.data.transforms import TRANSFORMS, seeded
from modsquad_ds.data.types import Batch, RawSample
from modsquad_ds.errors import UserError


def global_batch(step: int, **changes: Any) -> Batch:
    """Step `step` over all ranks and micro-batches, in the order of the stream."""
    whole = plan(**changes)
    micro_steps = range(step * whole.accumulation, (step + 1) * whole.accumulation)
    datasets = [StepDataset(replace(whole, rank=rank)) for rank in range(whole.world)]
    batches = [dataset[micro_step] for micro_step in micro_steps for dataset in datasets]
    return {name: joined([batch[name] for batch in batches]) for name in batches[0]}


# ---------------------------------------------------------------- training


def test_a_batch_is_what_types_py_says() -> None:
    batch = global_batch(0)
    assert list(batch) == ["digits", "scenes", "textures"]
    digits, scenes, textures = batch.values()
    assert digits.images_BCHW.shape == (8, 3, 32, 32) and digits.images_BCHW.dtype == torch.uint8
    assert digits.targets["probabilities"].shape == (8, 3) and digits.meta == ({},) * 8
    assert len(scenes.targets["boxes"]) == len(scenes.targets["labels"]) == len(scenes.targets["ignore"]) == 4
    assert scenes.images_BCHW.shape[-2:] in [(32, 48), (48, 32), (40, 40)]
    assert textures.images_BCHW.shape == (4, 3, 32, 40) and textures.targets["labels"].shape == (4, 32, 40)
    assert textures.targets["labels"].dtype == torch.int64
    assert all(type(keys) is tuple for keys in (digits.keys, scenes.keys, textures.keys))
    plain = plan(tasks={"digits": classification(transform={"image_size": 32})})
    labels = StepDataset(plain)[0]["digits"].targets["labels"]
    assert labels.dtype == torch.int64 and labels.shape == (8,)


@pytest.mark.parametrize("changes", [{"world": 2}, {"world": 4}, {"accumulation": 2}, {"world": 2, "accumulation": 2}])
def test_global_batch_is_the_same_for_any_cut(changes: dict[str, int]) -> None:
    for step in (0, 1, 9):
        assert_equal(global_batch(step, **changes), global_batch(step))


def test_global_batch_is_the_same_for_any_number_of_workers() -> None:
    here = list(train_loader(plan(world=2, rank=1), 2, 6, workers=0))
    there = list(train_loader(plan(world=2, rank=1), 2, 6, workers=2))
    assert len(here) == len(train_loader(plan(), 2, 6, workers=0)) == 4
    assert_equal(here, there)


def test_resume_continues_the_same_batches() -> None:
    for changes in ({}, {"sampling": "weighted"}, {"accumulation": 2}):
        through = list(train_loader(plan(**changes), 0, 7, workers=0))
        later = list(train_loader(plan(**changes), 4, 7, workers=0))
        assert_equal(later, through[4 * plan(**changes).accumulation :])


def marked(value: int, images: int, canvas: tuple[int, int]) -> torch.Tensor:
    return torch.full((images, 3, *canvas), value, dtype=torch.uint8)


def test_every_pixel_of_a_batch_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [global_batch(step) for step in range(4)]
    for value in (0, 255):
        with monkeypatch.context() as patch:
            patch.setattr(loader, "batch_memory", partial(marked, value))
            assert_equal([global_batch(step) for step in range(4)], expected)
    monkeypatch.setattr(collate, "_HUGE", 0)
    assert_equal([global_batch(step) for step in range(4)], expected)


@pytest.mark.parametrize("name", KIND_OF)
def test_an_image_is_the_same_in_a_batch_and_alone(name: str) -> None:
    spec, store = tasks()[name], MemoryStore(Path("memory") / name / "train")
    rows = TRANSFORMS[spec.kind]
    canvas = rows.canvas(spec.transform, 0, name, 0)
    for seed in range(12):
        sample, out = decode_sample(store.read(0, seed % 4), spec.kind, 3), marked(255, 1, canvas)[0]
        with seeded(seed):
            alone = rows.train(sample, spec.transform, plan().pixels, canvas)
        with seeded(seed):
            placed = rows.train(sample, spec.transform, plan().pixels, canvas, out)
        assert torch.equal(out, alone.image) and torch.equal(placed.image, out)


def test_seed_and_epoch_change_the_batch() -> None:
    assert global_batch(0)["digits"].keys != global_batch(0, seed=4)["digits"].keys
    one = plan(tasks={"digits": classification(batch_size=42, transform={"image_size": 32, "mixup": 1.0})})
    batch = StepDataset(one)[0]["digits"]
    # 42 images of 21 samples: two epochs in one batch, each an exact permutation, augmented differently.
    assert sorted(batch.keys[:21]) == sorted(batch.keys[21:]) and len(set(batch.keys)) == 21
    unmixed = replace(one, tasks={"digits": classification(batch_size=42, transform={"image_size": 32})})
    images = StepDataset(unmixed)[0]["digits"].images_BCHW
    again = batch.keys.index(batch.keys[0], 21)
    assert not torch.equal(images[0], images[again])


def test_canvas_is_one_per_step_and_varies() -> None:
    shapes = set()
    for step in range(12):
        of_ranks = {StepDataset(plan(world=4, rank=rank))[step]["scenes"].images_BCHW.shape[-2:] for rank in range(4)}
        assert len(of_ranks) == 1
        shapes |= of_ranks
    assert len(shapes) == 3


def test_weighted_sampling_gives_one_task_and_no_sample_is_skipped() -> None:
    weights = {"digits": 3.0, "scenes": 2.0, "textures": 1.0}
    specs = {name: spec.model_copy(update={"sampling_weight": weights[name]}) for name, spec in tasks().items()}
    ranks = [StepDataset(plan(tasks=specs, sampling="weighted", world=2, rank=rank)) for rank in range(2)]
    seen: dict[str, list[str]] = {name: [] for name in specs}
    for step in range(14):
        batches = [dataset[step] for dataset in ranks]
        assert len(batches[0]) == 1 and list(batches[0]) == list(batches[1])
        name = next(iter(batches[0]))
        seen[name] += joined([batch[name] for batch in batches]).keys
    assert all(seen.values())
    for name, keys in seen.items():
        # The k-th active step of a task takes up where its last one stopped: whole epochs appear exactly.
        size = sum(SIZES[name])
        for start in range(0, len(keys) - size + 1, size):
            assert len(set(keys[start : start + size])) == size


def test_loading_leaves_the_training_generator_alone() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for workers in (0, 1):
        for _ in train_loader(plan(), 0, 2, workers):
            pass
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_shards_are_read_at_a_time_than_are_kept_open() -> None:
    class Watched(MemoryStore):
        def read(self, shard: int, sample: int) -> RawSample:
            recent.append(shard)
            return super().read(shard, sample)

    recent: list[int] = []
    dataset = StepDataset(plan(tasks={"digits": classification()}, open_store=Watched, shuffle_window=1))
    for step in range(12):
        recent.clear()
        dataset[step]
        # A run of 8 positions in shards of 5 or more samples meets three at most, each opened once: no way back.
        assert [shard for index, shard in enumerate(recent) if recent[index - 1 : index] != [shard]] == [
            *dict.fromkeys(recent)
        ]


def test_dataset_survives_pickling() -> None:
    dataset = StepDataset(plan())
    first = dataset[1]
    assert_equal(pickle.loads(pickle.dumps(dataset))[1], first)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("workers", [0, 2])
def test_user_error_arrives_intact(workers: int) -> None:
    loader = train_loader(plan(open_store=BadLabelStore), 0, 6, workers)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value) == (
        "train/shard-3.tar: sample '3-4', field 'cls': class 17 is out of range, the task has 3 classes (0-based)"
    )
    assert not multiprocessing.active_children(), "workers end with the iteration"
    with pytest.raises(UserError, match="class 17"):
        list(eval_batches(plan(open_store=BadLabelStore), "digits", "train", 4, workers))


def test_pinned_parcel_keeps_its_types(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def fake_pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    batch = global_batch(0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", fake_pin)
    parcel = pin_memory(_Parcel(batch))
    assert isinstance(parcel, _Parcel)
    assert_equal(parcel.content, batch)
    assert len(pinned) == (1 + 1 + 4) + (1 + 3 * 4 + 1) + (1 + 1 + 1)
    assert pin_memory(_Parcel(failure="words")).failure == "words"


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 5, 25])
@pytest.mark.parametrize("batch_size", [4, 100])
def test_evaluation_covers_a_split_exactly_once(world: int, batch_size: int) -> None:
    keys: list[str] = []
    shapes = []
    for rank in range(world):
        batches = eval_batches(plan(world=world, rank=rank), "digits", "val", batch_size)
        found = list(batches)
        assert len(found) == len(batches)
        shapes.append([len(batch.keys) for batch in found])
        for batch in found:
            assert len(batch.images_BCHW) == len(batch.meta) == len(batch.targets["labels"]) == len(batch.keys)
            keys += [key for key, meta in zip(batch.keys, batch.meta, strict=True) if meta["valid"]]
    assert all(shape == shapes[0] for shape in shapes), "collectives need the same batches on every rank"
    assert keys == [f"{shard}-{sample}" for shard, size in enumerate(SIZES["digits"]) for sample in range(size)]


def test_evaluation_is_repeatable_and_the_same_from_workers() -> None:
    for name in KIND_OF:
        batches = eval_batches(plan(), name, "val", 3, workers=2)
        first = list(batches)
        assert_equal(first, list(batches))
        assert_equal(first, list(eval_batches(plan(), name, "val", 3)))


def test_evaluation_metadata_by_kind() -> None:
    scenes = next(iter(eval_batches(plan(), "scenes", "val", 2)))
    assert scenes.images_BCHW.shape == (2, 3, 48, 48)
    assert set(scenes.meta[0]) == {"valid", "size", "content", "canvas", "annotations"}
    assert scenes.meta[0]["annotations"]["ids"] == [1, 2] and len(scenes.targets["boxes"][0]) == 1
    textures = next(iter(eval_batches(plan(), "textures", "val", 6)))
    assert set(textures.meta[0]) == {"valid", "size", "content", "canvas", "label"}
    assert textures.meta[0]["label"].shape == textures.meta[0]["size"]
    assert textures.images_BCHW.shape[-2] % 8 == textures.images_BCHW.shape[-1] % 8 == 0
    assert {max(meta["canvas"][axis] for meta in textures.meta) for axis in (0, 1)} == set(textures.images_BCHW.shape[-2:])
    heights = {meta["content"] for meta in textures.meta}
    assert len(heights) > 1, "images of different sizes share the batch"


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UserError, match="no samples to evaluate task 'digits'"):
        eval_batches(plan(open_store=EmptyStore), "digits", "val", 4)
