"""`bench step --profile`: where the time of a training step goes, part by part, packed and with one pass per task.

What packing can save is what grows with the number of passes: waits for other ranks, and costs that no token adds to. The rest
of a step is computing that both do, so the table says how much there is to save.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from modsquad_ds.bench.jobs import run_job
from modsquad_ds.bench.measure import Row, wait_for_device, with_environment
from modsquad_ds.bench.step import LIMIT, WORKS
from modsquad_ds.bench.workload import PACKED, PER_TASK, Workload, step_batch, step_of, trainer_of, workload
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import barrier, gather_json
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.traffic import Traffic, counted, total

FORWARD, BACKWARD, DISPATCH = "forward", "backward", "all-to-alls"
REDUCTION, OPTIMIZER, OTHER, WHOLE = "gradients summed", "optimizer", "losses, the rest", "whole step"
PARTS = (FORWARD, BACKWARD, DISPATCH, REDUCTION, OPTIMIZER, OTHER, WHOLE)
WATCHED = ("forward", "backward", "allreduce_gradients", "step")
"""Methods of DeepSpeed's engine that a training step calls; the third is called by the second."""
COLUMNS = {
    "tokens": "tokens", "ranks": "ranks", "part": "part", "packed": "packed,\ns", "packed_cpu": "CPU s",
    "packed_calls": "calls", "per_task": "per\ntask, s", "per_task_cpu": "CPU s", "per_task_calls": "calls",
    "saved": "saved", "saved_cpu": "CPU",
}  # fmt: skip
NOTE = (
    "Of a step; medians of rounds in which both take turns, means over ranks. Forward and backward: without the all-to-alls in "
    "them, which include waiting for slower ranks. CPU s: of all threads of a rank, also those that send, so what a machine with "
    "other work leaves to go by. Calls: a rank's collectives. Saved: per task less packed, of each round, as a share of the "
    "whole packed step; the same of CPU seconds."
)
WARMUP = 2
"""Rounds that are dropped."""

Step = dict[str, dict[str, float]]
"""One step of one rank: part -> its `seconds`, `cpu` seconds where known, and `calls` of collectives."""


class Span(NamedTuple):
    """One call of a watched method."""

    name: str
    seconds: float
    cpu: float
    first: int
    """Collectives that came before it."""
    last: int
    """The same and those in it."""


def profile_step(repeat: int, works: Sequence[Workload] = WORKS) -> list[Row]:
    """A row per work, number of ranks and part: at 1 rank, and at 2 ranks with the experts spread over both."""
    jobs = [(work, ranks) for work in works for ranks in (1, 2)]
    return [
        row
        for work, ranks in jobs
        for row in run_job("step_profile", {"repeat": repeat, "ep_size": ranks, **work._asdict()}, ranks, LIMIT)
    ]


def measure_profile(repeat: int, ep_size: int, images: Any, size: str) -> list[Row] | None:
    """One rank of a job: steps of both variants in turns. Rows on the first rank."""
    ranks, work = launch.start(), workload(images, size)
    steps = gather_json(_rounds(_cases(work, ranks, ep_size), repeat))
    launch.stop()
    sizes = {"tokens": sum(work.tokens.values()), "ranks": ranks.world, "ep_size": ep_size, "size": size}
    return with_environment([{**sizes, **row} for row in rows_of(steps)]) if ranks.first else None


def _cases(work: Workload, ranks: Ranks, ep_size: int) -> dict[str, Callable[[], Step]]:
    batch = step_batch(work, ranks)
    trainers = {variant: trainer_of(variant, work, ranks, ep_size) for variant in (PACKED, PER_TASK)}
    return {name: partial(_watched_step, trainer.engine, step_of(trainer, batch)) for name, trainer in trainers.items()}


def _rounds(cases: Mapping[str, Callable[[], Step]], repeat: int) -> dict[str, list[Step]]:
    """Steps by case, warm-up dropped; the cases take turns in going first."""
    names = list(cases)
    steps: dict[str, list[Step]] = {name: [] for name in names}
    for turn in range(WARMUP + repeat):
        for name in names if turn % 2 else reversed(names):
            step = cases[name]()
            if turn >= WARMUP:
                steps[name].append(step)
    return steps


def _watched_step(engine: Any, step: Callable[[], None]) -> Step:
    """A step from when all ranks are there, as `bench step` times it, taken apart."""
    barrier()
    with counted() as traffic, _watched(engine, traffic) as spans:
        began, cpu = time.perf_counter(), time.process_time()
        step()
        wait_for_device()
        whole = Span(WHOLE, time.perf_counter() - began, time.process_time() - cpu, 0, len(traffic.calls))
    return parts_of(spans, whole, traffic)


@contextmanager
def _watched(engine: Any, traffic: Traffic) -> Iterator[list[Span]]:
    """Inside, a span for every call of a WATCHED method of the engine, which does what it always does."""
    spans: list[Span] = []
    for name in WATCHED:
        setattr(engine, name, _clocked(name, getattr(engine, name), traffic, spans))
    try:
        yield spans
    finally:
        for name in WATCHED:
            delattr(engine, name)  # the instance's own; the class's is there again


def _clocked(name: str, method: Callable[..., Any], traffic: Traffic, spans: list[Span]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        wait_for_device()
        first, began, cpu = len(traffic.calls), time.perf_counter(), time.process_time()
        result = method(*args, **kwargs)
        wait_for_device()
        spans.append(Span(name, time.perf_counter() - began, time.process_time() - cpu, first, len(traffic.calls)))
        return result

    return call


def parts_of(spans: Sequence[Span], whole: Span, traffic: Traffic) -> Step:
    """The parts of a step from its spans and collectives; seconds and calls of all parts sum to those of the whole."""
    forward, backward, reduction, optimizer = (_together(name, spans) for name in WATCHED)
    sent = {
        part: total([call for span in spans if span.name == name for call in traffic.calls[span.first : span.last]
                     if call.kind in ("rows", "counts")]).seconds
        for part, name in ((FORWARD, "forward"), (BACKWARD, "backward"))
    }  # fmt: skip
    dispatch = traffic.all_to_all()
    parts: Step = {
        FORWARD: {"seconds": forward["seconds"] - sent[FORWARD], "cpu": forward["cpu"], "calls": 0},
        BACKWARD: {
            "seconds": backward["seconds"] - reduction["seconds"] - sent[BACKWARD],
            "cpu": backward["cpu"] - reduction["cpu"],
            "calls": 0,
        },
        DISPATCH: {"seconds": dispatch.seconds, "calls": dispatch.calls},
        REDUCTION: reduction,
        OPTIMIZER: optimizer,
    }
    every = {"seconds": whole.seconds, "cpu": whole.cpu, "calls": len(traffic.calls)}
    rest = {key: value - sum(part.get(key, 0.0) for part in parts.values()) for key, value in every.items()}
    return {**parts, OTHER: rest, WHOLE: every}


def _together(name: str, spans: Sequence[Span]) -> dict[str, float]:
    those = [span for span in spans if span.name == name]
    calls = sum(span.last - span.first for span in those)
    return {"seconds": sum(span.seconds for span in those), "cpu": sum(span.cpu for span in those), "calls": calls}


def rows_of(by_rank: Sequence[Mapping[str, Sequence[Step]]]) -> list[Row]:
    """A row per part from the steps of all ranks: medians over rounds of means over ranks."""
    rows: list[Row] = []
    for part in PARTS:
        row: Row = {"part": part}
        for field, case in {"packed": PACKED, "per_task": PER_TASK}.items():
            row[field] = statistics.median(_means(by_rank, case, part, "seconds"))
            row[f"{field}_calls"] = round(statistics.median(_means(by_rank, case, part, "calls")))
            if part != DISPATCH:
                row[f"{field}_cpu"] = statistics.median(_means(by_rank, case, part, "cpu"))
        row["saved"] = _saved(by_rank, part, "seconds")
        if part != DISPATCH:
            row["saved_cpu"] = _saved(by_rank, part, "cpu")
        rows.append(row)
    return rows


def _saved(by_rank: Sequence[Mapping[str, Sequence[Step]]], part: str, key: str) -> float:
    """What packing saves of a part, as a share of the whole packed step, to a thousandth: the median over rounds."""
    per_task, packed = (_means(by_rank, case, part, key) for case in (PER_TASK, PACKED))
    whole = _means(by_rank, PACKED, WHOLE, key)
    return round(statistics.median((more - less) / step for more, less, step in zip(per_task, packed, whole, strict=True)), 3)


def _means(by_rank: Sequence[Mapping[str, Sequence[Step]]], case: str, part: str, key: str) -> list[float]:
    """Per round, the mean over ranks."""
    rounds = zip(*(steps[case] for steps in by_rank), strict=True)
    return [statistics.mean(step[part][key] for step in at_once) for at_once in rounds]
