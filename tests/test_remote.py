"""Shards by URL: the same batches and the same training as from disk, whatever the server and the cache's bound do."""

import json
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import run_command
from memory import assert_equal, classification, detection, plan, segmentation
from modsquad_ds.data import fetch as fetching
from modsquad_ds.data import shards
from modsquad_ds.data.convert import convert
from modsquad_ds.data.loader import StepDataset, eval_batches, train_loader
from modsquad_ds.data.loader_plan import LoaderPlan, check_data
from modsquad_ds.data.quickstart import build
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import evaluate
from modsquad_ds.location import Url, data_option, location
from modsquad_ds.model.network import build_network
from modsquad_ds.model_file import ModelFile, recipe_on, write_model
from modsquad_ds.plan import check_same_shards
from modsquad_ds.usage import usage
from small import small_recipe
from test_loader_data import write_datasets
from web import Web, cache, serve

STEPS = 5


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of eight images in four shards each, splits `train` and `val`."""
    folder = tmp_path_factory.mktemp("remote")
    write_datasets(folder)
    for layout, source, name in (("imagenet", "i", "digits"), ("coco", "c", "scenes"), ("ade20k", "a", "textures")):
        for split in ("train", "val"):
            convert(layout, folder / source, folder / name, "train", samples_per_shard=2, progress=False)
            if split == "train":
                (folder / name / "train").rename(folder / name / "kept")
        (folder / name / "train").rename(folder / name / "val")
        (folder / name / "kept").rename(folder / name / "train")
    return folder


@pytest.fixture
def web(data: Path) -> Iterator[Web]:
    with serve(data) as server:
        yield server


def plan_of(root: Path | str, folder: Path | None = None, **changes: Any) -> LoaderPlan:
    """Three tasks from a folder, or from a URL with the cache in `folder`."""
    specs = {
        "digits": classification(num_classes=2),
        "scenes": detection(num_classes=2),
        "textures": segmentation(num_classes=3, batch_size=4, batch_size_per_rank=None),
    }
    kept = cache(folder, **changes) if folder is not None else LoaderPlan.cache
    return replace(plan(tasks=specs, root=location(root)), open_store=LoaderPlan.open_store, cache=kept)


@pytest.fixture(scope="module")
def expected(data: Path) -> list[Any]:
    return list(train_loader(plan_of(data), 0, STEPS, 0))


def tars(web: Web) -> dict[str, int]:
    return {name: number for name, number in web.requests.items() if name.endswith((".tar", ".index.json"))}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_disk(workers: int, web: Web, expected: list[Any], tmp_path: Path) -> None:
    remote = plan_of(web.url, tmp_path / "c")
    check_data(remote)
    assert not tars(web)
    assert_equal(list(train_loader(remote, 0, STEPS, workers)), expected)
    assert tars(web) == {
        f"{task}/train/shard-{i:05d}{end}": 1
        for task in ("digits", "scenes", "textures") for i in range(4) for end in (".tar", ".index.json")
    }  # fmt: skip
    # Once per process and split; workers have their parent's.
    assert {web.requests[f"{task}/{split}/index.json"] for task in remote.tasks for split in ("train", "val")} == {1}


def test_what_a_sample_has_is_known_without_its_tar(web: Web, data: Path, tmp_path: Path) -> None:
    store = plan_of(web.url, tmp_path / "c").store("scenes", "val")
    assert [store.fields(1, sample) for sample in (0, 1)] == [{"png", "json"}] * 2
    assert tars(web) == {"scenes/val/shard-00001.index.json": 1}
    assert store.read(1, 1) == ShardSet(data / "scenes/val").read(1, 1)._replace(shard=f"{web.url}/scenes/val/shard-00001.tar")


def test_the_same_batches_for_evaluation(web: Web, data: Path, tmp_path: Path) -> None:
    for task in ("digits", "scenes", "textures"):
        remote = list(eval_batches(plan_of(web.url, tmp_path / "c"), task, "val", 3, workers=2))
        assert_equal(remote, list(eval_batches(plan_of(data), task, "val", 3)))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_cache_of_one_shard_is_slow_but_right(ahead: int, web: Web, data: Path, expected: list[Any], tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in data.rglob("*/train/*.tar"))
    remote = plan_of(web.url, tmp_path / "c", gigabytes=1.1 * largest / 1e9, ahead=ahead)
    found = []
    for batch in train_loader(remote, 0, STEPS, 2):
        found.append(batch)
        assert sum(path.stat().st_size for path in (tmp_path / "c").glob("*.data")) <= 1.1 * largest
    assert_equal(found, expected)
    assert max(tars(web).values()) > 1
    with pytest.raises(UserError, match=r"cache.gigabytes: .* GB hold no file of .* GB, which http.*tar is; raise it"):
        check_data(plan_of(web.url, tmp_path / "c", gigabytes=0.9 * largest / 1e9))


def test_faults_on_the_way_change_nothing(web: Web, expected: list[Any], tmp_path: Path) -> None:
    for i, fault in enumerate(("stall", "drop", "corrupt", 500)):
        web.faults[f"digits/train/shard-{i:05d}.tar"] = [fault]
        web.faults[f"scenes/train/shard-{i:05d}.index.json"] = [fault]
    web.faults["textures/train/index.json"] = ["drop", 503]
    assert_equal(list(train_loader(plan_of(web.url, tmp_path / "c"), 0, STEPS, 2)), expected)


def test_commands_give_the_same_batches(data: Path, expected: list[Any], tmp_path: Path) -> None:
    remote = plan_of(f"pipe:cat {data}/{{}}", tmp_path / "c")
    assert_equal(list(train_loader(remote, 0, STEPS, 0)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_had_is_named(workers: int, web: Web, tmp_path: Path) -> None:
    name = "digits/train/shard-00002.tar"
    web.always[name] = "corrupt"
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(train_loader(plan_of(web.url, tmp_path / "c"), 0, STEPS, workers))
    assert f"{web.url}/{name}: cannot be fetched (3 tries" in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - started < 30


def test_what_is_no_shard_folder(web: Web, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/digits/train/index.json: cannot be fetched \(3 tries .*error: 404"):
        check_data(plan_of(f"{web.url}/none", tmp_path / "c"))


def test_shards_are_fetched_before_they_are_read(web: Web, tmp_path: Path) -> None:
    store = ShardSet(Url(f"{web.url}/digits/train"), cache=cache(tmp_path / "c"))
    for _ in range(2):
        store.announce([2, 0, 3])
    wait_for(tmp_path / "c", 6)
    for shard in (2, 0, 3):
        assert store.read(shard, 0)
    assert web.requests == {f"digits/train/{name}": 1 for name in files_of([2, 0, 3])}


def test_a_fork_has_a_thread_of_its_own(web: Web, tmp_path: Path) -> None:
    store = ShardSet(Url(f"{web.url}/scenes/train"), cache=cache(tmp_path / "c"))
    store.announce([0])
    wait_for(tmp_path / "c", 2)
    child = multiprocessing.get_context("fork").Process(target=announce_and_wait, args=(store, tmp_path / "c"))
    child.start()
    child.join(30)
    assert child.exitcode == 0


def announce_and_wait(store: ShardSet, folder: Path) -> None:
    store.announce([1, 2])
    wait_for(folder, 6)


def files_of(numbers: list[int]) -> list[str]:
    return ["index.json", *(f"shard-{shard:05d}{end}" for shard in numbers for end in (".tar", ".index.json"))]


def wait_for(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 20
    while len(list(folder.glob("*.data"))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_pickled_set_keeps_its_index(web: Web, tmp_path: Path) -> None:
    """So that workers that do not fork go by what their parent has checked."""
    store = ShardSet(Url(f"{web.url}/digits/val"), cache=cache(tmp_path / "c"))
    web.always["digits/val/index.json"] = 404
    shards._fetched_index.cache_clear()
    again = pickle.loads(pickle.dumps(store))
    assert again.read(1, 0) == store.read(1, 0) and again.cache == store.cache and again.fingerprint == store.fingerprint


def test_what_changes_at_the_url_is_another_file(data: Path, tmp_path: Path) -> None:
    """Two sets of shards one after the other at the same place, with the same names and one cache."""
    (tmp_path / "at").symlink_to(data / "digits" / "train")
    with serve(tmp_path) as web:
        store = ShardSet(Url(f"{web.url}/at"), cache=cache(tmp_path / "c"))
        first = store.read(0, 0)
        (tmp_path / "at").unlink()
        (tmp_path / "at").symlink_to(data / "textures" / "train")
        assert store.read(0, 1).key != first.key
        with pytest.raises(UserError, match="damaged on the way, or replaced since the index was read"):
            store.read(1, 0)
        shards._fetched_index.cache_clear()  # as in a new process
        later = ShardSet(Url(f"{web.url}/at"), cache=cache(tmp_path / "c"))
        assert later.kind == "segmentation" and "seg.png" in later.read(0, 0).fields


# ---------------------------------------------------------------- what an index may say


@pytest.mark.parametrize("place", ["folder", "web"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file": "../digits/train/shard-00000.tar"}, "is not the plain name of a .tar file"),
        ({"file": "/etc/passwd"}, "is not the plain name of a .tar file"),
        ({"file": "$(touch x).tar"}, "is not the plain name of a .tar file"),
        ({"file": "-x.tar"}, "is not the plain name of a .tar file"),
        ({"sha256": "../" + "0" * 61}, "has no sha256 of 64 digits"),
        ({"index_sha256": ""}, "has no sha256 of 64 digits"),
        ({"bytes": -1}, "shards.0.bytes: Input should be greater than or equal to 0"),
    ],
)
def test_an_index_leads_nowhere_else(change: dict[str, Any], words: str, place: str, data: Path, tmp_path: Path) -> None:
    tree = json.loads((data / "digits/train/index.json").read_text())
    tree["shards"][0] |= change
    (tmp_path / "train").mkdir()
    (tmp_path / "train/index.json").write_text(json.dumps(tree))
    with serve(tmp_path) as web, pytest.raises(UserError) as caught:
        ShardSet(tmp_path / "train" if place == "folder" else Url(f"{web.url}/train"), cache=cache(tmp_path / "c"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- runs


def test_ranks_that_see_different_shards_do_not_start(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source, layout in (("digits", "i", "imagenet"), ("scenes", "c", "coco"), ("textures", "a", "ade20k")):
        size = 3 if name == "scenes" else 2
        convert(layout, data / source, tmp_path / "other" / name, "train", samples_per_shard=size, progress=False)
    seen: list[Any] = []
    monkeypatch.setattr("modsquad_ds.plan.gather_json", lambda mine: seen.append(mine) or [mine])
    for root in (data, tmp_path / "other"):
        check_same_shards(plan_of(root), ("train",))
    monkeypatch.setattr("modsquad_ds.plan.gather_json", lambda mine: [mine, seen[0]])
    check_same_shards(plan_of(data), ("train",))
    monkeypatch.setattr("modsquad_ds.plan.gather_json", lambda mine: [mine, seen[1]])
    with pytest.raises(UserError, match=r"^tasks.scenes.data: rank 1 sees other shards than rank 0 in .*/scenes/train: they"):
        check_same_shards(plan_of(data), ("train",))


def test_a_model_files_own_command_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelFile(small_recipe(data_root="pipe:cat {}", **{"cache.folder": "/elsewhere"}), {}, {}, ())
    with pytest.raises(UserError, match=r"tasks.digits.data: the model file names a command .*pipe:cat d/{}; say .*\(--data\)"):
        recipe_on(model, None)
    given = location("pipe:ssh host cat {}")
    assert recipe_on(model, given).data_root == given and recipe_on(model, given).cache.folder is None
    inner = ModelFile(small_recipe(**{"tasks.scenes.data": "pipe:cat {}"}), {}, {}, ())
    with pytest.raises(UserError, match=r"tasks.scenes.data: the model file names a command"):
        recipe_on(inner, tmp_path)
    monkeypatch.setenv("MODSQUAD_TRUST_COMMANDS", "1")
    assert recipe_on(model, None).data_root == location("pipe:cat {}")


SMALL = ["tasks.digits.batch_size=8", "tasks.scenes.batch_size=4", "tasks.textures.batch_size=4", "parallel.ep_size=1"]


def losses(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in record if key.startswith("loss") or key in ("step", "grad_norm")} for record in records]


def test_training_has_the_losses_of_training_from_disk(tmp_path: Path) -> None:
    build(tmp_path / "data")
    with serve(tmp_path / "data/shards") as web:
        web.faults["digits/train/shard-00000.tar"] = ["drop"]
        for place, root in (("disk", str(web.folder)), ("url", web.url)):
            settings = [f"run={tmp_path / place}", f"data_root={root}", f"cache.folder={tmp_path / 'c'}", *SMALL]
            settings += ["train.steps=3", "train.log_every=1", "train.workers=1"]
            done = run_command("train", "quickstart", *settings, cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "url") == losses(tmp_path / "disk") and len(losses(tmp_path / "url")) == 3


def test_evaluation_has_the_metrics_of_evaluation_from_disk(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODSQUAD_SCRATCH", str(tmp_path))
    counts = {"tasks.digits.num_classes": 2, "tasks.scenes.num_classes": 2, "tasks.textures.num_classes": 3}
    folders = {f"tasks.{task}.data": task for task in ("digits", "scenes", "textures")}
    sizes = {"tasks.scenes.transform.eval_canvas": [24, 32], "tasks.textures.transform.resize": [24, 32]}
    recipe = small_recipe(**counts, **folders, **sizes)
    classes = {"digits": ["cat", "dog"], "scenes": ["bird", "fish"], "textures": ["sky", "sea", "sand"]}
    write_model(tmp_path / "model.safetensors", ModelFile(recipe, build_network(recipe).state_dict(), classes, ()))
    found = []
    for data in (str(web.folder), web.url, f"pipe:cat {web.folder}/{{}}"):
        found.append(evaluate(tmp_path / "model.safetensors", data_option(data)))
        usage(tmp_path / "model.safetensors", data_option(data), out=tmp_path / f"usage{len(found)}")
    assert found[0] == found[1] == found[2] and found[0]["textures"]["aAcc"] > 0
    told = [json.loads((tmp_path / f"usage{i}/usage.json").read_text()) for i in (1, 2)]
    assert told[0] == told[1]
    assert (tmp_path / "shard-cache").is_dir()


def test_micro_steps_announce_their_windows(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(ShardSet, "announce", lambda self, upcoming: told.append(tuple(upcoming)))
    remote = replace(plan_of(web.url, tmp_path / "c"), shuffle_window=1)
    dataset = StepDataset(replace(remote, tasks={"textures": remote.tasks["textures"]}))
    for step in range(2):  # four images, so two shards, a step
        dataset[step]
    order = dataset._streams["textures"].order
    read = [order.locate(position).shard for position in (0, 2, 4, 6)]
    assert told == [tuple(read[0:2]), tuple(read[2:4])]
