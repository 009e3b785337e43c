"""`plan`: what it finds, how it ranks topologies, and the command from outside."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run_command
from layouts import made
from modsquad_ds.config import ParallelSpec, Recipe
from modsquad_ds.costs import count_flops
from modsquad_ds.errors import UserError
from modsquad_ds.feasibility import GIB, Forecast, forecast, usable_memory
from modsquad_ds.hardware import GPUS, gpu_named
from modsquad_ds.memory_trace import forward_flops, network_of
from modsquad_ds.model.network import build_network
from modsquad_ds.parallel.engine import read_deepspeed_config
from modsquad_ds.projection import Cluster
from modsquad_ds.step_work import Job, flops_of_images
from modsquad_ds.topologies import at_topology, config_at, topologies
from small import small_recipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 images of two classes, as train and val."""
    train = made("imagenet", tmp_path_factory.mktemp("shards"))
    shutil.copytree(train, train.parent / "val")
    return train.parent


def one_task(shards: Path, **changes: Any) -> Recipe:
    task = {"kind": "classification", "data": str(shards), "num_classes": 2, "batch_size": 8, "transform": {"image_size": 32}}
    return small_recipe(**{"tasks": {"digits": task}, **changes})


def planned(recipe: Recipe, nodes: int = 1, per_node: int = 2, memory: float = 80 * GIB, **options: Any) -> Forecast:
    return forecast(recipe, Cluster(GPUS["h100"], nodes, per_node), memory, **options)


def test_a_sound_recipe_has_no_errors(shards: Path) -> None:
    found = planned(one_task(shards, **{"parallel.ep_size": 2}))
    assert not found.fails and [(row.topology.ep, row.topology.zero) for row in found.rows if row.chosen] == [(2, 2)]
    assert sorted((row.topology.ep, row.topology.zero) for row in found.rows) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    (task,) = found.tasks
    assert (task.images, task.samples, task.steps_per_epoch) == (8, 8, 1.0)
    likely = [row.seconds.likely for row in found.rows]
    assert likely == sorted(likely)
    assert any("EP=1 is projected to be the fastest: experts of 32 x 24" in finding.text for finding in found.findings)
    assert all(row.exchanged == 0 for row in found.rows if row.topology.ep == 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks.digits.batch_size": 9}, "tasks.digits.batch_size: 9 images cannot be divided over 4 ranks"),
        ({"tasks.digits.data": "nowhere"}, "shard folder nowhere/train does not exist"),
        ({"tasks.digits.num_classes": 3}, "tasks.digits.num_classes: the recipe says 3"),
        ({"tasks.digits.transform": {"image_size": 30}}, "expected multiples of the patch size 8"),
        ({"deepspeed_config": "zero9"}, "deepspeed_config zero9: no such file"),
    ],
)
def test_what_would_stop_training_is_told_with_all_else(changes: dict[str, Any], told: str, shards: Path) -> None:
    recipe = one_task(shards, **{"parallel.ep_size": 2, "tasks.digits.data": str(shards)})
    tree = recipe.model_dump(mode="json")
    for key, value in changes.items():
        node = tree
        *path, last = key.split(".")
        for part in path:
            node = node[part]
        node[last] = value
    found = planned(Recipe.model_validate(tree), nodes=2)
    assert found.fails and any(told in finding.text for finding in found.findings if finding.kind == "error"), found.findings
    if "deepspeed_config" not in changes and "image_size" not in str(changes):
        assert found.rows, "the rest is projected all the same"


def test_a_task_without_canvases_ends_the_plan_with_its_finding() -> None:
    found = planned(small_recipe(**{"tasks.scenes.transform": {"canvases": []}}))
    assert found.fails and not found.rows
    assert any("tasks.scenes.transform.canvases: empty" in finding.text for finding in found.findings)


def test_ranks_that_do_not_suit_the_recipe(shards: Path) -> None:
    found = planned(one_task(shards, **{"parallel.ep_size": 4, "parallel.expect_world_size": 4}))
    told = [finding.text for finding in found.findings if finding.kind == "error"]
    assert len(told) == 2 and "expect_world_size is 4" in told[0]
    assert told[1].startswith("recipe: parallel.ep_size 4 does not divide the 2 ranks")
    assert not any(row.chosen for row in found.rows)


def test_what_does_not_fit_stands_below_with_what_it_lacks(shards: Path) -> None:
    fitting = planned(one_task(shards))
    sizes = sorted(row.memory.total for row in fitting.rows)
    between = (sizes[0] + sizes[-1]) / 2
    memory = (between + 1.5 * GIB) / 0.95
    assert usable_memory(memory) == pytest.approx(between)
    found = planned(one_task(shards), memory=memory)
    spare = [row.spare for row in found.rows]
    fits = sum(s >= 0 for s in spare)
    assert 0 < fits < len(spare) and all(s < 0 for s in spare[fits:]) and spare[fits:] == sorted(spare[fits:], reverse=True)
    chosen = next(row for row in found.rows if row.chosen)
    assert found.fails == (chosen.spare < 0)
    none = planned(one_task(shards), memory=GIB)
    assert [f.text.split(":")[0] for f in none.findings if f.kind == "error"] == ["memory", "memory"]


def test_experts_across_nodes_have_a_price(shards: Path) -> None:
    found = planned(one_task(shards, **{"tasks.digits.batch_size": 64}), nodes=2)
    priced = [finding.text for finding in found.findings if "crosses nodes of 2" in finding.text]
    assert len(priced) == 2 and all("times the step of EP=2" in text and text.startswith("EP=4, ZeRO") for text in priced)
    assert {row.crosses for row in found.rows if row.topology.ep == 4} == {True}
    assert {row.crosses for row in found.rows if row.topology.ep < 4} == {False}


def test_topologies_and_configs(tmp_path: Path) -> None:
    config = read_deepspeed_config("zero2_bf16")
    recipe = small_recipe(deepspeed_config="zero2_bf16")
    found = [(t.zero, t.ep, t.config) for t, _ in topologies(recipe, 6, config, None, None)]
    # 3 and 6 ranks do not divide 4 experts.
    assert found == [(1, 1, "zero1_bf16"), (1, 2, "zero1_bf16"), (2, 1, "zero2_bf16"), (2, 2, "zero2_bf16")]
    assert [(t.ep, t.zero) for t, _ in topologies(recipe, 8, config, 4, 1)] == [(4, 1)]
    dense = small_recipe(**{"model.layout": "dense"})
    assert {t.ep for t, _ in topologies(dense, 8, read_deepspeed_config("zero2"), None, None)} == {1}
    name, changed = config_at("own.json", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}, 1)
    assert name == "own.json with stage 1" and changed["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7}
    moved = at_topology(recipe, 4, 1)
    assert (moved.parallel.ep_size, moved.deepspeed_config) == (4, "zero1_bf16")
    with pytest.raises(UserError, match="ep_size 3 does not divide the 4 experts"):
        at_topology(recipe, 3, None)
    with pytest.raises(UserError, match="--gpu 'v100': expected one of a100, h100, h200"):
        gpu_named("v100")


def test_flops_of_a_step_are_those_of_the_real_network() -> None:
    """Forward, of each task; a step is three times that, or four times for blocks that are computed again."""
    recipe = small_recipe(**{"tasks.scenes.transform": {"canvases": [[32, 48], [48, 32], [64, 64]]}})
    network = build_network(recipe)
    sizes = {"digits": [(32, 32)], "scenes": [(32, 48), (64, 64)], "textures": [(32, 32)]}
    for task, pairs in forward_flops(recipe, sizes).items():
        for size, pair in zip(sizes[task], pairs, strict=True):
            image = torch.zeros(1, 3, *size)
            assert sum(pair) == pytest.approx(count_flops(lambda image=image, task=task: network({task: image})), rel=0.01)
    means = flops_of_images(recipe)
    scenes = forward_flops(recipe, sizes)["scenes"]
    assert means["scenes"][0] == pytest.approx((2 * scenes[0][0] + scenes[1][0]) / 3)
    cluster, images = Cluster(GPUS["a100"], 1, 1), {"digits": 8, "scenes": 4, "textures": 4}
    job = Job(recipe, cluster, network_of(recipe, ParallelSpec(), 1), images, means)
    assert job.flops() == pytest.approx(sum(3 * images[task] * sum(means[task]) for task in images))
    again = Job(small_recipe(**{"model.activation_checkpointing": True}), cluster, job.network, images, means)
    assert again.flops() - job.flops() == pytest.approx(sum(images[task] * means[task][0] for task in images))
    weights = {"train.sampling": "weighted", "tasks.digits.sampling_weight": 2.0}
    drawn = Job(small_recipe(**weights), cluster, job.network, images, means)
    assert drawn.shares() == {"digits": 0.5, "scenes": 0.25, "textures": 0.25}
    assert drawn.tokens() == 0.5 * 8 * 16 + 0.25 * 4 * 24 + 0.25 * 4 * 16
    assert len(drawn.packs()) == 3 and len(job.packs()) == 1


def test_the_command(tmp_path: Path) -> None:
    """Absent data is an error among the findings, and all else is told."""
    size = ("--nodes", "2", "--gpus-per-node", "2", "--gpu", "h100")
    found = run_command("plan", "quickstart", *size, "--json", "plan.json", cwd=tmp_path)
    assert found.returncode == 2, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0] == "quickstart on 2 x 2 H100 of 80 GiB: 1,152,677 parameters, 936,416 of them in the backbone"
    tables = [line for line in lines if not line.startswith(("note:", "error:"))]
    assert max(map(len, tables)) <= 100
    assert sum(line.startswith("error: shard folder data/quickstart/shards/") for line in lines) == 6
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fails"] and len(written["topologies"]) == 6 and written["usable_memory"] == usable_memory(80 * GIB)
    first = written["topologies"][0]
    assert first["fits"] and sum(first["memory"].values()) == first["memory_total"]
    assert first["seconds"]["low"] < first["seconds"]["likely"] < first["seconds"]["high"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing"], "error: recipe nothing: no such file"),
        (["quickstart", "--gpu", "v100"], "error: --gpu 'v100': expected one of a100, h100, h200"),
        (["quickstart", "--ep", "3"], "error: recipe quickstart: recipe: parallel.ep_size 3 does not divide the 8 experts"),
        (["quickstart", "train.stps=3"], "error: recipe quickstart: train.stps: unknown key"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: list[str], told: str, tmp_path: Path) -> None:
    found = run_command("plan", *arguments, cwd=tmp_path)
    assert found.returncode == 2 and found.stderr.strip().startswith(told), found.stderr
    assert len(found.stderr.strip().splitlines()) == 1 and not found.stdout
