"""Who uses which expert: a model file and held-out shards in; JSON, pictures and a table out. Called by cli_modular.py.

Axes: T tasks, E experts, K top-k; TT a square table of tasks.

    measure_usage -> Usage per sparse layer -> report_of -> OUT/usage.json, OUT/usage_<layer>.png, OUT/similarity.png
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from modsquad_ds import draw
from modsquad_ds.config import Recipe
from modsquad_ds.data.loader_plan import VAL, LoaderPlan, check_split
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import by_canvas, check_classes, model_path, split_batches
from modsquad_ds.files import make_folder, write_atomic, write_json
from modsquad_ds.location import Location
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model_file import ModelFile, network_of, read_model, recipe_on
from modsquad_ds.objective import Usage
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import gather_json
from modsquad_ds.parallel.ranks import ranks_from
from modsquad_ds.plan import loader_plan
from modsquad_ds.tables import information, without_memory

LEAST = 0.03
"""An expert is in use for a task if it is among the top-k of at least this share of the task's tokens (Mod-Squad's rule)."""


class LayerUse(NamedTuple):
    """One sparse layer and who uses its experts."""

    name: str
    """Path in the backbone, e.g. `blocks.1.mlp`."""
    top_k: int
    usage: Usage


# ---------------------------------------------------------------- measured


@torch.inference_mode()
def measure_usage(
    network: MultiTaskNetwork, recipe: Recipe, plan: LoaderPlan, split: str, tasks: Collection[str]
) -> tuple[Usage, ...]:
    """Per sparse layer: mean softmax probability and top-k selection share of each task over a split, all tokens alike.

    Every rank calls it with its own plan and gets the same fp32 tables `[T, E]`, one row per task of the network; tasks
    that are not in `tasks` keep rows of zeros. Each image counts once. The network is left in evaluation mode.
    """
    network = network.to(launch.device()).eval()
    like = network.backbone.pos_embed
    sizes = [layer.router.num_experts for layer in network.backbone.sparse_layers().values()]
    # fp64: one pack's sums are exact or nearly so in fp32, a whole split's would not be.
    sums = [torch.zeros(3, len(network.task_names), experts, dtype=torch.float64) for experts in sizes]
    for task in tasks:
        index = network.task_names.index(task)
        for sub in split_batches(plan, task, split, workers=recipe.train.workers):
            for chosen, images_BCHW in by_canvas(sub, like):
                valid = [i for i, place in enumerate(chosen) if sub.meta[place].get("valid", True)]
                if not valid:
                    continue
                for total, stats in zip(sums, network.backbone({index: images_BCHW[valid]})[1], strict=True):
                    total += torch.stack((stats.prob_TE, stats.count_TE, stats.token_T[:, None].expand_as(stats.prob_TE))).cpu()
    ranks = gather_json([total.tolist() for total in sums])
    return tuple(_means(torch.tensor(of_layer, dtype=torch.float64).sum(0)) for of_layer in zip(*ranks, strict=True))


def _means(sums_3TE: Tensor) -> Usage:
    """Sums of probabilities, of choices, and the number of tokens -> usage."""
    prob_TE, count_TE, token_TE = sums_3TE
    share_TE = count_TE / count_TE.sum(1, keepdim=True).clamp(min=1)
    return Usage((prob_TE / token_TE.clamp(min=1)).float(), share_TE.float())


# ---------------------------------------------------------------- compared


def used_experts(layer: LayerUse, least: float = LEAST) -> Tensor:
    """bool `[T, E]`: whether the expert is among the top-k of at least the share `least` of the task's tokens."""
    return layer.usage.share_TE.double() * layer.top_k >= least


def seen_tasks(layers: Sequence[LayerUse]) -> list[int]:
    """Rows of the tasks that routed any token."""
    return layers[0].usage.share_TE.sum(1).nonzero().flatten().tolist()


def overlap(share_TE: Tensor) -> Tensor:
    """fp64 `[T, T]`: sum over experts of the smaller selection share, for each pair of tasks. NaN for tasks not seen.

    0: no expert is shared; 1: both choose every expert equally often (one less the distance of total variation).
    """
    share_TE = share_TE.double()
    least_TT = torch.minimum(share_TE[:, None], share_TE[None, :]).sum(-1).clamp(max=1)
    unseen_T = share_TE.sum(1) == 0
    return least_TT.masked_fill(unseen_T[:, None] | unseen_T[None, :], torch.nan)


def jaccard(used_TE: Tensor) -> Tensor:
    """fp64 `[T, T]`: experts in use by both tasks / by any of the two. NaN where one of them uses none."""
    used_TE = used_TE.double()
    both_TT = used_TE @ used_TE.T
    count_T = used_TE.sum(1)
    none_T = count_T == 0
    share_TT = both_TT / (count_T[:, None] + count_T[None, :] - both_TT)
    return share_TT.masked_fill(none_T[:, None] | none_T[None, :], torch.nan)


def similarity(layers: Sequence[LayerUse], least: float = LEAST) -> dict[str, Tensor]:
    """`overlap` and `jaccard` of each pair of tasks, each the mean over the layers where it is defined; NaN where in none."""
    return {
        "overlap": torch.stack([overlap(layer.usage.share_TE) for layer in layers]).nanmean(0),
        "jaccard": torch.stack([jaccard(used_experts(layer, least)) for layer in layers]).nanmean(0),
    }


def report_of(layers: Sequence[LayerUse], tasks: Sequence[str], least: float = LEAST) -> dict[str, Any]:
    """All of it as JSON-able values: what usage.json holds. Tables of pairs have rows and columns in the order of `tasks`."""
    return {
        "tasks": list(tasks),
        "least_share_of_tokens": least,
        "layers": [_layer_report(layer, tasks, least) for layer in layers],
        "similarity": {name: _plain(table_TT) for name, table_TT in similarity(layers, least).items()},
    }


def _layer_report(layer: LayerUse, tasks: Sequence[str], least: float) -> dict[str, Any]:
    used_TE = used_experts(layer, least)
    rows = {
        "share": layer.usage.share_TE.tolist(),
        "prob": layer.usage.prob_TE.tolist(),
        "used": [row.nonzero().flatten().tolist() for row in used_TE],
    }
    return {
        "layer": layer.name,
        "experts": layer.usage.share_TE.shape[1],
        "top_k": layer.top_k,
        "information": information(layer.usage.prob_TE),
        **{name: dict(zip(tasks, of_task, strict=True)) for name, of_task in rows.items()},
        "overlap": _plain(overlap(layer.usage.share_TE)),
        "jaccard": _plain(jaccard(used_TE)),
    }


def _plain(table_TT: Tensor) -> list[list[float | None]]:
    """Nested lists, None in place of NaN."""
    return [[None if math.isnan(value) else value for value in row] for row in table_TT.tolist()]


# ---------------------------------------------------------------- drawn


def layer_picture(layer: LayerUse, tasks: Sequence[str]) -> Figure:
    """Selection shares and mean probabilities of one layer."""
    title = f"{layer.name}, top-{layer.top_k}: I(task; expert) = {information(layer.usage.prob_TE):.2f} nats"
    tables = {"share of choices": layer.usage.share_TE, "P(expert | task)": layer.usage.prob_TE}
    return draw.heat_maps(tables, tasks, title)


def similarity_picture(overlap_TT: Tensor, tasks: Sequence[str]) -> Figure:
    """The table of pairs, all of them known, beside the dendrogram that orders it; a single task has none.

    Average linkage on 1 - overlap: two groups join at the mean distance of their pairs.
    """
    side = 2.0 + 0.55 * len(tasks)
    figure = Figure(figsize=(side + 4.5, side), dpi=110, layout="constrained")
    if len(tasks) == 1:
        _draw_table(figure.subplots(), overlap_TT, tasks)
        return figure
    left, right = figure.subplots(1, 2, width_ratios=(side, 2.5), sharey=True)
    distance_TT = (1 - overlap_TT).fill_diagonal_(0)
    tree = dendrogram(linkage(squareform(distance_TT.numpy(), checks=False), "average"), no_plot=True)
    order = tree["leaves"]
    _draw_table(left, overlap_TT[order][:, order], [tasks[i] for i in order])
    for places, distances in zip(tree["icoord"], tree["dcoord"], strict=True):
        # scipy puts leaf i at 5 + 10 i.
        right.plot(distances, [(place - 5) / 10 for place in places], color="black", linewidth=1.5)
    right.set_xlim(0, 1)
    right.set_xlabel("1 - overlap")
    right.set_title("average linkage", fontsize=11)
    right.spines[["top", "right", "left"]].set_visible(False)
    right.tick_params(axis="y", left=False, labelleft=False)
    return figure


def _draw_table(axes: Axes, table_TT: Tensor, names: Sequence[str]) -> None:
    axes.imshow(table_TT.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 4 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set_title("overlap of selection shares,\nmean over sparse layers", fontsize=11)
    draw.write_numbers(axes, table_TT, 1.0)


def print_usage(report: Mapping[str, Any]) -> None:
    """Print information and experts in use per layer and task, and the similarity of tasks, in at most 100 columns."""
    least = report["least_share_of_tokens"]
    layers = Table(title=f"experts in use: by {least:.0%} of tokens or more", title_justify="left")
    layers.add_column("sparse layer", overflow="fold")
    layers.add_column("I, nats", justify="right")
    layers.add_column("task", overflow="fold")
    layers.add_column("in use", justify="right")
    layers.add_column("experts", overflow="fold")
    for layer in report["layers"]:
        head = (layer["layer"], f"{layer['information']:.3f}")
        for task, used in layer["used"].items():
            layers.add_row(*head, task, f"{len(used)} of {layer['experts']}", " ".join(map(str, used)))
            head = ("", "")
        layers.add_section()
    pairs = Table(title="overlap of experts, %", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    pairs.add_column("task", overflow="fold")
    for number in range(1, len(report["tasks"]) + 1):
        pairs.add_column(str(number), justify="right", no_wrap=True)
    for number, (task, row) in enumerate(zip(report["tasks"], report["similarity"]["overlap"], strict=True), 1):
        pairs.add_row(f"{number} {task}", *("-" if value is None else f"{100 * value:.0f}" for value in row))
    console = Console()
    console = console if console.width <= 100 else Console(width=100)
    console.print(layers)
    console.print(pairs)


# ---------------------------------------------------------------- the command


def usage(
    run_or_model: Path, data: Location | None = None, split: str = VAL, out: Path | None = None, stored: bool = False
) -> dict[str, Any]:
    """Measure or read who uses which expert, and write OUT/usage.json and pictures. Runs on any number of ranks.

    Args:
        run_or_model: a run folder, or a model file.
        data: folder that relative `data:` paths of the tasks start from, in place of the recipe's.
        out: folder of the results; default `usage/` beside the model file.
        stored: take the moving average that training left in the model file, and measure nothing.

    Raises UserError where there are no sparse layers, no data or nothing stored.
    """
    path = model_path(run_or_model)
    model = read_model(path)
    layers = without_memory(model.recipe).backbone.sparse_layers()
    if not layers:
        layout = model.recipe.model.layout
        raise UserError(f"model {path}: layout {layout!r} has no sparse layers, so there are no experts to show the use of")
    folder = path.with_name("usage") if out is None else out
    found = _stored(model, path, data) if stored else _measured(model, path, data, split, folder)
    uses = [LayerUse(name, layer.router.top_k, of_layer) for (name, layer), of_layer in zip(layers.items(), found, strict=True)]
    tasks = tuple(model.recipe.active)
    source = "moving average of training" if stored else split
    report = {"model": str(path), "source": source, **report_of(uses, tasks)}
    if ranks_from(os.environ).first:
        _write(folder, report, uses, tasks)
    launch.stop()
    return report


def _stored(model: ModelFile, path: Path, data: Location | None) -> tuple[Usage, ...]:
    if data is not None:
        raise UserError(f"--data {data}: --stored reads what the model file keeps and measures nothing; give one of the two")
    if not any(bool(layer.share_TE.any()) for layer in model.usage):
        raise UserError(f"model {path}: keeps no use of experts, it was not trained; measure it on data, without --stored")
    return model.usage


def _measured(model: ModelFile, path: Path, data: Location | None, split: str, out: Path) -> tuple[Usage, ...]:
    ranks = launch.start(model.recipe.parallel.collective_timeout)
    recipe = recipe_on(model, data)
    plan = loader_plan(recipe, ranks)
    for task in recipe.active:
        folder = plan.folder(task, split)
        if isinstance(folder, Path) and not folder.is_dir():
            raise UserError(
                f"{plan.section(task)}: shard folder {folder} does not exist; say where the tasks' shards lie "
                "(--data FOLDER), or read what training kept (--stored)"
            )
    check_split(plan, split)
    check_classes(model, plan, split)
    network = network_of(model, str(path))
    if ranks.first:
        make_folder(out, "--out")
    return measure_usage(network, recipe, plan, split, tuple(recipe.active))


def _write(folder: Path, report: Mapping[str, Any], layers: Sequence[LayerUse], tasks: Sequence[str]) -> None:
    """Draw everything before the first file is written; usage.json comes last."""
    make_folder(folder, "--out")
    pictures = {f"usage_{layer.name}.png": draw.figure_png(layer_picture(layer, tasks)) for layer in layers}
    seen = seen_tasks(layers)
    table_TT = similarity(layers)["overlap"][seen][:, seen]
    pictures["similarity.png"] = draw.figure_png(similarity_picture(table_TT, [tasks[i] for i in seen]))
    for name, content in pictures.items():
        write_atomic(folder / name, content)
    write_json(folder / "usage.json", report)
