"""Spreads a network's experts over ranks, in the terms of DeepSpeed's expert parallelism.

DeepSpeed's engine finds sparse layers by their class, makes the process groups they ask for, and reduces the gradients of
parameters marked with a group inside that group. So each spread layer gets a parameterless `ExpertParallelGroup`, a
`deepspeed.moe.layer.MoE`, and its expert parameters get the marks. Names of parameters stay as they are at any size of the
group: DeepSpeed's own checkpoints, which need other names and cannot change the group's size, are not used (checkpoint.py).
"""

from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from modsquad_ds.config import ParallelSpec
from modsquad_ds.errors import UserError
from modsquad_ds.model.capacity import CapacityDispatcher
from modsquad_ds.model.sparse import SparseLayer, SparseMLP
from modsquad_ds.model.vit import SparseViT
from modsquad_ds.parallel.capacity import AllToAllCapacityDispatcher
from modsquad_ds.parallel.dispatch import AllToAllDispatcher
from modsquad_ds.parallel.launch import group_timeout
from modsquad_ds.parallel.ranks import Ranks


class ExpertParallelGroup(MoE):
    """What DeepSpeed's engine needs to know of a sparse layer; holds no parameters and computes nothing."""

    def __init__(self, num_experts: int, ep_size: int, dispatcher: AllToAllDispatcher) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size = num_experts, ep_size
        self.num_local_experts = num_experts // ep_size
        self.expert_group_name = group_name(ep_size)
        self.use_residual = self.enable_expert_tensor_parallelism = False
        self.dispatcher = dispatcher

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine: make the group if this is its first layer, and hand it to the dispatcher."""
        if use_data_before_expert_parallel_:
            raise UserError("deepspeed config: use_data_before_expert_parallelism is not supported; remove the key")
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        self.dispatcher.group = groups._get_expert_parallel_group(self.expert_group_name)


def group_name(ep_size: int) -> str:
    """DeepSpeed's name of the expert-parallel groups of a size; it must be this one."""
    return f"ep_size_{ep_size}"


def ep_size_of(layer: SparseLayer, spec: ParallelSpec) -> int:
    """Ranks that share this layer's experts."""
    return spec.ep_size if isinstance(layer, SparseMLP) else spec.attention_ep_size


def check_parallel(spec: ParallelSpec, world: int) -> None:
    """Raise UserError where a group size does not divide the number of ranks."""
    for key, ep in (("ep_size", spec.ep_size), ("attention_ep_size", spec.attention_ep_size)):
        if world % ep:
            raise UserError(
                f"recipe: parallel.{key} {ep} does not divide the {world} ranks of this job; "
                f"start a multiple of {ep} ranks or set parallel.{key} to a divisor of {world}"
            )


def spread_experts(backbone: SparseViT, spec: ParallelSpec, ranks: Ranks, learn: bool = True) -> None:
    """Keep this rank's share of every layer's experts and connect the layers, in place. Layers with a group of 1 stay whole.

    With `learn` off DeepSpeed is not told of the experts: it has nothing to reduce for them, and refuses sparse layers none of
    whose experts learn. The groups are then made here.
    """
    check_parallel(spec, ranks.world)
    made: dict[int, Any] = {}
    for layer in backbone.sparse_layers().values():
        ep_size, bank = ep_size_of(layer, spec), layer.experts
        if ep_size == 1:
            continue
        local = bank.num_experts // ep_size
        bank.keep(first=ranks.rank % ep_size * local, local=local)
        dispatcher = AllToAllDispatcher(bank.num_experts, ep_size)
        layer.dispatcher = dispatcher
        if not learn:
            made[ep_size] = dispatcher.group = made.get(ep_size) or group_of_size(ep_size, spec, ranks)
            continue
        for parameter in bank.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name(ep_size)  # type: ignore[attr-defined]
        layer.parallel_group = ExpertParallelGroup(bank.num_experts, ep_size, dispatcher)
    if spec.capacity_factor is not None:
        for layer in backbone.sparse_layers().values():
            layer.training_dispatcher = with_capacity(layer, spec.capacity_factor)


def group_of_size(ep_size: int, spec: ParallelSpec, ranks: Ranks) -> dist.ProcessGroup:
    """This rank's group of `ep_size` consecutive ranks. Every rank calls it."""
    members = [list(range(first, first + ep_size)) for first in range(0, ranks.world, ep_size)]
    own, _ = dist.new_subgroups_by_enumeration(members, timeout=group_timeout(spec.collective_timeout))
    assert isinstance(own, dist.ProcessGroup)
    return own


def with_capacity(layer: SparseLayer, capacity_factor: float) -> CapacityDispatcher:
    """The dispatcher with a capacity that goes the way of the layer's dropless one: to other ranks, or nowhere."""
    dropless, num_experts = layer.dispatcher, layer.experts.num_experts
    if isinstance(dropless, AllToAllDispatcher):
        return AllToAllCapacityDispatcher(num_experts, capacity_factor, dropless)
    return CapacityDispatcher(num_experts, capacity_factor)
