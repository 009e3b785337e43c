"""Evaluation: a model file and held-out shards in, exact metrics out, on any number of ranks. Called by cli.py.

Every rank holds the whole model (no expert parallelism), takes its own part of the samples, and only the metrics' sums are
gathered: no sample is counted twice and none is lost.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from modsquad_ds.config import Recipe
from modsquad_ds.data.finish import finished_images, to_device
from modsquad_ds.data.loader import eval_batches
from modsquad_ds.data.loader_plan import VAL, LoaderPlan, check_split
from modsquad_ds.data.types import SubBatch
from modsquad_ds.errors import UserError
from modsquad_ds.files import write_json
from modsquad_ds.location import Location
from modsquad_ds.metrics import build_metric
from modsquad_ds.model.network import MultiTaskNetwork, build_network
from modsquad_ds.model_file import ModelFile, network_of, read_model, recipe_on
from modsquad_ds.parallel import launch, watchdog
from modsquad_ds.parallel.collectives import gather_json
from modsquad_ds.plan import check_same_shards, loader_plan
from modsquad_ds.tasks import metrics_of

BATCH_IMAGES = 16
"""Images per forward pass."""

Results = dict[str, dict[str, float | None]]
"""Task -> metric, the headline first -> value; None where the data cannot say, e.g. AP of small objects without small objects."""


def model_path(run_or_model: Path) -> Path:
    """The model file of a run folder, or the file itself."""
    return run_or_model / "model.safetensors" if run_or_model.is_dir() else run_or_model


def evaluate(
    run_or_model: Path, data: Location | None = None, split: str = VAL, untrained: bool = True
) -> dict[str, Any]:
    """Metrics of a model and of the same network untrained, also written to evaluation.json beside the model file.

    Args:
        run_or_model: a run folder, or a model file.
        data: folder or URL that relative `data:` paths of the tasks start from, in place of the recipe's.
        untrained: measure the untrained network too, which takes as long again.
    """
    path = model_path(run_or_model)
    model = read_model(path)
    ranks = launch.start(model.recipe.parallel.collective_timeout)
    recipe = recipe_on(model, data)
    plan = loader_plan(recipe, ranks)
    check_split(plan, split)
    check_same_shards(plan, (split,))
    check_classes(model, plan, split)
    results: dict[str, Any] = evaluate_network(network_of(model, str(path)), recipe, plan, split)
    if untrained:
        results["untrained"] = evaluate_network(build_network(recipe), recipe, plan, split)
    if ranks.first:
        write_json(path.with_name("evaluation.json"), results)
    launch.stop()
    return results


def evaluate_network(
    network: MultiTaskNetwork, recipe: Recipe, plan: LoaderPlan, split: str, quiet: bool = False
) -> Results:
    """Metrics of every task of the recipe. Every rank calls it with its own plan and gets the same results."""
    network = network.to(launch.device()).eval()
    results: Results = {}
    for task, spec in recipe.active.items():
        metric = build_metric(spec)
        for sub, predictions in predict_split(
            network, plan, task, split, workers=recipe.train.workers, quiet=quiet
        ):
            metric.update(predictions, sub)
        metric.merge(gather_json(metric.state()))
        values = metric.compute()
        results[task] = {key: _or_none(values[key]) for key in metrics_of(spec)}
    return results


@torch.inference_mode()
def predict_split(
    network: MultiTaskNetwork,
    plan: LoaderPlan,
    task: str,
    split: str,
    first: int | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> Iterator[tuple[SubBatch, list[dict[str, Any]]]]:
    """Batches of a split with the network's predictions; of the first `first` images only, if given."""
    for sub in split_batches(plan, task, split, first, workers, quiet):
        yield sub, predict_batch(network, task, sub)


def split_batches(
    plan: LoaderPlan, task: str, split: str, first: int | None = None, workers: int = 0, quiet: bool = False
) -> Iterator[SubBatch]:
    """This rank's batches of a split, of the first `first` images only, if given. A progress bar on a terminal, or `quiet`."""
    batches = eval_batches(plan, task, split, BATCH_IMAGES, workers)
    total = len(batches) if first is None else min(len(batches), -(-first // BATCH_IMAGES))
    quiet = quiet or plan.rank != 0 or not Console().is_terminal
    shown = track(batches, description=f"{task} {split}", total=total, disable=quiet, transient=True)
    for i, sub in enumerate(shown):
        watchdog.tell()
        if i == total:
            return
        yield sub


def predict_batch(network: MultiTaskNetwork, task: str, sub: SubBatch) -> list[dict[str, Any]]:
    """One prediction per image of a sub-batch, as the task's head gives them."""
    found: dict[int, dict[str, Any]] = {}
    for chosen, images_BCHW in by_canvas(sub, network.backbone.pos_embed):
        outputs = network({task: images_BCHW}).outputs[task]
        found |= zip(chosen, network.head(task).predict(outputs, [sub.meta[i] for i in chosen]), strict=True)
    return [found[i] for i in range(len(sub.meta))]


def by_canvas(sub: SubBatch, like: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Places in the sub-batch of the images of each canvas, and these images `[b, 3, h, w]` on `like`'s device, in its precision.

    Images of one canvas go through the network together, without the padding that larger neighbours brought: attention
    would see it, and the result would depend on who the neighbours were.
    """
    whole_BCHW = finished_images(to_device(sub._replace(targets={}), like.device)).to(like.dtype)
    whole = tuple(whole_BCHW.shape[-2:])
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, meta in enumerate(sub.meta):
        places[meta.get("canvas", whole)].append(i)
    for (height, width), chosen in places.items():
        yield chosen, whole_BCHW[chosen, :, :height, :width]


def summary_rows(results: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, str, float | None, float | None]]:
    """(task, metric, trained, untrained) of every metric, in the recipe's order."""
    untrained = results.get("untrained", {})
    return [
        (task, metric, results[task][metric], untrained.get(task, {}).get(metric))
        for task, spec in recipe.active.items()
        for metric in metrics_of(spec)
    ]


def check_classes(model: ModelFile, plan: LoaderPlan, split: str) -> None:
    """Equal numbers of classes under other names would give wrong metrics in silence."""
    for task, names in model.classes.items():
        folder = plan.folder(task, split)
        found = plan.classes(task, split)
        if found != names:
            first = next(i for i in range(len(names)) if found[i] != names[i])
            raise UserError(
                f"tasks.{task}: class {first} is {names[first]!r} in the model and {found[first]!r} in {folder}; "
                "evaluate on shards made from the same classes"
            )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
