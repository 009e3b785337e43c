"""Dispatch with a capacity over ranks: equal splits, so no counts are exchanged and the host never waits for the device.

Axes: S tokens in the pack, K top-k, R = S * K slots, D width, P ranks of the expert-parallel group, E all experts, L experts
held by this rank, C places of an expert per rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modsquad_ds.model.capacity import CapacityDispatcher
from modsquad_ds.model.dispatch import Compute, Groups, Plan
from modsquad_ds.model.router import Routing
from modsquad_ds.parallel.dispatch import AllToAllDispatcher


class AllToAllCapacityDispatcher(CapacityDispatcher):
    """`CapacityDispatcher` over the group of a dropless dispatcher, which evaluation goes on using.

    Contract: at every step all ranks of the group have the same S, as training's loader gives them, so the same C. Which slots
    are dropped is then each rank's own affair.
    """

    def __init__(self, num_experts: int, capacity_factor: float, dropless: AllToAllDispatcher) -> None:
        super().__init__(num_experts, capacity_factor)
        self.dropless = dropless

    def plan(self, routing: Routing) -> Plan:
        """This rank's places; each of its own experts gets C rows from every rank."""
        plan = super().plan(routing)
        capacity = plan.groups.rows[0]
        return plan._replace(groups=Groups((self.dropless.ep_size * capacity,) * self.dropless.local))

    def _at_experts(self, compute: Compute, rows_GD: Tensor, plan: Plan) -> Tensor:
        """`[E * C, D]` to the ranks of their experts, which see them by (expert, source rank), and back."""
        ranks, local = self.dropless.ep_size, self.dropless.local
        arrived = _regrouped(self._exchange(rows_GD), ranks, local)
        return self._exchange(_regrouped(compute(arrived, plan.groups), local, ranks))

    def _exchange(self, x: Tensor) -> Tensor:
        return _EqualAllToAll.apply(x, self.dropless.group)


def _regrouped(x: Tensor, outer: int, inner: int) -> Tensor:
    """Rows that lie by (outer, inner, place) -> by (inner, outer, place)."""
    return x.view(outer, inner, -1, x.shape[1]).transpose(0, 1).reshape(x.shape)


class _EqualAllToAll(torch.autograd.Function):
    """All-to-all of equal parts; its gradient is the same exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """`x` [P * n, D] -> [P * n, D]; part p goes to rank p."""
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Gradient rows to where the rows came from."""
        return _all_to_all(grads[0], ctx.group), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out
