"""Dispatch with a capacity: training's way through a sparse layer on machines where waits for the device hurt.

Axes: S tokens in the pack, K top-k, R = S * K slots (a token and one of its experts), E experts, C places of an expert,
G = E * C places, D width, T tasks.

Every expert has C places for the slots of one rank, C a function of shapes alone (GShard, arXiv 2006.16668, section 2.2; Switch,
arXiv 2101.03961, equation 3). Slots that find no place are dropped, those of lowest gate weight first, as DeepSpeed's
`topkgating` does with `drop_policy="probs"`. So the host knows every length without asking the device.
"""

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from modsquad_ds.model.dispatch import Compute, Groups, Plan, weighted_sum
from modsquad_ds.model.pack import Segment
from modsquad_ds.model.router import Routing, RoutingStats

NOWHERE = -1
"""Place of a dropped slot; slot of an empty place."""
BEHIND_ALL = -1.0
"""Below every gate weight."""


class CapacityDispatcher:
    """Dispatcher whose every expert gets C rows, empty places zero; a dropped slot comes back as zero.

    In its plans `order_R` is `[G]`, the slot of each place in expert order, `inverse_R` is `[R]`, the place of each slot, and
    both hold NOWHERE. Every expert is here; `parallel/capacity.py` adds the way to other ranks.
    """

    def __init__(self, num_experts: int, capacity_factor: float) -> None:
        self.num_experts = num_experts
        self.factor = Fraction(str(capacity_factor))
        """Exact, as it was written: in binary 1.1 * 100 / 10 is a little more than 11, and its ceiling 12."""

    def capacity(self, slots: int) -> int:
        """C: places per expert for this many slots of one rank."""
        return max(1, math.ceil(self.factor * slots / self.num_experts))

    def plan(self, routing: Routing) -> Plan:
        """The slots of highest gate weight get the places."""
        capacity = self.capacity(routing.expert_SK.numel())
        slot_G, place_R = assign_places(routing, self.num_experts, capacity)
        return Plan(slot_G, place_R, Groups((capacity,) * self.num_experts), dropped_R=place_R < 0)

    def run(self, compute: Compute, x: Tensor, plan: Plan, weight_SK: Tensor | None = None) -> Tensor:
        """See `Dispatcher`."""
        rows_GD = TakeOrZero.apply(x, plan.order_R, plan.inverse_R, plan.inverse_R.numel() // x.shape[0])
        slots_RO = TakeOrZero.apply(self._at_experts(compute, rows_GD, plan), plan.inverse_R, plan.order_R, 1)
        return slots_RO if weight_SK is None else weighted_sum(slots_RO, weight_SK)

    def _at_experts(self, compute: Compute, rows_GD: Tensor, plan: Plan) -> Tensor:
        """`[G, D]` -> `[G, O]`, both in expert order."""
        return compute(rows_GD, plan.groups)


def assign_places(routing: Routing, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Slot of each place `[G]` and place of each slot `[R]`, int64, inverse to each other apart from NOWHERE.

    Slots queue up by (expert, gate weight descending, slot number), those of rows that only fill up behind all others; an
    expert's first C have a place. Gathers alone, and no result whose shape depends on values, which would make the host wait.
    """
    expert_R, weight_SK = routing.expert_SK.flatten(), routing.weight_SK.detach()
    if routing.filling_S is not None:
        weight_SK = weight_SK.masked_fill(routing.filling_S.unsqueeze(1), BEHIND_ALL)
    by_weight_R = weight_SK.flatten().argsort(descending=True, stable=True)
    queue_R = by_weight_R[expert_R[by_weight_R].argsort(stable=True)]
    number_R = torch.empty_like(queue_R)
    number_R[queue_R] = torch.arange(queue_R.numel(), device=queue_R.device)

    first_E = torch.searchsorted(expert_R[queue_R], torch.arange(num_experts + 1, device=queue_R.device))
    position_C = torch.arange(capacity, device=queue_R.device)
    taken_EC = position_C < first_E.diff().unsqueeze(1)
    number_EC = (first_E[:-1].unsqueeze(1) + position_C).clamp(max=queue_R.numel() - 1)
    slot_EC = torch.where(taken_EC, queue_R[number_EC], NOWHERE)

    position_R = number_R - first_E[expert_R]
    place_R = torch.where(position_R < capacity, expert_R * capacity + position_R, NOWHERE)
    return slot_EC.flatten(), place_R


def with_dropped(routing: Routing, plan: Plan, segments: tuple[Segment, ...]) -> RoutingStats:
    """The routing's statistics with each task's dropped slots; as they are where the plan drops none."""
    stats, top_k = routing.stats, routing.expert_SK.shape[1]
    if plan.dropped_R is None:
        return stats
    dropped = list(stats.dropped_T.unbind())
    parts = plan.dropped_R.split([segment.length * top_k for segment in segments])
    for segment, part in zip(segments, parts, strict=True):
        dropped[segment.task] = dropped[segment.task] + part[: segment.counted_length * top_k].sum()
    return stats._replace(dropped_T=torch.stack(dropped))


class TakeOrZero(torch.autograd.Function):
    """`x[index // copies]`, zero where the index is NOWHERE. Its gradient is the same with `back`, the inverse: no scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        """`x` [n, D], `index` [m] -> [m, D]; `back` [n * copies]."""
        ctx.save_for_backward(back)
        ctx.copies = copies
        return _take(x, index, copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient rows to where the rows came from, a token's copies summed."""
        (back,) = ctx.saved_tensors
        grad = _take(grads[0], back, 1)
        if ctx.copies > 1:
            grad = grad.view(-1, ctx.copies, grad.shape[1]).sum(1)
        return grad, None, None, None


def _take(x: Tensor, index: Tensor, copies: int) -> Tensor:
    rows = x.index_select(0, index.clamp(min=0) // copies)
    return rows.masked_fill_((index < 0).unsqueeze(1), 0)
