"""The two ends of a run's life for tests that have a trainer at hand: write a checkpoint now, go on from the newest."""

from pathlib import Path

from modsquad_ds.checkpoint import Progress
from modsquad_ds.config import recipe_to_tree
from modsquad_ds.plan import loader_plan
from modsquad_ds.resume import find
from modsquad_ds.resume import resume as load
from modsquad_ds.saving import Saver
from modsquad_ds.trainer import Trainer


def save(trainer: Trainer, step: int) -> Path | None:
    """Write a checkpoint and wait until it is complete."""
    recipe, ranks = trainer.recipe, trainer.ranks
    plan = loader_plan(recipe, ranks, recipe.adapted)
    saver = Saver(recipe.run, recipe_to_tree(recipe), ranks, recipe.train.keep_checkpoints)
    images = {task: plan.step_images(task) for task in plan.tasks}
    saver.begin(trainer.state, Progress(step, trainer.usage, trainer.chosen, trainer.origin), images)
    return saver.settle()


def resume(trainer: Trainer) -> int:
    """Go on from the newest whole checkpoint, if the recipe wants it; returns its step."""
    return load(trainer, find(trainer.recipe, trainer.ranks))
