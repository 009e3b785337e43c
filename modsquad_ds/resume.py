"""Going on from a checkpoint: which one, whether it fits the recipe, and what it changes. Used by train.py."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from modsquad_ds import checkpoint
from modsquad_ds.config import Recipe
from modsquad_ds.errors import UserError
from modsquad_ds.files import say
from modsquad_ds.objective import Usage
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import broadcast_json
from modsquad_ds.parallel.experts import ep_size_of
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.placement import Order, balanced_order, expert_load, imbalance
from modsquad_ds.plan import loader_plan, step_tokens
from modsquad_ds.tasks import streams_of
from modsquad_ds.trainable import Chosen
from modsquad_ds.trainer import Trainer


def find(recipe: Recipe, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from, by the recipe's `resume`; None to begin anew. Every rank calls it.

    Raises UserError where the recipe's wish cannot be met, where the checkpoint is another model's, or where all are damaged.
    """
    # Rank 0's listing on every rank: a shared file system may show another node an older one.
    present = broadcast_json([str(folder) for folder in checkpoint.complete_checkpoints(recipe.run)])
    if recipe.resume == "must" and not present:
        raise UserError(f"resume=must: no complete checkpoint under {recipe.run / 'checkpoints'}; use resume=auto to start anew")
    if recipe.resume == "never" and present:
        raise UserError(f"resume=never: {present[-1]} exists; give another run folder (run=...) or remove it")
    found = checkpoint.newest_sound(recipe.run, ranks)
    if found is not None:
        check_continuation(found, recipe)
    return found


def progress_of(found: Path | None) -> tuple[int, Chosen]:
    """Steps done by a checkpoint, and the experts that learn there."""
    if found is None:
        return 0, ()
    saved = checkpoint.read_state(found)
    return saved["step"], tuple(map(tuple, saved["chosen"]))


def with_same_batch(recipe: Recipe, found: Path, ranks: Ranks) -> Recipe:
    """The recipe with as many images per step as the checkpoint's, where it states them per rank and the ranks are others now.

    So the order of the data and what a learning rate means stay the same. A `batch_size` of a whole step is taken as it is.
    """
    saved, plan = checkpoint.read_state(found), loader_plan(recipe, ranks, recipe.adapted)
    parts, tasks, sets = ranks.world * recipe.train.accumulation, dict(recipe.tasks), dict(recipe.sets)
    for stream, (name, *_) in streams_of(plan.tasks).items():
        spec, before, now = plan.tasks[name], saved["images"].get(name), plan.step_images(name)
        if spec.batch_size is not None or before in (None, now):
            continue
        if before % parts:
            shares = f"{ranks.world} ranks x {recipe.train.accumulation} micro-batches"
            raise UserError(
                f"checkpoint {found}: {stream} had {before} images a step, which {shares} cannot share evenly; "
                f"change one of them, or set {plan.section(name)}.batch_size"
            )
        kept = {"batch_size": before, "batch_size_per_rank": None}
        # Of a set, those too that do not learn here: the recipe is saved, and all of a set's tasks have to agree with it.
        tasks |= {one: tasks[one].model_copy(update=kept) for one in streams_of(tasks)[stream]}
        if stream in sets:
            sets[stream] = sets[stream].model_copy(update=kept)
        if ranks.first:
            say(
                f"{stream}: {before} images a step as before, so {before // parts} per rank and micro-batch "
                f"(the recipe's {spec.batch_size_per_rank} would make {now}; train.accumulation shares memory)"
            )
    return recipe.model_copy(update={"tasks": tasks, "sets": sets})


def resume(trainer: Trainer, found: Path | None) -> int:
    """Put a checkpoint into a freshly built trainer; returns the number of steps done. Every rank calls it."""
    if found is None:
        return 0
    if checkpoint.read_state(found)["origin"] != trainer.origin:
        raise UserError(
            f"checkpoint {found}: its frozen weights are of another file than init_from is now (checksum); "
            "put that one back, or start a new run folder (run=...)"
        )
    place = partial(place_experts, trainer) if trainer.recipe.parallel.placement == "balanced" else None
    progress = checkpoint.load(found, trainer.state, place)
    trainer.usage = tuple(Usage(*(x.to(launch.device()) for x in layer)) for layer in progress.usage)
    if trainer.ranks.first:
        say(f"going on from {found}, step {progress.step}")
    return progress.step


def place_experts(trainer: Trainer, usage: Sequence[Usage]) -> list[Order]:
    """Orders of all sparse layers' experts that even the loads of the ranks that share them; layers held whole keep theirs.

    Rank 0's count on every rank: different processors may round a load differently, and different orders lose experts.
    """
    plan = loader_plan(trainer.recipe, trainer.ranks, trainer.recipe.adapted)
    tokens = dict(zip(plan.tasks, step_tokens(plan), strict=True))
    token_T = [tokens.get(name, 0.0) for name in trainer.network.task_names]
    orders, told = [], []
    for (path, layer), seen in zip(trainer.network.backbone.sparse_layers().items(), usage, strict=True):
        ranks = ep_size_of(layer, trainer.recipe.parallel)
        load_E = expert_load(seen.share_TE, token_T, layer.router.top_k)
        order = balanced_order(load_E, ranks)
        orders.append(order)
        if ranks > 1:
            told.append(f"{path} {imbalance(load_E, ranks):.2f} -> {imbalance(load_E[list(order)], ranks):.2f}")
    if trainer.ranks.first:
        say(f"experts placed, busiest rank / mean: {', '.join(told) or 'no layer is spread over ranks'}")
    return [tuple(order) for order in broadcast_json(orders)]


def check_continuation(folder: Path, recipe: Recipe) -> None:
    """Refuse a checkpoint that would load but mean something else: rows of routers and embeddings belong to tasks by order."""
    saved = checkpoint.read_state(folder)
    then = [name for name in saved["recipe"]["tasks"] if not saved["recipe"]["only"] or name in saved["recipe"]["only"]]
    now = list(recipe.active)
    if then != now:
        raise UserError(
            f"checkpoint {folder}: trained for the tasks {', '.join(then)} in this order, the recipe has {', '.join(now)}; "
            "restore them, or start a new run folder (run=...)"
        )
    learned = saved["recipe"]["adapt"]["tasks"] or then
    if recipe.adapt.train != "all" and set(learned) != set(recipe.adapted):
        raise UserError(
            f"checkpoint {folder}: the tasks that learned are {', '.join(learned)}, in the recipe {', '.join(recipe.adapted)}; "
            "restore adapt.tasks, or start a new run folder (run=...)"
        )
    if saved["step"] > recipe.train.steps:
        raise UserError(
            f"checkpoint {folder}: {saved['step']} steps are done, train.steps is {recipe.train.steps}; "
            "raise it, or start a new run folder (run=...)"
        )
