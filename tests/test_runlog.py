"""What a run tells: one JSON object per line that a resume continues, lines without a terminal, wandb offline without a key."""

import json
import math
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb

from modsquad_ds.config import LogSpec
from modsquad_ds.errors import UserError
from modsquad_ds.runlog import RunLog, _clock, forget_after

QUIET = LogSpec(wandb="disabled")


def record_of(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.5, "loss/digits": 0.5, "images_per_s": 80.0, "tokens_per_s": 2500.0, **more}


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def lines(path: Path) -> list[Any]:
    """The records of a file, by a reader that knows no NaN."""
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- metrics.jsonl


def test_records_are_json_lines_and_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(tmp_path, "r", QUIET, 0, 3) as log:
        for step in (1, 2, 3):
            log.record(record_of(step, extra=None))
            log.advance(step)
            assert lines(path) == [record_of(s, extra=None) for s in range(1, step + 1)], "a killed run loses nothing"
    assert path.read_text().endswith("\n")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, "r", QUIET, 0, 1) as log:
        log.record(record_of(1, **{"loss/scenes": math.nan, "grad_norm": math.inf, "low": -math.inf, "count": 3}))
    (found,) = lines(tmp_path / "metrics.jsonl")
    assert found == record_of(1, **{"loss/scenes": None, "grad_norm": None, "low": None, "count": 3})


def test_resumed_run_goes_on_without_doubles(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(tmp_path, "r", QUIET, 0, 9) as log:
        for step in range(1, 6):
            log.record(record_of(step, life=1))
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    with RunLog(tmp_path, "r", QUIET, 3, 9) as log:
        for step in (4, 5, 6):
            log.record(record_of(step, life=2))
    assert [(r["step"], r["life"]) for r in lines(path)] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


@pytest.mark.parametrize(
    ("step", "left"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (99, [1, 2, 3])],
)  # fmt: skip
@pytest.mark.parametrize("tail", ["", '{"step": 4', '{"step": 4, "loss": 0.25, "x": "', "\n"])
def test_forget_after(step: int, left: list[int], tail: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 4}) + "\n" for s in (1, 2, 3)) + tail)
    forget_after(path, step)
    assert lines(path) == [{"step": s, "loss": s / 4} for s in left]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"], "rewritten under another name, then renamed"


def test_forget_after_without_a_file(tmp_path: Path) -> None:
    forget_after(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("log_every", [1, 2, 3])
@pytest.mark.parametrize(("logged", "start"), [(7, 4), (6, 6), (7, 7), (3, 0), (7, 5)])
def test_curve_has_neither_gaps_nor_doubles(logged: int, start: int, log_every: int, tmp_path: Path) -> None:
    """A life of `logged` steps, then one from the checkpoint of step `start` on: the same records as in one life."""
    for first, last in ((0, logged), (start, 9)):
        with RunLog(tmp_path, "r", QUIET, first, 9) as log:
            for step in range(first + 1, last + 1):
                if step % log_every == 0:
                    log.record(record_of(step))
    assert lines(tmp_path / "metrics.jsonl") == [record_of(s) for s in range(log_every, 10, log_every)]


# ---------------------------------------------------------------- a disk that fails


def test_records_wait_for_a_full_disk_to_have_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full takes nothing, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with RunLog(tmp_path, "r", QUIET, 0, 9) as log:
        for step in (1, 2, 3):
            log.record(record_of(step))
        path.unlink()
        log.record(record_of(4))
        assert lines(path) == [record_of(s) for s in (1, 2, 3, 4)]
        log.record(record_of(5))
    assert [r["step"] for r in lines(path)] == [1, 2, 3, 4, 5]
    said = [line for line in capsys.readouterr().out.splitlines() if str(path) in line]
    assert said == [
        f"{path}: cannot be written (No space left on device); records wait in memory, training goes on",
        f"{path}: can be written again, with the 3 records that waited",
    ]


def test_half_a_record_is_taken_back(tmp_path: Path) -> None:
    """The disk has room for some bytes of a record, and later for all."""
    path = tmp_path / "metrics.jsonl"
    with RunLog(tmp_path, "r", QUIET, 0, 9) as log:
        log.record(record_of(1))
        size = path.stat().st_size
        with resource_limit(size + 10):
            log.record(record_of(2))
            assert path.stat().st_size == size + 10
            log.record(record_of(3))
            assert path.stat().st_size == size + 10
        log.record(record_of(4))
    assert [r["step"] for r in lines(path)] == [1, 2, 3, 4]


@contextmanager
def resource_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_that_vanished_and_came_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with RunLog(run, "r", QUIET, 0, 9) as log:
        log.record(record_of(1))
        run.rename(tmp_path / "elsewhere")
        log.record(record_of(2))
        (tmp_path / "elsewhere").rename(run)
        log.record(record_of(3))
        assert [r["step"] for r in lines(run / "metrics.jsonl")] == [1, 2, 3]
        run.rename(tmp_path / "elsewhere")
        log.record(record_of(4))
    said = capsys.readouterr().out
    assert said.count("cannot be written (No such file or directory)") == 2
    assert f"{run / 'metrics.jsonl'}: could not be written to the end; the last 1 records are lost" in said


def test_a_disk_that_is_full_from_the_start_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record_of(s)) + "\n" for s in range(1, 9)))
    before = path.read_bytes()
    with resource_limit(100), pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(File too large\); make room"):
        RunLog(tmp_path, "r", QUIET, 7, 9)
    assert path.read_bytes() == before


def test_output_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with RunLog(tmp_path, "r", QUIET, 0, 1) as log:
            log.record(record_of(1))
            log.advance(1)
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it closes
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_records_are_on_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Any] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))
        fsync(descriptor)

    with RunLog(tmp_path, "r", QUIET, 0, 1) as log:
        log.sync()  # nothing to flush yet, which is no mistake
        log.record(record_of(1))
        monkeypatch.setattr(os, "fsync", watched)
        log.sync()
    path = tmp_path / "metrics.jsonl"
    assert flushed == [(str(path), path.stat().st_size)]


# ---------------------------------------------------------------- the terminal


def test_without_a_terminal_the_last_step_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, "r", QUIET, 0, 2) as log:
        for step in (1, 2):
            log.record(record_of(step, **{"loss/scenes": math.nan, "loss/textures": 12.3456}))
            log.advance(step)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "step 2/2  digits 0.500 textures 12.346 | 80 img/s 2.5k tok/s  0:00 left"


def test_clock() -> None:
    assert [_clock(s) for s in (0, 59.4, 59.6, 3599, 3661.2)] == ["0:00", "0:59", "1:00", "59:59", "1:01:01"]


# ---------------------------------------------------------------- wandb


@pytest.mark.parametrize(
    ("spec", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": ""}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, None),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("online", {}, "online"),
        ("disabled", {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, None),
    ],
)
def test_wandb_mode(
    spec: str, environment: dict[str, str], mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with RunLog(tmp_path, "mine", LogSpec(wandb=spec, wandb_project="squad"), 0, 1):
        pass
    assert [(s["mode"], s["name"], s["project"], s["dir"]) for s in started] == (
        [(mode, "mine", "squad", tmp_path)] if mode else []
    )


def test_a_resumed_run_adds_to_its_curve_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings))
    for start in (0, 3, 5, 0, 2):
        with RunLog(tmp_path, "mine", LogSpec(wandb="offline"), start, 9):
            pass
    first, again, third, anew, last = (s["id"] for s in started)
    assert first == again == third and anew == last != first, "a run from step 0 is another one"
    assert all(s["resume"] == "allow" for s in started)
    assert (tmp_path / "wandb_id").read_text() == f"{last}\n" and len(last) == 8


def test_wandb_without_a_place_for_its_id_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wandb_id").mkdir()
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("started without an id"))
    with RunLog(tmp_path, "mine", LogSpec(wandb="online"), 0, 1) as log:
        log.record(record_of(1))
    assert len(lines(tmp_path / "metrics.jsonl")) == 1 and "wandb: failed (" in capsys.readouterr().out


class Broken:
    """A wandb run whose every call fails, or is told of."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.finished = error, 0

    def log(self, *_: object, **__: object) -> None:
        if self.error:
            raise self.error

    def finish(self) -> None:
        self.finished += 1
        if self.error:
            raise self.error


def test_a_failing_wandb_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Broken(OSError("disk full"))
    monkeypatch.setattr(wandb, "init", lambda **_: broken)
    with RunLog(tmp_path, "mine", LogSpec(wandb="offline"), 0, 2) as log:
        for step in (1, 2):
            log.record(record_of(step))
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert capsys.readouterr().out.count("wandb: failed (disk full); going on without it") == 1, "told once, then left alone"


@pytest.mark.parametrize(("spec", "tried"), [("offline", ["offline"]), ("online", ["online", "offline"])])
def test_a_wandb_that_does_not_start_costs_no_record(
    spec: str, tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = []

    def refuse(**settings: Any) -> None:
        modes.append(settings["mode"])
        assert settings["settings"].finish_timeout == settings["settings"].init_timeout == 20
        raise wandb.errors.UsageError("no")

    monkeypatch.setattr(wandb, "init", refuse)
    with RunLog(tmp_path, "mine", LogSpec(wandb=spec), 0, 1) as log:
        log.record(record_of(1))
    assert modes == tried
    assert len(lines(tmp_path / "metrics.jsonl")) == 1 and "wandb: failed (no)" in capsys.readouterr().out


def test_a_rank_that_fails_does_not_wait_for_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Broken()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, "mine", LogSpec(wandb="offline"), 0, 1):
        raise ZeroDivisionError
    assert run.finished == 0
    with RunLog(tmp_path, "mine", LogSpec(wandb="offline"), 0, 1):
        pass
    assert run.finished == 1


def test_wandb_without_a_key_writes_files_and_asks_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    run.mkdir()
    home.mkdir()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        # Whatever wandb might want to reach, it would knock here; a key of the user's own must not be found either.
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, address)
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            monkeypatch.setenv(name, str(home))
        with RunLog(run, "mine", LogSpec(), 0, 2) as log:
            for step in (1, 2):
                log.record(record_of(step, broken=math.nan))
        wandb.teardown()  # ends its process, as the end of a training process does: now all is on disk
        with pytest.raises(BlockingIOError):
            server.accept()
    (offline,) = (path for path in (run / "wandb").iterdir() if path.name.startswith("offline-run-") and not path.is_symlink())
    assert offline.name.endswith(f"-{(run / 'wandb_id').read_text().strip()}")
    (data,) = offline.glob("*.wandb")
    content = data.read_bytes()
    assert b"loss/digits" in content and b"images_per_s" in content and b"NaN" not in content
    assert len(lines(run / "metrics.jsonl")) == 2
