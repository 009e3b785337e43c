"""Training: a recipe in, a run folder out. Builds data, network and engine, then loops; called by cli.py on every rank.

    RUN/recipe.json  RUN/metrics.jsonl  RUN/checkpoints/  RUN/model.safetensors
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modsquad_ds import checkpoint
from modsquad_ds.adapt import close, hide_unused, is_adaptation, without_unseen
from modsquad_ds.checkpoint import Progress
from modsquad_ds.config import Recipe, recipe_to_tree
from modsquad_ds.data.finish import finished_images, to_device
from modsquad_ds.data.loader import LoaderPlan, check_data, train_loader
from modsquad_ds.data.order import derive_seed
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.data.types import Batch
from modsquad_ds.errors import UserError
from modsquad_ds.files import make_folder, write_json
from modsquad_ds.model.heads import check_norm
from modsquad_ds.model.network import MultiTaskNetwork, NetworkOutput
from modsquad_ds.model_file import ModelFile, write_model
from modsquad_ds.objective import Objective, Report, Usage, flatten, no_usage, unflatten, updated_usage
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import broadcast_json, sum_over_ranks
from modsquad_ds.parallel.engine import build_engine, in_bf16, read_deepspeed_config
from modsquad_ds.parallel.experts import ep_size_of
from modsquad_ds.parallel.frozen import overlaid
from modsquad_ds.parallel.optimizer import learning_rate_factor, set_learning_rate
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.state import TrainingState, gather_network
from modsquad_ds.placement import Order, balanced_order, expert_load, imbalance
from modsquad_ds.plan import loader_plan, step_tokens
from modsquad_ds.runlog import RunLog
from modsquad_ds.start import Start, start_of
from modsquad_ds.trainable import Chosen, Trainable, choose_experts, trainable_entries


class Work(NamedTuple):
    """What one rank did in a step."""

    images: int
    tokens: int
    waited: float
    """Seconds without data."""


@dataclass
class Trainer:
    """Everything that one rank trains with."""

    recipe: Recipe
    ranks: Ranks
    engine: Any
    """DeepSpeed's engine around the network."""
    objective: Objective
    average: dict[str, Tensor]
    """Moving average of the weights by parameter name; empty without `train.ema`."""
    usage: tuple[Usage, ...] = ()
    start: Start | None = None
    """The network's start, where not everything learns: the frozen part of the model file that training leaves."""
    trainable: Trainable | None = None
    """What learns; None: everything."""
    chosen: Chosen = ()
    """The experts that learn, with `adapt.train: experts`."""

    @property
    def network(self) -> MultiTaskNetwork:
        """The network inside the engine."""
        return self.engine.module

    @property
    def state(self) -> TrainingState:
        """This rank's weights and optimizer state."""
        return TrainingState(self.engine, self.average)


def train(recipe: Recipe) -> None:
    """Run a recipe to its end, from its newest checkpoint if there is one. Every rank calls it."""
    ranks = launch.start(recipe.parallel.timeout_minutes)
    plan = loader_plan(recipe, ranks, recipe.adapted)
    check_data(plan)
    if ranks.first:
        make_folder(recipe.run, "run")
    trainer = build_trainer(recipe, ranks, *progress_of(recipe))
    class_names(trainer, plan)  # what is unknown is told now, not when the model is written
    start = resume(trainer)
    steps, prune = recipe.train.steps, recipe.adapt.prune
    if prune is not None:
        hide_unused(trainer.network, recipe, prune, ())
    if ranks.first:
        write_json(recipe.run / "recipe.json", recipe_to_tree(recipe))
    batches = iter(train_loader(plan, start, steps, recipe.train.workers))
    with RunLog(recipe.run, recipe.name, recipe.log, start, steps) if ranks.first else nullcontext() as log:
        clock = time.monotonic()
        for step in range(start, steps):
            if prune is not None and step == prune.at_step:
                hide_unused(trainer.network, recipe, prune, trainer.usage)
            micro_batches = islice(batches, recipe.train.accumulation)
            report, work = train_step(trainer, micro_batches, step)
            done = step + 1
            now = time.monotonic()
            record = record_of(trainer, report, work, done, now - clock)
            clock = now
            stop_if_not_finite(trainer, record)
            if log is not None:
                log.advance(done)
                if due(done, recipe.train.log_every, steps):
                    log.record(record)
            if done == recipe.adapt.router_steps:
                trainer = widened(trainer, done)
            # Before pruning too: where the rule leaves too little, another one can go on from here.
            if due(done, recipe.train.checkpoint_every, steps) or (prune is not None and done == prune.at_step):
                save(trainer, done)
                clock = time.monotonic()
    if prune is not None and prune.at_step in (None, steps):
        hide_unused(trainer.network, recipe, prune, trainer.usage)
    save_model(trainer, plan)
    if is_adaptation(recipe):
        close(recipe.run / "model.safetensors", recipe, ranks, trainer.trainable)
    launch.stop()


def build_trainer(recipe: Recipe, ranks: Ranks, done: int = 0, chosen: Chosen = ()) -> Trainer:
    """Network, engine and objective as they are after `done` steps, but with the weights of step 0."""
    all_saved = done > 0 and recipe.adapt.train == "all" and done >= recipe.adapt.router_steps
    all_saved = all_saved and len(recipe.adapted) == len(recipe.active)  # else the file names the others' classes
    start = start_of(recipe, read_file=not all_saved, show=ranks.first and done == 0)
    return trainer_from(start, recipe, ranks, done, chosen)


def trainer_from(start: Start, recipe: Recipe, ranks: Ranks, done: int, chosen: Chosen) -> Trainer:
    """The trainer of a start, whose network becomes the engine's. Experts are chosen here if they have to be and are not yet."""
    bf16 = in_bf16(read_deepspeed_config(recipe.deepspeed_config))
    for spec in recipe.active.values():
        check_norm(spec, launch.device().type, ranks.world, bf16)
    if recipe.adapt.train == "experts" and done >= recipe.adapt.router_steps and not chosen:
        # Rank 0's choice: another processor may round a share of use differently.
        chosen = tuple(map(tuple, broadcast_json(choose_experts(start.network, recipe, start.usage))))
    trainable = trainable_entries(start.network, recipe, done, chosen)
    engine = build_engine(start.network, recipe, ranks, trainable)
    average = {}
    if recipe.train.ema:
        average = {n: p.detach().float().clone() for n, p in engine.module.named_parameters() if p.requires_grad}
    usage = tuple(Usage(*(x.to(launch.device()) for x in layer)) for layer in start.usage)
    if trainable is None or not ranks.first:
        start = start._replace(whole={})  # nobody asks for it, and it is as large as the network
    return Trainer(recipe, ranks, engine, Objective(recipe, ranks.world), average, usage, start, trainable, chosen)


def widened(trainer: Trainer, done: int) -> Trainer:
    """The trainer that goes on once routers and heads have learned alone: with all that learns by now, from the same weights.

    Optimizer state and weight average begin anew: they are of other parameters.
    """
    assert trainer.start is not None and trainer.trainable is not None
    learned = gather_network(trainer.network, {})  # whole on every rank, since no expert is in it
    start = start_of(trainer.recipe)
    start.network.load_state_dict(overlaid(start.whole, learned, trainer.trainable))
    trainer.engine.destroy()
    return trainer_from(start._replace(usage=trainer.usage), trainer.recipe, trainer.ranks, done, ())


def progress_of(recipe: Recipe) -> tuple[int, Chosen]:
    """Steps done by the newest complete checkpoint, and the experts that learn there."""
    found = checkpoint.complete_checkpoints(recipe.run)
    if not found:
        return 0, ()
    saved = checkpoint.read_state(found[-1])
    return saved["step"], tuple(map(tuple, saved["chosen"]))


def resume(trainer: Trainer) -> int:
    """Load the newest complete checkpoint if the recipe wants it; returns the number of steps done."""
    recipe = trainer.recipe
    found = checkpoint.complete_checkpoints(recipe.run)
    if recipe.resume == "must" and not found:
        raise UserError(f"resume=must: no complete checkpoint under {recipe.run / 'checkpoints'}; use resume=auto to start anew")
    if recipe.resume == "never" and found:
        raise UserError(f"resume=never: {found[-1]} exists; give another run folder (run=...) or remove it")
    if not found:
        return 0
    check_continuation(found[-1], recipe)
    place = partial(place_experts, trainer) if recipe.parallel.placement == "balanced" else None
    progress = checkpoint.load(found[-1], trainer.state, place)
    trainer.usage = tuple(Usage(*(x.to(launch.device()) for x in layer)) for layer in progress.usage)
    if trainer.ranks.first:
        print(f"going on from {found[-1]}, step {progress.step}", flush=True)
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
        print(f"experts placed, busiest rank / mean: {', '.join(told) or 'no layer is spread over ranks'}", flush=True)
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


def train_step(trainer: Trainer, micro_batches: Iterator[Batch], step: int) -> tuple[Report, Work]:
    """One optimizer step: the mean values of its micro-batches, and what this rank did."""
    spec = trainer.recipe.train
    rate = spec.optimizer.lr * learning_rate_factor(spec.schedule, step, spec.steps)
    set_learning_rate(trainer.engine.optimizer, rate)
    work, reports = Work(0, 0, 0.0), []
    for micro in range(spec.accumulation):
        began = time.monotonic()
        batch = next(micro_batches)
        work = _more(work, batch, trainer.recipe.model.shape.patch, time.monotonic() - began)
        torch.manual_seed(derive_seed("step", trainer.recipe.seed, step, micro, trainer.ranks.rank))
        reports.append(forward_backward(trainer, batch))
        trainer.engine.step()
    for name, average in trainer.average.items():
        average.lerp_(trainer.network.get_parameter(name).detach().float(), 1 - spec.ema)
    return Report(*(torch.stack(values).mean(0) for values in zip(*reports, strict=True))), work


def forward_backward(trainer: Trainer, batch: Batch) -> Report:
    """Forward pass, one reduction of all sums over ranks, backward pass."""
    network, device = trainer.network, launch.device()
    batch = {task: to_device(sub, device) for task, sub in batch.items()}
    dtype = network.backbone.pos_embed.dtype
    output: NetworkOutput = trainer.engine({task: finished_images(sub).to(dtype) for task, sub in batch.items()})
    terms = {task: network.head(task).losses(output.outputs[task], sub.targets) for task, sub in batch.items()}
    sums = sum_over_ranks(flatten(terms, output.stats))
    total = unflatten(sums, terms, output.stats)
    trainer.usage = trainer.usage or no_usage(output.stats)
    loss, report = trainer.objective((terms, output.stats), total, trainer.usage, network.task_scale)
    trainer.engine.backward(loss)
    trainer.usage = updated_usage(trainer.usage, total[1], trainer.recipe.loss.memory)
    return report


def record_of(trainer: Trainer, report: Report, work: Work, step: int, seconds: float) -> dict[str, Any]:
    """One flat record of a step, the line of metrics.jsonl. The step's one deliberate wait for the device.

    Rates are over all ranks: every rank's batch has the same sizes.
    """
    tasks = trainer.network.task_names
    parts = [x.reshape(-1) for x in report]
    numbers = iter(torch.cat([x.to(report.total.device) for x in parts]).tolist())
    total, per_task, present, information, balance, dropped = (list(islice(numbers, x.numel())) for x in parts)
    record = {"step": step, "loss": total[0]}
    record |= {f"loss/{t}": v for t, v, here in zip(tasks, per_task, present, strict=True) if here}
    record |= {f"information/{i}": v for i, v in enumerate(information)}
    record |= {f"balance/{i}": v for i, v in enumerate(balance)}
    if trainer.recipe.parallel.capacity_factor is not None:
        record |= {f"dropped/{t}": v for t, v, here in zip(tasks, dropped, present, strict=True) if here}
    return record | {
        "lr": max(group["lr"] for group in trainer.engine.optimizer.param_groups),  # the heads', before layer decay
        "grad_norm": _grad_norm(trainer.engine),
        "seconds": seconds,
        "data_seconds": work.waited,
        "images_per_s": trainer.ranks.world * work.images / seconds,
        "tokens_per_s": trainer.ranks.world * work.tokens / seconds,
    }


def stop_if_not_finite(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Raise UserError on a NaN or infinite loss or gradient, naming step, task and last good checkpoint.

    All ranks see the same values. DeepSpeed would go on with such gradients and skip every update, with no more than a warning.
    """
    if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"] or 0.0):
        return
    tasks = [t for t in trainer.network.task_names if not math.isfinite(record.get(f"loss/{t}", 0.0))]
    good = checkpoint.complete_checkpoints(trainer.recipe.run)
    culprit = f"task {', '.join(tasks)}" if tasks else "no task's own loss"
    raise UserError(
        f"step {record['step']}: the loss is {record['loss']} and the gradient norm {record['grad_norm']} ({culprit}); "
        f"last good checkpoint: {good[-1] if good else 'none'}; lower train.optimizer.lr or set train.optimizer.clip and resume"
    )


def save(trainer: Trainer, step: int) -> None:
    """Write a training checkpoint."""
    recipe = trainer.recipe
    progress = Progress(step, trainer.usage, trainer.chosen)
    checkpoint.save(recipe.run, trainer.state, progress, recipe_to_tree(recipe), trainer.ranks, recipe.train.keep_checkpoints)


def save_model(trainer: Trainer, plan: LoaderPlan) -> None:
    """Write RUN/model.safetensors on rank 0, with averaged weights if the recipe keeps them and frozen bytes as they were."""
    state = gather_network(trainer.network, trainer.average)
    if trainer.ranks.first:
        if trainer.start is not None and trainer.trainable is not None:
            state = overlaid(trainer.start.whole, state, trainer.trainable)
        model = ModelFile(trainer.recipe, state, class_names(trainer, plan), trainer.usage)
        if trainer.recipe.adapt.prune is not None:
            model = without_unseen(model)
        write_model(trainer.recipe.run / "model.safetensors", model)


def class_names(trainer: Trainer, plan: LoaderPlan) -> dict[str, list[str]]:
    """Class names of all tasks: from the shards of those that learn, from the file that the run started from for the others."""
    known = trainer.start.classes if trainer.start is not None else {}
    own = {task: list(ShardSet(plan.folder(task, "train")).classes) for task in plan.tasks}
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


def _more(work: Work, batch: Batch, patch: int, waited: float) -> Work:
    """The work with one more micro-batch."""
    shapes = [sub.images_BCHW.shape for sub in batch.values()]
    tokens = sum(n * (height // patch) * (width // patch) for n, _, height, width in shapes)
    return Work(work.images + sum(shape[0] for shape in shapes), work.tokens + tokens, work.waited + waited)


def _grad_norm(engine: Any) -> float | None:
    """Global gradient norm before clipping, where DeepSpeed computed one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
