"""How long a training step will take on GPUs that are not here, and what it sends: formulas of its work and of the hardware.

Pure functions; bytes, seconds, FLOP. The formulas are an alpha-beta model with NCCL's own latencies (NVIDIA/nccl,
src/graph/tuning.cc). Against published runs it meets large messages within 2 % and is 1.6 to 2.5 times too fast for those below
some 256 MiB between nodes; `hardware.SMALL_OUTSIDE` corrects that. How much of a GPU's peak the layers reach is known least, so
a step's time is a band: every doubt at its best, as likely, and at its worst. Read by feasibility.py.
"""

import math
from typing import NamedTuple

from modsquad_ds import hardware
from modsquad_ds.hardware import Gpu, efficiency, slowdown

UPDATE_OWNED, UPDATE_HELD = 28, 6
"""Bytes that an Adam step moves in the GPU's memory per parameter of the rank's part, and per parameter that it holds."""
ROW_MOVES = 12
"""How often a step reads or writes the rows of a sparse layer to sort them and back."""
OVERLAP = 2 / 3
"""Share of the computation beside which sums of gradients can run: the backward pass."""
FP32_SHARE = 2.0
"""fp32 layers reach about twice the share of their (much lower) peak; at most `FP32_MOST`. A choice."""
FP32_MOST = 0.8


class Span(NamedTuple):
    """Where the ranks of a group are."""

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.per_node


class Cluster(NamedTuple):
    """The GPUs of a job."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.per_node


class Doubts(NamedTuple):
    """One end of the band, or its middle."""

    efficiency: int
    """Index into the efficiencies of hardware.py: 0 the least."""
    imbalance: float
    """Rows of the busiest rank of an expert-parallel group / the mean. A choice: unknown before routers are trained."""
    small: float
    """Weight of the correction for small messages: 0 takes the formula as it is, 1 as measured, more is worse."""
    straggling: float
    """Share of the rate that is lost each time the nodes double: stragglers, jitter, data. NeMo's ViT g/14 lost 4 to 5.6 % at 16
    nodes where the formulas say 1."""


BEST, LIKELY, WORST = Doubts(2, 1.0, 0.0, 0.0), Doubts(1, 1.2, 1.0, 0.01), Doubts(0, 2.0, 2.0, 0.015)


class Band(NamedTuple):
    """A projected value, never without its doubt."""

    low: float
    likely: float
    high: float


class Exchange(NamedTuple):
    """The all-to-alls of one kind of sparse layer in an optimizer step, over all layers of that kind."""

    ep: int
    size: float
    """Bytes of one, this rank's own share included; a mean over the kind's."""
    calls: int
    counts: int
    """Exchanges of row counts, each with a wait of the host; 0 with a capacity."""


class Work(NamedTuple):
    """What one rank does in an optimizer step."""

    flops: float
    operations: float
    """That the host has to start."""
    expert_share: float
    """Of these FLOPs, by the experts."""
    width: int
    """Of the model."""
    bf16: bool
    row_bytes: float
    """Rows of all sparse layers, each once."""
    dense: float
    """Parameters that every rank holds."""
    experts: tuple[tuple[int, float], ...]
    """(EP, parameters of all experts that are spread over so many ranks) per size of group; EP=1 is in `dense`."""
    exchanges: tuple[Exchange, ...]
    reductions: int
    """How often a step sums gradients: once, or in ZeRO 2 once per micro-batch."""
    message: int
    """Bytes of a gradient while it is summed."""
    weight: int
    bucket: int
    overlap: bool
    zero: int


class Times(NamedTuple):
    """Seconds of a step, by what they go to."""

    compute: float
    """On the GPU, or where that is more on the host, which starts it."""
    exchange: float
    """All-to-alls of the experts."""
    gradients: float
    """The part of the sums that no computation hides."""
    gather: float
    """Weights, after ZeRO's parts were updated."""
    update: float


# ---------------------------------------------------------------- collectives


def bus_rate(span: Span, gpu: Gpu) -> float:
    """Bytes per second and rank of a ring over the group."""
    if span.nodes == 1:
        return gpu.inside
    return min(gpu.inside, span.per_node * gpu.outside)


def all_reduce_seconds(size: float, span: Span, gpu: Gpu, small: float = 0.0) -> float:
    """An all-reduce of `size` bytes: the faster of ring and tree latency, and 2 (n - 1) / n of the bytes over the bus."""
    if span.ranks == 1:
        return 0.0
    steps, outside = 2 * (span.ranks - 1), 2 * (span.nodes - 1)
    ring = hardware.RING_START + (steps - outside) * hardware.RING_INSIDE + outside * hardware.RING_OUTSIDE
    hops = (span.per_node - 1) * hardware.TREE_INSIDE + math.log2(span.nodes) * hardware.TREE_OUTSIDE
    latency = min(ring, hardware.TREE_START + 2 * hops)
    return (latency + steps / span.ranks * size / bus_rate(span, gpu)) * _small(size, span, small)


def all_gather_seconds(size: float, span: Span, gpu: Gpu, small: float = 0.0) -> float:
    """An all-gather (or reduce-scatter) whose whole is `size` bytes: a ring of n - 1 steps."""
    if span.ranks == 1:
        return 0.0
    steps, outside = span.ranks - 1, span.nodes - 1
    latency = hardware.RING_START + (steps - outside) * hardware.RING_INSIDE + outside * hardware.RING_OUTSIDE
    return (latency + steps / span.ranks * size / bus_rate(span, gpu)) * _small(size, span, small)


def all_to_all_seconds(size: float, span: Span, gpu: Gpu, small: float = 0.0) -> float:
    """An all-to-all of `size` bytes per rank, own share included: the slower of NVLink and the one network card of a GPU."""
    ranks = span.ranks
    if ranks == 1:
        return 0.0
    hop = hardware.ALL_TO_ALL_INSIDE if span.nodes == 1 else hardware.ALL_TO_ALL_OUTSIDE
    inside, outside = size * (span.per_node - 1) / ranks / gpu.inside, size * (ranks - span.per_node) / ranks / gpu.outside
    # Measured corrections are of all-reduces; small all-to-alls are held to suffer as much.
    return hardware.ALL_TO_ALL_START + hop * (ranks - 1) + max(inside, outside) * _small(size, span, small)


def _small(size: float, span: Span, weight: float) -> float:
    table = hardware.SMALL_INSIDE if span.nodes == 1 else hardware.SMALL_OUTSIDE
    return 1 + weight * (slowdown(table, size) - 1)


# ---------------------------------------------------------------- groups of ranks


def whole_job(cluster: Cluster) -> Span:
    """All ranks."""
    return Span(cluster.nodes, cluster.per_node)


def expert_group(ep: int, cluster: Cluster) -> Span:
    """`ep` consecutive ranks: in one node where they divide it, else over as many nodes as they touch."""
    if cluster.per_node % ep == 0:
        return Span(1, ep)
    if ep % cluster.per_node == 0:
        return Span(ep // cluster.per_node, cluster.per_node)
    nodes = min(cluster.nodes, -(-ep // cluster.per_node) + (1 if ep > 1 and ep < cluster.per_node else 0))
    return Span(nodes, -(-ep // nodes))


def same_experts_group(ep: int, cluster: Cluster) -> Span:
    """The ranks that hold the same experts: every `ep`-th one."""
    copies = cluster.world // ep
    if ep >= cluster.per_node:
        return Span(copies, 1)
    nodes = min(cluster.nodes, copies)
    return Span(nodes, copies // nodes)


# ---------------------------------------------------------------- a step


def step_band(work: Work, cluster: Cluster) -> Band:
    """Seconds of a step."""
    return Band(*(total_seconds(work, cluster, doubts) for doubts in (BEST, LIKELY, WORST)))


def total_seconds(work: Work, cluster: Cluster, doubts: Doubts) -> float:
    """Seconds of a step, stragglers included."""
    lost = doubts.straggling * math.log2(cluster.nodes)
    return sum(step_times(work, cluster, doubts)) / (1 - lost)


def step_times(work: Work, cluster: Cluster, doubts: Doubts) -> Times:
    """Where the time of a step goes, but for stragglers."""
    gpu, small = cluster.gpu, doubts.small
    spread = any(exchange.ep > 1 for exchange in work.exchanges)
    uneven = doubts.imbalance if spread else 1.0
    rate = achieved_rate(work, gpu, doubts)
    compute = work.flops * (1 + work.expert_share * (uneven - 1)) / rate + ROW_MOVES * work.row_bytes / gpu.memory_rate
    compute = max(compute, work.operations * hardware.HOST[doubts.efficiency])
    exchange = 0.0
    for one in work.exchanges:
        if one.ep > 1:
            span = expert_group(one.ep, cluster)
            exchange += one.calls * all_to_all_seconds(one.size * uneven, span, gpu, small) + one.counts * hardware.COUNT_EXCHANGE
    gradients = work.reductions * sum(
        _in_buckets(elements, work, span, gpu, small) for elements, span in _held(work, cluster)
    )
    hidden = OVERLAP * compute if work.overlap else 0.0
    gather = 0.0
    if work.zero:
        gather = sum(all_gather_seconds(n * work.weight, span, gpu, small) for n, span in _held(work, cluster))
    held = sum(n for n, _ in _held(work, cluster))
    owned = sum(n / (span.ranks if work.zero else 1) for n, span in _held(work, cluster))
    update = (UPDATE_OWNED * owned + UPDATE_HELD * held) / gpu.memory_rate
    return Times(compute, exchange, max(0.0, gradients - hidden), gather, update)


def achieved_rate(work: Work, gpu: Gpu, doubts: Doubts) -> float:
    """FLOP/s that the layers reach."""
    share = efficiency(gpu, work.width)[doubts.efficiency]
    if work.expert_share:
        share *= hardware.SPARSE_EFFICIENCY[doubts.efficiency]
    return gpu.peak * share if work.bf16 else gpu.peak_fp32 * min(FP32_MOST, FP32_SHARE * share)


def bytes_exchanged(work: Work) -> float:
    """Bytes of rows that a rank sends to others in a step, with even routing."""
    return sum(one.calls * one.size * (one.ep - 1) / one.ep for one in work.exchanges)


def bytes_summed(work: Work, cluster: Cluster) -> float:
    """Bytes that a rank sends to others to sum gradients and to gather weights, as rings do."""
    total = 0.0
    for elements, span in _held(work, cluster):
        others = (span.ranks - 1) / span.ranks
        total += elements * others * (2 * work.reductions * work.message + (work.weight if work.zero else 0))
    return total


def _held(work: Work, cluster: Cluster) -> list[tuple[float, Span]]:
    """Parameters that a rank holds, and the ranks that hold the same."""
    shared = [(elements / ep, same_experts_group(ep, cluster)) for ep, elements in work.experts]
    return [(work.dense, whole_job(cluster)), *shared]


def _in_buckets(elements: float, work: Work, span: Span, gpu: Gpu, small: float) -> float:
    """DeepSpeed's sum of gradients: an all-reduce per bucket, also in ZeRO 1 and 2."""
    if not elements:
        return 0.0
    calls = math.ceil(elements / work.bucket)
    return calls * all_reduce_seconds(elements / calls * work.message, span, gpu, small)
