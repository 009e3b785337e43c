"""`bench step`: a whole training step of a sparse ViT-small with three tasks; all tasks in one pack, one pass per task, dense."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modsquad_ds.bench.jobs import run_job
from modsquad_ds.bench.measure import Row, Seconds, interleave, timing_rows, wait_for_device, with_environment
from modsquad_ds.bench.workload import DENSE, PACKED, VARIANTS, Workload, step_batch, step_of, trainer_of, workload
from modsquad_ds.costs import count_flops
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import barrier

COLUMNS = {
    "tokens": "tokens", "ranks": "ranks", "ep_size": "EP", "case": "step", "seconds": "seconds", "ratio": "x packed",
    "flops": "FLOPs\n/ dense", "peak_mib": "peak MiB\nabove rest",
}  # fmt: skip
WORKS = (
    Workload({"classes": (8, 112), "boxes": (4, 128), "masks": (4, 96)}),
    Workload({"classes": (8, 224), "boxes": (4, 256), "masks": (4, 192)}),
)
"""A step of few tokens (392, 256 and 144), where all that does not grow with them counts, and one of four times as many."""
LIMIT = 1800.0
"""Seconds that a job may take."""


def bench_step(repeat: int) -> list[Row]:
    """Rows of WORKS and every variant at 1 rank and at 2 ranks with EP=2; memory and FLOPs from jobs of their own at 1 rank."""
    return [row for work in WORKS for row in _rows_of(work, repeat)]


def _rows_of(work: Workload, repeat: int) -> list[Row]:
    rows, given = [], work._asdict()
    for ranks in (1, 2):
        rows += run_job("step", {"repeat": repeat, "ep_size": ranks, "variants": VARIANTS, **given}, ranks, LIMIT)
    alone = {}
    for variant in VARIANTS:
        (alone[variant],) = run_job("step_alone", {"variant": variant, **given}, 1, LIMIT)
    for row in rows[: len(VARIANTS)]:
        row["peak_mib"] = alone[row["case"]]["peak_mib"]
        row["flops"] = alone[row["case"]]["flops"] / alone[DENSE]["flops"]
    return rows


def measure_step(repeat: int, ep_size: int, variants: list[str], images: Any, size: str) -> list[Row] | None:
    """One rank of a job: every variant's step in turn. Rows on the first rank."""
    ranks, work = launch.start(), workload(images, size)
    batch = step_batch(work, ranks)
    cases = {}
    for variant in variants:
        step = step_of(trainer_of(variant, work, ranks, ep_size), batch)
        cases[variant] = _after_barrier(step)
    seconds = interleave(cases, repeat, show=False)
    launch.stop()
    tokens = sum(work.tokens.values())
    rows = timing_rows(seconds, PACKED, ranks=ranks.world, ep_size=ep_size, size=size, tokens=tokens)
    return with_environment(rows) if ranks.first else None


def measure_alone(variant: str, images: Any, size: str) -> list[Row] | None:
    """One variant in a process of its own: the most memory of a step above that of the resting trainer, and its FLOPs."""
    ranks, work = launch.start(), workload(images, size)
    step = step_of(trainer_of(variant, work, ranks, 1), step_batch(work, ranks))
    step()  # optimizer states and whatever else stays come to be in the first step
    rest = reset_peak()
    step()
    peak = read_peak()
    flops = count_flops(step)
    launch.stop()
    return [{"case": variant, "rest_mib": rest, "peak_mib": peak - rest, "flops": flops}]


def reset_peak() -> float:
    """Forget the peak so far; memory held now, MiB: of the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    # What the C library keeps of freed memory would hide what the next step takes of it.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def read_peak() -> float:
    """Most memory held since `reset_peak`, MiB."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> float:
    """A field of Linux's account of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(value) / 1024


def _after_barrier(step: Callable[[], None]) -> Callable[[], Seconds]:
    """The step, timed from when all ranks are there: a rank that was slow in the case before is not waited for in this one."""

    def run() -> Seconds:
        barrier()
        began = time.perf_counter()
        step()
        wait_for_device()
        return Seconds(time.perf_counter() - began)

    return run
