"""From a recipe to what the loader has to do on one rank. Shared by train.py and evaluate.py."""

from modsquad_ds.config import Recipe
from modsquad_ds.data.loader import LoaderPlan
from modsquad_ds.parallel.ranks import Ranks


def loader_plan(recipe: Recipe, ranks: Ranks) -> LoaderPlan:
    """What the recipe says about data, for this rank."""
    return LoaderPlan(
        tasks=recipe.active,
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
    )
