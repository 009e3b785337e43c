"""Freezes a network but for what learns, in place, so that DeepSpeed meets only what learns. Called before the engine is built.

A frozen tensor stops being a parameter: the optimizer has no state for it, no gradient of it exists and nothing of it is
communicated. Of a stacked tensor with some entries that learn, these become a small parameter of their own, and the whole is
put together where the module reads it. That small parameter is the same on every rank, also where experts are spread: ranks
that do not hold the expert contribute a zero gradient, so the average over all ranks is the one that DeepSpeed would make
in the expert's own group.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from modsquad_ds.model.experts import ExpertBank
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.trainable import Trainable

PART = ".parametrizations."
"""Stands in the name that torch gives the small parameter: `x.router.parametrizations.weight.original` of `x.router.weight`,
`parametrizations.task_scale.original` of the network's own `task_scale`."""


def freeze(network: MultiTaskNetwork, trainable: Trainable, whole: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Keep as parameters only what `trainable` names; experts may be spread already. Changes `network` in place.

    `state_dict()` then holds what learns and the buffers alone. A head of which nothing learns is in evaluation mode: its
    batch statistics are part of what must not change.

    Args:
        whole: the network's state dict before experts were spread.
        dtype: what training computes in; DeepSpeed casts parameters alone.
    """
    for path, module in list(network.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{path}.{name}" if path else name
            if full_name not in trainable:
                delattr(module, name)
                module.register_buffer(name, parameter.data.to(dtype), persistent=False)
            elif (entries := trainable[full_name]) is not None:
                part = nn.Parameter(whole[full_name][list(entries)].to(parameter.dtype, copy=True))
                _split(module, name, part, entries, dtype)
    for head in network.heads.values():
        if not any(True for _ in head.parameters()):
            head.eval()


def overlaid(whole: Mapping[str, Tensor], learned: Mapping[str, Tensor], trainable: Trainable) -> dict[str, Tensor]:
    """The whole network's state dict after training, frozen bytes as they were.

    Args:
        whole: the state dict before `freeze`.
        learned: the frozen network's own.
    """
    result = dict(whole)
    for name, tensor in learned.items():
        if PART not in f".{name}":
            result[name] = tensor
            continue
        full_name = f".{name}".replace(PART, ".").removesuffix(".original")[1:]
        old, entries = whole[full_name], trainable[full_name]
        assert entries is not None
        # One tensor has one precision, and the frozen entries' bytes stay.
        result[full_name] = old.index_copy(0, torch.tensor(entries), tensor.to(old.dtype))
    return result


class _Whole(nn.Module):
    """The learning entries in -> the whole stacked tensor out, of which this rank may hold a part."""

    def __init__(self, frozen: Tensor, here: Sequence[int], there: Sequence[int]) -> None:
        super().__init__()
        self.frozen: Tensor
        self.here: Tensor
        self.there: Tensor
        self.register_buffer("frozen", frozen, persistent=False)
        self.register_buffer("here", torch.tensor(here, dtype=torch.long), persistent=False)
        self.register_buffer("there", torch.tensor(there, dtype=torch.long), persistent=False)

    def forward(self, part: Tensor) -> Tensor:
        return _Inserted.apply(self.frozen, part, self.here, self.there)


class _Inserted(torch.autograd.Function):
    """whole[here] = part[there]. Entries that lie on other ranks get a gradient of zero here, not none: all ranks reduce it."""

    @staticmethod
    def forward(ctx: Any, frozen: Tensor, part: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """The whole tensor, a copy."""
        ctx.save_for_backward(here, there)
        ctx.shape = part.shape
        return frozen.index_copy(0, here, part.index_select(0, there))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the part."""
        here, there = ctx.saved_tensors
        grad_part = grads[0].new_zeros(ctx.shape)
        return None, grad_part.index_copy_(0, there, grads[0].index_select(0, here)), None, None


def _split(module: nn.Module, name: str, part: nn.Parameter, entries: tuple[int, ...], dtype: torch.dtype) -> None:
    """Put the part in the place of a stacked parameter, of which the rest is frozen."""
    frozen = module.get_parameter(name)
    first = module.first if isinstance(module, ExpertBank) else 0
    places = [(entry - first, i) for i, entry in enumerate(entries) if 0 <= entry - first < len(frozen)]
    if getattr(frozen, "stacked", False):
        part.stacked = True  # type: ignore[attr-defined]
    delattr(module, name)
    module.register_parameter(name, part)
    inserted = _Whole(frozen.data.to(dtype), [here for here, _ in places], [there for _, there in places])
    parametrize.register_parametrization(module, name, inserted, unsafe=True)
