"""Products of experts on CPU: rows are picked, multiplied and put back in blocks small enough to stay in the cache.

Axes: E experts, R rows in expert order, S tokens, K top-k, I and O input and output width, H hidden width, n rows as they lie.

Laying all rows out in expert order first would write and read the tokens K times over: three passes through memory that a dense
layer does not make. Block by block the copies never leave the cache, and no row of results is ever stored: the gradient of a gate
weight is the product of its row's input and the gradient that reached it. What is saved for the backward pass is the input
and, of an MLP, its hidden rows before the GELU. (Forward and backward of an MLP, 384 wide, 16 experts, 4 chosen, 16,384 tokens,
one thread: 1.02 to 1.06 times a dense MLP of equal active FLOPs; laid out as a whole 1.46 times.)

`laid_out.py` is the same from torch's own parts; tests hold both against loops over single tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modsquad_ds.model.dispatch import Groups

BLOCK = 1024
"""Rows at a time, at most half as many again. 384 and 768 wide, 256 rows were slower (more calls), 2048 and 4096 no faster."""


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


class _Block(NamedTuple):
    """Some rows of one expert that are worked on together."""

    number: int
    expert: int
    rows: slice
    size: int
    first: bool
    """Whether these are the expert's first."""


class _Rows(NamedTuple):
    """Where rows in expert order come from or go to: row r is row places[r] of a tensor, or row r itself without places.

    Cut into blocks once, for a view costs as much as a small operation when the products have pushed all else out of the cache.
    """

    places: Sequence[Tensor] | None
    """Per block."""
    gates: Sequence[Tensor] | None = None
    """Per block `[n, 1]`."""
    gate_R: Tensor | None = None

    def pick(self, x: Tensor, block: _Block, scratch: Tensor) -> Tensor:
        """The rows of a block; a copy, in `scratch`, where there are places."""
        if self.places is None:
            return x[block.rows]
        return torch.index_select(x, 0, self.places[block.number], out=scratch[: block.size])

    def put(self, total: Tensor, block: _Block, rows: Tensor) -> None:
        """Add a block's rows to where they belong."""
        if self.places is None:
            total[block.rows] = rows
        else:
            total.index_add_(0, self.places[block.number], rows.to(total.dtype))

    def weigh(self, block: _Block, *rows: Tensor) -> None:
        """Multiply a block's rows by their gate weights, if there are any, in place."""
        if self.gates is not None:
            for tensor in rows:
                tensor.mul_(self.gates[block.number])


def _ends(groups: Groups, n: int, gate_SK: Tensor | None, dtype: torch.dtype, blocks: Sequence[_Block]) -> tuple[_Rows, _Rows]:
    """Where the rows of an input of `n` rows lie, and where results go."""
    if groups.order_R is None:
        assert gate_SK is None, "rows that lie in expert order do not know their tokens"
        return _Rows(None), _Rows(None)
    sizes = [block.size for block in blocks]
    copies = groups.order_R.numel() // max(1, n)
    top_k = 1 if gate_SK is None else gate_SK.shape[1]
    by_copies = {k: (groups.order_R // k if k > 1 else groups.order_R).split(sizes) for k in {copies, top_k}}
    source = _Rows(by_copies[copies])
    if gate_SK is None:
        return source, _Rows(by_copies[1])
    gate_R = gate_SK.flatten().to(dtype).index_select(0, groups.order_R)
    return source, _Rows(by_copies[top_k], gate_R.unsqueeze(1).split(sizes), gate_R)


def _blocks(rows: Sequence[int]) -> list[_Block]:
    """Every expert's rows cut evenly into blocks of about BLOCK: no more than half as many again."""
    blocks: list[_Block] = []
    start = 0
    for expert, count in enumerate(rows):
        size = -(-count // max(1, round(count / BLOCK)))
        for first in range(start, start + count, max(1, size)):
            stop = min(first + size, start + count)
            blocks.append(_Block(len(blocks), expert, slice(first, stop), stop - first, first == start))
        start += count
    return blocks


def _scratch(blocks: Sequence[_Block], like: Tensor, *widths: int) -> list[Tensor]:
    """Memory for one block per width, used again for every block: it stays in the cache, and is not fetched from the system."""
    n = max((block.size for block in blocks), default=0)
    return [like.new_empty(n, width) for width in widths]


def _other(scratch: Tensor, size: int, width: int) -> Tensor:
    """The same memory, whose block is not needed any more, as another `[size, width]`."""
    return scratch.view(-1)[: size * width].view(size, width)


def _totals(like: Tensor, rows: int, width: int, target: _Rows) -> Tensor:
    """Where blocks are put: zeros to add to, in fp32 also for bf16 rows, or memory to be written once."""
    if target.places is None:
        return like.new_empty(rows, width)
    return torch.zeros(rows, width, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


class _Gradient(NamedTuple):
    """Memory for a stacked parameter's gradient, which blocks add to."""

    whole: Tensor
    parts: tuple[Tensor, ...]
    """Per expert."""

    @staticmethod
    def of(parameter: Tensor | None, wanted: bool) -> "_Gradient | None":
        """In fp32 also for bf16: sums of many blocks would lose bits."""
        if parameter is None or not wanted:
            return None
        whole = torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        return _Gradient(whole, whole.unbind(0))

    def add_product(self, block: _Block, left: Tensor, right: Tensor) -> None:
        """(+)= left^T right."""
        here = self.parts[block.expert]
        if left.dtype != here.dtype:
            product = left.t() @ right
            here.copy_(product) if block.first else here.add_(product)
        elif block.first:
            torch.mm(left.t(), right, out=here)
        else:
            torch.addmm(here, left.t(), right, out=here)

    def add_sum(self, block: _Block, rows: Tensor) -> None:
        """(+)= sum of rows."""
        here = self.parts[block.expert]
        if block.first:
            torch.sum(rows, 0, dtype=here.dtype, out=here)
        else:
            here.add_(rows.sum(0, dtype=here.dtype))

    def finished(self, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The gradient in its parameter's precision, zero for experts that got no rows; the others were written."""
        for part, count in zip(self.parts, rows, strict=True):
            if count == 0:
                part.zero_()
        return self.whole.to(dtype)


def _add(of: Sequence[_Gradient | None], block: _Block, back: Tensor, rows: Tensor) -> None:
    """Add a block to the gradients of a weight and a bias, where they are wanted."""
    of_weight, of_bias = of
    if of_weight is not None:
        of_weight.add_product(block, back, rows)
    if of_bias is not None:
        of_bias.add_sum(block, back)


def _finished(of: Sequence[_Gradient | None], rows: Sequence[int], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if gradient is None else gradient.finished(rows, dtype) for gradient in of]


def _gate_gradient(gradient_R: Tensor | None, groups: Groups, gate_SK: Tensor | None) -> Tensor | None:
    """Gradients of gate weights from expert order back to `[S, K]`."""
    if gradient_R is None or gate_SK is None or groups.inverse_R is None:
        return None
    return gradient_R.index_select(0, groups.inverse_R).view_as(gate_SK).to(gate_SK.dtype)


def _transposed(weight_EOI: Tensor) -> tuple[Tensor, ...]:
    """Every expert's matrix `[I, O]`, a view."""
    return weight_EOI.transpose(1, 2).unbind(0)


class _Linear(torch.autograd.Function):
    """out[put] += gate * (W_e x[pick] + b_e)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, gate_SK: Tensor | None, groups: Groups
    ) -> Tensor:
        """`[n, I]` -> `[R, O]` or `[S, O]`."""
        blocks = _blocks(groups.rows)
        source, target = _ends(groups, x.shape[0], gate_SK, x.dtype, blocks)
        size = sum(groups.rows) if gate_SK is None else gate_SK.shape[0]
        out = _totals(x, size, weight_EOI.shape[1], target)
        scratch = _scratch(blocks, x, x.shape[1], weight_EOI.shape[1])
        weights, biases = _transposed(weight_EOI), None if bias_EO is None else bias_EO.unbind(0)
        for block in blocks:
            rows, y = source.pick(x, block, scratch[0]), scratch[1][: block.size]
            if biases is None:
                torch.mm(rows, weights[block.expert], out=y)
            else:
                torch.addmm(biases[block.expert], rows, weights[block.expert], out=y)
            target.weigh(block, y)
            target.put(out, block, y)
        ctx.save_for_backward(x, weight_EOI, bias_EO, gate_SK, groups.order_R, groups.inverse_R)
        ctx.rows = groups.rows
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight, bias and gate weights."""
        x, weight, bias, gate_SK, order, inverse = ctx.saved_tensors
        groups, (grad,), blocks = Groups(ctx.rows, order, inverse), grads, _blocks(ctx.rows)
        source, target = _ends(groups, x.shape[0], gate_SK, x.dtype, blocks)
        want_x, want_weight, want_bias, want_gate, _ = ctx.needs_input_grad
        grad_x = _totals(x, x.shape[0], x.shape[1], source)
        of = [_Gradient.of(weight, want_weight), _Gradient.of(bias, want_bias)]
        grad_gate = torch.empty_like(target.gate_R) if want_gate and target.gate_R is not None else None
        scratch, weights = _scratch(blocks, x, x.shape[1], weight.shape[1], x.shape[1]), weight.unbind(0)
        for block in blocks:
            rows, back = source.pick(x, block, scratch[0]), target.pick(grad, block, scratch[1])
            towards_x = torch.mm(back, weights[block.expert], out=scratch[2][: block.size])
            if grad_gate is not None:
                grad_gate[block.rows] = torch.linalg.vecdot(towards_x, rows)
                if bias is not None:
                    grad_gate[block.rows] += back @ bias[block.expert]
            target.weigh(block, towards_x, back)
            source.put(grad_x, block, towards_x)
            _add(of, block, back, rows)
        given_x = grad_x.to(x.dtype) if want_x else None
        return given_x, *_finished(of, groups.rows, x.dtype), _gate_gradient(grad_gate, groups, gate_SK), None


class _MLP(torch.autograd.Function):
    """out[put] += gate * fc2_e(GELU(fc1_e(x[pick])))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gate_SK: Tensor | None, groups: Groups, keep: bool
    ) -> Tensor:
        """`[n, I]` -> `[R, O]` or `[S, O]`."""
        blocks = _blocks(groups.rows)
        source, target = _ends(groups, x.shape[0], gate_SK, x.dtype, blocks)
        size = sum(groups.rows) if gate_SK is None else gate_SK.shape[0]
        out = _totals(x, size, w2.shape[1], target)
        hidden_RH = x.new_empty(sum(groups.rows), w1.shape[1]) if keep else None
        scratch = _scratch(blocks, x, max(x.shape[1], w2.shape[1]), w1.shape[1])
        fc1, fc2 = (tuple(zip(bias.unbind(0), _transposed(weight), strict=True)) for weight, bias in ((w1, b1), (w2, b2)))
        for block in blocks:
            rows = source.pick(x, block, _other(scratch[0], block.size, x.shape[1]))
            active = scratch[1][: block.size]
            hidden = active if hidden_RH is None else hidden_RH[block.rows]
            bias, weight = fc1[block.expert]
            torch.addmm(bias, rows, weight, out=hidden)
            torch.ops.aten.gelu.out(hidden, out=active)
            bias, weight = fc2[block.expert]
            y = torch.addmm(bias, active, weight, out=_other(scratch[0], block.size, w2.shape[1]))
            target.weigh(block, y)
            target.put(out, block, y)
        ctx.save_for_backward(x, w1, b1, w2, b2, gate_SK, groups.order_R, groups.inverse_R, hidden_RH)
        ctx.rows = groups.rows
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weights, biases and gate weights."""
        x, w1, b1, w2, b2, gate_SK, order, inverse, hidden_RH = ctx.saved_tensors
        groups, (grad,), blocks = Groups(ctx.rows, order, inverse), grads, _blocks(ctx.rows)
        source, target = _ends(groups, x.shape[0], gate_SK, x.dtype, blocks)
        wanted, (width, hidden_width, out_width) = ctx.needs_input_grad, (x.shape[1], w1.shape[1], w2.shape[1])
        grad_x = _totals(x, x.shape[0], width, source)
        of = [_Gradient.of(parameter, want) for parameter, want in zip((w1, b1, w2, b2), wanted[1:5], strict=True)]
        grad_gate = torch.empty_like(target.gate_R) if wanted[5] and target.gate_R is not None else None
        gates = () if grad_gate is None else grad_gate.split([block.size for block in blocks])
        scratch = _scratch(blocks, x, max(width, hidden_width), max(width, out_width), hidden_width, hidden_width)
        fc1, fc2, biases2 = w1.unbind(0), w2.unbind(0), b2.unbind(0)
        for block in blocks:
            n, hidden = block.size, hidden_RH[block.rows]
            back = target.pick(grad, block, _other(scratch[1], n, out_width))
            active = torch.ops.aten.gelu.out(hidden, out=scratch[2][:n])
            towards = torch.mm(back, fc2[block.expert], out=scratch[3][:n])
            if grad_gate is not None:
                product = torch.mul(towards, active, out=_other(scratch[0], n, hidden_width))
                torch.sum(product, 1, out=gates[block.number]).addmv_(back, biases2[block.expert])
            target.weigh(block, towards, back)
            _add(of[2:], block, back, active)
            torch.ops.aten.gelu_backward.grad_input(towards, hidden, grad_input=towards)
            _add(of[:2], block, towards, source.pick(x, block, _other(scratch[0], n, width)))
            source.put(grad_x, block, torch.mm(towards, fc1[block.expert], out=_other(scratch[1], n, width)))
        given_x = grad_x.to(x.dtype) if wanted[0] else None
        return given_x, *_finished(of, groups.rows, x.dtype), _gate_gradient(grad_gate, groups, gate_SK), None, None


class _Combine(torch.autograd.Function):
    """out[token] += gate * row."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gate_SK: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        """`[R, D]` in expert order -> `[S, D]`."""
        groups = Groups((rows_RD.shape[0],), order_R, inverse_R)
        blocks = _blocks(groups.rows)
        _, target = _ends(groups, rows_RD.shape[0], gate_SK, rows_RD.dtype, blocks)
        out = _totals(rows_RD, gate_SK.shape[0], rows_RD.shape[1], target)
        (scratch,) = _scratch(blocks, rows_RD, rows_RD.shape[1])
        for block in blocks:
            rows = scratch[: block.size].copy_(rows_RD[block.rows])
            target.weigh(block, rows)
            target.put(out, block, rows)
        ctx.save_for_backward(rows_RD, gate_SK, order_R, inverse_R)
        return out.to(rows_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows and gate weights."""
        rows_RD, gate_SK, order_R, inverse_R = ctx.saved_tensors
        groups = Groups((rows_RD.shape[0],), order_R, inverse_R)
        blocks = _blocks(groups.rows)
        _, target = _ends(groups, rows_RD.shape[0], gate_SK, rows_RD.dtype, blocks)
        grad_rows, grad_gate = torch.empty_like(rows_RD), rows_RD.new_empty(rows_RD.shape[0])
        (scratch,) = _scratch(blocks, rows_RD, rows_RD.shape[1])
        for block in blocks:
            back = target.pick(grads[0], block, scratch)
            grad_gate[block.rows] = torch.linalg.vecdot(back, rows_RD[block.rows])
            target.weigh(block, back)
            grad_rows[block.rows] = back
        return grad_rows, _gate_gradient(grad_gate, groups, gate_SK), None, None
