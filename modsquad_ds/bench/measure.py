"""Timing side by side, and rows that say what was measured where. The ground that all benchmarks stand on.

A figure is a ratio: cases and peers take turns, so that a machine that slows down or is shared slows all of them, and the ratio
is taken round by round. A row is one flat JSON-able mapping.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from modsquad_ds import __version__
from modsquad_ds.files import write_json

Row = dict[str, Any]


class Seconds(float):
    """What a case returns that times itself: only a part of the call counts."""


class Spread(NamedTuple):
    """Several measurements of one thing."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def interleave(
    cases: Mapping[str, Callable[[], Any]], repeat: int, warmup: int = 2, label: str = "", show: bool = True
) -> dict[str, list[float]]:
    """Seconds of every case, `repeat` times; the cases take turns, in another order each round. `warmup` rounds are dropped.

    A call counts until the device has done it; where it returns `Seconds`, those count. `show` draws a progress bar on a
    terminal.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in _with_bar(range(warmup + repeat), label, show):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            wait_for_device()
            began = time.perf_counter()
            told = cases[name]()
            wait_for_device()
            if turn >= warmup:
                seconds[name].append(float(told) if isinstance(told, Seconds) else time.perf_counter() - began)
    return seconds


def wait_for_device() -> None:
    """Return when the GPU, if there is one, has done all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: Mapping[str, Sequence[float]], case: str, peer: str) -> Spread:
    """How many times as long as the peer a case took: of each round, then their spread."""
    return spread([mine / theirs for mine, theirs in zip(seconds[case], seconds[peer], strict=True)])


def timing_rows(seconds: Mapping[str, Sequence[float]], peer: str, **sizes: Any) -> list[Row]:
    """A row per case: its sizes, its seconds, and how many times as long as the peer it took."""
    return [
        {
            "case": case,
            **sizes,
            **spread_fields("seconds", spread(values)),
            "peer": peer,
            **spread_fields("ratio", ratio(seconds, case, peer)),
        }
        for case, values in seconds.items()
    ]


def spread_fields(name: str, value: Spread) -> Row:
    """`name`, `name_min` and `name_max` of a row; the plain one is the median."""
    return {name: value.median, f"{name}_min": value.low, f"{name}_max": value.high}


def peak_memory() -> float:
    """Most memory that this process has held so far, MiB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def environment() -> Row:
    """What a figure depends on besides its sizes: versions, device, threads, commit."""
    return {
        "modsquad_ds": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "deepspeed": _version("deepspeed"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def write_rows(path: Path, bench: str, rows: Sequence[Row], surroundings: Row | None = None) -> None:
    """Rows as a JSON list, each with its benchmark's name and the environment it was measured in, its own if it names one."""
    around = environment() if surroundings is None else surroundings
    write_json(path, [{"bench": bench, **around, **row} for row in rows])


def with_environment(rows: Sequence[Row]) -> list[Row]:
    """Rows that were measured in this process, for another one to print and write."""
    around = environment()
    return [{**row, **around} for row in rows]


def print_rows(title: str, rows: Sequence[Row], columns: Mapping[str, str], note: str = "") -> None:
    """Rows as a table of at most 100 columns. A column `x` whose row also has `x_min` shows the median and the range.

    Args:
        columns: key of the rows -> heading.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = note, "left"
    for key, heading in columns.items():
        numeric = any(isinstance(row.get(key), int | float) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row, key) for key in columns))
    console = Console()
    (console if console.is_terminal and console.width <= 100 else Console(width=100)).print(table)


def print_environment(rows: Sequence[Row] = ()) -> None:
    """One line that says where the figures of the rows come from, by the first of them if it says so."""
    e = environment() | (rows[0] if rows else {})
    commit = f", commit {e['commit']}" if e["commit"] else ""
    print(
        f"{e['device']}, {e['cores']} cores, {e['threads']} threads; torch {e['torch']}, deepspeed {e['deepspeed']}, "
        f"modsquad_ds {e['modsquad_ds']}{commit}; median (min-max)",
        flush=True,
    )


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if f"{key}_min" in row:
        return f"{_number(value)} ({_number(row[f'{key}_min'])}-{_number(row[f'{key}_max'])})"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Three figures: 0.0123, 1.23, 123, 12,345."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.{3 if size < 1 else 2 if size < 10 else 1}f}" if size >= 0.1 else f"{value:.3g}"


def _with_bar(turns: range, label: str, show: bool) -> Iterator[int]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        yield from bar.track(turns, description=label)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """Short commit of the code, `+` after it where files differ; None for an installed copy or without git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
