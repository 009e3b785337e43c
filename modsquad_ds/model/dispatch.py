"""Dispatch and combine: rows to their experts and back. The second and fourth verb of a sparse layer.

Axes: S tokens in the pack, K top-k, R = S * K slots (a token and one of its experts), D width, O width of results, E experts.

`LocalDispatcher` is the path of a single rank and the truth that the all-to-all dispatcher (`parallel/dispatch.py`) is tested
against. Both are dropless: exactly R rows travel, however skewed the routing. Training may use those with a capacity instead
(`capacity.py`).
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from modsquad_ds.model.router import Routing


class Groups(NamedTuple):
    """Which rows are whose: what an expert bank needs to know of a plan."""

    rows: tuple[int, ...]
    """Rows of each local expert, on the host: they are the lengths of the expert's matrix products."""
    order_R: Tensor | None = None
    """Row r in expert order is slot order_R[r] of the rows as they lie; None where they lie in expert order already."""
    inverse_R: Tensor | None = None
    """The inverse permutation."""


class Plan(NamedTuple):
    """Where each row goes; made once per routing and used for every transfer of that layer."""

    order_R: Tensor
    """Row r of the expert-sorted rows is slot order_R[r] of the flattened `[S, K]`."""
    inverse_R: Tensor
    """The inverse permutation."""
    groups: Groups
    """The local experts' rows among those that arrive here."""
    remote: Any = None
    """What a dispatcher across ranks adds."""
    dropped_R: Tensor | None = None
    """With a capacity: bool, which of the flattened slots found no place."""


class Compute(Protocol):
    """What a bank does with rows: `[n, D]` -> `[R, O]` in the same order, the input's rows each repeated R / n times.

    With gate weights `[S, K]`: -> `[S, O]`, each token's K results weighted and summed.
    """

    def __call__(self, x: Tensor, groups: Groups, weight_SK: Tensor | None = None) -> Tensor: ...


class Dispatcher(Protocol):
    """Brings rows to their experts, lets these work, and brings the results back."""

    def plan(self, routing: Routing) -> Plan:
        """Where the rows of this routing go."""

    def run(self, compute: Compute, x: Tensor, plan: Plan, weight_SK: Tensor | None = None) -> Tensor:
        """`x`: `[S, D]` (every token to each of its K experts) or `[R, D]`, in token order.

        Returns `[R, O]` in token order, or with gate weights each token's weighted sum `[S, O]`.
        """


class LocalDispatcher:
    """Every expert is here: nothing travels, and dispatch and combine are left to the compute, which reads rows in any order."""

    def plan(self, routing: Routing) -> Plan:
        """Rows sorted by expert, stable, so equal inputs give equal sums."""
        order_R, inverse_R = sort_by_expert(routing.expert_SK)
        rows = tuple(int(n) for n in routing.rows_per_expert.tolist())
        return Plan(order_R, inverse_R, Groups(rows, order_R, inverse_R))

    def run(self, compute: Compute, x: Tensor, plan: Plan, weight_SK: Tensor | None = None) -> Tensor:
        """See `Dispatcher`."""
        return compute(x, plan.groups, weight_SK)


def sort_by_expert(expert_SK: Tensor) -> tuple[Tensor, Tensor]:
    """Stable order of the flattened slots by expert number, and its inverse; both int64 `[R]`."""
    order_R = expert_SK.flatten().argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return order_R, inverse_R


def permuted(x: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Rows `[R, D]` in another order from `[R, D]`, or from `[n, D]` with each row R / n times."""
    return Permute.apply(x, order_R, inverse_R, order_R.numel() // max(1, x.shape[0]))


def weighted_sum(slots_RD: Tensor, weight_SK: Tensor) -> Tensor:
    """Gate-weighted sum of each token's K rows: `[R, D]` in token order -> `[S, D]`."""
    weight_SK1 = weight_SK.to(slots_RD.dtype).unsqueeze(-1)
    return (slots_RD.view(*weight_SK.shape, -1) * weight_SK1).sum(1)


class Permute(torch.autograd.Function):
    """`x[order // copies]`, whose gradient is a gather and a sum over copies: no scatter-add, so no atomics, and exact order."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        """`x` [n, D] -> [n * copies, D]."""
        ctx.save_for_backward(inverse)
        ctx.copies = copies  # type: ignore[attr-defined]
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient rows back in the order of `x`, a row's copies summed."""
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        if ctx.copies > 1:
            grad = grad.view(-1, ctx.copies, grad.shape[1]).sum(1)
        return grad, None, None, None
