"""Which expert lies on which rank: loads by task in, an order of the experts out that evens them, and tensors in that order.

Routers specialise, so the experts of a task with many tokens get most rows, and a rank that holds them all is waited for by
its whole group. An order moves experts between ranks; router rows and usage move along, so the network computes the same.
checkpoint.py applies an order while it loads, since an expert's place matters to nothing but the expert-parallel group.

Axes: T tasks, E experts of a layer. Load means rows per step: one row is one token on its way through one expert.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modsquad_ds.model.sparse import SparseLayer
from modsquad_ds.objective import Usage

Order = tuple[int, ...]
"""New position i of a layer's experts holds old expert order[i]."""

ROUNDING = 1e-9
"""Loads that differ by less than this share of the larger are even."""


class Move(NamedTuple):
    """What an order does to one tensor."""

    axis: int
    order: Order


# ---------------------------------------------------------------- loads


def expert_load(share_TE: Tensor, token_T: Sequence[float], top_k: int) -> Tensor:
    """Rows per step that each expert of a layer gets, over all ranks; float64 `[E]` on the CPU.

    Args:
        share_TE: share of each task's top-k choices that fell on the expert (`Usage.share_TE`); zeros for a task not seen yet.
        token_T: tokens of each task in a step (`plan.step_tokens`).
        top_k: experts per token.
    """
    tokens_T1 = torch.tensor(token_T, dtype=torch.float64).unsqueeze(1)
    return (share_TE.detach().cpu().double() * tokens_T1 * top_k).sum(0)


def imbalance(load_E: Tensor, ranks: int) -> float:
    """Load of the busiest rank over the mean of all, experts lying on `ranks` ranks in order of number; 1 is even.

    No load at all is even. Raises ValueError as `balanced_order` does.
    """
    load = _checked(load_E, ranks)
    total = math.fsum(load)
    return _busiest(_in_order(load, ranks), load) * ranks / total if total else 1.0


def balanced_order(load_E: Tensor, ranks: int) -> Order:
    """The order that evens the ranks' loads, each rank with the same number of experts.

    Largest load first onto the least loaded rank with room (Graham 1969), then swaps of two experts as long as one lowers
    the busiest rank; the same swaps are tried from the present layout. The better result wins, and the present order wherever
    it is as even. Swaps end with the busiest rank at no more than the mean load + (1 - 1/ranks) * the largest expert's load,
    so below twice the best there is; what is left is seldom anything (tests/test_placement.py compares with all layouts).
    Deterministic: ties go to lower numbers, and a rank's experts keep their mutual order. Raises ValueError where `ranks`
    does not divide the experts, or a load is negative or not finite.
    """
    load = _checked(load_E, ranks)
    present = _in_order(load, ranks)
    layouts = (present, _swapped(present, load), _swapped(_largest_first(load, ranks), load))
    least = min(_busiest(layout, load) for layout in layouts)
    best = next(layout for layout in layouts if _busiest(layout, load) <= least * (1 + ROUNDING))
    return tuple(expert for group in sorted(sorted(group) for group in best) for expert in group)


def _checked(load_E: Tensor, ranks: int) -> list[float]:
    load = [float(x) for x in load_E.tolist()]
    if ranks < 1 or len(load) % ranks:
        raise ValueError(f"{len(load)} experts do not divide over {ranks} ranks")
    if not all(math.isfinite(x) and x >= 0 for x in load):
        raise ValueError(f"loads of experts must be finite and not negative: {load}")
    return load


def _in_order(load: Sequence[float], ranks: int) -> list[list[int]]:
    """Experts of each rank, by number."""
    size = len(load) // ranks
    return [list(range(rank * size, (rank + 1) * size)) for rank in range(ranks)]


def _rows(layout: Iterable[Sequence[int]], load: Sequence[float]) -> list[float]:
    """Load of each rank; exactly rounded, so the same for the same experts in any order."""
    return [math.fsum(load[expert] for expert in group) for group in layout]


def _busiest(layout: Iterable[Sequence[int]], load: Sequence[float]) -> float:
    return max(_rows(layout, load))


def _largest_first(load: Sequence[float], ranks: int) -> list[list[int]]:
    """Each expert, by falling load, to the rank with the least load among those with room."""
    layout: list[list[int]] = [[] for _ in range(ranks)]
    rows = [0.0] * ranks
    for expert in sorted(range(len(load)), key=lambda e: (-load[e], e)):
        rank = min((r for r in range(ranks) if len(layout[r]) < len(load) // ranks), key=lambda r: (rows[r], r))
        layout[rank].append(expert)
        rows[rank] += load[expert]
    return layout


def _swapped(layout: Sequence[Sequence[int]], load: Sequence[float]) -> list[list[int]]:
    """After swaps between the busiest rank and another, the best first, until none makes both smaller than the busiest was.

    Each swap lowers the largest load or the number of ranks that have it, so it ends.
    """
    groups = [list(group) for group in layout]
    while True:
        rows = _rows(groups, load)
        top = rows.index(max(rows))
        swaps = (
            (max(rows[top] - load[i] + load[j], rows[rank] + load[i] - load[j]), i, j, rank)
            for rank, group in enumerate(groups)
            if rank != top
            for i in groups[top]
            for j in group
        )
        highest, i, j, rank = min(swaps, default=(rows[top], 0, 0, 0))
        if highest >= rows[top] * (1 - ROUNDING):
            return groups
        groups[top][groups[top].index(i)], groups[rank][groups[rank].index(j)] = j, i


# ---------------------------------------------------------------- tensors


def expert_moves(network: nn.Module, orders: Sequence[Order]) -> dict[str, Move]:
    """Name of every parameter that new orders change -> how. One order per sparse layer, in the order of the statistics.

    `network` gives the structure alone: its experts may lie on other ranks, while moves are of full tensors.
    """
    layers = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, SparseLayer)]
    return {
        f"{path}.{name}": Move(axis, tuple(order))
        for (path, layer), order in zip(layers, orders, strict=True)
        if tuple(order) != tuple(range(len(order)))
        for name, axis in layer.expert_axes().items()
    }


def moved(tensor: Tensor, move: Move) -> Tensor:
    """The tensor with its axis of experts in the new order. Raises ValueError where the order is of another number of experts."""
    if len(move.order) != tensor.shape[move.axis]:
        raise ValueError(f"an order of {len(move.order)} experts for axis {move.axis} of {tuple(tensor.shape)}")
    return tensor.index_select(move.axis, torch.tensor(move.order, device=tensor.device))


def permute_experts(state: Mapping[str, Tensor], moves: Mapping[str, Move]) -> dict[str, Tensor]:
    """A state dict of full tensors with its experts moved; what no move names is passed on as it is."""
    return {name: moved(tensor, moves[name]) if name in moves else tensor for name, tensor in state.items()}


def permute_usage(usage: Sequence[Usage], orders: Sequence[Order]) -> tuple[Usage, ...]:
    """Every layer's usage with its experts moved."""
    return tuple(
        Usage(*(moved(tensor, Move(1, tuple(order))) for tensor in layer)) for layer, order in zip(usage, orders, strict=True)
    )
