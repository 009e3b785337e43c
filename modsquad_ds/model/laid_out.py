"""Products of experts with all rows laid out in expert order: CUDA's way, where large kernels count. Chosen by products.py.

Axes: E experts, R rows in expert order, S tokens, K top-k, I and O input and output width, H hidden width, n rows as they lie.

Gathers in both directions, no scatter-add: no atomics, and sums in a fixed order. In bf16 the products are grouped GEMMs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modsquad_ds.model.dispatch import Groups, permuted, weighted_sum


def linear(x: Tensor, groups: Groups, weight_EOI: Tensor, bias_EO: Tensor | None, gate_SK: Tensor | None) -> Tensor:
    """See `products.expert_linear`."""
    return _back(_products(_sorted(x, groups), groups.rows, weight_EOI, bias_EO), groups, gate_SK)


def mlp(x: Tensor, groups: Groups, fc1: tuple[Tensor, Tensor], fc2: tuple[Tensor, Tensor], gate_SK: Tensor | None) -> Tensor:
    """See `products.expert_mlp`."""
    hidden_RH = F.gelu(_products(_sorted(x, groups), groups.rows, *fc1))
    return _back(_products(hidden_RH, groups.rows, *fc2), groups, gate_SK)


def combine(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor, gate_SK: Tensor) -> Tensor:
    """See `products.combined`."""
    return weighted_sum(permuted(rows_RD, inverse_R, order_R), gate_SK)


def _sorted(x: Tensor, groups: Groups) -> Tensor:
    """`[n, D]` as it lies -> `[R, D]` sorted by expert, each row R / n times."""
    if groups.order_R is None or groups.inverse_R is None:
        return x
    return permuted(x, groups.order_R, groups.inverse_R)


def _back(rows_RD: Tensor, groups: Groups, gate_SK: Tensor | None) -> Tensor:
    """The inverse of `_sorted` for `[R, D]`; with gate weights each token's weighted sum `[S, D]`."""
    if groups.order_R is None or groups.inverse_R is None:
        assert gate_SK is None, "rows that lie in expert order do not know their tokens"
        return rows_RD
    if gate_SK is None:
        return permuted(rows_RD, groups.inverse_R, groups.order_R)
    return combine(rows_RD, groups.order_R, groups.inverse_R, gate_SK)


def can_group(weight_EOI: Tensor) -> bool:
    """Whether CUDA's grouped GEMM takes this matrix: bf16, and every row begins at a multiple of 16 bytes.

    In fp32 torch falls back to a loop that asks the device for the row counts, which `_looped` has on the host. ZeRO lays
    parameters side by side in one buffer, so even matrices of even sizes may begin anywhere.
    """
    sizes_fit = all(size * weight_EOI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
    # Memory itself begins at such a multiple; a tensor without memory, of a plan, knows its offset alone.
    begins_there = int(weight_EOI.storage_offset()) * weight_EOI.element_size() % 16 == 0
    return weight_EOI.dtype == torch.bfloat16 and sizes_fit and begins_there


def _products(x_RI: Tensor, rows: Sequence[int], weight_EOI: Tensor, bias_EO: Tensor | None = None) -> Tensor:
    return (_grouped if can_group(weight_EOI) else _looped)(x_RI, rows, weight_EOI, bias_EO)


def _looped(x_RI: Tensor, rows: Sequence[int], weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    biases = bias_EO.unbind(0) if bias_EO is not None else [None] * len(rows)
    parts = zip(x_RI.split(list(rows)), weight_EOI.unbind(0), biases, strict=True)
    return torch.cat([F.linear(x, weight, bias) for x, weight, bias in parts])


def _grouped(x_RI: Tensor, rows: Sequence[int], weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    rows_E = torch.tensor(rows, dtype=torch.int32).to(x_RI.device, non_blocking=True)
    ends_E = rows_E.cumsum(0, dtype=torch.int32)
    y_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    return y_RO if bias_EO is None else _AddBias.apply(y_RO, bias_EO, rows_E, ends_E)


class _AddBias(torch.autograd.Function):
    """Each row plus its expert's bias. The bias's gradient, a sum over all rows of an expert, is a grouped GEMM with ones.

    Left to autograd, it would be an index-add in bf16, whose 8 bits lose the sum of some hundred rows, in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, y_RO: Tensor, bias_EO: Tensor, rows_E: Tensor, ends_E: Tensor) -> Tensor:
        """`[R, O]` -> `[R, O]`."""
        ctx.save_for_backward(ends_E)
        return y_RO + bias_EO.repeat_interleave(rows_E, dim=0, output_size=y_RO.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """GEMMs add up in fp32; 8 equal columns, since CUDA wants rows of 16 bytes."""
        (ends_E,) = ctx.saved_tensors
        (grad_RO,) = grads
        ones_R8 = grad_RO.new_ones(grad_RO.shape[0], 8)
        return grad_RO, F.grouped_mm(ones_R8.t(), grad_RO.contiguous(), offs=ends_E)[:, 0], None, None
