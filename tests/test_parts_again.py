"""Parts of a conversion that are run again, killed, or run at the same time, and merges likewise: nothing is lost or twice."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import layouts
from layouts import contents
from modsquad_ds.data import parts
from modsquad_ds.data.part_job import Part
from modsquad_ds.data.parts import convert_part
from modsquad_ds.errors import UserError
from part_runs import PER_SHARD, flip, merge, one_piece, part, tree
from test_convert import wait_for, writers


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """20 samples, so 7 tars."""
    return layouts.imagenet(tmp_path / "src", per_class=10)


def test_a_finished_part_is_read_and_not_written_again(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part(src, out, 1, 3)
    folder = out / ".train.parts/part-1-of-3"
    before = [os.stat(path) for path in (folder, *sorted(folder.iterdir()))]
    part(src, out, 1, 3)
    assert [(state.st_ino, state.st_mtime_ns) for state in before] == [
        (state.st_ino, state.st_mtime_ns) for state in (os.stat(path) for path in (folder, *sorted(folder.iterdir())))
    ]
    whole = tree(folder)
    flip(folder / "shard-00004.tar", 600)
    part(src, out, 1, 3)
    assert tree(folder) == whole


def test_a_part_run_again_after_the_merge_changes_nothing(src: Path, tmp_path: Path) -> None:
    """Its node was lost after it had finished; Slurm requeues it when the others are long done."""
    out = tmp_path / "out"
    for number in range(2):
        part(src, out, number, 2)
    shutil.copytree(out / ".train.parts", tmp_path / "copy")
    index = merge(src, out, 2)
    before = {path.name: os.stat(path).st_mtime_ns for path in (out / "train").iterdir()}
    (tmp_path / "copy").rename(out / ".train.parts")  # as after a kill between publishing and tidying up
    assert part(src, out, 0, 2, merge=True) == index
    assert merge(src, out, 2) == index
    assert part(src, out, 1, 2) == index
    assert {path.name: os.stat(path).st_mtime_ns for path in (out / "train").iterdir()} == before
    assert os.listdir(out) == ["train"]


def test_other_shards_in_the_place_are_left_alone(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = one_piece(src, out)
    with pytest.raises(UserError, match="not of this listing and these settings: choose another OUT or remove them"):
        convert_part("imagenet", src, out, "train", Part(0, 2), samples_per_shard=4, progress=False)
    (src / "train/n01/n01_3.jpeg").rename(src / "train/n01/n01_99.jpeg")
    with pytest.raises(UserError, match="not of this listing"):
        part(src, out, 0, 2)
    with pytest.raises(UserError, match="not of this listing"):
        merge(src, out, 2)
    assert contents(out / "train") == before and os.listdir(out) == ["train"]


@pytest.mark.parametrize(
    ("function", "call", "error", "message"),
    [
        ("_link", 5, KeyboardInterrupt("stop"), "stop"),
        ("write_file", 1, OSError(28, "No space left on device", "index.json"), "cannot write .*/train: No space left on dev"),
    ],
)
def test_a_merge_that_ends_early_leaves_the_parts(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, error: BaseException, message: str
) -> None:
    out = tmp_path / "out"
    for number in range(2):
        part(src, out, number, 2)
    before, calls, real = tree(out), [], getattr(parts, function)

    def failing(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == call:
            raise error
        real(*arguments)

    monkeypatch.setattr(parts, function, failing)
    with pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else UserError, match=message):
        merge(src, out, 2)
    assert tree(out) == before
    monkeypatch.undo()
    (out / ".train.parts/merge-of-a-killed-one").mkdir()
    merge(src, out, 2)
    assert contents(out / "train") == one_piece(src, tmp_path / "one")
    assert os.listdir(out) == ["train"]


@pytest.mark.parametrize("locks", [True, False])
def test_parts_and_merges_at_the_same_time(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """All parts at once, each twice where locks keep the two apart, then merges at once: one set of shards, none in pieces."""

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(parts, "WAIT_SECONDS", 0.02)
    expected = one_piece(src, tmp_path / "one")
    for attempt in range(3):
        out = tmp_path / f"out{attempt}"
        with ThreadPoolExecutor(8) as threads:
            numbers = [number for number in range(3) for _ in range(2 if locks else 1)]
            written = [threads.submit(part, src, out, number, 3, merge=locks) for number in numbers]
            found = [future.result(timeout=60) for future in written]
        with ThreadPoolExecutor(4) as threads:
            merged = [threads.submit(merge, src, out, 3) for _ in range(4)]
            index = merged[0].result(timeout=60)
            assert all(future.result(timeout=60) == index for future in merged)
        assert all(result in (None, index) for result in found)
        assert contents(out / "train") == expected
        assert os.listdir(out) == ["train"]


def test_without_hard_links_the_bytes_are_copied(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for number in range(2):
        part(src, tmp_path / "out", number, 2, merge=True)
    assert contents(tmp_path / "out/train") == one_piece(src, tmp_path / "one")


PART = """
import sys
from pathlib import Path
from modsquad_ds.data.part_job import Part
from modsquad_ds.data.parts import convert_part

convert_part("imagenet", Path(sys.argv[1]), Path(sys.argv[2]), "train", Part(1, 2), samples_per_shard=3)
"""


def test_kill_9_in_a_part_while_another_run_of_it_waits(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The part hangs in its last file. A second run of it waits; when the first is killed, it starts anew and merges."""
    monkeypatch.setattr(parts, "WAIT_SECONDS", 0.02)
    expected, out = one_piece(src, tmp_path / "one"), tmp_path / "out"
    assert part(src, out, 0, 2, merge=True) is None
    row = json.loads(expected["shard-00005.index.json"])[-1]  # tars 1, 3 and 5 are part 1's
    stuck = next((src / "train").glob(row["key"] + ".*"))
    picture = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.Popen([sys.executable, "-c", PART, src, out], env=environment)
    stage = out / ".train.parts/.part-1-of-2.partial"
    wait_for(lambda: len(list(stage.glob("*.index.json"))) == 2 and writers(out))
    stuck.unlink()  # whoever has it open waits for ever
    stuck.write_bytes(picture)
    with ThreadPoolExecutor(1) as thread:
        options = {"samples_per_shard": PER_SHARD, "merge": True}
        second = thread.submit(convert_part, "imagenet", src, out, "train", Part(1, 2), **options)
        said = ""
        while "part 1/2: another process is writing it, waiting\n" not in said:
            assert not second.done()
            said += capsys.readouterr().out
        assert killed.poll() is None
        with pytest.raises(UserError, match=r"^1 of 2 parts .*\n  part 1/2 is missing: "):
            merge(src, out, 2)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert second.result(timeout=60) is not None
    assert f"part 1/2: 9 samples in 3 shards in {out}/.train.parts/part-1-of-2" in capsys.readouterr().out
    assert contents(out / "train") == expected
    assert os.listdir(out) == ["train"]
