"""LAMB (arXiv 1904.00962) that stays LAMB under ZeRO and expert parallelism. One of the two optimizers of optimizer.py.

LAMB scales each layer's update by |weights| / |update|. ZeRO lays all parameters of a group end to end and gives every rank a
slice, so an optimizer that takes one norm per tensor it is handed would take one ratio for everything in the slice. This one
knows which elements belong to which piece, sums squared norms of pieces over the ranks that share them, and treats each
expert (and each task's router) of a stacked parameter as a piece of its own, so ratios do not depend on the size of the
expert-parallel group. Update rule as timm's Lamb: bias-corrected moments, weight decay inside the update, ratio 1 for
parameters without weight decay and where a norm is 0.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Pieces(NamedTuple):
    """Which piece each element of an optimizer's tensor belongs to."""

    element: Tensor
    """int64, one entry per element, flattened; `pieces` marks padding."""
    pieces: int
    group: dist.ProcessGroup | None
    """Ranks over which the pieces' elements are spread; None if they are all here."""


class Lamb(torch.optim.Optimizer):
    """See the file's head. `pieces` of tensors that ZeRO made are set by `attach_zero`; other tensors are cut by shape."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.pieces: dict[int, Pieces] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = state["step"].item()
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (state["exp_avg"] / (1 - beta1**step)).div_(denominator)
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
            update.mul_(self._ratio(parameter, update))
        parameter.sub_(update, alpha=group["lr"])

    def _ratio(self, parameter: Tensor, update: Tensor) -> Tensor:
        """|weights| / |update| of each element's piece, in the parameter's shape."""
        pieces = self.pieces.get(id(parameter)) or _pieces_of_whole(parameter)
        squares = parameter.new_zeros(2, pieces.pieces + 1, dtype=torch.float32)
        squares[0].index_add_(0, pieces.element, parameter.flatten().float().square())
        squares[1].index_add_(0, pieces.element, update.flatten().float().square())
        if pieces.group is not None:
            dist.all_reduce(squares, group=pieces.group)
        weight, change = squares.sqrt()
        ratio = torch.where((weight > 0) & (change > 0), weight / change.clamp(min=1e-30), torch.ones_like(weight))
        return ratio[pieces.element].view_as(parameter).to(parameter.dtype)


def attach_zero(optimizer: Lamb, zero: Any) -> None:
    """Tell the optimizer how DeepSpeed's ZeRO-1/2 optimizer laid parameters into its flat slices."""
    for i, (flat, parameters) in enumerate(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)):
        starts, total = [], 0
        for parameter in parameters:
            starts.append(total)
            total += _piece_count(parameter)
        index = torch.full((flat.numel(),), total, dtype=torch.int64, device=flat.device)
        for start, parameter in zip(starts, parameters, strict=True):
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                elements = torch.arange(here.start, here.start + here.numel, device=flat.device)
                size = parameter.numel() // _piece_count(parameter)
                index[there.start : there.start + there.numel] = start + elements // size
        optimizer.pieces[id(flat)] = Pieces(index, total, zero.real_dp_process_group[i])


def _piece_count(parameter: Tensor) -> int:
    """Pieces of a parameter: one, or as many as it stacks experts or tasks."""
    return parameter.shape[0] if getattr(parameter, "stacked", False) else 1


def _pieces_of_whole(parameter: Tensor) -> Pieces:
    count = _piece_count(parameter)
    elements = torch.arange(parameter.numel(), device=parameter.device)
    return Pieces(elements // (parameter.numel() // count), count, None)
