"""Where tasks, layers and experts lie in a state dict. What init_from.py, selection.py and surgery.py cut and join along.

Layers are the sparse ones, in the order of the statistics.
"""

from typing import Literal, NamedTuple

import torch

from modsquad_ds.config import Recipe
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model.sparse import SparseMLP
from modsquad_ds.model.vit import Block

KindOfLayer = Literal["mlp", "attention"]


class PerKind(NamedTuple):
    """A number for each kind of sparse layer: top-k, or new experts."""

    mlp: int
    attention: int


class SparsePlace(NamedTuple):
    """One sparse layer of a recipe's network."""

    path: str
    """Inside the backbone."""
    kind: KindOfLayer
    expert_axes: dict[str, int]
    """Name in the state dict -> axis of experts."""
    size: int
    """Parameters of one expert."""


class Structure(NamedTuple):
    """Where tasks and experts lie in a recipe's state dict."""

    layers: tuple[SparsePlace, ...]
    by_task: frozenset[str]
    """Tensors whose axis 0 counts tasks."""

    @property
    def expert_axes(self) -> dict[str, int]:
        """Name in the state dict -> axis of experts, of all layers."""
        return {name: axis for layer in self.layers for name, axis in layer.expert_axes.items()}


def structure_of(recipe: Recipe) -> Structure:
    """Of the recipe's network, which is built without memory."""
    with torch.device("meta"):
        return structure_of_network(MultiTaskNetwork(recipe))


def structure_of_network(network: MultiTaskNetwork) -> Structure:
    """Of a network that holds all its experts."""
    layers, by_task = [], set()
    for path, layer in network.backbone.sparse_layers().items():
        kind: KindOfLayer = "mlp" if isinstance(layer, SparseMLP) else "attention"
        axes = {f"backbone.{path}.{name}": axis for name, axis in layer.expert_axes().items()}
        size = sum(p[0].numel() for p in layer.experts.parameters())
        layers.append(SparsePlace(path, kind, axes, size))
        if layer.router.spec.per_task:
            by_task |= {f"backbone.{path}.router.{name}" for name in layer.router.state_dict()}
    for number, block in enumerate(network.backbone.blocks):
        if isinstance(block, Block) and block.task_embed is not None:
            by_task.add(f"backbone.blocks.{number}.task_embed")
    if network.task_scale is not None:
        by_task.add("task_scale")
    return Structure(tuple(layers), frozenset(by_task))


def head_of(name: str) -> str | None:
    """Task of a head's tensor, None for others; names of tasks have no dots."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "heads" else None


def top_k_of(recipe: Recipe) -> PerKind:
    """The recipe's own."""
    return PerKind(recipe.model.mlp.top_k, recipe.model.attention.top_k)
