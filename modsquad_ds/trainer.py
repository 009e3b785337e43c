"""What one rank trains with, and one step of it: network, engine and objective, from a batch to a record. Used by train.py."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modsquad_ds import checkpoint
from modsquad_ds.config import Recipe
from modsquad_ds.data.finish import finished_images, to_device
from modsquad_ds.data.order import derive_seed
from modsquad_ds.data.types import Batch
from modsquad_ds.errors import UserError
from modsquad_ds.model.heads import check_norm
from modsquad_ds.model.network import MultiTaskNetwork, NetworkOutput
from modsquad_ds.objective import Objective, Report, Usage, flatten, no_usage, unflatten, updated_usage
from modsquad_ds.parallel import launch, watchdog
from modsquad_ds.parallel.collectives import broadcast_json, sum_over_ranks
from modsquad_ds.parallel.engine import build_engine, in_bf16, read_deepspeed_config
from modsquad_ds.parallel.frozen import overlaid
from modsquad_ds.parallel.optimizer import learning_rate_factor, set_learning_rate
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.state import TrainingState, gather_network
from modsquad_ds.start import Start, start_of
from modsquad_ds.trainable import Chosen, Trainable, choose_experts, trainable_entries


class Votes(NamedTuple):
    """What one rank has to know of the others between two steps; rides on the step's own reduction, 0 or 1 from each rank."""

    stop: float = 0.0
    """A signal asked for the end."""
    due: float = 0.0
    """A checkpoint is due by the clock."""
    writing: float = 0.0
    """A part of the last checkpoint is not on disk yet."""


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
    votes: Votes = field(default_factory=Votes)
    """What this rank has to say in the next step."""
    cast: Tensor | None = None
    """The votes of all ranks in the last step, summed, on the device."""

    @property
    def origin(self) -> str:
        """Checksum of the file that what is frozen comes from; empty where everything learns."""
        return self.start.origin if self.start is not None and self.trainable is not None else ""

    @property
    def network(self) -> MultiTaskNetwork:
        """The network inside the engine."""
        return self.engine.module

    @property
    def agreed(self) -> Votes:
        """The sums of all ranks' votes in the last step, the same on every rank. Waits for the device."""
        return Votes() if self.cast is None else Votes(*self.cast.tolist())

    @property
    def state(self) -> TrainingState:
        """This rank's weights and optimizer state."""
        return TrainingState(self.engine, self.average)


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


def train_step(trainer: Trainer, micro_batches: Iterator[Batch], step: int) -> tuple[Report, Work]:
    """One optimizer step: the mean values of its micro-batches, and what this rank did."""
    spec = trainer.recipe.train
    rate = spec.optimizer.lr * learning_rate_factor(spec.schedule, step, spec.steps)
    set_learning_rate(trainer.engine.optimizer, rate)
    work, reports = Work(0, 0, 0.0), []
    for micro in range(spec.accumulation):
        began = time.monotonic()
        watchdog.tell(step + 1, "loading data")
        batch = next(micro_batches)
        watchdog.tell(step + 1, "computing")
        work = _more(work, batch, trainer.recipe.model.shape.patch, time.monotonic() - began)
        torch.manual_seed(derive_seed("step", trainer.recipe.seed, step, micro, trainer.ranks.rank))
        reports.append(forward_backward(trainer, batch))
        trainer.engine.step()
    for name, average in trainer.average.items():
        average.lerp_(trainer.network.get_parameter(name).detach().float(), 1 - spec.ema)
    return mean_report(reports), work


def mean_report(reports: Sequence[Report]) -> Report:
    """Means over micro-batches; a task's own values over those that have it (an image set's may lack all its labels)."""
    mean = Report(*(torch.stack(values).mean(0) for values in zip(*reports, strict=True)))
    if len(reports) == 1:
        return mean
    present_T = mean.present_T.clamp(min=1 / len(reports))  # an absent task's values are 0 in every micro-batch
    return mean._replace(task_T=mean.task_T / present_T, dropped_T=mean.dropped_T / present_T)


def forward_backward(trainer: Trainer, batch: Batch) -> Report:
    """Forward pass, one reduction of all sums over ranks, backward pass."""
    network, device = trainer.network, launch.device()
    batch = {task: to_device(sub, device) for task, sub in batch.items()}
    dtype = network.backbone.pos_embed.dtype
    pixels = {stream: finished_images(sub).to(dtype) for stream, sub in batch.items()}
    sets = [(pixels.pop(stream), sub.rows) for stream, sub in batch.items() if sub.rows is not None]
    output: NetworkOutput = trainer.engine(pixels, sets)
    terms = {task: network.head(task).losses(output.outputs[task], x) for task, x in targets_by_task(batch).items()}
    own = flatten(terms, output.stats)
    votes = torch.tensor(trainer.votes).to(device, non_blocking=True)
    *sums, trainer.cast = sum_over_ranks([*own, votes])
    total = unflatten(sums, terms, output.stats)
    trainer.usage = trainer.usage or no_usage(output.stats)
    loss, report = trainer.objective((terms, output.stats), total, trainer.usage, network.task_scale)
    trainer.engine.backward(loss)
    trainer.usage = updated_usage(trainer.usage, total[1], trainer.recipe.loss.memory)
    return report


def targets_by_task(batch: Batch) -> dict[str, dict[str, Any]]:
    """Targets of every task of a batch, those of image sets among them."""
    targets: dict[str, dict[str, Any]] = {}
    for stream, sub in batch.items():
        targets |= {stream: sub.targets} if sub.rows is None else sub.targets
    return targets


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


def is_finite(record: Mapping[str, Any]) -> bool:
    """Whether training can go on from a step's loss and gradient; the same on every rank."""
    return math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"] or 0.0)


def stop_if_not_finite(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Raise UserError on a NaN or infinite loss or gradient, naming step, task and last good checkpoint.

    All ranks see the same values. DeepSpeed would go on with such gradients and skip every update, with no more than a warning.
    """
    if is_finite(record):
        return
    tasks = [t for t in trainer.network.task_names if not math.isfinite(record.get(f"loss/{t}", 0.0))]
    good = checkpoint.complete_checkpoints(trainer.recipe.run)
    culprit = f"task {', '.join(tasks)}" if tasks else "no task's own loss"
    raise UserError(
        f"step {record['step']}: the loss is {record['loss']} and the gradient norm {record['grad_norm']} ({culprit}); "
        f"last good checkpoint: {good[-1] if good else 'none'}; lower train.optimizer.lr or set train.optimizer.clip and resume"
    )


def _more(work: Work, batch: Batch, patch: int, waited: float) -> Work:
    """The work with one more micro-batch."""
    images, tokens = work.images, work.tokens
    for sub in batch.values():
        count, _, height, width = sub.images_BCHW.shape
        read = count if sub.rows is None else sum(len(rows.index_B) for rows in sub.rows.values())
        images, tokens = images + count, tokens + read * (height // patch) * (width // patch)
    return Work(images, tokens, work.waited + waited)


def _grad_norm(engine: Any) -> float | None:
    """Global gradient norm before clipping, where DeepSpeed computed one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
