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

from modsquad_ds.model.dispatch import Permute, Plan, sort_by_expert, to_expert_order, to_token_order
from modsquad_ds.model.router import Routing


class Remote(NamedTuple):
    """The part of a plan that crosses ranks."""

    sent: list[int]
    """Rows to each rank of the group."""
    received: list[int]
    """Rows from each rank of the group."""
    regroup_Q: Tensor
    """Arriving rows lie by (source rank, expert); row q in expert order is arriving row regroup_Q[q]."""
    ungroup_Q: Tensor
    """The inverse permutation."""


class AllToAllDispatcher:
    """Dispatcher over an expert-parallel group; same contract as `LocalDispatcher`."""

    def __init__(self, num_experts: int, ep_size: int) -> None:
        self.ep_size, self.local = ep_size, num_experts // ep_size
        self.group: dist.ProcessGroup | None = None
        """Set once the groups exist, before the first forward pass."""

    def plan(self, routing: Routing) -> Plan:
        """Exchange counts and lay out both permutations. One small all-to-all and one wait for the host."""
        order_R, inverse_R = sort_by_expert(routing.expert_SK)
        leaving_PE = routing.stats.count_TE.detach().sum(0).long().view(self.ep_size, self.local)
        arriving_PE = torch.empty_like(leaving_PE)
        dist.all_to_all_single(arriving_PE, leaving_PE, group=self.group)
        counts = torch.stack((leaving_PE, arriving_PE)).tolist()
        sent, received = ([sum(row) for row in table] for table in counts)
        rows = tuple(sum(column) for column in zip(*counts[1], strict=True))
        expert_Q = torch.arange(self.local, device=order_R.device).repeat(self.ep_size)
        expert_Q = expert_Q.repeat_interleave(arriving_PE.flatten(), output_size=sum(received))
        regroup_Q, ungroup_Q = sort_by_expert(expert_Q)
        return Plan(order_R, inverse_R, routing.expert_SK.shape[1], rows, Remote(sent, received, regroup_Q, ungroup_Q))

    def dispatch(self, x_SD: Tensor, plan: Plan) -> Tensor:
        """`[S, D]` or `[R, D]` in token order -> `[Q, D]` grouped by local expert."""
        remote: Remote = plan.remote
        arrived_QD = self._exchange(to_expert_order(x_SD, plan), remote.sent, remote.received)
        return Permute.apply(arrived_QD, remote.regroup_Q, remote.ungroup_Q, 1)

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """`[Q, D]` grouped by local expert -> `[R, D]` in token order."""
        remote: Remote = plan.remote
        leaving_QD = Permute.apply(rows_RD, remote.ungroup_Q, remote.regroup_Q, 1)
        return to_token_order(self._exchange(leaving_QD, remote.received, remote.sent), plan)

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
