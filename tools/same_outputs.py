"""Whether two models give the same outputs, bit for bit, on held-out images of the tasks that both have.

    python tools/same_outputs.py runs/quickstart runs/modular/grown [--data data/quickstart/shards]

Exit code 0: the same to the last bit. 1: a task differs; its largest difference is printed. 2: bad input.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modsquad_ds.data.finish import finished_images
from modsquad_ds.data.loader import eval_batches
from modsquad_ds.data.loader_plan import VAL, check_split
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import BATCH_IMAGES, model_path
from modsquad_ds.model_file import network_of, read_model
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan


def leaves(outputs: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a head's outputs, each with its place in them."""
    if isinstance(outputs, Tensor):
        yield path, outputs
        return
    inner = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
    for name, value in inner:
        yield from leaves(value, f"{path}/{name}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether type, shape and every byte agree; unlike `==`, 0.0 and -0.0 differ and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def difference(a: Any, b: Any) -> str | None:
    """The first place where two heads' outputs differ, and by how much; None where all bits agree."""
    left, right = dict(leaves(a)), dict(leaves(b))
    if left.keys() != right.keys():
        return f"{', '.join(sorted(left.keys() ^ right.keys()))} in one of them only"
    for place, x in left.items():
        y = right[place]
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"{place} is {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        if not same_bits(x, y):
            return f"{place} by up to {(x.double() - y.double()).abs().max():.3g}"
    return None


@torch.inference_mode()
def compare(first: Path, second: Path, data: Path | None) -> bool:
    """Print one line per task that both models have; whether all of them agree. Both models see the same batches.

    Raises:
        UserError: a model or the data cannot be read, or no task is in both models.
    """
    files = [read_model(model_path(path)) for path in (first, second)]
    shared = [task for task in files[0].recipe.active if task in files[1].recipe.active]
    if not shared:
        tasks = " and ".join(", ".join(file.recipe.active) for file in files)
        raise UserError(f"{first} and {second} have no task in common: {tasks}")
    recipe = files[0].recipe if data is None else files[0].recipe.model_copy(update={"data_root": data})
    plan = loader_plan(recipe, Ranks())
    plan = replace(plan, tasks={task: recipe.active[task] for task in shared})
    check_split(plan, VAL)
    a, b = (network_of(file, str(path)).eval() for file, path in zip(files, (first, second), strict=True))
    agree = True
    for task in shared:
        images, found = 0, None
        for sub in eval_batches(plan, task, VAL, BATCH_IMAGES):
            batch = {task: finished_images(sub)}
            images += len(batch[task])
            found = difference(a(batch).outputs[task], b(batch).outputs[task])
            if found is not None:
                break
        agree &= found is None
        print(f"{task}: {images} images, " + ("the same to the last bit" if found is None else f"DIFFERENT: {found}"))
    return agree


def main() -> int:
    """Parse, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs=2, type=Path, metavar="MODEL", help="a run folder or a model file")
    parser.add_argument("--data", type=Path, help="folder with the tasks' shards, in place of the first recipe's data_root")
    arguments = parser.parse_args()
    try:
        return 0 if compare(*arguments.models, arguments.data) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
