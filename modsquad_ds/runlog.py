"""What a run tells while it trains: a progress bar or lines, RUN/metrics.jsonl, wandb. Rank 0 only; fed by train.py."""

import json
import math
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import Self

from modsquad_ds.config import LogSpec
from modsquad_ds.errors import UserError
from modsquad_ds.files import say, sync, write_atomic, writing_to

Record = dict[str, Any]
"""One line of metrics.jsonl."""

WANDB_SECONDS = 20
"""How long wandb may look for its server, and at the end send what is left, before the run goes on without it."""

LINE_SECONDS = 15.0
"""Without a terminal, a line this often stands in for the progress bar."""


class RunLog:
    """Use as a context manager; `record` takes one flat JSON-able mapping with a `step`."""

    def __init__(self, run: Path, name: str, spec: LogSpec, start: int, steps: int) -> None:
        self.metrics = Metrics(run / "metrics.jsonl", start)
        self.steps = steps
        self.console = Console()
        self.bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.row = self.bar.add_task("train", total=steps, completed=start, text="")
        self.began, self.start, self.said = time.monotonic(), start, 0.0
        self.wandb = _start_wandb(run, name, spec, start)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self.bar.stop()
        self.metrics.close()
        # A rank that fails has to leave at once: other ranks wait for it. What was logged is with wandb's own process.
        if self.wandb is not None and failure is None:
            self._to_wandb(self.wandb.finish)

    def record(self, values: dict[str, Any]) -> None:
        """Append a record; NaN becomes null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.metrics.add(clean)
        if self.wandb is not None:
            self._to_wandb(self.wandb.log, {k: v for k, v in clean.items() if v is not None}, step=clean["step"])
        self._show(clean)

    def _to_wandb(self, call: Callable[..., Any], *values: Any, **settings: Any) -> None:
        """Tell wandb something. Where it fails, training goes on without it: metrics.jsonl holds the same records."""
        try:
            call(*values, **settings)
        except Exception as error:
            say(f"wandb: failed ({error}); going on without it, {self.metrics.path} has every record")
            self.wandb = None

    def sync(self) -> None:
        """Bring the records to disk for good, before a checkpoint that goes on from them: a node that crashes leaves no gap."""
        with suppress(OSError):  # told when the record could not be written
            sync(self.metrics.path)

    def advance(self, step: int) -> None:
        """Move the bar."""
        self.bar.update(self.row, completed=step)

    def _show(self, values: dict[str, Any]) -> None:
        known = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/") and v is not None}
        losses = " ".join(f"{task} {v:.3f}" for task, v in known.items())
        text = f"{losses} | {values['images_per_s']:.0f} img/s {values['tokens_per_s'] / 1000:.1f}k tok/s"
        self.bar.update(self.row, text=text)
        now = time.monotonic()
        done = values["step"]
        if not self.console.is_terminal and (now - self.said > LINE_SECONDS or done == self.steps):
            self.said = now
            left = (now - self.began) / max(1, done - self.start) * (self.steps - done)
            say(f"step {done}/{self.steps}  {text}  {_clock(left)} left")


class Metrics:
    """The file of records. Where it cannot be written, training goes on and the records wait in memory for a later try.

    It is opened anew for every record: a network file system that came back does not know the file that was open before.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        with writing_to(path):
            forget_after(path, start)
        self.waiting: list[bytes] = []
        self.whole: int | None = None
        """Size of the file up to its last whole record; None while no write failed, when that is all of it."""

    def add(self, record: Record) -> None:
        """Append a record, and before it those that still wait. A failure is told once, and so is its end."""
        failing = bool(self.waiting)
        self.waiting.append((json.dumps(record) + "\n").encode())
        try:
            self._write(b"".join(self.waiting))
        except OSError as error:
            if not failing:
                say(f"{self.path}: cannot be written ({error.strerror}); records wait in memory, training goes on")
            return
        if failing:
            say(f"{self.path}: can be written again, with the {len(self.waiting) - 1} records that waited")
        self.waiting.clear()

    def _write(self, data: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            if self.whole is not None and end > self.whole:
                end = file.truncate(self.whole)  # part of a record that the disk had no more room for
            self.whole = end
            while data:
                data = data[file.write(data) :]
            self.whole = None

    def close(self) -> None:
        """Say what is lost, if anything."""
        if self.waiting:
            say(f"{self.path}: could not be written to the end; the last {len(self.waiting)} records are lost")


def forget_after(path: Path, step: int) -> None:
    """Drop records of steps after `step`, and a half-written last line, so that a resumed run's curve has no doubles."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that was being written when the run was killed; nothing follows it
        if record["step"] <= step:
            kept.append(line)
    write_atomic(path, "".join(line + "\n" for line in kept).encode())


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl. Raises UserError if it is missing, damaged or empty."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a run that `train` wrote")
    # What follows the last line end is a record that is being written at this moment.
    lines = path.read_text().split("\n")[:-1]
    try:
        records = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: holds a line that is no JSON ({error.msg}); restore the file") from None
    if not records:
        raise UserError(f"{path}: holds no records yet; train for at least log_every steps")
    return records


def wandb_mode(spec: LogSpec) -> Literal["online", "offline", "disabled"]:
    """wandb's mode: the recipe's; with `auto` the environment's WANDB_MODE, else online where there is a key."""
    if spec.wandb != "auto":
        return spec.wandb
    modes: tuple[Literal["online", "offline", "disabled"], ...] = ("online", "offline", "disabled")
    for mode in modes:
        if os.environ.get("WANDB_MODE") == mode:
            return mode
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


def wandb_id(path: Path, start: int) -> str:
    """The id of a run's curve at wandb, kept in a file: a run that goes on from step `start` adds to its curve."""
    if start == 0 or not path.is_file():
        write_atomic(path, (secrets.token_hex(4) + "\n").encode())
    return path.read_text().strip()


def _start_wandb(run: Path, name: str, spec: LogSpec, start: int) -> Any:
    """A wandb run, or None. Offline unless a key is there, because without one wandb asks or waits for the network.

    Steps that were logged after the checkpoint which a run goes on from are at wandb already: it ignores what comes twice.
    """
    mode = wandb_mode(spec)
    if mode == "disabled":
        return None
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=WANDB_SECONDS, login_timeout=WANDB_SECONDS, finish_timeout=WANDB_SECONDS
    )

    def begin(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=spec.wandb_project, name=name, dir=run, settings=settings, mode=mode,
            id=wandb_id(run / "wandb_id", start), resume="allow",
        )  # fmt: skip

    if mode == "online":
        try:
            return begin("online")
        except (wandb.errors.Error, OSError) as error:
            say(f"wandb: not online ({error}); `wandb sync {run}/wandb/offline-*` uploads the records later")
    try:
        return begin("offline")
    except (wandb.errors.Error, OSError) as error:
        say(f"wandb: failed ({error}); going on without it, {run}/metrics.jsonl has every record")
        return None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
