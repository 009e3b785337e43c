"""Whole lives with many labels per image: both layouts from files to metrics, and any number of ranks as one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

import pascal_files
import taskonomy_files
from modsquad_ds import train
from modsquad_ds.adapt_spec import PruneSpec
from modsquad_ds.config import Recipe, recipe_from_tree
from modsquad_ds.data.convert import convert
from modsquad_ds.data.loader import StepDataset
from modsquad_ds.data.sources import Options
from modsquad_ds.evaluate import evaluate
from modsquad_ds.extract import extract
from modsquad_ds.model_file import read_model
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.state import gather_network
from modsquad_ds.plan import loader_plan
from modsquad_ds.report import write_pictures
from modsquad_ds.targets import PASCAL_CONTEXT, TASKONOMY
from modsquad_ds.tasks import metrics_of
from modsquad_ds.trainer import build_trainer, train_step
from ranks import run_ranks
from small import small_tree
from test_topology import Curve, assert_same, config_file

LACKING = (
    ("normal", "ackley", 0), ("depth_zbuffer", "ackley", 1), ("depth_euclidean", "ackley", 1), ("class_scene", "bolton", 0),
)  # fmt: skip
"""Files of the miniature that are not there, so that steps hold fewer of some tasks' images."""


def recipe_of(shards: Path, run: Path, rows: tuple[Any, ...], crop: tuple[int, int], **changes: Any) -> Recipe:
    """The small model for the tasks of one image set, one of them with a convolutional head."""
    transform = {"crop": crop, "zoom": [0.9, 1.2], "rotate": 10}
    tree = small_tree() | {
        "run": str(run), "data_root": str(shards.parent),
        "sets": {"views": {"data": shards.name, "batch_size": 4, "transform": transform | changes.pop("transform", {})}},
        "tasks": {row.name: {"set": "views"} for row in rows},
    }  # fmt: skip
    tree["tasks"][rows[-1].name]["head"] = {"type": "patch", "stride": 8}
    tree["tasks"][rows[-2].name]["head"] = {"type": "conv_map", "stride": 4, "channels": 32, "convs": 1}
    tree["train"] |= {"steps": 3, "log_every": 1, **changes.pop("train", {})}
    tree["loss"] = {"mutual_information": 0.05, "weighting": "uncertainty"}
    return recipe_from_tree(tree | changes, "views")


@pytest.fixture(scope="module")
def taskonomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of five training views, some of which lack some targets, and of two held-out ones."""
    folder = tmp_path_factory.mktemp("taskonomy")
    src = taskonomy_files.taskonomy(folder / "src")
    for place in LACKING:
        (src / taskonomy_files.place(*place)).unlink()
    for split in ("train", "val"):
        convert("taskonomy", src, folder / "views", split, options=Options("tiny"), samples_per_shard=2, progress=False)
    return folder / "views"


@pytest.fixture(scope="module")
def pascal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of four images, one of which shows people; the same ones held out."""
    folder = tmp_path_factory.mktemp("pascal")
    src = pascal_files.pascal(folder / "src")
    pascal_files.write_list(src, list(pascal_files.SIZES), "val")
    for split in ("train", "val"):
        convert("pascal_context", src, folder / "views", split, samples_per_shard=3, progress=False)
    return folder / "views"


def lived(rank: int, world: int, recipe: Recipe) -> dict[str, Any]:
    """Train a recipe to its end, evaluate it, draw its pictures."""
    train.train(recipe)
    results = evaluate(recipe.run)
    layers = len(read_model(recipe.run / "model.safetensors").usage)
    assert len(write_pictures(recipe.run, images=2)) == len(recipe.tasks) + 1 + layers
    return results


@pytest.mark.dist
@pytest.mark.parametrize("name", ["taskonomy", "pascal_context"])
def test_from_files_to_metrics(name: str, taskonomy: Path, pascal: Path, tmp_path: Path) -> None:
    if name == "taskonomy":
        recipe = recipe_of(taskonomy, tmp_path / "run", TASKONOMY, (24, 32))
    else:
        stretched = {"resize": [16, 16], "score_at": "original"}
        recipe = recipe_of(pascal, tmp_path / "run", PASCAL_CONTEXT, (16, 16), transform=stretched)
    results = run_ranks(1, lived, recipe)[0]
    for task, spec in recipe.tasks.items():
        assert tuple(results[task]) == metrics_of(spec)
        for metric, value in results[task].items():
            assert value is not None and value >= 0, (task, metric)
            assert value <= (180 if metric == "mErr" else 130 if metric == "rmse" else 1000)
    assert results["untrained"].keys() == recipe.tasks.keys()


def curve(rank: int, world: int, recipe: Recipe) -> Curve:
    """Losses, information and gradient norm of three steps on the set's own batches, and the weights after them."""
    ranks = launch.start()
    trainer, dataset = build_trainer(recipe, ranks), StepDataset(loader_plan(recipe, ranks))
    values = []
    for step in range(recipe.train.steps):
        batch = dataset[step]
        report, _ = train_step(trainer, iter([batch]), step)
        norm = torch.as_tensor(trainer.engine.get_global_grad_norm() or 0.0).view(1)
        values.append(torch.cat([report.total.view(1), report.task_T, report.information_L, norm]).tolist())
    return Curve(values, gather_network(trainer.network, {}))


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_ranks_together_are_one_process(taskonomy: Path, pascal: Path, tmp_path: Path) -> None:
    """Images are dealt to ranks by what they have and rows fill up; the sums of a step, and so its weights, stay the same."""
    clip = {"steps": 3, "optimizer": {"lr": 1e-3, "eps": 1e-5, "clip": 1.0}}
    for shards, rows, crop in ((taskonomy, TASKONOMY, (24, 32)), (pascal, PASCAL_CONTEXT, (16, 16))):
        one, two = (
            recipe_of(shards, tmp_path, rows, crop, train=clip, deepspeed_config=config_file(tmp_path, 2), parallel=parallel)
            for parallel in ({}, {"ep_size": 2, "attention_ep_size": 2})
        )
        alone = run_ranks(1, curve, one)[0]
        for found in run_ranks(2, curve, two):
            assert_same(found, alone, 2e-5)


def taken_out(rank: int, world: int, recipe: Recipe, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of a whole model and of the part of it that two of its tasks need, all experts kept."""
    train.train(recipe)
    extract(recipe.run, ["normal", "depth_zbuffer"], out, PruneSpec(keep_params=1.0))
    return evaluate(recipe.run), evaluate(out, untrained=False)


@pytest.mark.dist
def test_two_tasks_are_taken_out_with_their_quality(taskonomy: Path, tmp_path: Path) -> None:
    recipe = recipe_of(taskonomy, tmp_path / "run", TASKONOMY, (24, 32), train={"steps": 2})
    whole, part = run_ranks(1, taken_out, recipe, tmp_path / "part.safetensors")[0]
    assert part.keys() == {"normal", "depth_zbuffer"}
    for task in ("normal", "depth_zbuffer"):
        assert part[task] == pytest.approx(whole[task], rel=1e-5)
