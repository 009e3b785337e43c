"""Fine-tuning from a model file, end to end: what a run leaves, what pruning takes away, that old tasks stay as they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run_command
from modsquad_ds.config import load_recipe, recipe_to_tree
from modsquad_ds.errors import UserError
from modsquad_ds.expand import expand
from modsquad_ds.model_file import ModelFile, network_of, read_model, write_model
from modsquad_ds.objective import Usage
from modsquad_ds.structure import PerKind
from modsquad_ds.train import train
from modular import make_shards, model_for
from ranks import run_ranks
from small import ZERO0
from test_surgery import assert_same, outputs
from test_topology import config_file

ROOT = Path(__file__).parents[1]
TASKS = ("digits", "scenes", "textures")
NEW = "letters: {kind: classification, data: d, num_classes: 2, batch_size: 4, transform: {image_size: 32}}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_shards(tmp_path_factory.mktemp("shards"))
    return make_shards(root, "train")


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    file = model_for(data)
    write_model(path, file._replace(recipe=file.recipe.model_copy(update={"data_root": data})))
    return path


def recipe_file(folder: Path, model: Path, **changes: Any) -> Path:
    """A YAML recipe that starts from the model file and adapts digits."""
    tree = recipe_to_tree(read_model(model).recipe)
    tree |= {"init_from": str(model), "run": str(folder / "run"), "adapt": {"tasks": ["digits"], "train": "experts"}}
    tree["train"] |= {"steps": 4, "checkpoint_every": 0}
    tree["adapt"] |= changes
    path = folder / "adapt.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def trained(recipe: Path, *overrides: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the train command, in a process of its own."""
    found = run_command("train", str(recipe), *overrides, cwd=recipe.parent)
    return found.returncode, found.stdout, found.stderr


def launched(rank: int, world: int, recipe: str, overrides: list[str]) -> None:
    train(load_recipe(recipe, overrides))


def left_by(folder: Path) -> tuple[ModelFile, dict[str, Any]]:
    return read_model(folder / "run" / "model.safetensors"), json.loads((folder / "run" / "adapt.json").read_text())


def test_run_from_a_file_ends_with_a_table(model: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, model)
    code, told, errors = trained(recipe)
    assert code == 0, errors
    found, table = left_by(tmp_path)
    before = read_model(model)
    assert f"start from model file {model}" in told
    assert f"{table['trained']:,}" in told and "GFLOPs an image" in told and "top1" in told
    layers = 2 * (2 * 16 * 32 + 24 * 32 * 2 + 24 + 32)  # one expert of each layer: attention heads of 16, MLPs of 24
    routers, head = 2 * (2 * 4 * 32 + 32), 32 * 2 + 2
    assert table["trained"] == layers + routers + head
    assert 0 <= table["metrics"]["digits"]["top1"] <= 1 and set(table["metrics"]) == {"digits"}
    changed = {name for name, tensor in before.state.items() if not torch.equal(found.state[name], tensor)}
    assert "backbone.norm.weight" not in changed and "heads.digits.linear.weight" in changed
    for name in changed:
        if name.endswith("router.weight"):
            assert torch.equal(found.state[name][1:], before.state[name][1:]), "other tasks' routers"
    assert found.classes == before.classes


@pytest.mark.parametrize("at_step", [None, 2])
def test_pruning_leaves_what_the_rule_keeps_and_other_tasks_need(model: Path, tmp_path: Path, at_step: int | None) -> None:
    """Tasks that do not adapt still see everything, so all experts stay; alone, the task keeps its two."""
    prune = {"keep": 2} | ({"at_step": at_step} if at_step else {})
    code, _, errors = trained(recipe_file(tmp_path, model, prune=prune))
    assert code == 0, errors
    found, _ = left_by(tmp_path)
    visible = found.state["backbone.blocks.0.mlp.router.visible"]
    assert visible.sum(1).tolist() == [2, 4, 4] and found.recipe.model.mlp.num_experts == 4
    recipe = recipe_file(tmp_path, model, prune=prune)
    alone = ["only=[digits]", "init_from.allow=[tasks]", f"run={tmp_path / 'alone'}"]
    code, _, errors = trained(recipe, "adapt.router_steps=1", *alone)
    assert code == 0, errors
    small = read_model(tmp_path / "alone" / "model.safetensors")
    assert small.recipe.model.mlp.num_experts == small.recipe.model.attention.num_experts == 2
    costs = json.loads((tmp_path / "alone" / "adapt.json").read_text())["costs"]["digits"]
    assert costs["total"] == sum(t.numel() for n, t in small.state.items() if not n.endswith("visible"))


def test_a_rule_that_keeps_too_little_is_met_before_training(model: Path, tmp_path: Path) -> None:
    code, _, errors = trained(recipe_file(tmp_path, model, prune={"keep": 1}))
    assert code == 2 and "keep 1: blocks.0.attn needs 2 experts, as many as its top-k" in errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_rule_that_keeps_too_little_after_training_costs_no_work(model: Path, tmp_path: Path) -> None:
    """How far the tasks' top-k overlap is known at the end; another rule then goes on from the last checkpoint."""
    recipe = recipe_file(tmp_path, model, tasks=[], train="all", prune={"keep_params": 0.5})
    file = read_model(model)
    apart = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]) / 2
    usage = tuple(Usage(apart.clone(), apart.clone()) for _ in file.usage)
    write_model(tmp_path / "apart.safetensors", file._replace(usage=usage))
    changes = [f"init_from.path={tmp_path / 'apart.safetensors'}", "loss.memory=0.999", "train.steps=1"]
    code, _, errors = trained(recipe, *changes)
    assert code == 2 and "keep_params 50.0%: each task's top-k experts of every layer are 100.0%" in errors, errors
    code, told, errors = trained(recipe, *changes, "adapt.prune.keep_params=1.0")
    assert code == 0 and "step-00000001, step 1" in told, errors
    assert (tmp_path / "run" / "adapt.json").exists()


def test_class_names_of_tasks_that_do_not_learn(model: Path, tmp_path: Path) -> None:
    """Known after a resumption too; where nothing knows them that is met before training."""
    recipe = recipe_file(tmp_path, model, train="all")
    for steps in (1, 2):
        code, _, errors = trained(recipe, f"train.steps={steps}")
        assert code == 0, errors
    assert left_by(tmp_path)[0].classes == read_model(model).classes
    code, _, errors = trained(recipe, "init_from=null", f"run={tmp_path / 'fresh'}")
    assert code == 2 and "adapt.tasks: without scenes, textures, which neither learns" in errors, errors
    assert not (tmp_path / "fresh" / "metrics.jsonl").exists()


def test_a_checkpoint_of_other_tasks_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, model, train="routers")
    code, _, errors = trained(recipe, "train.steps=1")
    assert code == 0, errors
    code, _, errors = trained(recipe, "adapt.tasks=[scenes]")
    assert code == 2 and "the tasks that learned are digits, in the recipe scenes" in errors, errors


@pytest.mark.dist
@pytest.mark.parametrize(("world", "bf16"), [(1, False), (2, False), (2, True)], ids=["1 rank", "EP 2", "EP 2, bf16"])
def test_a_task_with_experts_of_its_own_leaves_old_outputs_bit_for_bit(
    model: Path, data: Path, tmp_path: Path, world: int, bf16: bool
) -> None:
    grown = tmp_path / "grown.safetensors"
    expand(model, NEW, PerKind(2, 2), grown, data)
    config = config_file(tmp_path, 2, bf16=bf16)
    changes = [f"run={tmp_path / 'run'}", f"parallel.ep_size={world}", f"parallel.attention_ep_size={world}",
               f"deepspeed_config={config}", "train.steps=3", "log.wandb=disabled"]  # fmt: skip
    run_ranks(world, launched, str(grown.with_suffix(".yaml")), changes, timeout=240)
    after, table = left_by(tmp_path)
    assert list(table["metrics"]) == ["letters"]
    start = read_model(grown).state
    learned = after.state["backbone.blocks.1.mlp.experts.fc1_weight"]
    assert not torch.equal(learned[4:], start["backbone.blocks.1.mlp.experts.fc1_weight"][4:]), "it did learn"
    for dtype in (torch.float32, torch.bfloat16):
        old, new = (network_of(one, "x").to(dtype) for one in (read_model(model), after))
        assert_same(outputs(new, TASKS), outputs(old, TASKS))


def test_a_part_cannot_learn_without_zero_and_placement(model: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, model)
    code, _, errors = trained(recipe, "parallel.placement=balanced")
    assert code == 2 and "parallel.placement balanced moves experts" in errors
    (tmp_path / "zero0.json").write_text(ZERO0)
    code, _, errors = trained(recipe, "deepspeed_config=zero0.json")
    assert code == 0, errors


@pytest.mark.dist
def test_checkpoints_by_the_clock(model: Path, tmp_path: Path) -> None:
    """With a limit that every step passes, each of the four steps leaves one; without, the last alone."""
    recipe = str(recipe_file(tmp_path, model))
    for minutes, steps in ((1e-10, [1, 2, 3, 4]), (0, [4])):
        changes = [f"run={tmp_path / f'by-{minutes}'}", f"train.checkpoint_minutes={minutes:.11f}", "train.keep_checkpoints=9"]
        run_ranks(1, launched, recipe, [*changes, "log.wandb=disabled"])
        found = sorted(path.name for path in (tmp_path / f"by-{minutes}" / "checkpoints").iterdir())
        assert found == [f"step-{step:08d}" for step in steps]


def refusal(rank: int, world: int, recipe: str, overrides: list[str]) -> str:
    with pytest.raises(UserError) as refused:
        train(load_recipe(recipe, overrides))
    return str(refused.value)


@pytest.mark.dist
def test_frozen_weights_of_another_file_are_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    """The same run, but the file that it starts from was made anew in between: its frozen part would change unseen."""
    copy = tmp_path / "start.safetensors"
    shutil.copy(model, copy)
    recipe = str(recipe_file(tmp_path, copy))
    run_ranks(1, launched, recipe, ["train.steps=1", "log.wandb=disabled"])
    file = read_model(model)
    write_model(copy, file._replace(state={name: tensor + 1 for name, tensor in file.state.items()}))
    told = run_ranks(1, refusal, recipe, ["train.steps=2", "log.wandb=disabled"])[0]
    assert "step-00000001: its frozen weights are of another file than init_from is now" in told


def test_classes_of_one_number_under_other_names_are_refused_before_training(model: Path, data: Path, tmp_path: Path) -> None:
    file = read_model(model)
    names = file.classes["digits"]
    write_model(tmp_path / "other.safetensors", file._replace(classes=file.classes | {"digits": [names[0], "zebra"]}))
    recipe = recipe_file(tmp_path, model)
    code, _, errors = trained(recipe, f"init_from={tmp_path / 'other.safetensors'}")
    assert code == 2 and f"class 1 of task digits is 'zebra' there and {names[1]!r} in {data / 'd' / 'train'}" in errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
