"""From a recipe to what the loader has to do on one rank. Shared by train.py and evaluate.py."""

from collections.abc import Mapping

from modsquad_ds.config import Recipe
from modsquad_ds.data.loader import LoaderPlan
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.tasks import TaskSpec


def loader_plan(recipe: Recipe, ranks: Ranks, tasks: Mapping[str, TaskSpec] | None = None) -> LoaderPlan:
    """What the recipe says about data, for this rank; of all its tasks, or of some."""
    return LoaderPlan(
        tasks=dict(recipe.active if tasks is None else tasks),
        root=recipe.data_root,
        seed=recipe.seed,
        sampling=recipe.train.sampling,
        shuffle_window=recipe.train.shuffle_window,
        patch_size=recipe.model.shape.patch,
        mean=recipe.mean,
        std=recipe.std,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=recipe.train.accumulation,
        cache=recipe.cache,
    )


def step_tokens(plan: LoaderPlan) -> tuple[float, ...]:
    """Mean tokens of each task in an optimizer step, over all ranks and micro-batches, in the recipe's order.

    With `weighted` sampling a task's steps are its share of the sampling weights.
    """
    weights = {name: spec.sampling_weight for name, spec in plan.tasks.items()}
    total = sum(weights.values())
    shares = {name: weight / total if plan.sampling == "weighted" else 1.0 for name, weight in weights.items()}
    return tuple(
        shares[name] * plan.step_images(name) * image_tokens(spec, plan.patch_size) for name, spec in plan.tasks.items()
    )


def image_tokens(spec: TaskSpec, patch: int) -> float:
    """Mean tokens of a training image of the task."""
    sizes = spec.transform.train_sizes
    return sum((height // patch) * (width // patch) for height, width in sizes) / len(sizes)
