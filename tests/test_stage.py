"""Shards copied to a disk of the node: whole, once, again when the source is another, and refused where that cannot be."""

import fcntl
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from modsquad_ds.config import Recipe, load_recipe
from modsquad_ds.data.shards import FORMAT
from modsquad_ds.errors import UserError
from modsquad_ds.stage import stage
from small import small_recipe

TASKS = ("digits", "scenes", "textures")
SPLITS = ("train", "val")


def write_shards(folder: Path, content: bytes) -> None:
    """Two shards and their indices, as far as copying looks at them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number in (0, 1):
        name, data = f"shard-{number:05d}", content * (number + 1)
        (folder / f"{name}.tar").write_bytes(data)
        (folder / f"{name}.index.json").write_text("[]")
        sums = {"sha256": hashlib.sha256(data).hexdigest(), "index_sha256": hashlib.sha256(b"[]").hexdigest()}
        entries.append({"file": f"{name}.tar", "samples": 1, "bytes": len(data), **sums})
    index = {
        "format": FORMAT, "tool": "t", "kind": "classification", "layout": "imagenet", "source": "s", "split": folder.name,
        "classes": ["a"], "details": {}, "num_samples": 2, "skipped": 0, "skipped_samples": [], "shards": entries,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for task in TASKS:
        for split in SPLITS:
            write_shards(tmp_path / "shards" / task / split, f"{task} {split}".encode())
    return load_recipe("quickstart", [f"data_root={tmp_path / 'shards'}"])


def files(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden, by its path."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_copy_is_the_source_and_is_made_once(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "disk"
    assert stage(recipe, to) == to
    assert files(to) == files(recipe.data_root)
    assert len(files(to)) == 5 * len(TASKS) * len(SPLITS)
    assert capsys.readouterr().out.endswith(f"{to} has 6 folders of shards, 6 of them new\n")
    stage(recipe, to)
    assert capsys.readouterr().out.endswith("0 of them new\n")
    write_shards(recipe.data_root / "scenes/train", b"other")
    stage(recipe, to)
    assert capsys.readouterr().out.endswith("1 of them new\n")
    assert files(to) == files(recipe.data_root)


def test_only_tasks_that_learn_are_copied(recipe: Recipe, tmp_path: Path) -> None:
    stage(load_recipe("quickstart", [f"data_root={recipe.data_root}", "only=[scenes]"]), tmp_path / "disk")
    assert {name.split("/")[0] for name in files(tmp_path / "disk")} == {"scenes"}


def test_shard_that_is_not_whole_leaves_no_copy(recipe: Recipe, tmp_path: Path) -> None:
    shard = recipe.data_root / "scenes/train/shard-00001.tar"
    os.truncate(shard, 3)
    with pytest.raises(UserError, match=rf"{shard}: 3 bytes, 24 in its index"):
        stage(recipe, tmp_path / "disk")
    assert not (tmp_path / "disk/scenes/train").exists()
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.tar to .*: No such file"):
        stage(recipe, tmp_path / "disk")
    assert not (tmp_path / "disk/scenes/train").exists() and (tmp_path / "disk/digits/train").exists()


def test_what_cannot_be_copied_is_named(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"data_root={recipe.data_root}", f"tasks.scenes.data={recipe.data_root}/scenes"]
    with pytest.raises(UserError, match=r"tasks\.scenes\.data .*: give it relative to data_root"):
        stage(load_recipe("quickstart", settings), tmp_path / "disk")
    with pytest.raises(UserError, match=r"stage: sets\.taskonomy\.data /shards: give it relative to data_root"):
        stage(load_recipe("taskonomy", ["sets.taskonomy.data=/shards"]), tmp_path / "node")
    for by_url in ("data_root=https://host/shards", "tasks.digits.data=s3://bucket/digits"):
        with pytest.raises(UserError, match=r"tasks\.digits\.data .*://.*/digits: shards that come by URL are kept on each node"):
            stage(load_recipe("quickstart", [f"data_root={recipe.data_root}", by_url]), tmp_path / "disk")
    views = {"sets": {"views": {"data": "/views", "batch_size": 2}}, "tasks": {"normal": {"set": "views"}}}
    with pytest.raises(UserError, match=r"sets\.views\.data /views: give it relative to data_root"):
        stage(small_recipe(**views), tmp_path / "disk")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/digits cannot be written to"):
        stage(recipe, tmp_path / "file")
    usage = shutil.disk_usage(tmp_path)._replace(free=40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0\.0 GiB free, the train shards of s take"):
        stage(recipe, tmp_path / "disk")
    with pytest.raises(UserError, match="shard folder /nowhere/digits/train does not exist"):
        stage(load_recipe("quickstart", ["data_root=/nowhere"]), tmp_path / "disk")


def test_second_process_waits_and_finds_the_copy(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "disk"
    stage(recipe, to)
    shutil.rmtree(to / "digits/train")
    capsys.readouterr()
    with (to / "digits/.train.wait").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=stage, args=(recipe, to))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not (to / "digits/train").exists()
        shutil.copytree(recipe.data_root / "digits/train", to / "digits/train")
    waiting.join(20)
    assert capsys.readouterr().out.endswith("0 of them new\n")
