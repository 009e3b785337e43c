"""The whole network: the shared backbone and one head per task. Images by task in; head outputs and routing statistics out.

It computes no loss and knows no ranks: train.py and evaluate.py put it to use, parallel/ spreads its experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modsquad_ds.config import Recipe
from modsquad_ds.data.types import Rows
from modsquad_ds.model.heads import build_head
from modsquad_ds.model.heads.base import Head
from modsquad_ds.model.pack import Shared
from modsquad_ds.model.router import RoutingStats
from modsquad_ds.model.vit import SparseViT, init_weights


class NetworkOutput(NamedTuple):
    """What one forward pass gives."""

    outputs: dict[str, Any]
    """Task name -> its head's outputs, to be read by that head's `losses` and `predict`."""
    stats: tuple[RoutingStats, ...]
    """One per sparse layer, in the order of `SparseViT.sparse_layers()`."""


class MultiTaskNetwork(nn.Module):
    """Backbone, heads and, with `loss.weighting: uncertainty`, one learned scale per task."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.task_names = tuple(recipe.active)
        self.backbone = SparseViT(recipe.model, len(self.task_names))
        shape = recipe.model.shape
        self.heads = nn.ModuleDict(
            {name: build_head(spec, shape.width, shape.patch) for name, spec in recipe.active.items()}
        )
        learned = recipe.loss.weighting == "uncertainty"
        self.task_scale = nn.Parameter(torch.ones(len(self.task_names))) if learned else None

    def forward(self, images: Mapping[str, Tensor], sets: Sequence[tuple[Tensor, Mapping[str, Rows]]] = ()) -> NetworkOutput:
        """Outputs of the tasks whose images are given; sides are multiples of the patch size.

        Args:
            images: `[B, 3, H, W]` by name of the one task that reads them.
            sets: images that several tasks read, and which of them each task does.
        """
        by_index = {self.task_names.index(name): x for name, x in images.items()}
        shared = [Shared(x, {self.task_names.index(name): r for name, r in rows.items()}) for x, rows in sets]
        maps, stats = self.backbone(by_index, shared)
        outputs = {self.task_names[t]: self.head(self.task_names[t])(map_BDHW) for t, map_BDHW in maps.items()}
        return NetworkOutput(outputs, stats)

    def head(self, task: str) -> Head:
        """The head of a task."""
        head = self.heads[task]
        assert isinstance(head, Head)
        return head


def build_network(recipe: Recipe) -> MultiTaskNetwork:
    """The network with its initial weights: a function of the recipe alone, the same for any number of ranks.

    Under `with torch.device("meta")` it is built without memory, to count parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = MultiTaskNetwork(recipe)
        init_weights(network.backbone, recipe.seed)
    return network
