"""The loader meets an image set: decoding, batches that do not depend on the number of ranks, evaluation of one of its tasks."""

import pickle
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

import taskonomy_files
from memory import MemoryStore, assert_equal, classification, plan, png
from modsquad_ds.bench.loader import cases_of
from modsquad_ds.bench.scaling_step import like_steps
from modsquad_ds.data.convert import convert
from modsquad_ds.data.decode import decode_image_of
from modsquad_ds.data.layouts import Options
from modsquad_ds.data.loader import StepDataset, _Parcel, eval_batches, scored, train_loader
from modsquad_ds.data.loader_plan import LoaderPlan, check_data
from modsquad_ds.data.order import TaskSchedule
from modsquad_ds.data.set_decode import decode_set_sample
from modsquad_ds.data.target_files import mask_png, npy_bytes
from modsquad_ds.data.types import Batch, RawSample
from modsquad_ds.errors import UserError
from modsquad_ds.targets import TARGETS, Target
from modsquad_ds.tasks import SetTask, TaskSpec, completed_set_task

NAMES = ("class_scene", "depth_zbuffer", "normal", "segment_unsup2d", "semseg", "sal")
ROWS = tuple(TARGETS[name] for name in NAMES)
SIZES = [9, 0, 15]
PLACES = [(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)]


def label_bytes(row: Target, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    if row.stored == "npy":
        return npy_bytes(torch.from_numpy(rng.random(row.channels, dtype=np.float32)))
    if row.stored == "grey16":
        return png(rng.integers(1, 60000, size=size, dtype=np.uint16))
    if row.kind == "semantic":
        return png(rng.integers(row.channels, size=size, dtype=np.uint8))
    return png(rng.integers(256, size=size if row.stored == "grey8" else (*size, 3), dtype=np.uint8))


class SetStore:
    """The samples of an image set, made up; a third of the labels is missing. Stands in for `ShardSet`."""

    kind, classes, shard_sizes = "multilabel", (), SIZES

    def __init__(self, folder: Path) -> None:
        fields = [self.fields(*place) for place in PLACES]
        self.details = {"targets": {row.name: sum(row.field in those for those in fields) for row in ROWS}}

    def fields(self, shard: int, sample: int) -> Collection[str]:
        drawn = np.random.default_rng([shard, sample, 1]).random(len(ROWS)) > 0.34
        # All have depth; the first sample has nothing else.
        there = [row.field for row, one in zip(ROWS, drawn, strict=True) if one and (shard, sample) != (0, 0)]
        return {"png", "valid.png", "depth_zbuffer.png", *there}

    def read(self, shard: int, sample: int) -> RawSample:
        rng = np.random.default_rng([shard, sample])
        size = (int(rng.integers(20, 40)), 30)
        made = {"png": png(rng.integers(256, size=(*size, 3), dtype=np.uint8))}
        made["valid.png"] = mask_png(torch.from_numpy(rng.random(size) < 0.8))
        made |= {row.field: label_bytes(row, size, rng) for row in ROWS}
        fields = self.fields(shard, sample)
        return RawSample(f"{shard}-{sample}", {name: data for name, data in made.items() if name in fields}, f"shard-{shard}.tar")


def open_store(folder: Path) -> Any:
    return SetStore(folder) if folder.parts[-2] == "rooms" else MemoryStore(folder)


def set_tasks(**changes: Any) -> dict[str, TaskSpec]:
    transform = {"crop": (16, 24), "zoom": (0.7, 1.3)} | changes.pop("transform", {})
    images = {"data": "rooms", "batch_size": 8, "transform": transform} | changes
    return {name: SetTask.model_validate(completed_set_task(name, {"set": "rooms"}, {"rooms": images})) for name in NAMES}


def set_plan(**changes: Any) -> LoaderPlan:
    return plan(**({"tasks": set_tasks(), "open_store": open_store} | changes))


def pairs_of(ranks: list[Batch]) -> dict[tuple[str, str], list[Any]]:
    """(task, key) -> everything that counts of it, over all ranks: targets and image."""
    found: dict[tuple[str, str], list[Any]] = {}
    for batch in ranks:
        sub = batch["rooms"]
        assert sub.rows is not None
        for task, (index_B, counted) in sub.rows.items():
            for row, place in enumerate(index_B[:counted].tolist()):
                target = {name: values[row] for name, values in sub.targets[task].items()}
                assert (task, sub.keys[place]) not in found
                found[task, sub.keys[place]] = [target, sub.images_BCHW[place]]
    return found


def step_of(step: int, **changes: Any) -> list[Batch]:
    whole = set_plan(**changes)
    return [
        StepDataset(replace(whole, rank=rank))[step * whole.accumulation + micro]
        for micro in range(whole.accumulation)
        for rank in range(whole.world)
    ]


# ---------------------------------------------------------------- training


def test_a_batch_is_what_types_py_says() -> None:
    (batch,) = step_of(0)
    assert list(batch) == ["rooms"]
    sub = batch["rooms"]
    assert sub.images_BCHW.shape == (8, 3, 16, 24) and sub.images_BCHW.dtype == torch.uint8
    assert sub.rows is not None and tuple(sub.rows) == tuple(sub.targets) == NAMES and sub.meta == ({},) * 8
    for task, entries in sub.targets.items():
        rows = sub.rows[task]
        store = SetStore(Path("."))
        having = [TARGETS[task].field in store.fields(*map(int, key.split("-"))) for key in sub.keys]
        assert rows.index_B.tolist() == [place for place, has in enumerate(having) if has] and rows.counted == sum(having)
        assert all(len(values) == rows.counted for values in entries.values())
    shapes = {task: {name: tuple(values.shape[1:]) for name, values in entries.items()} for task, entries in sub.targets.items()}
    assert shapes == {
        "class_scene": {"probabilities": (365,), "valid": ()},
        "depth_zbuffer": {"values": (1, 16, 24), "valid": (16, 24)},
        "normal": {"values": (3, 16, 24), "valid": (16, 24)},
        "segment_unsup2d": {"labels": (16, 24)},
        "semseg": {"labels": (16, 24)},
        "sal": {"values": (16, 24), "valid": (16, 24)},
    }


@pytest.mark.parametrize("changes", [{"world": 2}, {"world": 4}, {"accumulation": 2}, {"world": 4, "accumulation": 2}])
def test_what_counts_is_the_same_for_any_cut(changes: dict[str, int]) -> None:
    for step in (0, 1, 5):
        cut, whole = step_of(step, **changes), step_of(step)
        expected, found = pairs_of(whole), pairs_of(cut)
        assert set(found) == set(expected) and len(found) > 20
        for pair, content in expected.items():
            assert_equal(found[pair], content)
        world = changes.get("world", 1)
        for start in range(0, len(cut), world):
            all_rows = [batch["rooms"].rows or {} for batch in cut[start : start + world]]
            lengths = [{task: len(rows.index_B) for task, rows in of_rank.items()} for of_rank in all_rows]
            assert lengths[0] and lengths == lengths[:1] * world, "shapes are the same on every rank"


def test_rows_that_fill_up_have_no_valid_label() -> None:
    filled = 0
    for step in range(4):
        for batch in step_of(step, world=4):
            sub = batch["rooms"]
            assert sub.rows is not None
            for task, (index_B, counted) in sub.rows.items():
                filled += len(index_B) - counted
                entries = sub.targets[task]
                if "valid" in entries:
                    assert not entries["valid"][counted:].any()
                    assert entries["valid"][:counted].any() or counted == 0
                else:
                    assert (entries["labels"][counted:] == (255 if task == "semseg" else -1)).all()
    assert filled > 0


def test_an_epoch_shows_every_image_once_whatever_the_ranks() -> None:
    batches = [batch["rooms"] for step in range(3) for batch in step_of(step, world=2)]
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == 24 and set(keys) == {f"{shard}-{sample}" for shard, sample in PLACES}


def test_resume_and_workers_give_the_same_batches() -> None:
    through = list(train_loader(set_plan(world=2, rank=1), 0, 5, workers=0))
    assert_equal(list(train_loader(set_plan(world=2, rank=1), 3, 5, workers=2)), through[3:])


def test_only_some_of_a_sets_tasks_see_the_same_images() -> None:
    some = {name: spec for name, spec in set_tasks().items() if name in ("normal", "semseg")}
    (all_tasks,), (two,) = step_of(2), step_of(2, tasks=some)
    assert tuple(two["rooms"].targets) == ("normal", "semseg")
    assert_equal(two["rooms"].images_BCHW, all_tasks["rooms"].images_BCHW)
    for task in some:
        assert_equal(two["rooms"].targets[task], all_tasks["rooms"].targets[task])


def test_sets_and_tasks_share_steps_by_stream() -> None:
    both = {"digits": classification(sampling_weight=1.0), **set_tasks(sampling_weight=3.0)}
    packed = StepDataset(set_plan(tasks=both))[0]
    assert list(packed) == ["digits", "rooms"] and packed["digits"].rows is None
    assert_equal(packed["digits"], StepDataset(plan(tasks={"digits": both["digits"]}))[0]["digits"])
    weighted = StepDataset(set_plan(tasks=both, sampling="weighted"))
    seen = [list(weighted[step]) for step in range(24)]
    assert all(len(names) == 1 for names in seen) and 12 < seen.count(["rooms"]) < 24
    assert set_plan(tasks=both).sampling_weights == {"digits": 1.0, "rooms": 3.0}


def test_pinning_reaches_rows_and_the_targets_of_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def fake_pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor.clone()

    (batch,) = step_of(0)
    monkeypatch.setattr(Tensor, "pin_memory", fake_pin)
    parcel = pin_memory(_Parcel(batch))
    assert_equal(parcel.content, batch)
    # Image, area, rows of six tasks; two of their targets have one tensor, four have two.
    assert len(pinned) == 1 + 1 + 6 + 2 + 8


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("task", ["semseg", "depth_zbuffer"])
def test_evaluation_meets_each_sample_that_has_the_label_once(task: str, world: int) -> None:
    store = SetStore(Path("."))
    expected = [f"{shard}-{sample}" for shard, sample in PLACES if TARGETS[task].field in store.fields(shard, sample)]
    assert (len(expected) == 24) == (task == "depth_zbuffer")
    keys, shapes = [], []
    for rank in range(world):
        batches = list(eval_batches(set_plan(world=world, rank=rank), task, "val", 2))
        shapes.append([len(batch.keys) for batch in batches])
        for batch in batches:
            assert batch.rows is None and all(len(values) == len(batch.keys) for values in batch.targets.values())
            assert batch.images_BCHW.shape[1:] == (3, 16, 24)
            for meta, key in zip(batch.meta, batch.keys, strict=True):
                keys += [key] if meta["valid"] else []
    assert keys == expected and all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize("score_at", ["input", "original"])
def test_what_a_metric_is_given(score_at: str) -> None:
    tasks = set_tasks(transform={"crop": (40, 40), "score_at": score_at})
    for name in NAMES:
        for batch in eval_batches(set_plan(tasks=tasks), name, "val", 4):
            for place, meta in enumerate(batch.meta):
                assert set(meta) == {"valid", "size", "canvas", "label", "window"} and meta["canvas"] == (40, 40)
                at = (40, 40) if score_at == "input" else meta["size"]
                assert list(meta["label"]) == list(batch.targets)
                for entry, values in meta["label"].items():
                    assert name == "class_scene" or tuple(values.shape[-2:]) == at
                    if score_at == "input":
                        assert torch.equal(values, batch.targets[entry][place])
                if score_at == "original":
                    top, left, height, width = meta["window"]
                    assert (height, width) == meta["size"]
                    if name == "semseg":
                        shown = batch.targets["labels"][place, top : top + height, left : left + width]
                        assert torch.equal(shown, meta["label"]["labels"])


def test_an_image_that_the_crop_cannot_show_is_named() -> None:
    small = set_plan(tasks=set_tasks(transform={"score_at": "original"}))
    words = r"shard-0.tar: sample '0-0', field 'image': the image of \d+x30 is larger than transform.crop 16x24"
    with pytest.raises(UserError, match=words):
        list(eval_batches(small, "depth_zbuffer", "val", 4))


# ---------------------------------------------------------------- decoding


SMALL = png(np.zeros((8, 9), dtype=np.uint8))


def broken(field: str, data: bytes) -> RawSample:
    raw = SetStore(Path(".")).read(2, 3)
    rng = np.random.default_rng(0)
    size = decode_image_of(raw).shape[1:]
    labels = {row.field: label_bytes(row, (size[0], size[1]), rng) for row in ROWS}
    return raw._replace(fields=raw.fields | labels | {field: data})


@pytest.mark.parametrize(
    ("field", "data", "words"),
    [
        ("normal.png", b"", "field 'normal.png': the map cannot be decoded ("),
        ("depth_zbuffer.png", SMALL, "field 'depth_zbuffer.png': the map cannot be decoded (PNG of 8-bit grey"),
        ("sal.png", SMALL, "field 'sal.png': the map is 8x9 but the image is"),
        ("valid.png", SMALL, "field 'valid.png': the map is 8x9 but the image is"),
        ("semseg.png", None, "field 'semseg.png': class 21 is out of range, the target has 21 classes (0-based, or 255)"),
        ("class_scene.npy", npy_bytes(torch.zeros(364)), "field 'class_scene.npy': .npy of float32 with shape (364,)"),
        ("class_scene.npy", b"junk", "field 'class_scene.npy': not a .npy file"),
    ],
)
def test_broken_labels_are_named(field: str, data: bytes | None, words: str) -> None:
    whole = broken("x", b"")
    size = decode_image_of(whole).shape[1:]
    wrong = png(np.full(tuple(size), 21, dtype=np.uint8)) if data is None else data
    with pytest.raises(UserError) as caught:
        decode_set_sample(broken(field, wrong), ROWS)
    message = str(caught.value)
    assert message.startswith("shard-2.tar: sample '2-3', ") and words in message and "\n" not in message


def test_only_what_is_wanted_is_decoded() -> None:
    raw = broken("normal.png", b"broken")
    sample = decode_set_sample(raw, [TARGETS["semseg"], TARGETS["keypoints2d"]])
    assert list(sample.targets) == ["semseg"] and sample.valid is None, "nothing masked is wanted"
    assert sample.targets["semseg"].shape == (1, *sample.image.shape[1:])
    depth = decode_set_sample(raw, [TARGETS["depth_zbuffer"]])
    assert depth.valid is not None and depth.valid.dtype == torch.bool and not depth.valid.all()
    full = raw._replace(fields=raw.fields | {"valid.png": mask_png(torch.ones(sample.image.shape[1:], dtype=torch.bool))})
    assert decode_set_sample(full, [TARGETS["depth_zbuffer"]]).valid is None
    unmasked = raw._replace(fields={name: data for name, data in raw.fields.items() if name != "valid.png"})
    assert decode_set_sample(unmasked, [TARGETS["depth_zbuffer"]]).valid is None


def test_an_image_without_labels_can_be_predicted() -> None:
    raw = SetStore(Path(".")).read(0, 0)
    spec = set_tasks()["normal"]
    ready = scored(raw._replace(fields={"png": raw.fields["png"]}), spec, set_plan().pixels)
    assert ready.image.shape == (3, 16, 24) and ready.target == {} and ready.meta["label"] is None


# ---------------------------------------------------------------- checks


def test_good_plan_passes() -> None:
    check_data(set_plan(world=2, accumulation=2))
    assert set_plan().classes("semseg", "train")[15] == "person" and len(set_plan().classes("class_scene", "train")) == 365
    assert set_plan(tasks={"digits": classification()}).classes("digits", "val") == ["a", "b", "c"]


def test_mismatches_are_refused_before_training() -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(UserError) as caught:
            check_data(set_plan(**changes))
        assert words in str(caught.value) and "\n" not in str(caught.value)

    refused("sets.rooms.batch_size: 8 images cannot be divided over 3 ranks", world=3)
    crop = "sets.rooms.transform.crop: 16 x 20 px; expected multiples of the patch size 8"
    refused(crop, tasks=set_tasks(transform={"crop": (16, 20)}))
    refused("sets.rooms.transform.zoom: 1.5 to 1.0", tasks=set_tasks(transform={"zoom": (1.5, 1.0)}))
    refused("sets.rooms.transform.resize: 0 x 8 px; expected 1 or more", tasks=set_tasks(transform={"resize": (0, 8)}))
    larger = {"resize": (24, 24), "score_at": "original"}
    refused("sets.rooms.transform.resize: 24 x 24 px is larger than crop 16 x 24", tasks=set_tasks(transform=larger))
    missing = SetTask.model_validate(completed_set_task("edge", {"set": "rooms"}, {"rooms": {"data": "rooms", "batch_size": 8}}))
    refused("tasks.edge.target: no sample of memory/rooms/train has edge; they have class_scene, depth", tasks={"edge": missing})
    refused("sets.rooms.data: memory/digits/train holds classification shards", tasks=set_tasks(data="digits"))
    wrong = classification(data="rooms")
    refused("tasks.a.kind: the recipe says classification, but memory/rooms/train holds multilabel", tasks={"a": wrong})


def test_benches_take_a_set_as_a_whole() -> None:
    both = {"digits": classification(), **set_tasks(transform={"photometric": True})}
    cases = {case.name: case for case in cases_of(set_plan(tasks=both), 20)}
    alone = ["digits, plain", "digits", "rooms, plain", "rooms"]
    assert list(cases) == [*alone, "digits, plain, worker", "all tasks", "all tasks, worker"]
    plain = cases["rooms, plain"]
    assert tuple(plain.plan.tasks) == NAMES and plain.steps == range(3) and plain.plan.streams == {"rooms": NAMES}
    assert not any(spec.transform.photometric for spec in plain.plan.tasks.values() if isinstance(spec, SetTask))
    assert cases["rooms"].beyond == "read, maps decoded, zoom, crop to 16 x 24 px of all, flip, photometric distortion, batch"
    steps = like_steps(set_plan(tasks=both, sampling="weighted"), rounds=2, cases=2)
    schedule = TaskSchedule("weighted", 3, {"digits": 1.0, "rooms": 1.0})
    kinds = [schedule.active(step) for step in steps]
    assert len(set(steps)) == 4 and kinds[::2] == kinds[1::2]


# ---------------------------------------------------------------- with real shards


def test_from_a_datasets_files_to_batches(tmp_path: Path) -> None:
    src = taskonomy_files.taskonomy(tmp_path / "src")
    (tmp_path / "src/normal/taskonomy/ackley/point_9_view_1_domain_normal.png").unlink()
    for split in ("train", "val"):
        convert("taskonomy", src, tmp_path / "rooms", split, samples_per_shard=2, options=Options("tiny", None), progress=False)
    names = taskonomy_files.ALL
    images = {"data": "rooms", "batch_size": 4, "transform": {"crop": (32, 32), "resize": (32, 40)}}
    tasks: dict[str, TaskSpec] = {
        name: SetTask.model_validate(completed_set_task(name, {"set": "rooms"}, {"rooms": images})) for name in names
    }
    real = replace(plan(tasks=tasks, root=tmp_path), open_store=LoaderPlan.open_store)
    check_data(real)
    batches = list(train_loader(real, 0, 3, workers=2))
    assert_equal(batches[1:], list(train_loader(real, 1, 3, workers=0)))
    lacking = 0
    for sub in (batch["rooms"] for batch in batches):
        assert sub.rows is not None and tuple(sub.rows) == names
        for task, rows in sub.rows.items():
            without = sub.keys.count("ackley/point_9_view_1") if task == "normal" else 0
            assert rows.counted == len(sub.keys) - without
            lacking += without
    assert lacking, "the view without normals was among them"
    for task in names:
        (batch,) = eval_batches(real, task, "val", 16)
        assert sorted(batch.keys) == ["corozal/point_10_view_0", "corozal/point_9_view_1"]
    assert len(next(iter(eval_batches(real, "normal", "train", 16))).keys) == 4
    depth = next(iter(eval_batches(real, "depth_zbuffer", "val", 16))).meta[0]["label"]
    # The hole is columns 10 to 19 of rows 0 to 4; the canvas begins at column 4.
    assert not depth["valid"][:5, 6:16].any() and int(depth["valid"].sum()) == 32 * 32 - 50
    two = replace(real, tasks={name: tasks[name] for name in ("class_scene", "normal")})
    assert sorted(two.store("normal", "val").read(0, 0).fields) == ["normal.png", "png", "valid.png"]  # nothing else is read
    for store in (two.train_store("normal"), pickle.loads(pickle.dumps(two.train_store("normal")))):
        read = {field for shard in range(3) for field in store.read(shard, 0).fields}
        assert read == {"class_scene.npy", "normal.png", "png", "valid.png"}
