"""What a rank holds of the training state: pieces of fp32 weights and moments, in terms of full tensors. For checkpoint.py.

Full tensors have the network's parameter names and, for experts, all experts of the layer stacked. Which elements a rank owns
follows from the ZeRO stage and the expert-parallel group; nothing here communicates.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from modsquad_ds.model.experts import ExpertBank
from modsquad_ds.model.sparse import SparseLayer
from modsquad_ds.parallel.dispatch import AllToAllDispatcher

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Optimizer state of both AdamW and LAMB."""


class Piece(NamedTuple):
    """Consecutive elements of a flattened full tensor."""

    name: str
    kind: str
    """`weight`, `exp_avg`, `exp_avg_sq` or `average` (of weights)."""
    start: int
    tensor: Tensor
    """fp32 `[n]`; a view of the live state where there is one."""


class _Owned(NamedTuple):
    """A rank's share of one parameter."""

    name: str
    parameter: nn.Parameter
    offset: int
    """Where this rank's parameter begins in the full tensor, in elements."""
    flat: Tensor
    """The optimizer's tensor, flattened, which holds the share."""
    state_key: Tensor
    here: slice
    """The share within `flat`."""
    there: slice
    """The share within the parameter, flattened."""


Cut = Callable[[str, str, int, int], Tensor]
"""(name, kind, start, stop) -> these elements of the flattened full tensor, fp32 on the CPU."""


class TrainingState:
    """Weights, moments and weight average of one rank, under one engine."""

    def __init__(self, engine: Any, average: dict[str, Tensor]) -> None:
        self.engine, self.average = engine, average
        """`average`: name of each parameter -> fp32 moving average of this rank's weights; empty if there is none."""
        self.parameters = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        self.banks = {
            f"{path}.{name}": bank
            for path, bank in engine.module.named_modules()
            if isinstance(bank, ExpertBank)
            for name, _ in bank.named_parameters(recurse=False)
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every full tensor."""
        return {name: self._full_shape(name, p) for name, p in self.parameters.items()}

    def pieces(self) -> list[Piece]:
        """The pieces that this rank has to write; over all ranks every element once."""
        pieces = []
        for owned in self._owned(only_writer=True):
            start = owned.offset + owned.there.start
            pieces.append(Piece(owned.name, "weight", start, owned.flat[owned.here]))
            state = self._optimizer().state[owned.state_key]
            pieces += [Piece(owned.name, kind, start, state[kind].flatten()[owned.here]) for kind in MOMENTS if kind in state]
            if self.average:
                pieces.append(Piece(owned.name, "average", start, self.average[owned.name].flatten()[owned.there]))
        return pieces

    def load(self, cut: Cut, optimizer_step: int) -> None:
        """Overwrite weights and optimizer state with this rank's parts of full tensors."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                start = self._offset(name, parameter)
                stop = start + parameter.numel()
                parameter.copy_(cut(name, "weight", start, stop).view(parameter.shape))
                if self.average:
                    self.average[name].copy_(cut(name, "average", start, stop).view(parameter.shape))
            for owned in self._owned(only_writer=False):
                start, stop = owned.offset + owned.there.start, owned.offset + owned.there.stop
                for kind in ("weight", *(MOMENTS if optimizer_step else ())):
                    self._live(owned, kind, optimizer_step)[owned.here].copy_(cut(owned.name, kind, start, stop))

    def buffers(self) -> dict[str, Tensor]:
        """The network's buffers that belong to its state, such as batch statistics; live tensors."""
        network = self.engine.module
        parameters = {name for name, _ in network.named_parameters()}
        return {name: tensor for name, tensor in network.state_dict().items() if name not in parameters}

    def load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Overwrite buffers, by the way on which modules notice it."""
        self.engine.module.load_state_dict(buffers, strict=False)

    def optimizer_step(self) -> int:
        """Updates done by the optimizer, as its bias correction counts them."""
        states = [state for state in self._optimizer().state.values() if "step" in state]
        return int(states[0]["step"]) if states else 0

    def _live(self, owned: _Owned, kind: str, optimizer_step: int) -> Tensor:
        """The flat tensor of a kind, made if the optimizer has not stepped yet."""
        if kind == "weight":
            return owned.flat
        state = self._optimizer().state[owned.state_key]
        if kind not in state:
            state[kind] = torch.zeros_like(owned.state_key)
        state["step"] = step_count(optimizer_step, self._optimizer(), owned.state_key)
        return state[kind].view(-1)

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.engine.optimizer
        return optimizer.optimizer if isinstance(optimizer, DeepSpeedZeroOptimizer) else optimizer

    def _owned(self, only_writer: bool) -> Iterator[_Owned]:
        zero = self.engine.optimizer
        for name, parameter in self.parameters.items():
            offset = self._offset(name, parameter)
            if isinstance(zero, DeepSpeedZeroOptimizer):
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
                here = slice(in_flat.start, in_flat.start + in_flat.numel)
                there = slice(in_parameter.start, in_parameter.start + in_parameter.numel)
                yield _Owned(name, parameter, offset, flat.data, flat, here, there)
            elif not only_writer or self._first_replica(name):
                whole = slice(0, parameter.numel())
                yield _Owned(name, parameter, offset, parameter.data.view(-1), parameter, whole, whole)

    def _first_replica(self, name: str) -> bool:
        """Whether, without ZeRO, this rank is the first of those that hold the parameter."""
        rank = dist.get_rank()
        bank = self.banks.get(name)
        return rank == 0 if bank is None else rank < bank.num_experts // bank.local

    def _full_shape(self, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
        bank = self.banks.get(name)
        return tuple(parameter.shape) if bank is None else (bank.num_experts, *parameter.shape[1:])

    def _offset(self, name: str, parameter: nn.Parameter) -> int:
        bank = self.banks.get(name)
        return 0 if bank is None else bank.first * (parameter.numel() // bank.local)


def step_count(step: int, optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """The `step` of an optimizer's state, where the optimizer wants it: fused ones count on the parameter's device."""
    on = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
    return torch.tensor(float(step), device=on)


def gather_network(network: nn.Module, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole network's state dict on the CPU of rank 0, experts of all ranks stacked; `average` replaces parameters it names.

    Every rank calls it; on others the experts are incomplete.
    """
    state = {name: average.get(name, tensor).detach() for name, tensor in network.state_dict().items()}
    for path, module in network.named_modules():
        if isinstance(module, SparseLayer) and isinstance(module.dispatcher, AllToAllDispatcher):
            for name, _ in module.experts.named_parameters(recurse=False):
                key = f"{path}.experts.{name}"
                parts = [torch.empty_like(state[key]) for _ in range(module.dispatcher.ep_size)]
                dist.all_gather(parts, state[key].contiguous(), group=module.dispatcher.group)
                state[key] = torch.cat(parts)
    return {name: tensor.cpu() for name, tensor in state.items()}
