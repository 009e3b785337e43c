"""Conversion: bad samples, refusals and killed runs; no failure leaves half a folder."""

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import layouts
from layouts import all_samples, by_webdataset, contents, made
from modsquad_ds.data.convert import convert
from modsquad_ds.data.shards import ShardSet, load_index
from modsquad_ds.data.staging import BusyError, staged_folder
from modsquad_ds.errors import UserError

# webdataset leaves the tars that it reads to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:webdataset.tariterators")


# ---------------------------------------------------------------- bad samples


def spoil(src: Path, count: int) -> None:
    for number in range(count):
        (src / "train/n01" / f"broken_{number:02d}.jpg").write_bytes(b"no image")


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_samples_refuse_the_conversion_and_leave_nothing(tmp_path: Path, workers: int) -> None:
    src = layouts.imagenet(tmp_path / "src")
    spoil(src, 23)
    layouts.save(layouts.picture(), src / "train/n01/a.b.jpg")
    with pytest.raises(UserError) as refused:
        convert("imagenet", src, tmp_path / "deep/out", "train", samples_per_shard=5, workers=workers, progress=False)
    lines = str(refused.value).splitlines()
    assert lines[0] == f"24 bad and 8 good samples in {src} (imagenet, split train):"
    assert lines[1].startswith("  train/n01/a.b.jpg: the name 'n01/a.b' has a dot")
    assert [line.split(":")[0] for line in lines[2:21]] == [f"  train/n01/broken_{i:02d}.jpg" for i in range(19)]
    assert lines[21:] == ["  ... and 4 more", "mend them, or leave them out with --skip-bad"]
    assert sorted(os.listdir(tmp_path)) == ["src"]


def test_skip_bad_goes_on_counts_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = layouts.imagenet(tmp_path / "src")
    spoil(src, 23)
    out = tmp_path / "out"
    index = convert("imagenet", src, out, "train", samples_per_shard=2, skip_bad=True, progress=True)
    assert (index.num_samples, index.skipped) == (8, 23)
    assert index.skipped_samples[0].file == "train/n01/broken_00.jpg"
    assert "does not decode" in index.skipped_samples[0].reason
    assert load_index(out / "train") == index
    printed = capsys.readouterr().out
    assert "8 samples of 2 classes" in printed
    assert "skipped 23 bad samples:" in printed
    assert "train/n01/broken_19.jpg: does not decode" in printed
    assert "... and 3 more" in printed
    # Shards that lost all their samples leave no gap in the numbering.
    shards = ShardSet(out / "train")
    assert 0 not in shards.shard_sizes
    assert [entry.file for entry in index.shards] == [f"shard-{i:05d}.tar" for i in range(len(index.shards))]
    assert sum(shards.shard_sizes) == len(all_samples(shards)) == 8
    assert len(by_webdataset(out / "train")) == 8


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "src/train/n01").mkdir(parents=True)
    (tmp_path / "src/train/n01/x.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable sample: 1 bad and 0 good.*\n  train/n01/x.jpg: is empty"):
        convert("imagenet", tmp_path / "src", tmp_path / "out", "train", skip_bad=True, progress=False)
    layouts.coco(tmp_path / "coco", content={"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]})
    with pytest.raises(UserError, match="no usable sample: 0 bad and 0 good"):
        convert("coco", tmp_path / "coco", tmp_path / "out", "train", progress=False)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- refusals


def test_finished_shards_are_only_replaced_on_request(tmp_path: Path) -> None:
    folder = made("imagenet", tmp_path)
    before = contents(folder)
    with pytest.raises(UserError, match="already holds finished shards: choose another OUT or give --overwrite"):
        made("imagenet", tmp_path)
    spoil(tmp_path / "src", 1)
    with pytest.raises(UserError, match="broken_00"):
        made("imagenet", tmp_path, overwrite=True)
    assert contents(folder) == before  # a failed replacement keeps the old
    (tmp_path / "src/train/n01/broken_00.jpg").unlink()
    made("imagenet", tmp_path, samples_per_shard=8, overwrite=True)
    assert ShardSet(folder).shard_sizes == [8]
    assert os.listdir(folder.parent) == ["train"]


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    src = layouts.imagenet(tmp_path / "src")
    with pytest.raises(UserError, match=r"src/train exists and holds no shards, so it is left alone"):
        convert("imagenet", src, src, "train", overwrite=True, progress=False)
    assert len(list((src / "train").rglob("*.*"))) == 8


def test_splits_must_agree(tmp_path: Path) -> None:
    made("imagenet", tmp_path)
    other = layouts.imagenet(tmp_path / "other", "val")
    (other / "val/n02").rename(other / "val/n03")
    with pytest.raises(UserError, match=r"'val' has other classes than .*first difference at label 1: 'n02' / 'n03'"):
        convert("imagenet", other, tmp_path / "out", "val", progress=False)
    layouts.coco(tmp_path / "coco", "val2017")
    with pytest.raises(UserError, match="holds classification shards, these would be detection"):
        convert("coco", tmp_path / "coco", tmp_path / "out", "val", progress=False)


@pytest.mark.parametrize("split", ["", "a/b", "..", ".hidden"])
def test_names_of_splits(tmp_path: Path, split: str) -> None:
    with pytest.raises(UserError, match="cannot name a folder"):
        convert("imagenet", tmp_path, tmp_path / "out", split, progress=False)


def test_numbers_and_unwritable_places(tmp_path: Path) -> None:
    src = layouts.imagenet(tmp_path / "src")
    with pytest.raises(UserError, match="samples per shard: 0, expected 1 or more"):
        convert("imagenet", src, tmp_path / "out", "train", samples_per_shard=0, progress=False)
    with pytest.raises(UserError, match="workers: -1, expected 1 or more"):
        convert("imagenet", src, tmp_path / "out", "train", workers=-1, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the folder .*/file: File exists"):
        convert("imagenet", src, tmp_path / "file", "train", progress=False)


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "shard-00000.tar")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(UserError, match=r"cannot write .*out/train: No space left on device"):
        made("imagenet", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_splits_is_not_both_training_and_held_out_data(tmp_path: Path) -> None:
    flat = layouts.imagenet(tmp_path / "src") / "train"
    convert("imagenet", flat, tmp_path / "out", "train", progress=False)
    with pytest.raises(UserError, match=r"no folder 'val', so its class folders .* and .*out/train holds the same"):
        convert("imagenet", flat, tmp_path / "out", "val", progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    other = layouts.imagenet(tmp_path / "src", "val", per_class=3) / "val"
    convert("imagenet", other, tmp_path / "out", "val", progress=False)
    assert load_index(tmp_path / "out/val").num_samples == 6


# ---------------------------------------------------------------- killed runs


def test_nobody_gets_in_while_a_finished_folder_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        with pytest.raises(BusyError, match="another process is writing"), staged_folder(tmp_path / "out/final"):
            raise AssertionError("let in")
        seen.append((self.name, target.name))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    for text in ("old", "new"):
        with staged_folder(tmp_path / "out/final") as stage:
            (stage / "file").write_text(text)
    assert seen == [(".final.partial", "final"), ("final", ".final.replaced"), (".final.partial", "final")]
    assert os.listdir(tmp_path / "out") == ["final"] and (tmp_path / "out/final/file").read_text() == "new"

PARALLEL = """
import sys
from pathlib import Path
from modsquad_ds.data.convert import convert

if __name__ == "__main__":
    convert("imagenet", Path(sys.argv[1]), Path(sys.argv[2]), "train", samples_per_shard=2, workers=2, progress=False)
"""


def stuck_source(root: Path) -> Path:
    """A source whose conversion never ends: whoever reads the last file waits for ever."""
    src = layouts.imagenet(root)
    os.mkfifo(src / "train/n01/n01_9.jpg")
    return src


def test_kill_9_leaves_nothing_that_looks_finished_and_the_next_run_works(tmp_path: Path) -> None:
    src, out = stuck_source(tmp_path / "src"), tmp_path / "out"
    (tmp_path / "parallel.py").write_text(PARALLEL)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.Popen([sys.executable, tmp_path / "parallel.py", src, out], env=environment)
    wait_for(lambda: len(list(out.glob(".train.partial/*.index.json"))) == 4 and writers(out))  # all but the stuck one
    assert killed.poll() is None
    with pytest.raises(UserError, match="another process is writing"):
        convert("imagenet", src, out, "train", progress=False)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_for(lambda: not writers(out))  # its workers end with it
    assert sorted(os.listdir(out)) == [".train.lock", ".train.partial"]
    with pytest.raises(UserError, match=r"out/train does not exist: make it with"):
        ShardSet(out / "train")
    (src / "train/n01/n01_9.jpg").unlink()
    convert("imagenet", src, out, "train", samples_per_shard=16, progress=False)
    assert os.listdir(out) == ["train"]
    assert sorted(os.listdir(out / "train")) == ["index.json", "shard-00000.index.json", "shard-00000.tar"]
    assert len(all_samples(ShardSet(out / "train"))) == 8


def wait_for(condition: Callable[[], Any], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def writers(out: Path) -> list[str]:
    """Processes that hold one of the shards being written open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(descriptor) for descriptor in (process / "fd").iterdir()]
        except OSError:  # gone, or another user's
            continue
        if any(link.startswith(str(out)) and link.endswith(".tar") for link in links):
            found.append(process.name)
    return found


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path: Path) -> None:
    src, out = stuck_source(tmp_path / "src"), tmp_path / "out"
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(convert, "imagenet", src, out, "train", workers=2, progress=False)
        wait_for(lambda: job.done() or writers(out))
        os.kill(int(writers(out)[0]), signal.SIGKILL)
        with pytest.raises(UserError, match="a worker process died while packing"):
            job.result(timeout=60)
    assert not out.exists()
