"""Products of experts on CPU: rows are picked, multiplied and put back in blocks small enough to stay in the cache.

Axes: E experts, R rows in expert order, S tokens, K top-k, I and O input and output width, H hidden width, n rows as they lie.

Laying all rows out in expert order first would write and read the tokens K times over: three passes through memory that a dense
layer does not make. Block by block the copies never leave the cache, and no row of results is ever stored: the gradient of a gate
weight is the product of its row's input and the gradient that reached it. What is saved for the backward pass is the input
and, of an MLP, its hidden rows before the GELU. (Forward and backward of an MLP, 384 wide, 16 experts, 4 chosen, 16,384 tokens,
one thread: 1.02 to 1.06 times a dense MLP of equal active FLOPs; laid out as a whole 1.46 times.)

`laid_out.py` is the same from torch's own parts; tests hold both against loops over single tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modsquad_ds.model.dispatch import Groups

BLOCK = 1024
"""Rows at a time. At widths of 384 and 768, 256 rows were slower (more calls), 2048 and 4096 no faster."""


def linear(x: Tensor, groups: Groups, weight_EOI: Tensor, bias_EO: Tensor | None, gate_SK: Tensor | None) -> Tensor:
    """See `products.expert_linear`."""
    return _Linear.apply(x, weight_EOI, bias_EO, gate_SK, groups)


def mlp(x: Tensor, groups: Groups, fc1: tuple[Tensor, Tensor], fc2: tuple[Tensor, Tensor], gate_SK: Tensor | None) -> Tensor:
    """See `products.expert_mlp`."""
    # Asked here, for inside of an autograd function gradients are always off.
    return _MLP.apply(x, *fc1, *fc2, gate_SK, groups, torch.is_grad_enabled())


def combine(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor, gate_SK: Tensor) -> Tensor:
    """See `products.combined`."""
    return _Combine.apply(rows_RD, gate_SK, order_R, inverse_R)


class _Rows(NamedTuple):
    """Where rows in expert order come from or go to: row r is row index[r] of a tensor, or row r itself without an index."""

    index_R: Tensor | None
    gate_R: Tensor | None = None

    def pick(self, x: Tensor, block: slice, scratch: Tensor) -> Tensor:
        """The rows of a block; a copy, in `scratch`, where there is an index."""
        if self.index_R is None:
            return x[block]
        index = self.index_R[block]
        return torch.index_select(x, 0, index, out=scratch[: index.numel()])

    def put(self, total: Tensor, block: slice, rows: Tensor) -> None:
        """Add a block's rows to where they belong."""
        if self.index_R is None:
            total[block] = rows
        else:
            total.index_add_(0, self.index_R[block], rows.to(total.dtype))

    def weigh(self, block: slice, *rows: Tensor) -> None:
        """Multiply a block's rows by their gate weights, if there are any, in place."""
        if self.gate_R is not None:
            for tensor in rows:
                tensor.mul_(self.gate_R[block].unsqueeze(1))


def _ends(groups: Groups, n: int, gate_SK: Tensor | None, dtype: torch.dtype) -> tuple[_Rows, _Rows]:
    """Where the rows of an input of `n` rows lie, and where results go."""
    if groups.order_R is None:
        assert gate_SK is None, "rows that lie in expert order do not know their tokens"
        return _Rows(None), _Rows(None)
    copies = groups.order_R.numel() // max(1, n)
    source = _Rows(groups.order_R // copies if copies > 1 else groups.order_R)
    if gate_SK is None:
        return source, _Rows(groups.order_R)
    gate_R = gate_SK.flatten().to(dtype).index_select(0, groups.order_R)
    token_R = groups.order_R // gate_SK.shape[1]
    return source, _Rows(token_R, gate_R)


def _blocks(rows: Sequence[int]) -> Iterator[tuple[int, slice, bool]]:
    """(expert, its rows, whether these are its first), every expert's rows cut evenly into blocks."""
    start = 0
    for expert, count in enumerate(rows):
        size = -(-count // max(1, -(-count // BLOCK)))
        for first in range(start, start + count, max(1, size)):
            yield expert, slice(first, min(first + size, start + count)), first == start
        start += count


def _scratch(rows: Sequence[int], like: Tensor, *widths: int) -> list[Tensor]:
    """Memory for one block per width, used again for every block: it stays in the cache, and is not fetched from the system."""
    n = min(BLOCK, max(rows, default=0))
    return [like.new_empty(n, width) for width in widths]


def _totals(like: Tensor, rows: int, width: int, target: _Rows) -> Tensor:
    """Where blocks are put: zeros to add to, in fp32 also for bf16 rows, or memory to be written once."""
    if target.index_R is None:
        return like.new_empty(rows, width)
    return torch.zeros(rows, width, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _gradient(parameter: Tensor | None, wanted: bool) -> Tensor | None:
    """Memory for a gradient that blocks add to, in fp32 also for bf16: sums of many blocks would lose bits."""
    if parameter is None or not wanted:
        return None
    return torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _finished(rows: Sequence[int], gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The gradient in its parameter's precision, zero for experts that got no rows; the others were written."""
    if gradient is None or parameter is None:
        return None
    for expert, count in enumerate(rows):
        if count == 0:
            gradient[expert].zero_()
    return gradient.to(parameter.dtype)


def _add_product(gradient: Tensor | None, expert: int, left: Tensor, right: Tensor, first: bool) -> None:
    """gradient[expert] (+)= left^T right."""
    if gradient is None:
        return
    here = gradient[expert]
    if left.dtype != gradient.dtype:
        product = left.t() @ right
        here.copy_(product) if first else here.add_(product)
    elif first:
        torch.mm(left.t(), right, out=here)
    else:
        torch.addmm(here, left.t(), right, out=here)


def _add_sum(gradient: Tensor | None, expert: int, rows: Tensor, first: bool) -> None:
    """gradient[expert] (+)= sum of rows."""
    if gradient is None:
        return
    total = rows.sum(0, dtype=gradient.dtype)
    gradient[expert].copy_(total) if first else gradient[expert].add_(total)


def _gate_gradient(gradient_R: Tensor | None, groups: Groups, gate_SK: Tensor | None) -> Tensor | None:
    """Gradients of gate weights from expert order back to `[S, K]`."""
    if gradient_R is None or gate_SK is None or groups.inverse_R is None:
        return None
    return gradient_R.index_select(0, groups.inverse_R).view_as(gate_SK).to(gate_SK.dtype)


class _Linear(torch.autograd.Function):
    """out[put] += gate * (W_e x[pick] + b_e)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, gate_SK: Tensor | None, groups: Groups
    ) -> Tensor:
        """`[n, I]` -> `[R, O]` or `[S, O]`."""
        source, target = _ends(groups, x.shape[0], gate_SK, x.dtype)
        size = sum(groups.rows) if gate_SK is None else gate_SK.shape[0]
        out = _totals(x, size, weight_EOI.shape[1], target)
        scratch = _scratch(groups.rows, x, x.shape[1], weight_EOI.shape[1])
        for expert, block, _ in _blocks(groups.rows):
            rows = source.pick(x, block, scratch[0])
            y = torch.mm(rows, weight_EOI[expert].t(), out=scratch[1][: len(rows)])
            if bias_EO is not None:
                y += bias_EO[expert]
            target.weigh(block, y)
            target.put(out, block, y)
        ctx.save_for_backward(x, weight_EOI, bias_EO, gate_SK, groups.order_R, groups.inverse_R)
        ctx.rows = groups.rows
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight, bias and gate weights."""
        x, weight, bias, gate_SK, order, inverse = ctx.saved_tensors
        groups, (grad,) = Groups(ctx.rows, order, inverse), grads
        source, target = _ends(groups, x.shape[0], gate_SK, x.dtype)
        want_x, want_weight, want_bias, want_gate, _ = ctx.needs_input_grad
        grad_x = _totals(x, x.shape[0], x.shape[1], source)
        grad_weight, grad_bias = _gradient(weight, want_weight), _gradient(bias, want_bias)
        grad_gate = torch.empty_like(target.gate_R) if want_gate and target.gate_R is not None else None
        scratch = _scratch(groups.rows, x, x.shape[1], weight.shape[1], x.shape[1])
        for expert, block, first in _blocks(groups.rows):
            rows, back = source.pick(x, block, scratch[0]), target.pick(grad, block, scratch[1])
            towards_x = torch.mm(back, weight[expert], out=scratch[2][: len(rows)])
            if grad_gate is not None:
                grad_gate[block] = torch.linalg.vecdot(towards_x, rows)
                if bias is not None:
                    grad_gate[block] += back @ bias[expert]
            target.weigh(block, towards_x, back)
            source.put(grad_x, block, towards_x)
            _add_product(grad_weight, expert, back, rows, first)
            _add_sum(grad_bias, expert, back, first)
        given_x = grad_x.to(x.dtype) if want_x else None
        of = (_finished(groups.rows, grad_weight, weight), _finished(groups.rows, grad_bias, bias))
        return given_x, *of, _gate_gradient(grad_gate, groups, gate_SK), None


class _MLP(torch.autograd.Function):
    """out[put] += gate * fc2_e(GELU(fc1_e(x[pick])))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gate_SK: Tensor | None, groups: Groups, keep: bool
    ) -> Tensor:
        """`[n, I]` -> `[R, O]` or `[S, O]`."""
        source, target = _ends(groups, x.shape[0], gate_SK, x.dtype)
        size = sum(groups.rows) if gate_SK is None else gate_SK.shape[0]
        out = _totals(x, size, w2.shape[1], target)
        hidden_RH = x.new_empty(sum(groups.rows), w1.shape[1]) if keep else None
        scratch = _scratch(groups.rows, x, x.shape[1], w1.shape[1], w2.shape[1])
        for expert, block, _ in _blocks(groups.rows):
            n = block.stop - block.start
            rows = source.pick(x, block, scratch[0])
            hidden = scratch[1][:n] if hidden_RH is None else hidden_RH[block]
            torch.mm(rows, w1[expert].t(), out=hidden).add_(b1[expert])
            active = torch.ops.aten.gelu.out(hidden, out=scratch[1][:n])
            y = torch.mm(active, w2[expert].t(), out=scratch[2][:n]).add_(b2[expert])
            target.weigh(block, y)
            target.put(out, block, y)
        ctx.save_for_backward(x, w1, b1, w2, b2, gate_SK, groups.order_R, groups.inverse_R, hidden_RH)
        ctx.rows = groups.rows
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weights, biases and gate weights."""
        x, w1, b1, w2, b2, gate_SK, order, inverse, hidden_RH = ctx.saved_tensors
        groups, (grad,) = Groups(ctx.rows, order, inverse), grads
        source, target = _ends(groups, x.shape[0], gate_SK, x.dtype)
        wanted = ctx.needs_input_grad
        grad_x = _totals(x, x.shape[0], x.shape[1], source)
        parameters = (w1, b1, w2, b2)
        of = [_gradient(parameter, want) for parameter, want in zip(parameters, wanted[1:5], strict=True)]
        grad_gate = torch.empty_like(target.gate_R) if wanted[5] and target.gate_R is not None else None
        scratch = _scratch(groups.rows, x, x.shape[1], w2.shape[1], w1.shape[1], w1.shape[1], x.shape[1])
        for expert, block, first in _blocks(groups.rows):
            n, hidden = block.stop - block.start, hidden_RH[block]
            rows, back = source.pick(x, block, scratch[0]), target.pick(grad, block, scratch[1])
            active = torch.ops.aten.gelu.out(hidden, out=scratch[2][:n])
            towards = torch.mm(back, w2[expert], out=scratch[3][:n])
            if grad_gate is not None:
                grad_gate[block] = torch.linalg.vecdot(towards, active) + back @ b2[expert]
            target.weigh(block, towards, back)
            _add_product(of[2], expert, back, active, first)
            _add_sum(of[3], expert, back, first)
            torch.ops.aten.gelu_backward.grad_input(towards, hidden, grad_input=towards)
            _add_product(of[0], expert, towards, rows, first)
            _add_sum(of[1], expert, towards, first)
            source.put(grad_x, block, torch.mm(towards, w1[expert], out=scratch[4][:n]))
        given_x = grad_x.to(x.dtype) if wanted[0] else None
        given = [_finished(groups.rows, gradient, of_) for gradient, of_ in zip(of, parameters, strict=True)]
        return given_x, *given, _gate_gradient(grad_gate, groups, gate_SK), None, None


class _Combine(torch.autograd.Function):
    """out[token] += gate * row."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gate_SK: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        """`[R, D]` in expert order -> `[S, D]`."""
        groups = Groups((rows_RD.shape[0],), order_R, inverse_R)
        _, target = _ends(groups, rows_RD.shape[0], gate_SK, rows_RD.dtype)
        out = _totals(rows_RD, gate_SK.shape[0], rows_RD.shape[1], target)
        (scratch,) = _scratch(groups.rows, rows_RD, rows_RD.shape[1])
        for _, block, _ in _blocks(groups.rows):
            rows = scratch[: block.stop - block.start].copy_(rows_RD[block])
            target.weigh(block, rows)
            target.put(out, block, rows)
        ctx.save_for_backward(rows_RD, gate_SK, order_R, inverse_R)
        return out.to(rows_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows and gate weights."""
        rows_RD, gate_SK, order_R, inverse_R = ctx.saved_tensors
        groups = Groups((rows_RD.shape[0],), order_R, inverse_R)
        _, target = _ends(groups, rows_RD.shape[0], gate_SK, rows_RD.dtype)
        grad_rows, grad_gate = torch.empty_like(rows_RD), rows_RD.new_empty(rows_RD.shape[0])
        (scratch,) = _scratch(groups.rows, rows_RD, rows_RD.shape[1])
        for _, block, _ in _blocks(groups.rows):
            back = target.pick(grads[0], block, scratch)
            grad_gate[block] = torch.linalg.vecdot(back, rows_RD[block])
            target.weigh(block, back)
            grad_rows[block] = back
        return grad_rows, _gate_gradient(grad_gate, groups, gate_SK), None, None
