"""Dispatch and combine: rows to their experts and back. The second and fourth verb of a sparse layer.

Axes: S tokens in the pack, K top-k, R = S * K rows, D width, E experts.

`LocalDispatcher` is the path of a single rank and the truth that the all-to-all dispatcher (`parallel/dispatch.py`) is tested
against. Both are dropless: exactly R rows travel, however skewed the routing. Training may use those with a capacity instead
(`capacity.py`).
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from modsquad_ds.model.router import Routing


class Plan(NamedTuple):
    """Where each row goes; made once per routing and used for every transfer of that layer."""

    order_R: Tensor
    """Row r of the expert-sorted rows is slot order_R[r] of the flattened `[S, K]`."""
    inverse_R: Tensor
    """The inverse permutation."""
    top_k: int
    rows: tuple[int, ...]
    """Rows of each local expert, on the host: they are the lengths of the expert's matrix products."""
    remote: Any = None
    """What a dispatcher across ranks adds."""
    dropped_R: Tensor | None = None
    """With a capacity: bool, which of the flattened slots found no place."""


class Dispatcher(Protocol):
    """Moves rows between token order and expert order. `x` holds S rows (a token's copies are equal) or S * K."""

    def plan(self, routing: Routing) -> Plan:
        """Where the rows of this routing go."""

    def dispatch(self, x_SD: Tensor, plan: Plan) -> Tensor:
        """`[S, D]` or `[S * K, D]` in token order -> rows grouped by local expert, in the plan's `rows` lengths."""

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """Rows grouped by local expert -> `[S * K, D]` in token order."""


class LocalDispatcher:
    """Every expert is here: dispatch is a permutation."""

    def plan(self, routing: Routing) -> Plan:
        """Rows sorted by expert, stable, so equal inputs give equal sums."""
        order_R, inverse_R = sort_by_expert(routing.expert_SK)
        rows = tuple(int(n) for n in routing.stats.count_TE.detach().sum(0).tolist())
        return Plan(order_R, inverse_R, routing.expert_SK.shape[1], rows)

    def dispatch(self, x_SD: Tensor, plan: Plan) -> Tensor:
        """See `Dispatcher`."""
        return to_expert_order(x_SD, plan)

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """See `Dispatcher`."""
        return to_token_order(rows_RD, plan)


def sort_by_expert(expert_SK: Tensor) -> tuple[Tensor, Tensor]:
    """Stable order of the flattened slots by expert number, and its inverse; both int64 `[R]`."""
    order_R = expert_SK.flatten().argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return order_R, inverse_R


def to_expert_order(x_SD: Tensor, plan: Plan) -> Tensor:
    """Rows `[R, D]` sorted by expert from `[S, D]` (each token K times) or `[R, D]`."""
    copies = plan.order_R.numel() // max(1, x_SD.shape[0])
    return Permute.apply(x_SD, plan.order_R, plan.inverse_R, copies)


def to_token_order(rows_RD: Tensor, plan: Plan) -> Tensor:
    """The inverse of `to_expert_order` for `[R, D]`."""
    return Permute.apply(rows_RD, plan.inverse_R, plan.order_R, 1)


class Permute(torch.autograd.Function):
    """`x[order // copies]`, whose gradient is a gather and a sum over copies: no scatter-add, so no atomics, and exact order."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        """`x` [S, D] -> [S * copies, D]."""
        ctx.save_for_backward(inverse)
        ctx.copies = copies  # type: ignore[attr-defined]
        return x.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient rows back in token order, a token's copies summed."""
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        if ctx.copies > 1:
            grad = grad.view(-1, ctx.copies, grad.shape[1]).sum(1)
        return grad, None, None, None
