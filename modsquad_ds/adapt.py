"""The ends of an adaptation: experts that the adapted tasks do without, and the closing table. Used by train.py.

    RUN/adapt.json   what learned, what it costs, how good it is
"""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from modsquad_ds.adapt_spec import AdaptSpec, PruneSpec
from modsquad_ds.config import Recipe
from modsquad_ds.costs import Version, costs_of
from modsquad_ds.data.loader_plan import VAL
from modsquad_ds.evaluate import Results, evaluate_network
from modsquad_ds.files import write_json
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model_file import ModelFile, network_of, read_model
from modsquad_ds.objective import Usage
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import barrier, broadcast_json
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from modsquad_ds.selection import candidates, kept_by_usage
from modsquad_ds.surgery import extract
from modsquad_ds.tables import ADAPTED, metric_name, without_memory
from modsquad_ds.tasks import metrics_of
from modsquad_ds.trainable import Trainable, count_trainable

RUNS = 5
"""Passes of which the table's FLOPs and the median time are taken."""


def is_adaptation(recipe: Recipe) -> bool:
    """Whether a run starts from a file or trains a part."""
    return recipe.init_from is not None or recipe.adapt != AdaptSpec()


def hide_unused(network: MultiTaskNetwork, recipe: Recipe, rule: PruneSpec, usage: Sequence[Usage]) -> None:
    """Let the adapted tasks choose no more among the experts that the rule gives up; in place, on every rank the same.

    Raises UserError where the rule leaves them fewer than top-k. Called with no usage before training, it meets that early.
    """
    layers = list(network.backbone.sparse_layers().values())
    known = candidates(recipe, [layer.router.visible for layer in layers], usage, list(recipe.adapted))
    kept = broadcast_json(kept_by_usage(known, rule))
    if not usage:
        return
    for layer, experts in zip(layers, kept, strict=True):
        for task in map(network.task_names.index, recipe.adapted):
            layer.router.restrict(task, sorted(set(experts) & set(layer.router.seen_by(task))))


def without_unseen(model: ModelFile) -> ModelFile:
    """The model without the experts that none of its tasks sees any more."""
    with_rows = network_of(model, "to be pruned")
    routers = [layer.router for layer in with_rows.backbone.sparse_layers().values()]
    kept = tuple(tuple(sorted(set().union(*(r.seen_by(t) for t in range(r.tasks))))) for r in routers)
    return extract(model, tuple(model.recipe.active), kept)


def close(path: Path, recipe: Recipe, ranks: Ranks, trainable: Trainable | None) -> None:
    """Measure the written model on the adapted tasks' held-out data, print the table, write adapt.json. Every rank calls it."""
    barrier()  # rank 0 writes the model
    model = read_model(path)
    network = network_of(model, str(path)).to(launch.device())
    alone = model.recipe.model_copy(update={"only": tuple(recipe.adapted)})
    results = evaluate_network(network, alone, loader_plan(alone, ranks), VAL)
    if not ranks.first:
        return
    trained = count_trainable(without_memory(recipe), trainable)
    tasks = {task: costs_of(Version(network, model.recipe, path), task, RUNS)._asdict() for task in alone.active}
    write_json(path.with_name(ADAPTED), {"trained": trained, "costs": tasks, "metrics": results})
    _print(recipe, trained, tasks, results)


def _print(recipe: Recipe, trained: int, costs: dict[str, dict[str, float]], results: Results) -> None:
    table = Table(title=f"{recipe.name}: adapt.train {recipe.adapt.train}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("task", overflow="fold")
    for heading in ("trained", "parameters", "active", "GFLOPs an image", "held-out metric"):
        table.add_column(heading, justify="right")
    for task, of_task in costs.items():
        metric = metrics_of(recipe.active[task])[0]
        value = results[task][metric]
        shown = f"{'-' if value is None else f'{value:.3f}'} {metric_name(recipe.active[task], metric)}"
        numbers = (f"{n:,}" for n in (trained, of_task["total"], of_task["active"]))
        table.add_row(task, *numbers, f"{of_task['flops'] / 1e9:,.3f}", shown)
    console = Console()
    (console if console.width <= 100 else Console(width=100)).print(table)
