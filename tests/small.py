"""A network small enough to train in every test, with all three kinds of task, and batches for it that need no files."""

from typing import Any

import torch

from modsquad_ds.config import Recipe, recipe_from_tree
from modsquad_ds.data.finish import finished_images
from modsquad_ds.data.types import Batch, Finish, SubBatch

ZERO0 = '{"zero_optimization": {"stage": 0}, "zero_allow_untested_optimizer": true}'


def small_tree() -> dict[str, Any]:
    """A recipe as a plain mapping, to be changed by a test before `recipe_from_tree`.

    Adam's eps is above the size of rounding errors in gradients: below it, Adam turns the sign of a rounding error into a
    full step, and no two orders of summation would give the same weights.
    """
    return {
        "name": "small",
        "run": "unused",
        "deepspeed_config": "zero2",
        "model": {
            "size": "tiny", "width": 32, "depth": 2, "heads": 2, "patch": 8, "grid": 4, "layout": "every_block",
            "mlp": {"num_experts": 4, "top_k": 2, "hidden": 24},
            "attention": {"num_experts": 4, "top_k": 2},
        },
        "tasks": {
            "digits": {"kind": "classification", "data": "d", "num_classes": 5, "batch_size": 8,
                       "transform": {"image_size": 32}},
            "scenes": {"kind": "detection", "data": "s", "num_classes": 3, "batch_size": 4,
                       "head": {"type": "anchor_free", "strides": [4], "channels": 32, "convs": 1},
                       "transform": {"canvases": [[32, 48]]}},
            "textures": {"kind": "segmentation", "data": "t", "num_classes": 4, "batch_size": 4,
                         "head": {"type": "fcn", "stride": 4, "channels": 32, "convs": 1, "dropout": 0.0,
                                  "aux_channels": 32},
                         "transform": {"crop": [32, 32]}},
        },
        "loss": {"mutual_information": 0.5, "load_balance": 0.01, "z_loss": 0.001},
        "train": {"steps": 5, "optimizer": {"lr": 1e-3, "eps": 1e-5}, "workers": 0},
        "parallel": {"ep_size": 1},
        "log": {"wandb": "disabled"},
    }  # fmt: skip


def small_recipe(**changes: Any) -> Recipe:
    """The small recipe with dotted keys changed, e.g. `small_recipe(**{"parallel.ep_size": 2})`."""
    tree = small_tree()
    for key, value in changes.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return recipe_from_tree(tree, "small")


def small_batch(step: int, rank: int, world: int) -> Batch:
    """This rank's part of a global batch that depends on the step alone. Ranks get unequal numbers of boxes and pixels."""
    g = torch.Generator().manual_seed(1000 + step)
    digits = _noise(g, 8, 3, 32, 32), torch.randint(5, (8,), generator=g)
    scenes = _noise(g, 4, 3, 32, 48)
    boxes = [torch.tensor([[2.0, 3.0, 20.0, 22.0], [25.0, 5.0, 44.0, 30.0]])[: (i + step) % 3] for i in range(4)]
    labels = [torch.arange(len(b)) for b in boxes]
    textures, masks = _noise(g, 4, 3, 32, 32), torch.randint(4, (4, 32, 32), generator=g)
    masks[0, :20] = 255

    def part(x: Any) -> Any:
        size = len(x) // world
        return x[rank * size : (rank + 1) * size]

    ignore = [torch.zeros(0, 4) for _ in range(4)]
    return {
        "digits": _sub(part(digits[0]), {"labels": part(digits[1])}),
        "scenes": _sub(part(scenes), {"boxes": part(boxes), "labels": part(labels), "ignore": part(ignore)}),
        "textures": _sub(part(textures), {"labels": part(masks)}),
    }


def small_images(batch: Batch) -> dict[str, torch.Tensor]:
    """What the network sees of a batch."""
    return {task: finished_images(sub) for task, sub in batch.items()}


def _noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """uint8 pixels; finished, they have mean 0 and variance 1."""
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def _sub(images: torch.Tensor, targets: dict[str, Any]) -> SubBatch:
    n = len(images)
    keys, finish = tuple(f"{i}" for i in range(n)), Finish((127.5,) * 3, (73.9,) * 3)
    return SubBatch(images, targets, keys, tuple({} for _ in range(n)), finish)
