"""Will a recipe run on so many nodes, does it fit, and how should it lie on them? Called by cli_plan.py, before anyone queues.

Needs no GPU, no process group and no data (whose absence is told). Memory comes from memory_trace.py and memory.py, times and
bytes from projection.py; what is wrong with recipe, size or data is collected, not raised.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from modsquad_ds.config import ParallelSpec, Recipe
from modsquad_ds.data.loader_plan import TRAIN, VAL, check_data, check_split
from modsquad_ds.errors import UserError
from modsquad_ds.memory import Group, Held, Zero, groups_of, step_memory
from modsquad_ds.memory_trace import Trace, network_of, trace_step
from modsquad_ds.model.counts import Counts, count_parameters
from modsquad_ds.model.heads import check_norm
from modsquad_ds.parallel.engine import complete_config, in_bf16, read_deepspeed_config
from modsquad_ds.parallel.experts import check_parallel
from modsquad_ds.parallel.ranks import Ranks, check_world
from modsquad_ds.plan import loader_plan, step_shares
from modsquad_ds.projection import (
    LIKELY,
    Band,
    Cluster,
    Times,
    bytes_exchanged,
    bytes_summed,
    expert_group,
    step_band,
    step_times,
)
from modsquad_ds.step_work import Job, flops_of_images
from modsquad_ds.tasks import TaskSpec
from modsquad_ds.topologies import Topology, topologies

GIB = 2**30
RESERVED, GAPS = 1.5 * GIB, 0.05
"""Of a GPU's memory: what CUDA's context and NCCL's buffers take (0.5 to 1 GB each), and the share that is lost between the
allocator's blocks. A choice."""
CHECKPOINTING = "model.activation_checkpointing=true"
UNEVEN_ROWS = 1.5
"""Rows of the busiest rank / the mean that memory has to hold where experts are spread and nothing is dropped. A choice."""


class Finding(NamedTuple):
    """Something to know before the job is queued."""

    kind: Literal["error", "note"]
    """`error`: training would not start, or not live."""
    text: str


class TaskRow(NamedTuple):
    """A task's data and parameters."""

    task: str
    images: int
    """Of an optimizer step over all ranks; 0 where they do not divide."""
    samples: int | None
    """Of the training split; None where it cannot be read."""
    steps_per_epoch: float | None
    """Optimizer steps of the run, those without the task included."""
    head: int
    """Parameters."""
    active: int
    """Parameters that a token of the task meets."""
    gflops: float
    """Forward pass of one training image, mean over its sizes."""


class Row(NamedTuple):
    """What a topology costs."""

    topology: Topology
    chosen: bool
    """The recipe's own."""
    memory: Held
    spare: float
    """Bytes left on the GPU; negative: missing."""
    seconds: Band
    """Of an optimizer step."""
    times: Times
    """Where the likely one goes."""
    exchanged: float
    """Bytes that a rank sends to others in a step for experts on other ranks."""
    summed: float
    """The same for gradients and weights."""
    crosses: bool
    """Whether experts' rows travel between nodes."""


@dataclass
class Forecast:
    """The whole answer."""

    recipe: Recipe
    cluster: Cluster
    gpu_memory: float
    """Bytes of a GPU."""
    counts: Counts
    findings: list[Finding] = field(default_factory=list)
    tasks: list[TaskRow] = field(default_factory=list)
    flops: float = 0.0
    """Of an optimizer step over all ranks, backward pass and recomputation included; mean over the tasks and sizes of steps."""
    rows: list[Row] = field(default_factory=list)
    """Those that fit, fastest first, then those that do not, by what they lack."""

    @property
    def fails(self) -> bool:
        """Whether something would make the run fail."""
        return any(finding.kind == "error" for finding in self.findings)


def forecast(recipe: Recipe, cluster: Cluster, gpu_memory: float, ep: int | None = None, zero: int | None = None) -> Forecast:
    """Check and project a recipe.

    Args:
        gpu_memory: bytes of a GPU.
        ep: show this expert-parallel size alone.
        zero: show this ZeRO stage alone.
    """
    network = network_of(recipe, ParallelSpec(), 1)
    result = Forecast(recipe, cluster, gpu_memory, count_parameters(network))
    config = _noted(result, read_deepspeed_config, recipe.deepspeed_config)
    if config is None:
        return result
    _noted(result, complete_config, config, recipe, cluster.world)
    _noted(result, check_world, Ranks(0, cluster.world), recipe.parallel.expect_world_size)
    _noted(result, check_parallel, recipe.parallel, cluster.world)
    images = _check_tasks(result, in_bf16(config))
    if not all(recipe.active[task].transform.train_sizes for task in images):
        return result  # nothing to run the network on
    flops = flops_of_images(recipe)
    _describe_tasks(result, images, flops)
    job = Job(recipe, cluster, network, images, flops)
    result.flops = job.flops() * cluster.world
    traces = _Traces(job)
    for topology, settings in topologies(recipe, cluster.world, config, ep, zero):
        result.rows.append(_row(result, job, traces, topology, settings))
    usable = [row for row in result.rows if row.spare >= 0]
    result.rows = sorted(usable, key=lambda row: row.seconds.likely) + sorted(
        (row for row in result.rows if row.spare < 0), key=lambda row: -row.spare
    )
    _conclude(result)
    return result


def _row(result: Forecast, job: Job, traces: "_Traces", topology: Topology, zero: Zero) -> Row:
    recipe, cluster = result.recipe, result.cluster
    parallel = recipe.parallel.model_copy(update={"ep_size": topology.ep, "attention_ep_size": topology.attention_ep})
    groups = traces.groups(parallel)
    packs = traces.of(topology, zero.weight == 2)
    held = max((step_memory(trace, groups, zero, recipe, cluster.world) for trace in packs), key=lambda one: one.total)
    work = job.work(topology, zero, statistics.mean(trace.operations for trace in packs))
    span = expert_group(max(topology.ep, topology.attention_ep), cluster)
    own = (recipe.parallel.ep_size, recipe.parallel.attention_ep_size, recipe.deepspeed_config)
    return Row(
        topology=topology,
        chosen=(topology.ep, topology.attention_ep, topology.config) == own,
        memory=held,
        spare=usable_memory(result.gpu_memory) - held.total,
        seconds=step_band(work, cluster),
        times=step_times(work, cluster, LIKELY),
        exchanged=bytes_exchanged(work),
        summed=bytes_summed(work, cluster),
        crosses=span.nodes > 1,
    )


def usable_memory(gpu_memory: float) -> float:
    """Bytes that training can fill."""
    return gpu_memory * (1 - GAPS) - RESERVED


class _Traces:
    """Traces of the packs that may be the largest; experts here, and on other ranks, whose number hardly matters."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.kept: dict[tuple[bool, bool], list[Trace]] = {}
        self.kept_groups: dict[int, list[Group]] = {}

    def groups(self, parallel: ParallelSpec) -> list[Group]:
        """The optimizer's groups, which the ZeRO stage does not change."""
        if parallel.ep_size not in self.kept_groups:
            recipe, world = self.job.recipe, self.job.cluster.world
            self.kept_groups[parallel.ep_size] = groups_of(network_of(recipe, parallel, world), recipe, world)
        return self.kept_groups[parallel.ep_size]

    def of(self, topology: Topology, bf16: bool) -> list[Trace]:
        """A trace per kind of pack: all tasks at their largest size, or with `weighted` sampling each task alone."""
        key = (topology.ep > 1, bf16)
        if key not in self.kept:
            job = self.job
            update = {"ep_size": topology.ep, "attention_ep_size": topology.attention_ep}
            parallel = job.recipe.parallel.model_copy(update=update)
            uneven = UNEVEN_ROWS if job.recipe.parallel.capacity_factor is None else 1.0
            self.kept[key] = [
                trace_step(job.recipe, parallel, job.cluster.world, pack, bf16=bf16, imbalance=uneven) for pack in job.packs()
            ]
        return self.kept[key]


# ---------------------------------------------------------------- checks


def _noted(result: Forecast, check: Callable[..., Any], *arguments: Any) -> Any:
    """What a check returns; a UserError becomes a finding, and None comes back."""
    try:
        return check(*arguments)
    except UserError as error:
        if (finding := Finding("error", str(error))) not in result.findings:
            result.findings.append(finding)
        return None


def _check_tasks(result: Forecast, bf16: bool) -> dict[str, int]:
    """Every task's batch, head and data through training's own checks. Images of a rank's micro-batch, rounded up where odd."""
    recipe, world = result.recipe, result.cluster.world
    images = {}
    for task, spec in recipe.adapted.items():
        plan = loader_plan(recipe, Ranks(0, world), {task: spec})
        _noted(result, check_data, plan, ())
        _noted(result, check_norm, spec, "cuda", world, bf16)
        for split in (TRAIN, VAL):
            _noted(result, check_split, plan, split)
        images[task] = -(-plan.step_images(task) // (world * plan.accumulation))
    return images


def _describe_tasks(result: Forecast, images: Mapping[str, int], flops: Mapping[str, tuple[float, float]]) -> None:
    recipe, world = result.recipe, result.cluster.world
    shares = step_shares(recipe.adapted, recipe.train.sampling)
    for task in images:
        spec: TaskSpec = recipe.active[task]
        plan = loader_plan(recipe, Ranks(0, world), {task: spec})
        try:
            samples = sum(plan.train_store(task).shard_sizes)
        except UserError:
            samples = None
        step = plan.step_images(task)
        result.tasks.append(TaskRow(
            task, step, samples, None if not samples else samples / (step * shares[task]),
            result.counts.heads[task], result.counts.active[task], sum(flops[task]) / 1e9,
        ))  # fmt: skip


def _conclude(result: Forecast) -> None:
    """Findings that the rows give."""
    fits = [row for row in result.rows if row.spare >= 0]
    for row in result.rows:
        if row.chosen and row.spare < 0:
            lacks = f"memory: the recipe's topology lacks {-row.spare / GIB:.1f} GiB per GPU"
            result.findings.append(Finding("error", f"{lacks}; take a row that fits, fewer images, or {CHECKPOINTING}"))
    if result.rows and not fits:
        result.findings.append(Finding("error", f"memory: no topology fits; take fewer images per rank, or {CHECKPOINTING}"))
    adapt = result.recipe.adapt
    if adapt.train != "all" or adapt.tasks:
        result.findings.append(Finding("note", "adapt: memory, sums and times are those of training everything, so at most"))
    if fits and fits[0].topology.ep == 1:
        spread = next((row for row in fits if row.topology.ep > 1), None)
        if spread is not None:
            result.findings.append(Finding("note", small_experts(fits[0], spread, result.recipe)))
    for row in fits:
        peer = _inside_a_node(row, fits)
        if row.crosses and peer is not None:
            result.findings.append(Finding("note", price(row, peer, result.cluster)))


def small_experts(alone: Row, spread: Row, recipe: Recipe) -> str:
    """Why no rank has to share experts, and what sharing would cost."""
    ratio = spread.seconds.likely / alone.seconds.likely
    return (
        f"EP=1 is projected to be the fastest: experts of {recipe.model.shape.width} x {recipe.model.expert_hidden} are small "
        f"enough for every rank to hold them all; EP={spread.topology.ep} would take {ratio:.2f} times as long"
    )


def _inside_a_node(row: Row, fits: Sequence[Row]) -> Row | None:
    """The row of the same ZeRO stage with the largest groups that stay in a node."""
    peers = [one for one in fits if not one.crosses and one.topology.zero == row.topology.zero]
    return max(peers, key=lambda one: one.topology.ep, default=None)


def price(row: Row, peer: Row, cluster: Cluster) -> str:
    """What it costs that experts' rows cross nodes, against a topology that keeps them inside."""
    ratios = [mine / theirs for mine, theirs in zip(row.seconds, peer.seconds, strict=True)]
    likely, low, high = ratios[1], min(ratios), max(ratios)
    return (
        f"EP={row.topology.ep}, ZeRO {row.topology.zero} crosses nodes of {cluster.per_node}: "
        f"{likely:.2f} ({low:.2f} to {high:.2f}) times the step of EP={peer.topology.ep}"
    )
