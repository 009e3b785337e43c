"""The experts' matrix products: every expert's rows times its own matrices. What the banks of experts.py compute with.

Axes: E experts held by this rank, R rows, S tokens, K top-k, I and O input and output width, H hidden width of an expert.

Rows need not lie in expert order: `Groups` says whose they are. Two ways to the same results, chosen by device: on CPU rows are
picked, multiplied and put back while they are in the cache (`cached.py`); on CUDA they are laid out as a whole (`laid_out.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from torch import Tensor

from modsquad_ds.model import cached, laid_out
from modsquad_ds.model.dispatch import Groups


def expert_linear(
    x: Tensor, groups: Groups, weight_EOI: Tensor, bias_EO: Tensor | None = None, gate_SK: Tensor | None = None
) -> Tensor:
    """Each row times its expert's matrix (plus its bias). Shapes: see `dispatch.Compute`."""
    return way_for(x).linear(x, groups, weight_EOI, bias_EO, gate_SK)


def expert_mlp(
    x: Tensor,
    groups: Groups,
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    gate_SK: Tensor | None = None,
) -> Tensor:
    """fc2(GELU(fc1(row))) of each row's expert.

    Args:
        x: shapes of rows and result as in `dispatch.Compute`.
        fc1: weights `[E, H, I]` and biases `[E, H]`.
        fc2: weights `[E, O, H]` and biases `[E, O]`.
    """
    return way_for(x).mlp(x, groups, fc1, fc2, gate_SK)


def combined(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor, gate_SK: Tensor) -> Tensor:
    """`[R, D]` sorted by expert -> each token's gate-weighted sum `[S, D]`."""
    return way_for(rows_RD).combine(rows_RD, order_R, inverse_R, gate_SK)


def way_for(x: Tensor) -> ModuleType:
    """The module whose `linear`, `mlp` and `combine` suit the tensor's device."""
    return _planned.get() or (laid_out if x.is_cuda else cached)


_planned: ContextVar[ModuleType | None] = ContextVar("planned way", default=None)


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Inside the block products go the way of `cpu` or `cuda`, wherever tensors are: for plans of machines that are not here."""
    token = _planned.set(laid_out if device == "cuda" else cached)
    try:
        yield
    finally:
        _planned.reset(token)
