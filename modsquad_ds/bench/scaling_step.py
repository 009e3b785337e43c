"""One size of the scaling benchmark, on every rank of it: training steps with learned and balanced routing in turns.

Started by scaling.py through a launcher. Of each routing, every second step is only timed and every second one has its
collectives counted, which on GPUs makes it slower; rates come from the former, shares of time from the latter. The steps of a
round have the same tasks and canvases, each its own images; the learning rate is as good as 0, so that all steps route alike.
"""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from torch.utils.data import Dataset

from modsquad_ds.bench.measure import Row, environment, peak_memory, spread, spread_fields, wait_for_device
from modsquad_ds.bench.routing import Load, balanced, load_of_ranks, observed
from modsquad_ds.config import Recipe, recipe_from_tree
from modsquad_ds.data.loader import BatchLoader, StepDataset
from modsquad_ds.data.loader_plan import TRAIN, LoaderPlan, check_data
from modsquad_ds.data.order import TaskSchedule
from modsquad_ds.data.transforms import TRANSFORMS
from modsquad_ds.data.types import Batch
from modsquad_ds.errors import UserError
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import gather_json
from modsquad_ds.parallel.experts import ep_size_of
from modsquad_ds.parallel.traffic import counted
from modsquad_ds.plan import loader_plan
from modsquad_ds.resume import find, resume
from modsquad_ds.tasks import SetTask
from modsquad_ds.trainer import Trainer, build_trainer, train_step

ROUTINGS = ("learned", "balanced")
CASES = tuple(f"{routing} {how}" for routing in ROUTINGS for how in ("timed", "counted"))
WARMUP = 2
"""Rounds that are dropped; a round is a timed and a counted step of each routing."""
LEARNING_RATE = 1e-20
"""Weights of fp32 do not move by it."""

Step = dict[str, float]
"""What one rank measured in one step: seconds, of which waited (data), all_to_all, reduction and sums; bytes; images, tokens."""


def measure(tree: dict[str, Any], ranks: int, steps: int, trained: str | None) -> list[Row] | None:
    """A row per routing on the first rank, None on others.

    Args:
        tree: the recipe at this size.
        ranks: as many as there have to be.
        steps: timed and counted steps of each routing.
        trained: name of the newest checkpoint in the recipe's run folder, whose weights are taken; None: fresh ones.
    """
    tree["train"]["optimizer"]["lr"] = LEARNING_RATE
    rounds = WARMUP + steps
    needed = rounds * len(CASES)
    tree["train"]["steps"] = max(needed, tree["train"]["steps"])
    recipe = recipe_from_tree(tree, "of the benchmark")
    here = launch.start(recipe.parallel.collective_timeout)
    if here.world != ranks:
        raise UserError(f"bench scaling: started on {here.world} rank(s), expected {ranks}; look at the launcher's settings")
    plan = loader_plan(recipe, here)
    check_data(plan, (TRAIN,))
    trainer = build_trainer(recipe, here)
    if trained:
        resume(trainer, find(recipe, here))
    data = ChosenSteps(plan, like_steps(plan, rounds, len(CASES)))
    batches = iter(BatchLoader(data, range(needed * plan.accumulation), recipe.train.workers))
    measured, loads = _rounds(trainer, batches, rounds)
    peak = peak_memory()
    everyone = gather_json([measured, peak])
    launch.stop()
    if not here.first:
        return None
    memory = max(peak for _, peak in everyone)
    by_rank = [steps_of_rank for steps_of_rank, _ in everyone]
    return [{**row, **sizes_of(recipe, ranks, steps), "memory_mib": memory, **environment()} for row in rows_of(by_rank, loads)]


def sizes_of(recipe: Recipe, ranks: int, steps: int) -> Row:
    """What the size is made of."""
    parallel = recipe.parallel
    return {
        "recipe": recipe.name, "ranks": ranks, "ep_size": parallel.ep_size, "attention_ep_size": parallel.attention_ep_size,
        "deepspeed_config": recipe.deepspeed_config, "steps": steps,
    }  # fmt: skip


# ---------------------------------------------------------------- data


def like_steps(plan: LoaderPlan, rounds: int, cases: int) -> list[int]:
    """Optimizer steps of the recipe, each `cases` of them with the same tasks and canvases, in the order in which they fill up.

    So cases do the same work, and rounds differ as the recipe's steps do.
    """
    schedule = TaskSchedule(plan.sampling, plan.seed, plan.sampling_weights)
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    chosen: list[int] = []
    for step in itertools.count():
        kind = tuple((name, _canvas(plan, name, step)) for name in schedule.active(step))
        alike[kind].append(step)
        if len(alike[kind]) == cases:
            chosen += alike.pop(kind)
        if len(chosen) == rounds * cases:
            return chosen
    raise AssertionError("an endless count ended")


def _canvas(plan: LoaderPlan, name: str, step: int) -> Any:
    spec = plan.tasks[plan.streams[name][0]]
    if isinstance(spec, SetTask):
        return spec.transform.crop
    return TRANSFORMS[spec.kind].canvas(spec.transform, plan.seed, name, step)


class ChosenSteps(Dataset[Batch]):
    """Micro-step -> this rank's batch, with other optimizer steps in place of 0, 1, 2, ..."""

    def __init__(self, plan: LoaderPlan, steps: Sequence[int]) -> None:
        self._all, self._steps, self._accumulation = StepDataset(plan), steps, plan.accumulation

    def __getitem__(self, micro_step: int) -> Batch:
        """UserError as in StepDataset."""
        place, micro = divmod(micro_step, self._accumulation)
        return self._all[self._steps[place] * self._accumulation + micro]


# ---------------------------------------------------------------- steps


def _rounds(
    trainer: Trainer, batches: Iterator[Batch], rounds: int
) -> tuple[dict[str, list[Step]], dict[str, Load | None]]:
    """Steps of this rank by case, warm-up dropped, and how rows lay on ranks by routing. Cases take turns in going first."""
    layers = list(trainer.network.backbone.sparse_layers().values())
    ep_sizes = [ep_size_of(layer, trainer.recipe.parallel) for layer in layers]
    measured: dict[str, list[Step]] = {case: [] for case in CASES}
    counts: dict[str, list[list[Any]]] = {routing: [[] for _ in layers] for routing in ROUTINGS}
    index = 0
    for turn in range(rounds):
        first = turn % len(CASES)
        for case in CASES[first:] + CASES[:first]:
            routing, how = case.split()
            with ExitStack() as stack:
                if routing == "balanced":
                    stack.enter_context(balanced(trainer.network))
                if how == "timed":
                    step = _timed_step(trainer, batches, index)
                else:
                    passes = stack.enter_context(observed([layer.router for layer in layers]))
                    step = _counted_step(trainer, batches, index)
                    for seen, new in zip(counts[routing], passes, strict=True):
                        seen += new if turn >= WARMUP else []
            index += 1
            if turn >= WARMUP:
                measured[case].append(step)
    return measured, {routing: load_of_ranks(seen, ep_sizes, trainer.ranks) for routing, seen in counts.items()}


def _timed_step(trainer: Trainer, batches: Iterator[Batch], index: int) -> Step:
    """A step as training makes it, to the moment when the device has done it."""
    wait_for_device()
    began = time.perf_counter()
    _, work = train_step(trainer, islice(batches, trainer.recipe.train.accumulation), index)
    wait_for_device()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "waited": work.waited, "images": work.images, "tokens": work.tokens}


def _counted_step(trainer: Trainer, batches: Iterator[Batch], index: int) -> Step:
    with counted() as traffic:
        step = _timed_step(trainer, batches, index)
    dispatch, reduction = traffic.all_to_all(), traffic.by_deepspeed()
    every = sum(call.seconds for call in traffic.calls)
    return step | {
        "all_to_all": dispatch.seconds,
        "reduction": reduction.seconds,
        "sums": every - dispatch.seconds - reduction.seconds,
        "all_to_all_bytes": dispatch.bytes,
        "reduction_bytes": reduction.bytes,
    }


# ---------------------------------------------------------------- rows


def rows_of(by_rank: Sequence[Mapping[str, Sequence[Step]]], loads: Mapping[str, Load | None]) -> list[Row]:
    """A row per routing from the steps of all ranks, in rank order."""
    rows = []
    for routing in ROUTINGS:
        row = rates([steps[f"{routing} timed"] for steps in by_rank])
        row |= shares([steps[f"{routing} counted"] for steps in by_rank])
        load = loads[routing]
        row |= {"rows_max_mean": load and load.mean, "rows_max_mean_worst": load and load.worst}
        rows.append({"routing": routing, **row})
    times = {routing: _means([steps[f"{routing} timed"] for steps in by_rank], "seconds") for routing in ROUTINGS}
    for row in rows:
        ratios = [mine / theirs for mine, theirs in zip(times[row["routing"]], times["balanced"], strict=True)]
        row |= spread_fields("ratio_to_balanced", spread(ratios))
    return rows


def rates(by_rank: Sequence[Sequence[Step]]) -> Row:
    """Seconds per step, images and tokens per second, in all and per rank.

    A step's seconds are the mean over ranks. Rates are a step's work / its median seconds where all steps do the same work;
    where they do not (`sampling: weighted`, canvases of several sizes), all work / all seconds.
    """
    ranks, seconds = len(by_rank), _means(by_rank, "seconds")
    images, tokens = (_sums(by_rank, what) for what in ("images", "tokens"))
    typical = statistics.median(seconds) if len({*zip(images, tokens, strict=True)}) == 1 else statistics.mean(seconds)
    row: Row = spread_fields("seconds", spread(seconds))
    for what, values in (("images", images), ("tokens", tokens)):
        work = statistics.mean(values)
        row |= {what: work, f"{what}_per_s": work / typical, f"{what}_per_s_per_rank": work / typical / ranks}
    return row


def shares(by_rank: Sequence[Sequence[Step]]) -> Row:
    """Shares of the counted steps' time, which sum to 1, and bytes that a rank sends to others in a step; means over ranks."""
    parts = {"data": "waited", "all_to_all": "all_to_all", "reduction": "reduction", "sums": "sums"}
    whole = statistics.mean(_means(by_rank, "seconds"))
    row = {f"share_{name}": statistics.mean(_means(by_rank, key)) / whole for name, key in parts.items()}
    row["share_compute"] = 1 - sum(row.values())
    sent = {f"{what}_bytes": statistics.mean(_means(by_rank, f"{what}_bytes")) for what in ("all_to_all", "reduction")}
    return {"seconds_counted": whole, **row, **sent}


def _means(by_rank: Sequence[Sequence[Step]], key: str) -> list[float]:
    """Per step, the mean over ranks."""
    return [statistics.mean(step[key] for step in at_once) for at_once in zip(*by_rank, strict=True)]


def _sums(by_rank: Sequence[Sequence[Step]], key: str) -> list[float]:
    return [sum(step[key] for step in at_once) for at_once in zip(*by_rank, strict=True)]
