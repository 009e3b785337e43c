"""How many parameters a network has, and how many work for one image of a task. Read by `describe` and by reports."""

from typing import NamedTuple

from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model.vit import Block


class Counts(NamedTuple):
    """Numbers of parameters."""

    total: int
    backbone: int
    heads: dict[str, int]
    """Per task."""
    active: dict[str, int]
    """Per task: what one token can meet on its way, its own head included."""


def count_parameters(network: MultiTaskNetwork) -> Counts:
    """Counts of a network that holds all its experts (one built on the meta device will do).

    Active for a task: of each sparse layer top-k experts and the task's own router; of each block the task's embedding; all
    dense parts; the task's head.
    """
    heads = {task: sum(p.numel() for p in network.head(task).parameters()) for task in network.task_names}
    backbone = sum(p.numel() for p in network.backbone.parameters())
    idle = 0
    for layer in network.backbone.sparse_layers().values():
        router = sum(p.numel() for p in layer.router.parameters())
        rows = layer.router.weight.shape[0]
        experts = sum(p.numel() for p in layer.experts.parameters())
        per_expert = experts // layer.experts.num_experts
        idle += (layer.experts.num_experts - layer.router.top_k) * per_expert + (rows - 1) * (router // rows)
    for block in network.backbone.blocks:
        if isinstance(block, Block) and block.task_embed is not None:
            idle += block.task_embed.numel() - block.task_embed.shape[1]
    active = {task: backbone - idle + heads[task] for task in network.task_names}
    total = sum(p.numel() for p in network.parameters())
    return Counts(total, backbone, heads, active)
