"""`bench step`: a whole training step of a sparse ViT-small with three tasks; all tasks in one pack, one pass per task, dense."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modsquad_ds.bench.jobs import run_job
from modsquad_ds.bench.measure import Row, interleave, timing_rows
from modsquad_ds.bench.workload import DENSE, PACKED, VARIANTS, Workload, step_batch, step_of, trainer_of, workload
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import barrier

COLUMNS = {
    "ranks": "ranks", "ep_size": "EP", "case": "step", "seconds": "seconds", "ratio": "x packed",
    "flops": "FLOPs\n/ dense", "peak_mib": "peak MiB\nabove rest",
}  # fmt: skip
WORK = Workload({"classes": (8, 224), "boxes": (4, 256), "masks": (4, 192)})
"""1568, 1024 and 576 tokens."""
LIMIT = 1800.0
"""Seconds that a job may take."""


def bench_step(repeat: int) -> list[Row]:
    """Rows of every variant at 1 rank and at 2 ranks with EP=2; memory and FLOPs from jobs of their own at 1 rank."""
    rows, work = [], WORK._asdict()
    for ranks in (1, 2):
        rows += run_job("step", {"repeat": repeat, "ep_size": ranks, "variants": VARIANTS, **work}, ranks, LIMIT)
    alone = {}
    for variant in VARIANTS:
        (alone[variant],) = run_job("step_alone", {"variant": variant, **work}, 1, LIMIT)
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
        # Ranks start together, so a slow rank of the case before is not counted here.
        cases[variant] = _after_barrier(step)
    seconds = interleave(cases, repeat, show=False)
    launch.stop()
    tokens = sum(work.tokens.values())
    return timing_rows(seconds, PACKED, ranks=ranks.world, ep_size=ep_size, size=size, tokens=tokens) if ranks.first else None


def measure_alone(variant: str, images: Any, size: str) -> list[Row] | None:
    """One variant in a process of its own: the most memory of a step above that of the resting trainer, and its FLOPs."""
    ranks, work = launch.start(), workload(images, size)
    step = step_of(trainer_of(variant, work, ranks, 1), step_batch(work, ranks))
    step()  # optimizer states and whatever else stays come to be in the first step
    rest = reset_peak()
    step()
    peak = read_peak()
    # The counter does not know CPU's fused attention, so here attention is matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    launch.stop()
    return [{"case": variant, "rest_mib": rest, "peak_mib": peak - rest, "flops": counter.get_total_flops()}]


def reset_peak() -> float:
    """Forget the peak so far; memory held now, MiB: of the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
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


def _after_barrier(step: Any) -> Any:
    def run() -> None:
        barrier()
        step()

    return run
