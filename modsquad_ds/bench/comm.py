"""`bench comm`: what a training step sends between ranks, counted: against the least possible and against padded dispatch.

Axes: S tokens, K top-k, E experts, P ranks of the expert-parallel group, D width, C width of an attention head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modsquad_ds.bench.jobs import run_job
from modsquad_ds.bench.measure import Row, with_environment
from modsquad_ds.bench.routing import observed, steered
from modsquad_ds.bench.workload import PACKED, PER_TASK, Workload, step_batch, step_of, step_recipe, trainer_of, workload
from modsquad_ds.errors import UserError
from modsquad_ds.model.router import Router
from modsquad_ds.model.sparse import SparseAttention, SparseLayer, SparseMLP
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import gather_json
from modsquad_ds.parallel.experts import ep_size_of
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.traffic import Traffic, counted
from modsquad_ds.placement import balanced_order, expert_load
from modsquad_ds.trainer import Trainer

WORK = Workload({"classes": (8, 224), "boxes": (4, 160), "masks": (4, 112)})
"""1568, 400 and 196 tokens: about 70, 20 and 10 %."""
CAPACITY = 1.25
COLUMNS = {
    "ranks": "ranks", "case": "dispatch", "routing": "routing", "row_calls": "row\na2a", "count_calls": "count\na2a",
    "stats_calls": "stats", "mib": "MiB\nsent", "ratio": "sent\n/ least", "padded": "padded\n/ least", "busiest": "max\n/ mean",
}  # fmt: skip
NOTE = (
    "Per step and rank; MiB of the rank that sends most. a2a: all-to-alls. stats: all-reduces besides DeepSpeed's. least: bytes "
    "of the chosen (token, expert) rows of other ranks, out and back, forward and backward. padded: what DeepSpeed's dispatch "
    "without drops would send for this routing. max / mean: rows of a layer's busiest rank."
)
LIMIT = 1200.0


class Case(NamedTuple):
    """One way of dispatch under one routing."""

    name: str
    routing: str = "random"
    variant: str = PACKED
    capacity: float | None = None
    attention_ep: bool = False


CASES = (
    Case("packed"),
    Case("one pass per task", variant=PER_TASK),
    Case("attention spread too", attention_ep=True),
    Case("capacity 1.25", capacity=CAPACITY),
    Case("packed", "specialised"),
    Case("experts placed", "specialised"),
)
PLACED = CASES[-1]


def bench_comm(world_sizes: Sequence[int], work: Workload = WORK) -> list[Row]:
    """Rows of every case at each number of ranks, all of which share the experts. UserError where they cannot."""
    for ranks in world_sizes:
        check_ranks(ranks, work)
    return [row for ranks in world_sizes for row in run_job("comm", work._asdict(), ranks, LIMIT)]


def check_ranks(ranks: int, work: Workload) -> None:
    """Refuse, before anything starts, what experts or images do not divide over."""
    moe = step_recipe(work, 1).model
    parts = {"MLP experts": moe.mlp.num_experts, "attention experts": moe.attention.num_experts}
    parts |= {f"images of {task}": count for task, (count, _) in work.images.items()}
    odd = [f"{count} {what}" for what, count in parts.items() if count % ranks]
    if ranks < 2 or odd:
        why = f"the {odd[0]} do not divide over them" if odd else "one rank sends nothing"
        raise UserError(f"--ranks {ranks}: {why}; take 2 or 4")


def measure_comm(images: Any, size: str) -> list[Row] | None:
    """One rank of a job. Rows on the first rank."""
    ranks, work = launch.start(), workload(images, size)
    rows = [measure_case(case, work, ranks) for case in CASES]
    launch.stop()
    return with_environment(rows) if ranks.first else None


def measure_case(case: Case, work: Workload, ranks: Ranks) -> Row:
    """The second step of a case, counted."""
    changes = {"capacity_factor": case.capacity, "attention_ep_size": ranks.world if case.attention_ep else 1}
    trainer = trainer_of(case.variant, work, ranks, ranks.world, changes)
    layers = list(trainer.network.backbone.sparse_layers().values())
    step = step_of(trainer, step_batch(work, ranks))
    tokens = [count // ranks.world for count in work.tokens.values()]
    with routed(case, trainer, tokens):
        step()
        with counted(timed=False) as traffic, observed([layer.router for layer in layers]) as counts:
            step()
    mine = {
        "sent": traffic.totals()["rows"].bytes,
        "counts": [[passed.tolist() for passed in of_layer] for of_layer in counts],
    }
    everyone = gather_json(mine)
    return row_of(case, trainer, layers, traffic, everyone)


def row_of(
    case: Case, trainer: Trainer, layers: Sequence[SparseLayer], traffic: Traffic, everyone: Sequence[dict[str, Any]]
) -> Row:
    """What ranks sent beside what they had to, calls, and how evenly rows lay on ranks.

    Args:
        traffic: this rank's; calls are the same on all.
        everyone: of each rank the bytes of rows that it `sent` and its `counts` per layer and pass.
    """
    ranks, totals = trainer.ranks, traffic.totals()
    spread = [i for i, layer in enumerate(layers) if ep_size_of(layer, trainer.recipe.parallel) > 1]
    counts_LNPE = [torch.tensor([rank["counts"][i] for rank in everyone]).transpose(0, 1) for i in spread]
    widths = [exchanged_width(layers[i]) for i in spread]
    least_P = sum(least_bytes(c, w) for c, w in zip(counts_LNPE, widths, strict=True))
    padded = sum(padded_bytes(c, w) for c, w in zip(counts_LNPE, widths, strict=True))
    sent_P = torch.tensor([float(rank["sent"]) for rank in everyone])
    assert isinstance(least_P, Tensor)
    return {
        "ranks": ranks.world, "ep_size": ranks.world, "case": case.name, "routing": case.routing,
        "layers": len(spread),
        "row_calls": totals["rows"].calls,
        "count_calls": totals["counts"].calls if "counts" in totals else 0,
        "stats_calls": sum(not call.deepspeed for call in traffic.calls if call.kind == "all_reduce"),
        "all_collectives": len(traffic.calls),
        "mib": float(sent_P.max()) / 2**20, "least_mib": float(least_P.max()) / 2**20,
        "ratio": float(sent_P.sum() / least_P.sum()), "padded": padded * ranks.world / float(least_P.sum()),
        "busiest": max(busiest(c) for c in counts_LNPE),
    }  # fmt: skip


def exchanged_width(layer: SparseLayer) -> int:
    """Numbers that a row brings to its expert's rank on its ways in a forward pass; as many come back."""
    if isinstance(layer, SparseAttention):
        return layer.kv.in_features + layer.head_dim
    assert isinstance(layer, SparseMLP)
    return layer.experts.fc1_weight.shape[2]


def least_bytes(counts_NPE: Tensor, width: int) -> Tensor:
    """Bytes `[P]` that each rank has to send in a step for one layer, fp32.

    A row that leaves comes back, and in the backward pass its gradient takes both ways once more. So a rank sends, each in fp32
    and twice: its rows that leave, and those that came from others.

    Args:
        counts_NPE: per pass, rank and expert the rows of this rank for this expert; rank p holds the p-th part of the experts.
        width: `exchanged_width`.
    """
    passes, ranks, _ = counts_NPE.shape
    to_NPP = counts_NPE.view(passes, ranks, ranks, -1).sum(-1)
    away_NPP = to_NPP * (1 - torch.eye(ranks))
    return 2 * 4 * width * (away_NPP.sum(2) + away_NPP.sum(1)).sum(0)


def padded_bytes(counts_NPE: Tensor, width: int) -> float:
    """Bytes that a rank sends where every expert's part is padded to the longest of all ranks, as DeepSpeed without drops."""
    _, ranks, experts = counts_NPE.shape
    away = experts * (ranks - 1) / ranks
    return float(4 * 4 * width * away * counts_NPE.amax((1, 2)).sum())


def busiest(counts_NPE: Tensor) -> float:
    """Rows of the busiest rank over the mean, of all passes together."""
    _, ranks, _ = counts_NPE.shape
    rows_P = counts_NPE.sum((0, 1)).view(ranks, -1).sum(1)
    return float(rows_P.max() / rows_P.mean())


@contextmanager
def routed(case: Case, trainer: Trainer, tokens: Sequence[int]) -> Iterator[None]:
    """Inside the block the sparse MLPs' routers choose as the case says; other layers as they learned."""
    if case.routing == "random":
        yield
        return
    with ExitStack() as stack:
        for layer in trainer.network.backbone.sparse_layers().values():
            if isinstance(layer, SparseMLP):
                stack.enter_context(steered(layer, specialised(layer.router, tokens, trainer.ranks.world, case == PLACED)))
        yield


def specialised(router: Router, tokens: Sequence[int], ranks: int, placed: bool) -> Callable[[Router, Tensor], Tensor]:
    """Every task on experts of its own, the first K, the next K and so on; `placed`: numbered anew so that ranks are even.

    Args:
        tokens: of each task in a rank's pack, in its order.
        ranks: that share the experts.
    """
    top_k, experts = router.top_k, router.num_experts
    share_TE = torch.zeros(len(tokens), experts)
    for task in range(len(tokens)):
        share_TE[task, task * top_k : (task + 1) * top_k] = 1 / top_k
    load_E = expert_load(share_TE, [float(n) for n in tokens], top_k)
    order = balanced_order(load_E, ranks) if placed else tuple(range(experts))
    position_E = torch.tensor(order).argsort()
    own_TK = position_E[torch.arange(len(tokens) * top_k).view(len(tokens), top_k)]
    expert_SK = own_TK.repeat_interleave(torch.tensor(tokens), dim=0)
    return lambda _router, prob_SE: expert_SK.to(prob_SE.device)
