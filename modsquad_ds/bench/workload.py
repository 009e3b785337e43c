"""The training step that `bench step` and `bench comm` measure: a sparse ViT with three tasks, and its peers.

Axes: B images, D width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from modsquad_ds.config import Recipe, recipe_from_tree
from modsquad_ds.data.types import Batch, Finish, SubBatch
from modsquad_ds.model.network import build_network
from modsquad_ds.model.pack import Shared
from modsquad_ds.model.router import RoutingStats
from modsquad_ds.model.sparse import SparseLayer
from modsquad_ds.model_spec import SIZES
from modsquad_ds.objective import Objective
from modsquad_ds.parallel.engine import build_engine
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.trainer import Trainer, build_trainer, train_step

PACKED, PER_TASK, DENSE = "packed", "one pass per task", "dense timm ViT"
VARIANTS = (PACKED, PER_TASK, DENSE)
PATCH = 16


class Workload(NamedTuple):
    """What a step consists of."""

    images: dict[str, tuple[int, int]]
    """Task (classes, boxes, masks) -> images of a step over all ranks, side in pixels."""
    size: str = "small"
    """Of the ViT, a name in model_spec.SIZES with patches of PATCH."""

    @property
    def tokens(self) -> dict[str, int]:
        """Of each task in a step, over all ranks."""
        return {task: count * (side // PATCH) ** 2 for task, (count, side) in self.images.items()}


def workload(images: Mapping[str, Sequence[int]], size: str) -> Workload:
    """From JSON, which has no tuples."""
    return Workload({task: (count, side) for task, (count, side) in images.items()}, size)


def step_recipe(
    work: Workload, accumulation: int, layout: str = "alternate", parallel: Mapping[str, Any] | None = None
) -> Recipe:
    """A ViT whose every token does the work of a dense one's: 4 of 16 experts of hidden width D, as many heads of twice as many.

    Args:
        accumulation: micro-batches of a step.
        layout: of the model.
        parallel: the recipe's section.
    """
    heads = {
        "classes": {"type": "linear"},
        "boxes": {"type": "anchor_free", "strides": [8], "channels": 32, "convs": 1},
        "masks": {"type": "fcn", "stride": 8, "channels": 32, "convs": 1, "dropout": 0.0, "aux_channels": 32},
    }
    kinds = {"classes": "classification", "boxes": "detection", "masks": "segmentation"}
    tasks = {
        name: {"kind": kinds[name], "data": name, "num_classes": 10, "batch_size": accumulation * count, "head": heads[name]}
        for name, (count, _) in work.images.items()
    }
    heads_of_dense = SIZES[work.size].heads
    tree = {
        "name": "bench", "run": "unused", "deepspeed_config": "zero1",
        "model": {
            "size": work.size, "layout": layout,
            "mlp": {"num_experts": 16, "top_k": 4},
            "attention": {"num_experts": 2 * heads_of_dense, "top_k": heads_of_dense},
        },
        "tasks": tasks,
        "loss": {"mutual_information": 0.005},
        "train": {"steps": 10**6, "accumulation": accumulation, "optimizer": {"lr": 1e-4, "clip": 1.0}},
        "parallel": dict(parallel or {}),
        "log": {"wandb": "disabled"},
    }  # fmt: skip
    return recipe_from_tree(tree, "bench")


def step_batch(work: Workload, ranks: Ranks) -> Batch:
    """This rank's part of one batch of noise with labels: data that cost nothing to load."""
    return {name: _sub_batch(name, count // ranks.world, side, ranks.rank) for name, (count, side) in work.images.items()}


def _sub_batch(task: str, count: int, side: int, seed: int) -> SubBatch:
    g = torch.Generator().manual_seed(seed)
    targets: dict[str, Any]
    if task == "classes":
        targets = {"labels": torch.randint(10, (count,), generator=g)}
    elif task == "boxes":
        boxes = [torch.tensor([[8.0, 8.0, side / 2, side / 2], [side / 4, side / 3, side - 4.0, side - 4.0]])] * count
        targets = {"boxes": boxes, "labels": [torch.tensor([1, 2])] * count, "ignore": [torch.zeros(0, 4)] * count}
    else:
        targets = {"labels": torch.randint(10, (count, side, side), generator=g)}
    keys = tuple(f"{i}" for i in range(count))
    images = torch.randint(256, (count, 3, side, side), generator=g, dtype=torch.uint8)
    return SubBatch(images, targets, keys, ({},) * count, Finish((127.5,) * 3, (73.9,) * 3))


class TimmBackbone(nn.Module):
    """timm's dense ViT in the place of the sparse backbone; canvases of several sizes are several passes."""

    def __init__(self, width: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=224, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0, global_pool="",
            class_token=False, dynamic_img_size=True, fc_norm=False,
        )  # fmt: skip
        self.patch = patch
        self.blocks, self.patch_embed, self.pos_embed = self.vit.blocks, self.vit.patch_embed, self.vit.pos_embed

    def sparse_layers(self) -> dict[str, SparseLayer]:
        """None."""
        return {}

    def forward(
        self, images: Mapping[int, Tensor], shared: Sequence[Shared] = ()
    ) -> tuple[dict[int, Tensor], tuple[RoutingStats, ...]]:
        """As `SparseViT.forward`; the workload has no image sets."""
        assert not shared
        return {task: self._map(images_BCHW) for task, images_BCHW in images.items()}, ()

    def _map(self, images_BCHW: Tensor) -> Tensor:
        tokens_BND = self.vit.forward_features(images_BCHW)
        height, width = (side // self.patch for side in images_BCHW.shape[2:])
        return tokens_BND.transpose(1, 2).unflatten(2, (height, width))


def trainer_of(
    variant: str, work: Workload, ranks: Ranks, ep_size: int, parallel: Mapping[str, Any] | None = None
) -> Trainer:
    """A trainer at step 0. `one pass per task` is a micro-batch per task: the gradients of three passes, one update.

    `parallel`: more keys of the recipe's section besides `ep_size`.
    """
    if variant != DENSE:
        section = {"ep_size": ep_size, **(parallel or {})}
        accumulation = len(work.images) if variant == PER_TASK else 1
        return build_trainer(step_recipe(work, accumulation, parallel=section), ranks)
    recipe = step_recipe(work, 1, layout="dense")
    network, shape = build_network(recipe), recipe.model.shape
    network.backbone = TimmBackbone(shape.width, shape.depth, shape.heads, shape.patch)  # type: ignore[assignment]
    return Trainer(recipe, ranks, build_engine(network, recipe, ranks), Objective(recipe, ranks.world), {})


def step_of(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    """One training step on the same batch, whole or a task at a time as the recipe's micro-batches want it."""
    micro_batches = [batch] if trainer.recipe.train.accumulation == 1 else [{name: sub} for name, sub in batch.items()]

    def step() -> None:
        train_step(trainer, _endless(micro_batches), 0)

    return step


def _endless(batches: list[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches
