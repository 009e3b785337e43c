"""The expand command: a task from YAML and shards into a model file, the recipe beside it, and mistakes that leave nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from modsquad_ds.config import load_recipe, recipe_from_tree, recipe_to_tree
from modsquad_ds.data.loader_plan import check_data
from modsquad_ds.errors import UserError
from modsquad_ds.expand import EXAMPLE, expand, read_task
from modsquad_ds.model_file import network_of, read_model
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from modsquad_ds.structure import PerKind
from modsquad_ds.surgery import expand as grow
from modular import Shell, make_shards, model_for, shell, write
from test_cli import run
from test_surgery import TASKS, assert_same, outputs, trained

ENTRY = "faces: {kind: classification, data: d, num_classes: 2, batch_size: 4, transform: {image_size: 24}}"

__all__ = ["shell"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both splits of the small digits, which stand for faces, and what a model's file needs."""
    folder = make_shards(tmp_path_factory.mktemp("shards"))
    return make_shards(folder, "train", ("digits",))


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "model.safetensors", model_for(data, **{"parallel.ep_size": 4}))


def test_whole_command(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "faces.yaml").write_text(ENTRY)
    found = run("expand", str(model), "--task", "faces.yaml", "--new-mlp-experts", "2", "--new-attention-experts", "1",
                "--data", str(data), "--out", "grown/model.safetensors", cwd=tmp_path)  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert {path.name for path in (tmp_path / "grown").iterdir()} == {"model.safetensors", "model.yaml"}
    old, larger = read_model(model), read_model(tmp_path / "grown/model.safetensors")
    assert list(larger.recipe.tasks) == [*TASKS, "faces"] and larger.classes["faces"] == ["n01", "n02"]
    assert_same(outputs(network_of(larger, "new"), TASKS), outputs(network_of(old, "old"), TASKS))
    direct = grow(old, "faces", larger.recipe.tasks["faces"], PerKind(2, 1), ["n01", "n02"])
    assert larger.recipe == direct.recipe and all(torch.equal(larger.state[n], t) for n, t in direct.state.items())

    lines = [line.split() for line in found.stdout.splitlines()]
    assert ["blocks.0.attn", "4", "5", "1,024"] in lines and ["blocks.1.mlp", "4", "6", "3,184"] in lines
    assert "parallel.ep_size: 1, as 4 no longer divides the numbers of experts" in found.stdout
    assert found.stdout.splitlines()[-1].strip() == "python -m modsquad_ds train grown/model.yaml"


def test_recipe_beside_it_trains_the_addition(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown.safetensors"
    expand(model, ENTRY, PerKind(2, 1), out, data)
    recipe = load_recipe(str(tmp_path / "grown.yaml"))
    larger = read_model(out)
    assert recipe.init_from is not None and recipe.init_from.path == out
    assert recipe.run == tmp_path / "grown" and recipe.data_root == data and recipe.name == "small_faces"
    adapt = recipe.adapt
    assert (adapt.train, adapt.choose, adapt.experts, adapt.tasks) == ("experts", "added", 2, ("faces",))
    assert recipe.model == larger.recipe.model and recipe.tasks == larger.recipe.tasks and list(recipe.adapted) == ["faces"]
    assert larger.recipe.adapt.tasks == () and larger.recipe.init_from is None, "the model file itself has no such sections"
    check_data(loader_plan(recipe.model_copy(update={"only": ("faces",)}), Ranks()))
    expand(model, ENTRY, PerKind(0, 0), out, data, overwrite=True)
    assert load_recipe(str(tmp_path / "grown.yaml")).adapt.train == "routers+heads", "nothing else is new"


def test_recipe_beside_it_can_be_read_whatever_made_the_model(data: Path, tmp_path: Path) -> None:
    made = model_for(data, **{"resume": "must", "parallel.placement": "balanced", "model.router.per_task": False})
    write(tmp_path / "made.safetensors", made)
    expand(tmp_path / "made.safetensors", ENTRY, PerKind(0, 0), tmp_path / "grown.safetensors", data)
    recipe = load_recipe(str(tmp_path / "grown.yaml"))
    assert (recipe.resume, recipe.parallel.placement, recipe.adapt.train) == ("auto", "fixed", "heads")


def test_one_addition_after_the_other(model: Path, data: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    expand(model, ENTRY, PerKind(1, 1), once, data)
    expand(once, ENTRY.replace("faces", "cats"), PerKind(1, 0), twice, data)
    larger = read_model(twice)
    assert list(larger.recipe.tasks) == [*TASKS, "faces", "cats"]
    tasks = [*TASKS]
    assert_same(outputs(network_of(larger, "new"), tasks), outputs(network_of(read_model(model), "old"), tasks))
    assert_same(outputs(network_of(larger, "new"), ["faces"]), outputs(network_of(read_model(once), "old"), ["faces"]))


# ---------------------------------------------------------------- the task's entry


def test_entries_that_are_understood(tmp_path: Path) -> None:
    model = trained()
    name, spec = read_task(EXAMPLE, model)
    assert name == "faces" and spec.num_classes == 2 and spec.batch_size == 16
    texts = {
        "entry.yaml": EXAMPLE,
        "section.yml": "tasks:\n  " + EXAMPLE,
        "recipe.yaml": "base: quickstart\ntrain: {steps: 3}\ntasks:\n  digits: {batch_size: 3}\n  " + EXAMPLE,
    }
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
        assert read_task(str(tmp_path / file), model) == (name, spec) == read_task(text, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.yaml", "--task nowhere.yaml: cannot be read (.*No such file.*); give a YAML file, or an entry"),
        ("faces: {kind", "--task faces: {kind: not valid YAML: "),
        ("faces", "--task faces: found str; expected one entry, e.g. 'faces: {kind"),
        ("tasks: [1]", "--task tasks: [1]: found list; expected one entry"),
        ("a: {}\nb: {}", "--task a: {} b: {}: found 2 new tasks; expected one entry"),
        ("digits: {}\nscenes: {}", "found 0 new tasks; expected one entry"),
        ("faces: {kind: classification, data: d, batch_size: 4}", "tasks.faces.num_classes: missing; this key is required"),
        ("faces: {kind: depth, data: d}", "recipe of --task faces: {kind: depth, data: d}: tasks.faces"),
        ("faces: {kind: classification, data: d, num_clases: 2}", "tasks.faces.num_clases: unknown key; did you mean num_cl"),
        ("faces: 3", "recipe of --task faces: 3: tasks.faces"),
        ("3: {kind: classification, data: d, num_classes: 2, batch_size: 4}", "recipe of --task 3: "),
        ("Faces: {kind: classification, data: d, num_classes: 2, batch_size: 4}", "task name 'Faces': use lower-case letters"),
    ],
)  # fmt: skip
def test_entries_that_are_not(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_task(text, trained())
    start, _, rest = message.partition(".*")
    assert start in str(caught.value) and rest.rpartition(".*")[2] in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


SHADE = "sets: {views: {data: v, batch_size: 4}}\ntasks: {shade: {set: views, target: reshading}}"


def test_a_new_task_may_bring_its_image_set() -> None:
    """Which is then the model's: a second task may use it without a word, and what differs from it is refused."""
    model = trained()
    with pytest.raises(UserError, match=r"tasks\.shade\.set: 'views' is not under sets"):
        read_task("shade: {set: views, target: reshading}", model)
    name, spec = read_task(SHADE, model)
    larger = grow(model, name, spec, PerKind(1, 0), list("rgb"))
    assert list(larger.recipe.sets) == ["views"] and larger.recipe.sets["views"].batch_size == 4
    assert recipe_from_tree(recipe_to_tree(larger.recipe), "again") == larger.recipe
    assert read_task("normal: {set: views}", larger)[1].batch_size == 4
    more = SHADE.replace("shade:", "light:")
    assert read_task(more, larger)[0] == "light"
    with pytest.raises(UserError, match=r"sets\.views: the model has another image set of this name; rename it"):
        read_task(more.replace("data: v", "data: w"), larger)


# ---------------------------------------------------------------- refusals


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "a task that is there": (ENTRY.replace("faces", "digits"), [], "error: task 'digits': the model has a task of this name"),
    "another label count": (
        ENTRY.replace("num_classes: 2", "num_classes: 3"), [],
        "error: tasks.faces.num_classes: the recipe says 3, but DATA/d/train has 2",
    ),
    "another kind of label": (
        ENTRY.replace("kind: classification", "kind: segmentation").replace(", transform: {image_size: 24}", ""), [],
        "error: tasks.faces.kind: the recipe says segmentation, but DATA/d/train holds classification shards",
    ),
    "no data": (ENTRY.replace("data: d", "data: nowhere"), [], "error: shard folder DATA/nowhere/train does not exist"),
    "an image that does not fit": (ENTRY.replace("24", "25"), [], "error: tasks.faces.transform.image_size: "),
    "no entry": ("faces", [], "error: --task faces: found str; expected one entry"),
    "a model that is none": (ENTRY, ["MODEL=nothing.safetensors"], "error: model nothing.safetensors: no such file"),
    "a model's name for the recipe": (ENTRY, ["--out", "x.yaml"], "error: --out x.yaml: a recipe of this name is written beside"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_nothing_is_written(case: str, model: Path, data: Path, shell: Shell) -> None:
    task, more, message = REFUSED[case]
    named = next((m.removeprefix("MODEL=") for m in more if m.startswith("MODEL=")), str(model))
    more = [m for m in more if not m.startswith("MODEL=")] or ["--out", "out.safetensors"]
    told = shell.refused("expand", named, "--task", task, "--new-mlp-experts", "1", "--data", str(data), *more)
    assert told.startswith(message.replace("DATA", str(data))), told


def test_negative_numbers_are_refused(model: Path, shell: Shell) -> None:
    code, _, _ = shell.run("expand", str(model), "--task", ENTRY, "--new-mlp-experts", "-1", "--out", "x.safetensors")
    assert code == 2 and not list(shell.folder.iterdir())


def refused(*arguments: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        expand(*arguments)


def test_results_are_not_overwritten_and_models_must_be_able(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    refused(model, ENTRY, PerKind(1, 0), out, data, match=r"--out .*x\.safetensors: exists already")
    out.rename(tmp_path / "x.yaml")
    refused(model, ENTRY, PerKind(1, 0), out, data, match=r"--out, its recipe .*x\.yaml: exists already")
    assert (tmp_path / "x.yaml").read_text() == "mine" and not out.exists()
    shared = write(tmp_path / "shared.safetensors", model_for(data, **{"model.router": {"per_task": False}}))
    other = tmp_path / "other.safetensors"
    refused(shared, ENTRY, PerKind(1, 0), other, data, match="new experts: the model has one router for all tasks")
    sparse = write(tmp_path / "mlps.safetensors", model_for(data, **{"model.layout": "mlp_only"}))
    refused(sparse, ENTRY, PerKind(0, 2), other, data, match="2 new attention experts: the model has 0 sparse attention layers")
    broken = tmp_path / "broken.safetensors"
    shutil.copy(model, broken)
    broken.write_bytes(model.read_bytes()[:-9] + b"123456789")
    refused(broken, ENTRY, PerKind(1, 0), other, data, match="differs from its checksum")
    assert not other.exists() and not (tmp_path / "other.yaml").exists()
