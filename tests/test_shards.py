"""Shards: plain webdataset reads them, pread gives the same bytes, and damage is named with shard and key."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

import layouts
from layouts import all_samples, by_webdataset, contents, made
from modsquad_ds.data.convert import convert
from modsquad_ds.data.shards import FORMAT, Index, ShardSet, load_index
from modsquad_ds.errors import UserError

# webdataset leaves the tars that it reads to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:webdataset.tariterators")


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("layout", list(layouts.MAKERS))
def test_plain_webdataset_and_pread_give_the_same_bytes(tmp_path: Path, layout: str) -> None:
    folder = made(layout, tmp_path)
    ours = all_samples(ShardSet(folder))
    theirs = by_webdataset(folder)
    assert len(ours) == len(theirs) == {"imagenet": 8, "coco": 4, "ade20k": 4}[layout]
    for sample, other in zip(ours, theirs, strict=True):
        assert sample.key == other["__key__"]
        assert sample.fields == {name: data for name, data in other.items() if not name.startswith("__")}
        assert sample.shard == other["__url__"]


def test_webdataset_decodes_what_was_stored(tmp_path: Path) -> None:
    tars = [str(path) for path in made("ade20k", tmp_path).glob("*.tar")]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "seg.png"))
    assert sorted(key for key, _, _ in samples) == ["ADE_0", "ADE_1", "ADE_2", "ADE_3"]
    for key, image, mask in samples:
        original = Image.open(tmp_path / f"src/images/training/{key}.jpg").convert("RGB")
        assert np.array_equal(np.asarray(image), np.asarray(original))
        assert np.asarray(mask.convert("L"))[0, :5].tolist() == [255, 0, 1, 2, 255]


def test_index_of_coco(tmp_path: Path) -> None:
    index = load_index(made("coco", tmp_path))
    assert (index.format, index.kind, index.layout, index.split) == (FORMAT, "detection", "coco", "train")
    assert index.source == "src"
    assert index.classes == ("dog", "cat")
    assert index.details["category_ids"] == [3, 7]
    assert [entry.samples for entry in index.shards] == [3, 1]
    assert index.num_samples == 4
    assert index.skipped == 0
    assert str(tmp_path) not in index.model_dump_json()


def test_offsets_point_at_the_members(tmp_path: Path) -> None:
    folder = made("imagenet", tmp_path)
    with tarfile.open(folder / "shard-00000.tar") as tar:
        members = {member.name: [member.offset_data, member.size] for member in tar}
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar.getmembers()} == {(0, 0, 0, "")}
    rows = json.loads((folder / "shard-00000.index.json").read_text())
    assert {f"{row['key']}.{field}": place for row in rows for field, place in row["fields"].items()} == members


def test_long_and_foreign_names(tmp_path: Path) -> None:
    name = "ж" * 60 + "x" * 120
    layouts.save(layouts.picture(), tmp_path / "src/train/класс" / f"{name}.jpg")
    convert("imagenet", tmp_path / "src", tmp_path / "out", "train", progress=False)
    sample = ShardSet(tmp_path / "out/train").read(0, 0)
    (other,) = by_webdataset(tmp_path / "out/train")
    assert sample.key == other["__key__"] == f"класс/{name}"
    assert sample.fields["jpg"] == other["jpg"] == (tmp_path / "src/train/класс" / f"{name}.jpg").read_bytes()


def test_shards_mix_the_classes(tmp_path: Path) -> None:
    layouts.imagenet(tmp_path / "src", per_class=64)
    convert("imagenet", tmp_path / "src", tmp_path / "out", "train", samples_per_shard=32, progress=False)
    shards = ShardSet(tmp_path / "out/train")
    for shard, size in enumerate(shards.shard_sizes):
        ones = sum(shards.read(shard, place).fields["cls"] == b"1" for place in range(size))
        assert 6 <= ones <= 26  # 16 expected; sorted by class it would be 0 or 32


def test_same_bytes_on_every_run_and_with_any_number_of_workers(tmp_path: Path) -> None:
    first = contents(made("imagenet", tmp_path))
    for workers in (1, 2):
        out = tmp_path / f"again{workers}"
        convert("imagenet", tmp_path / "src", out, "train", samples_per_shard=3, workers=workers, progress=False)
        assert contents(out / "train") == first


def test_nothing_else_remains(tmp_path: Path) -> None:
    folder = made("imagenet", tmp_path)
    assert sorted(os.listdir(folder.parent)) == ["train"]
    assert sorted(os.listdir(folder)) == sorted(
        ["index.json", *(f"shard-{i:05d}{end}" for i in range(3) for end in (".tar", ".index.json"))]
    )

# ---------------------------------------------------------------- reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made("imagenet", tmp_path)


def test_shard_set(folder: Path) -> None:
    shards = ShardSet(folder)
    assert len(shards) == 8
    assert shards.kind == "classification"
    assert shards.classes == ("n01", "n02")
    assert shards.shard_sizes == [3, 3, 2]
    assert isinstance(shards.index, Index)
    assert {sample.key for sample in all_samples(shards)} == {f"{c}/{c}_{i}" for c in ("n01", "n02") for i in range(4)}
    for shard in range(3):
        shards.verify(shard)
    with pytest.raises(IndexError):
        shards.read(0, 3)


def test_few_descriptors_stay_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    shards = ShardSet(folder, open_shards=2)
    for _ in range(3):
        all_samples(shards)
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_reading_from_threads_while_shards_are_evicted(folder: Path) -> None:
    shards = ShardSet(folder, open_shards=1)
    expected = [sample.fields for sample in all_samples(shards)]
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: [sample.fields for sample in all_samples(shards)], range(20)):
            assert found == expected


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_other_processes_read_too(folder: Path, method: str) -> None:
    """fork inherits the open files, forkserver (as spawn) gets the pickled path."""
    shards = ShardSet(folder)
    expected = all_samples(shards)
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        found = [
            pool.submit(shards.read, shard, place) for shard, size in enumerate([3, 3, 2]) for place in range(size)
        ]
        assert [future.result(timeout=60) for future in found] == expected
    assert all_samples(shards) == expected


def test_pickle_is_the_path(folder: Path) -> None:
    shards = ShardSet(folder)
    all_samples(shards)
    data = pickle.dumps(shards)
    assert len(data) < 600
    assert all_samples(pickle.loads(data)) == all_samples(shards)


def test_truncated_shard_names_the_first_key_lost(folder: Path) -> None:
    tar = folder / "shard-00001.tar"
    rows = json.loads((folder / "shard-00001.index.json").read_text())
    offset, size = rows[1]["fields"]["cls"]
    os.truncate(tar, offset + size - 1)
    with pytest.raises(UserError, match=rf"shard-00001.tar: truncated to .*, first key lost is '{rows[1]['key']}'"):
        ShardSet(folder)


def test_shard_without_its_end_marker(folder: Path) -> None:
    tar = folder / "shard-00001.tar"
    os.truncate(tar, tar.stat().st_size - 512)
    with pytest.raises(UserError, match=r"shard-00001.tar: truncated .*no sample is lost"):
        ShardSet(folder)


def test_shard_truncated_after_opening(folder: Path) -> None:
    shards = ShardSet(folder)
    key = shards.read(1, 1).key
    os.truncate(folder / "shard-00001.tar", 600)
    with pytest.raises(UserError, match=rf"shard-00001.tar, key '{key}', field '(jpg|png)': cut off after 0 of "):
        shards.read(1, 1)


def test_missing_shard(folder: Path) -> None:
    (folder / "shard-00002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00002.tar: No such file or directory; index.json lists it"):
        ShardSet(folder)


def test_shard_removed_after_opening(folder: Path) -> None:
    shards = ShardSet(folder)
    (folder / "shard-00002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00002.tar: cannot be opened \(No such file or directory\)"):
        shards.read(2, 0)


def test_shard_whose_file_system_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the restart of a file server."""
    shards = ShardSet(folder)
    key = shards.read(1, 0).key

    def fail(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=rf"shard-00001.tar, key '{key}', field '\w+': cannot be read \(Stale file handle\)"):
        shards.read(1, 0)


def test_longer_shard(folder: Path) -> None:
    with open(folder / "shard-00000.tar", "ab") as tar:
        tar.write(b"x")
    with pytest.raises(UserError, match=r"shard-00000.tar: has \d+ bytes, index.json says \d+"):
        ShardSet(folder)


def test_changed_bytes(folder: Path) -> None:
    with open(folder / "shard-00000.tar", "r+b") as tar:
        tar.seek(700)
        tar.write(b"?")
    shards = ShardSet(folder)
    with pytest.raises(UserError, match=r"shard-00000.tar: content differs from its checksum"):
        shards.verify(0)
    shards.verify(1)


def test_changed_or_missing_member_index(folder: Path) -> None:
    path = folder / "shard-00000.index.json"
    shards = ShardSet(folder)
    path.write_text(path.read_text().replace("n01", "n09"))
    with pytest.raises(UserError, match=r"shard-00000.index.json: is not the file that index.json describes"):
        shards.read(0, 0)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00000.index.json: cannot be read \(No such file or directory\)"):
        shards.read(0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "shard format 2, this program reads format 1"),
        ({"kind": "depth"}, "kind 'depth', expected one of classification, detection, segmentation"),
        ({"num_samples": "many"}, "index.json: num_samples: Input should be a valid integer"),
        ({"colour": "red"}, "index.json: colour: Extra inputs are not permitted"),
    ],
)
def test_wrong_index(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        ShardSet(folder)


def test_unreadable_index_and_missing_folders(folder: Path) -> None:
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json: not JSON .*make the shards again: python -m modsquad_ds shards"):
        ShardSet(folder)
    (folder / "index.json").unlink()
    with pytest.raises(
        UserError, match=r"has no index.json \(no finished shards\): make it with python -m modsquad_ds"
    ):
        ShardSet(folder)
    with pytest.raises(UserError, match=r"gone does not exist: make it with python -m modsquad_ds shards"):
        ShardSet(folder / "gone")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["jpg"], r"key 'k': has no label 'cls', only \['jpg'\]"),
        (["cls"], r"key 'k': has no image among \['cls'\], expected exactly one of jpg, "),
        (["jpg", "png", "cls"], r"key 'k': has \['jpg', 'png'\] among"),
    ],
)
def test_incomplete_samples(folder: Path, fields: list[str], message: str) -> None:
    """A folder written by something else, consistent in itself, whose sample lacks a part."""
    import hashlib

    tar = folder / "shard-00000.tar"
    with tarfile.open(tar, "w") as archive:
        for field in fields:
            member = tarfile.TarInfo(f"k.{field}")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"0"))
    places = {field: [512 + 1024 * number, 1] for number, field in enumerate(fields)}
    rows = json.dumps([{"key": "k", "fields": places}]).encode()
    (folder / "shard-00000.index.json").write_bytes(rows)
    index = json.loads((folder / "index.json").read_text())
    sums = {"sha256": hashlib.sha256(tar.read_bytes()).hexdigest(), "index_sha256": hashlib.sha256(rows).hexdigest()}
    index["shards"] = [{"file": tar.name, "samples": 1, "bytes": tar.stat().st_size, **sums}]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"shard-00000.tar, " + message):
        ShardSet(folder).read(0, 0)
