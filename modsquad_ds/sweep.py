"""A sweep over how much of a model is kept for some tasks: thresholds and top-k in; rows, a CSV file and a picture out.

extract.py calls it. A row is an extracted model: its share of the experts' parameters, its cost and its held-out metrics.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modsquad_ds import draw
from modsquad_ds.adapt_spec import PruneSpec
from modsquad_ds.costs import Version, costs_of
from modsquad_ds.data.loader_plan import VAL, LoaderPlan
from modsquad_ds.evaluate import Results, evaluate_network
from modsquad_ds.model_file import ModelFile, network_of
from modsquad_ds.selection import Kept, kept_experts, share_kept
from modsquad_ds.structure import PerKind, structure_of, top_k_of
from modsquad_ds.surgery import extract
from modsquad_ds.tables import metric_name
from modsquad_ds.tasks import metrics_of

THRESHOLDS = (0.003, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Values of `min_usage`; from all that Mod-Squad's 0.03 keeps down to little more than top-k experts."""


class Point(NamedTuple):
    """One way to cut a model down."""

    rule: PruneSpec | None
    """None: every expert that the tasks see."""
    top_k: PerKind
    kept: Kept
    chosen: bool
    """Whether it is the one that the command writes."""


class Outcome(NamedTuple):
    """What a point's model costs and reaches."""

    share: float
    """Parameters of its experts over those of all the model's experts."""
    parameters: int
    flops: dict[str, int]
    """Per task: of one image."""
    metrics: Results


def points_of(model: ModelFile, tasks: Sequence[str], chosen: Point) -> list[Point]:
    """Every threshold at every top-k of the ladder, beginning with every expert at the model's own; the chosen point last."""
    steps = top_k_ladder(model)
    if chosen.top_k not in steps:
        steps = sorted([*steps, chosen.top_k], reverse=True)
    rules = (None, *(PruneSpec(min_usage=least) for least in THRESHOLDS))
    grid = [Point(rule, top_k, kept_experts(model, tasks, rule, top_k), False) for top_k in steps for rule in rules]
    return [*grid, chosen]


def top_k_ladder(model: ModelFile) -> list[PerKind]:
    """The model's top-k, halved until it is 1 for both kinds; a kind without layers keeps its number."""
    kinds = {layer.kind for layer in structure_of(model.recipe).layers}
    own = top_k_of(model.recipe)
    steps = [own]
    while True:
        halved = PerKind(*(max(1, k // 2) if kind in kinds else k for kind, k in zip(own._fields, steps[-1], strict=True)))
        if halved == steps[-1]:
            return steps
        steps.append(halved)


def outcomes(
    model: ModelFile,
    tasks: Sequence[str],
    points: Sequence[Point],
    plan: LoaderPlan,
    known: Mapping[tuple[Kept, PerKind], Results],
) -> list[Outcome]:
    """What each point reaches on held-out data. Points that are the same model are measured once; a progress bar on a terminal.

    Args:
        known: metrics that need not be measured again.
    """
    done: dict[tuple[Kept, PerKind], Outcome] = {}
    different = dict.fromkeys((point.kept, point.top_k) for point in points)
    columns = (TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not Console().is_terminal) as progress:
        for kept, top_k in progress.track(different):
            done[kept, top_k] = _outcome(model, tasks, kept, top_k, plan, known.get((kept, top_k)))
    return [done[point.kept, point.top_k] for point in points]


def _outcome(
    model: ModelFile, tasks: Sequence[str], kept: Kept, top_k: PerKind, plan: LoaderPlan, metrics: Results | None
) -> Outcome:
    part = extract(model, tasks, kept, top_k)
    network = network_of(part, "of the sweep")
    if metrics is None:
        metrics = evaluate_network(network, part.recipe, plan, VAL, quiet=True)
    costs = {task: costs_of(Version(network, part.recipe), task, runs=1) for task in part.recipe.tasks}
    flops = {task: cost.flops for task, cost in costs.items()}
    return Outcome(share_kept(model, kept), next(iter(costs.values())).total, flops, metrics)


# ---------------------------------------------------------------- written


def sweep_csv(model: ModelFile, points: Sequence[Point], found: Sequence[Outcome]) -> bytes:
    """A line per point. `rule` is empty where every expert was kept; metrics are empty where the data cannot say."""
    rows = []
    for point, outcome in zip(points, found, strict=True):
        mlp, attention = point.top_k
        row: dict[str, object] = {"rule": rule_name(point.rule), "mlp_top_k": mlp, "attention_top_k": attention}
        row |= {"experts": sum(map(len, point.kept)), "expert_parameters_kept": outcome.share, "parameters": outcome.parameters}
        for task, values in outcome.metrics.items():
            row |= {f"{task} flops": outcome.flops[task]} | {f"{task} {metric}": value for metric, value in values.items()}
        rows.append(row | {"chosen": int(point.chosen)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def rule_name(rule: PruneSpec | None) -> str:
    """`min_usage=0.03`"""
    return "" if rule is None else ",".join(f"{key}={value}" for key, value in rule if value is not None)


def sweep_png(model: ModelFile, points: Sequence[Point], found: Sequence[Outcome], full: Results) -> bytes:
    """PNG: for each task its headline metric against the share of the experts' parameters kept, a line per top-k."""
    tasks = list(found[0].metrics)
    figure = Figure(figsize=(6.4 * len(tasks), 4.6), dpi=110, layout="constrained")
    figure.suptitle(f"{model.recipe.name}: extracted for {', '.join(tasks)}")
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        spec = model.recipe.tasks[task]
        metric = metrics_of(spec)[0]
        _panel(axes, points, found, task, metric)
        value = full[task][metric]
        if value is not None:
            axes.axhline(value, color="grey", linewidth=1, linestyle="--", label=f"full model, {value:.3f}")
        axes.set_title(task)
        axes.set_xlabel("experts' parameters kept, %")
        axes.set_ylabel(metric_name(spec, metric))
        axes.set_xlim(0, 103)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:  # none where the data cannot say the metric
            axes.legend(frameon=False)
    return draw.figure_png(figure)


def _panel(axes: Axes, points: Sequence[Point], found: Sequence[Outcome], task: str, metric: str) -> None:
    values = [
        (point, 100 * outcome.share, value)
        for point, outcome in zip(points, found, strict=True)
        if (value := outcome.metrics[task][metric]) is not None
    ]
    for place, top_k in enumerate(dict.fromkeys(point.top_k for point in points)):
        here = {(share, value) for point, share, value in values if point.top_k == top_k}
        colour = tuple(channel / 255 for channel in draw.colour_of(place))
        label = f"top-k {top_k.mlp} (MLP), {top_k.attention} (attention)"
        if here:
            axes.plot(*zip(*sorted(here), strict=True), marker="o", markersize=4, color=colour, label=label)
    for _, share, value in (one for one in values if one[0].chosen):
        axes.plot([share], [value], "*", markersize=17, markeredgecolor="black", markerfacecolor="gold", label="written")
