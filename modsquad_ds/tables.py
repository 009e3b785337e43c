"""Tables on the terminal: a run's metrics, several runs side by side, a recipe's parameters. Called by cli.py."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from modsquad_ds.config import Recipe
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import model_path, summary_rows
from modsquad_ds.losses import mutual_information, task_expert_joint
from modsquad_ds.model.counts import count_parameters
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model_file import ModelFile, read_model
from modsquad_ds.targets import METRICS
from modsquad_ds.tasks import SetTask, TaskSpec, higher_is_better, metrics_of

ADAPTED = "adapt.json"
"""Beside the model of a run that trained part of it: what was trained, and what the model has and costs."""


def information_of(model: ModelFile) -> dict[str, float]:
    """Sparse layer, e.g. `blocks.1.mlp` -> mutual information of task and expert in nats.

    From the usage that training kept; empty for a model that was not trained or has no sparse layers.
    """
    if not model.usage:
        return {}
    names = without_memory(model.recipe).backbone.sparse_layers()
    return {name: information(usage.prob_TE) for name, usage in zip(names, model.usage, strict=True)}


def information(prob_TE: Tensor) -> float:
    """Mutual information where row t is P(expert | t); tasks that were never seen (rows of zeros) are left out."""
    return float(mutual_information(task_expert_joint(prob_TE, prob_TE.new_ones(len(prob_TE)))))


def print_results(results: Mapping[str, Any], recipe: Recipe, information: Mapping[str, float]) -> None:
    """Print the held-out metrics and the mutual information per sparse layer, in at most 80 columns.

    Args:
        results: what `evaluate` returned: task -> metric -> value, and the same under `untrained`.
        information: what `information_of` returned; without sparse layers, or with one task, there is no second table.
    """
    console = _console()
    metrics = Table(title="held-out data", title_justify="left")
    for name in ("task", "metric"):
        metrics.add_column(name, overflow="fold")
    for name in ("trained", "untrained"):
        metrics.add_column(name, justify="right")
    last = None
    for task, metric, trained, untrained in summary_rows(results, recipe):
        if last not in (None, task):
            metrics.add_section()
        name = metric_name(recipe.active[task], metric)
        metrics.add_row("" if task == last else task, name, _number(trained), _number(untrained))
        last = task
    console.print(metrics)
    limit = math.log(len(recipe.active))
    if not information or not limit:
        return
    routing = Table(title="mutual information of task and expert, nats", title_justify="left")
    routing.add_column("sparse layer", overflow="fold")
    for name in ("I(task; expert)", "limit: log T", "share"):
        routing.add_column(name, justify="right")
    for layer, value in information.items():
        routing.add_row(layer, f"{value:.3f}", f"{limit:.3f}", f"{value / limit:.1%}")
    console.print(routing)


def print_description(recipe: Recipe) -> None:
    """Print how many parameters a recipe's network has, and how many work for each task. Needs no memory for them."""
    counts = count_parameters(without_memory(recipe))
    table = Table(title=f"{recipe.name}: {counts.total:,} parameters, {counts.backbone:,} of them in the backbone")
    table.add_column("task", overflow="fold")
    for name in ("of its head", "active: one token meets"):
        table.add_column(name, justify="right")
    for task, head in counts.heads.items():
        table.add_row(task, f"{head:,}", f"{counts.active[task]:,}")
    _console().print(table)


def without_memory(recipe: Recipe) -> MultiTaskNetwork:
    """The recipe's network on the meta device: its shapes and names, no weights."""
    with torch.device("meta"):
        return MultiTaskNetwork(recipe)


def _console() -> Console:
    """Tables are at most 80 columns wide, also on a wider terminal."""
    console = Console()
    return console if console.width <= 80 else Console(width=80)


def metric_name(spec: TaskSpec, metric: str) -> str:
    """With its unit, and a note where less of it is better: `mErr, degrees, less is better`."""
    unit = METRICS[metric].unit if isinstance(spec, SetTask) else ""
    return ", ".join(filter(None, (metric, unit, "" if higher_is_better(spec, metric) else "less is better")))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def print_comparison(runs: Sequence[Path]) -> None:
    """Print the headline metric of every task of several evaluated runs, as a Markdown table; raises UserError for others.

    Where one of them was adapted there is a column of trained parameters; runs without adapt.json trained all they have.
    """
    models = {run: read_model(model_path(run)) for run in runs}
    tasks = {task: spec for model in models.values() for task, spec in model.recipe.active.items()}
    headings = [f"{task} {metric_name(spec, metrics_of(spec)[0])}" for task, spec in tasks.items()]
    table = Table(box=box.MARKDOWN)
    table.add_column("run", no_wrap=True)
    adapted = any((run / ADAPTED).is_file() for run in runs)
    for name in (*headings, "least I / log T", *(["trained"] if adapted else []), "parameters"):
        table.add_column(name, justify="right")
    for run, model in models.items():
        results = _evaluation(run)
        values = [_number(results.get(t, {}).get(metrics_of(spec)[0])) for t, spec in tasks.items()]
        total = count_parameters(without_memory(model.recipe)).total
        trained = [f"{_trained(run, total):,}"] if adapted else []
        table.add_row(run.name, *values, _least_share(model), *trained, f"{total:,}")
    Console(width=10_000, soft_wrap=True).print(table)  # Markdown has a row per line, however many tasks there are


def _trained(run: Path, total: int) -> int:
    """Parameters that a run's training could change."""
    path = run / ADAPTED
    return int(json.loads(path.read_bytes())["trained"]) if path.is_file() else total


def _evaluation(run: Path) -> dict[str, Any]:
    path = model_path(run).with_name("evaluation.json")
    if not path.is_file():
        raise UserError(f"run {run}: no {path}; run `modsquad-ds evaluate {run}` first")
    return json.loads(path.read_text())


def _least_share(model: ModelFile) -> str:
    """Smallest mutual information among the sparse layers, as a share of its limit."""
    values = information_of(model).values()
    limit = math.log(len(model.recipe.active))
    return f"{min(values) / limit:.0%}" if values and limit else "-"
