"""The checks behind tools/modular.sh: they find what differs, by a bit, a digit or a parameter, and pass what does not."""

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from modsquad_ds.config import Recipe
from modsquad_ds.data.convert import convert
from modsquad_ds.model.counts import count_parameters
from modsquad_ds.model.network import build_network
from modsquad_ds.model_file import ModelFile, expert_parameters, write_model
from modsquad_ds.tables import print_comparison
from modsquad_ds.targets import TASKONOMY
from small import small_recipe

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


same_outputs, modular_claims = tool("same_outputs"), tool("modular_claims")


def save(run: Path, recipe: Recipe, changes: Mapping[str, Any] | None = None) -> Path:
    """A run folder with the recipe's initial model, tensors replaced by `changes`."""
    state = build_network(recipe).state_dict() | dict(changes or {})
    write_model(run / "model.safetensors", ModelFile(recipe, state, {}, ()))
    return run


def call(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    return module.main()


# ---------------------------------------------------------------- same_outputs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three grey images for the small recipe's digits."""
    root = tmp_path_factory.mktemp("data")
    for i in range(5):
        folder = root / f"source/val/{i}"
        folder.mkdir(parents=True)
        Image.effect_noise((32, 32), 60 + i).save(folder / "x.png")
    convert("imagenet", root / "source", root / "d", "val", progress=False)
    return root


def digits_alone(**changes: Any) -> Recipe:
    return small_recipe(only=["digits"], **changes)


def test_equal_models_are_the_same(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the task that both have is compared; the other's data are not even there."""
    a = save(tmp_path / "a", digits_alone())
    other = small_recipe(only=["digits", "scenes"])
    network = build_network(other).state_dict()
    mine = build_network(digits_alone()).state_dict()
    b = save(tmp_path / "b", other, {k: v for k, v in mine.items() if v.shape == network[k].shape} | widened(mine, network))
    assert call(same_outputs, monkeypatch, a, b, "--data", data) == 0
    assert capsys.readouterr().out == "digits: 5 images, the same to the last bit\n"


def widened(mine: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with an axis of tasks, the first task's row taken from `mine`."""
    out = {}
    for name, value in mine.items():
        if value.shape != other[name].shape:
            out[name] = other[name].clone()
            out[name][:1] = value
    return out


@pytest.mark.parametrize("name", ["heads.digits.linear.bias", "backbone.pos_embed"])
def test_one_bit_of_one_weight_is_found(
    name: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = digits_alone()
    value = build_network(recipe).state_dict()[name].clone()
    value.view(-1)[0] = torch.nextafter(value.view(-1)[0] + 1e-3, torch.tensor(9.0))
    a, b = save(tmp_path / "a", recipe), save(tmp_path / "b", recipe, {name: value})
    assert call(same_outputs, monkeypatch, a, b, "--data", data) == 1
    assert "digits: 5 images, DIFFERENT: /logits by up to " in capsys.readouterr().out


def test_models_without_a_common_task_are_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = save(tmp_path / "a", digits_alone()), save(tmp_path / "b", small_recipe(only=["textures"]))
    assert call(same_outputs, monkeypatch, a, b, "--data", data) == 2
    assert call(same_outputs, monkeypatch, a, tmp_path / "nothing", "--data", data) == 2
    error = capsys.readouterr().err
    assert "have no task in common: digits and textures" in error
    assert "nothing: no such file" in error


def test_difference_compares_bits_not_values() -> None:
    x = torch.tensor([0.0, float("nan"), 1.0])
    assert same_outputs.difference({"a": [x]}, {"a": [x.clone()]}) is None
    minus = torch.tensor([-0.0, float("nan"), 1.0])
    assert same_outputs.difference({"a": [x]}, {"a": [minus]}) is not None
    assert same_outputs.difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])]) == "/0 by up to 0.5"
    assert same_outputs.difference({"a": x, "b": x}, {"a": x}) == "/b in one of them only"
    assert same_outputs.difference(x, x.bfloat16()) == " is torch.float32 (3,) and torch.bfloat16 (3,)"


# ---------------------------------------------------------------- modular_claims

METRICS = {
    "digits": {"top1": 0.97, "top5": 1.0},
    "scenes": {"AP": 0.43, "AP50": 0.6, "AP75": None},
    "textures": {"mIoU": 0.9, "mAcc": 0.95},
}


def evaluated(run: Path, results: Mapping[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "evaluation.json").write_text(json.dumps(results))


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What modular.sh leaves where all goes well: half the experts, nothing lost, faces one image of fifty behind."""
    evaluated(save(tmp_path / "full", small_recipe()), METRICS)
    half = {"model.mlp.num_experts": 2, "model.attention.num_experts": 2}
    for task, metrics in METRICS.items():
        evaluated(save(tmp_path / "modular" / task, small_recipe(only=[task], **half)), {task: metrics})
    evaluated(tmp_path / "modular/grown", METRICS | {"faces": {"top1": 0.96}})
    evaluated(tmp_path / "modular/faces_all", {"faces": {"top1": 0.98}})
    return tmp_path


def test_all_claims_hold(left: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(modular_claims, monkeypatch, left / "full", left / "modular") == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 10
    assert all(line.endswith("| yes |") for line in lines)
    assert "| 50.0% |" in lines[0]


@pytest.mark.parametrize(
    ("run", "results", "line"),
    [
        ("scenes", {"scenes": {"AP": 0.4199}}, "scenes alone: AP, at most 0.01 below all experts' | 0.4300 -> 0.4199 | NO |"),
        ("grown", {**METRICS, "digits": {"top1": 0.9700001}, "faces": {"top1": 1.0}}, "digits after growing"),
        ("grown", {**METRICS, "faces": {"top1": 0.94}}, "training everything | 0.98, 0.94 | NO |"),
    ],
)
def test_a_claim_that_fails_is_named(
    run: str, results: dict[str, Any], line: str, left: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(left / "modular" / run, results)
    assert call(modular_claims, monkeypatch, left / "full", left / "modular") == 1
    (failed,) = [found for found in capsys.readouterr().out.splitlines() if found.endswith("| NO |")]
    assert line in failed


def test_too_many_experts_kept(left: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of four experts everywhere, counted by hand: 75 %."""
    recipe = small_recipe(only=["digits"], **{"model.mlp.num_experts": 3, "model.attention.num_experts": 3})
    save(left / "modular/digits", recipe)
    assert expert_parameters(recipe)
    assert call(modular_claims, monkeypatch, left / "full", left / "modular") == 1
    assert "expert parameters kept, at most 60% | 75.0% | NO |" in capsys.readouterr().out


def test_a_missing_evaluation_is_one_line(
    left: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (left / "modular/faces_all/evaluation.json").unlink()
    assert call(modular_claims, monkeypatch, left / "full", left / "modular") == 2
    assert "faces_all/evaluation.json: no such file; run `modsquad-ds evaluate" in capsys.readouterr().err


# ---------------------------------------------------------------- compare, modular.sh


def test_compare_shows_trained_parameters_where_a_run_was_adapted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = digits_alone()
    runs = [save(tmp_path / name, recipe) for name in ("part", "scratch")]
    for run in runs:
        evaluated(run, {"digits": {"top1": 0.5}})
    print_comparison(runs)
    assert "trained" not in capsys.readouterr().out
    (runs[0] / "adapt.json").write_text('{"trained": 1234}')
    print_comparison(runs)
    heading, _, part, scratch = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in capsys.readouterr().out.split("\n") if "|" in line
    ]
    total = f"{count_parameters(build_network(recipe)).total:,}"
    assert heading == ["run", "digits top1", "least I / log T", "trained", "parameters"]
    assert part == ["part", "0.500", "-", "1,234", total]
    assert scratch == ["scratch", "0.500", "-", total, total]


def test_compare_has_a_line_per_run_however_many_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(sets={"views": {"data": "v", "batch_size": 2}}, tasks={row.name: {"set": "views"} for row in TASKONOMY})
    run = save(tmp_path / "run", recipe)
    evaluated(run, {row.name: {row.metrics[0]: 0.25} for row in TASKONOMY})
    print_comparison([run])
    lines = [text.strip("| ").split("|") for text in capsys.readouterr().out.split("\n") if "|" in text]
    heading, _, line = [[cell.strip() for cell in cells] for cells in lines]
    assert heading[1:3] == ["class_object top1", "class_scene top1"] and "normal mErr, degrees, less is better" in heading
    assert line[:14] == ["run", *["0.250"] * 13]


def test_modular_needs_the_quickstarts_model(tmp_path: Path) -> None:
    """Told before the set-up starts, in one line."""
    script = TOOLS / "modular.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    (tmp_path / "tools").mkdir()
    shutil.copy(script, tmp_path / "tools")
    found = subprocess.run(["bash", tmp_path / "tools/modular.sh"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr == "error: runs/quickstart/model.safetensors: no such file; run bash tools/quickstart.sh first\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]
