"""The all-to-all dispatcher: rows to the ranks that hold their experts, and back, with no row too many.

Axes: S tokens in the pack, K top-k, R = S * K rows leaving, Q rows arriving, D width, P ranks of the expert-parallel group,
E experts held by this rank.

Experts are numbered so that rank p holds p * E to (p + 1) * E - 1; rows sorted by expert are therefore sorted by rank. One
exchange of counts per layer tells every rank what will arrive; splits are uneven, so only real rows are sent.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modsquad_ds.model.dispatch import Compute, Groups, Plan, permuted, sort_by_expert
from modsquad_ds.model.products import combined
from modsquad_ds.model.router import Routing


class Remote(NamedTuple):
    """The part of a plan that crosses ranks."""

    sent: list[int]
    """Rows to each rank of the group."""
    received: list[int]
    """Rows from each rank of the group."""


class AllToAllDispatcher:
    """Dispatcher over an expert-parallel group; same contract as `LocalDispatcher`."""

    def __init__(self, num_experts: int, ep_size: int) -> None:
        self.ep_size, self.local = ep_size, num_experts // ep_size
        self.group: dist.ProcessGroup | None = None
        """Set once the groups exist, before the first forward pass."""

    def plan(self, routing: Routing) -> Plan:
        """Exchange counts and lay out both permutations. One small all-to-all and one wait for the host."""
        order_R, inverse_R = sort_by_expert(routing.expert_SK)
        leaving_PE = routing.rows_per_expert.long().view(self.ep_size, self.local)
        arriving_PE = torch.empty_like(leaving_PE)
        dist.all_to_all_single(arriving_PE, leaving_PE, group=self.group)
        counts = torch.stack((leaving_PE, arriving_PE)).tolist()
        sent, received = ([sum(row) for row in table] for table in counts)
        rows = tuple(sum(column) for column in zip(*counts[1], strict=True))
        expert_Q = torch.arange(self.local, device=order_R.device).repeat(self.ep_size)
        expert_Q = expert_Q.repeat_interleave(arriving_PE.flatten(), output_size=sum(received))
        # Arriving rows lie by (source rank, expert).
        return Plan(order_R, inverse_R, Groups(rows, *sort_by_expert(expert_Q)), Remote(sent, received))

    def run(self, compute: Compute, x: Tensor, plan: Plan, weight_SK: Tensor | None = None) -> Tensor:
        """See `Dispatcher`."""
        remote: Remote = plan.remote
        arrived_QD = self._exchange(permuted(x, plan.order_R, plan.inverse_R), remote.sent, remote.received)
        back_RO = self._exchange(compute(arrived_QD, plan.groups), remote.received, remote.sent)
        if weight_SK is None:
            return permuted(back_RO, plan.inverse_R, plan.order_R)
        return combined(back_RO, plan.order_R, plan.inverse_R, weight_SK)

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return _AllToAll.apply(x, sent, received, self.group)


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows, whose gradient is the all-to-all the other way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        """`x` [sum(sent), D] -> [sum(received), D]."""
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient rows to where the rows came from."""
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
