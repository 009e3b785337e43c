"""Training: a recipe in, a run folder out. Builds data, network and engine, then loops; called by cli.py on every rank.

    RUN/recipe.json  RUN/metrics.jsonl  RUN/checkpoints/  RUN/model.safetensors
"""

import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from modsquad_ds import checkpoint
from modsquad_ds.adapt import close, hide_unused, is_adaptation, without_unseen
from modsquad_ds.checkpoint import Progress
from modsquad_ds.config import Recipe, recipe_to_tree
from modsquad_ds.data.loader import train_loader
from modsquad_ds.data.loader_plan import TRAIN, LoaderPlan, check_data
from modsquad_ds.errors import Stopped, UserError
from modsquad_ds.files import make_folder, say, write_json, writing_to
from modsquad_ds.model_file import ModelFile, write_model
from modsquad_ds.parallel import launch, watchdog
from modsquad_ds.parallel.frozen import overlaid
from modsquad_ds.parallel.state import gather_network
from modsquad_ds.plan import check_same_shards, loader_plan
from modsquad_ds.resume import find, progress_of, resume, with_same_batch
from modsquad_ds.runlog import RunLog
from modsquad_ds.saving import Saver
from modsquad_ds.signals import StopSignal
from modsquad_ds.trainer import Trainer, Votes, build_trainer, is_finite, record_of, stop_if_not_finite, train_step, widened


class End(NamedTuple):
    """How the loop ended."""

    trainer: Trainer
    """What trained by then."""
    done: int
    """Steps."""
    stopped: bool
    """By a signal."""


def train(recipe: Recipe) -> None:
    """Run a recipe to its end, from its newest checkpoint if there is one. Every rank calls it.

    Raises Stopped when SIGUSR1 or SIGTERM ended it early: after the step at hand, with a checkpoint.
    """
    with StopSignal() as stop:
        _train(recipe, stop)


def _train(recipe: Recipe, stop: StopSignal) -> None:
    ranks = launch.start(recipe.parallel.collective_timeout)
    if ranks.first:
        checkpoint.clear_remains(recipe.run)
    found = find(recipe, ranks)
    if found is not None:
        recipe = with_same_batch(recipe, found, ranks)
    plan = loader_plan(recipe, ranks, recipe.adapted)
    check_data(plan)
    check_same_shards(plan, (TRAIN,))
    if ranks.first:
        make_folder(recipe.run, "run")
    trainer = build_trainer(recipe, ranks, *progress_of(found))
    class_names(trainer, plan)  # what is unknown is told now, not when the model is written
    start = resume(trainer, found)
    prune = recipe.adapt.prune
    if prune is not None:
        hide_unused(trainer.network, recipe, prune, ())
    if ranks.first:
        with writing_to(recipe.run / "recipe.json") as path:
            write_json(path, recipe_to_tree(recipe))
    saver = Saver(recipe.run, recipe_to_tree(recipe), ranks, recipe.train.keep_checkpoints)
    with RunLog(recipe.run, recipe.name, recipe.log, start, recipe.train.steps) if ranks.first else nullcontext() as log:
        trainer, done, early = loop(trainer, plan, start, saver, stop, log)
        watchdog.tell(done, "saving")
        last = saver.settle()
    if early:
        launch.stop()
        raise stopped(done, recipe.train.steps, last)
    if ranks.first:
        say(saver.summary())
    if prune is not None and prune.at_step in (None, recipe.train.steps):
        hide_unused(trainer.network, recipe, prune, trainer.usage)
    save_model(trainer, plan)
    if is_adaptation(recipe):
        close(recipe.run / "model.safetensors", recipe, ranks, trainer.trainable)
    launch.stop()


def loop(
    trainer: Trainer, plan: LoaderPlan, start: int, saver: Saver, stop: StopSignal, log: RunLog | None
) -> End:
    """The steps from `start` to the last, or until any rank got a signal."""
    recipe, images = trainer.recipe, {task: plan.step_images(task) for task in plan.tasks}
    spec, prune, done = recipe.train, recipe.adapt.prune, start
    batches = iter(train_loader(plan, start, spec.steps, spec.workers))
    clock = saved = time.monotonic()
    for step in range(start, spec.steps):
        if prune is not None and step == prune.at_step:
            hide_unused(trainer.network, recipe, prune, trainer.usage)
        by_clock = 0 < spec.checkpoint_minutes <= (time.monotonic() - saved) / 60
        trainer.votes = Votes(stop=stop.asked, due=by_clock and trainer.ranks.first, writing=saver.writing)
        report, work = train_step(trainer, islice(batches, spec.accumulation), step)
        done, now = step + 1, time.monotonic()
        record = record_of(trainer, report, work, done, now - clock) | {"checkpoint_seconds": sum(saver.pauses)}
        clock = now
        if not is_finite(record):
            saver.settle()  # what is on its way is the last good one
        stop_if_not_finite(trainer, record)
        if log is not None:
            log.advance(done)
            if due(done, spec.log_every, spec.steps):
                log.record(record)
        agreed = trainer.agreed
        saver.follow(agreed.writing > 0)
        if done == recipe.adapt.router_steps:
            trainer = widened(trainer, done)
        # Before pruning too: where the rule leaves too little, another one can go on from here.
        wanted = due(done, spec.checkpoint_every, spec.steps) or (prune is not None and done == prune.at_step)
        if wanted or agreed.due or agreed.stop:
            watchdog.tell(done, "saving")
            if log is not None:
                log.sync()
            saver.begin(trainer.state, Progress(done, trainer.usage, trainer.chosen, trainer.origin), images)
            clock = saved = time.monotonic()
        if agreed.stop:
            return End(trainer, done, stopped=True)
    return End(trainer, done, stopped=False)


def stopped(done: int, steps: int, last: Path | None) -> Exception:
    """How a run ends that a signal ended early."""
    if last is None:
        return UserError(
            f"asked to stop after step {done} of {steps}, but its checkpoint could not be written (see above); "
            "mend that and give the same command, which goes on from the checkpoint before"
        )
    return Stopped(f"asked to stop after step {done} of {steps}; {last} is written, the same command goes on from there")


def save_model(trainer: Trainer, plan: LoaderPlan) -> None:
    """Write RUN/model.safetensors on rank 0, with averaged weights if the recipe keeps them and frozen bytes as they were."""
    watchdog.tell(trainer.recipe.train.steps, "finishing")
    state = gather_network(trainer.network, trainer.average)
    if trainer.ranks.first:
        if trainer.start is not None and trainer.trainable is not None:
            state = overlaid(trainer.start.whole, state, trainer.trainable)
        model = ModelFile(trainer.recipe, state, class_names(trainer, plan), trainer.usage)
        if trainer.recipe.adapt.prune is not None:
            model = without_unseen(model)
        with writing_to(trainer.recipe.run / "model.safetensors") as path:
            write_model(path, model)


def class_names(trainer: Trainer, plan: LoaderPlan) -> dict[str, list[str]]:
    """Class names of all tasks: from the shards of those that learn, from the file that the run started from for the others."""
    known = trainer.start.classes if trainer.start is not None else {}
    own = {task: plan.classes(task, TRAIN) for task in plan.tasks}
    for task in own.keys() & known.keys():
        if own[task] != known[task]:
            i = next(i for i, pair in enumerate(zip(own[task], known[task], strict=False)) if pair[0] != pair[1])
            raise UserError(
                f"init_from: class {i} of task {task} is {known[task][i]!r} there and {own[task][i]!r} in "
                f"{plan.folder(task, 'train')}; make the shards from the same classes, or give the task another name"
            )
    names = known | own
    unknown = [task for task in trainer.recipe.active if task not in names]
    if unknown:
        raise UserError(
            f"adapt.tasks: without {', '.join(unknown)}, which neither learns nor is in a model file that the run starts from; "
            "add it to adapt.tasks, start from a model file that has it (init_from), or leave it out (only)"
        )
    return {task: names[task] for task in trainer.recipe.active}


def due(done: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last, happens now."""
    return done == last or (every > 0 and done % every == 0)
