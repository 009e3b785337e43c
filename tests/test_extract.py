"""The extract command: what it writes, tells and measures, the sweep's files, and that a mistake leaves nothing behind."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modsquad_ds.adapt_spec import PruneSpec
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import evaluate_network
from modsquad_ds.extract import DEFAULT_RULE, Fewer, extract, rule_from, top_k_from
from modsquad_ds.model_file import ModelFile, network_of, read_model, write_model
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from modsquad_ds.selection import kept_experts
from modsquad_ds.structure import PerKind
from modsquad_ds.surgery import extract as cut
from modsquad_ds.sweep import THRESHOLDS, Outcome, Point, points_of, rule_name, sweep_csv, sweep_png, top_k_ladder
from modular import Shell, make_shards, model_for, shell
from test_surgery import trained

__all__ = ["shell"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    write_model(path, model_for(data))
    return path


def metrics(file: ModelFile, data: Path, task: str) -> dict[str, float | None]:
    recipe = file.recipe.model_copy(update={"data_root": data, "only": (task,)})
    return evaluate_network(network_of(file, "x"), recipe, loader_plan(recipe, Ranks()), "val")[task]


# ---------------------------------------------------------------- the command


def test_whole_command(model: Path, data: Path, shell: Shell) -> None:
    code, told, errors = shell.run("extract", str(model), "--task", "digits", "--keep", "2", "--mlp-top-k", "1",
                                   "--data", str(data), "--sweep", "--out", "small/digits.safetensors")  # fmt: skip
    assert code == 0, errors
    folder = shell.folder / "small"
    names = {"digits.safetensors", "digits.sweep.csv", "digits.sweep.png"}
    assert {path.name for path in folder.iterdir()} == names == {Path(line).name for line in told.splitlines()[-3:]}
    part, whole = read_model(folder / "digits.safetensors"), read_model(model)
    assert list(part.recipe.tasks) == ["digits"] and part.recipe.model.mlp.top_k == 1 and part.recipe.model.attention.top_k == 2
    assert (part.recipe.model.mlp.num_experts, part.recipe.model.attention.num_experts) == (2, 2)
    kept = ((0, 1),) * 4
    direct = cut(whole, ["digits"], kept, PerKind(1, 2))
    assert part.recipe == direct.recipe and all(torch.equal(part.state[n], t) for n, t in direct.state.items())

    for number in (sum(t.numel() for n, t in file.state.items() if "visible" not in n) for file in (whole, part)):
        assert f"{number:,}" in told, "all parameters, before and after"
    size = (folder / "digits.safetensors").stat().st_size
    assert f"{model.stat().st_size / 1e6:.2f}" in told and f"{size / 1e6:.2f}" in told
    for file in (whole, part):
        assert f"{metrics(file, data, 'digits')['top1']:.3f}" in told
    assert "experts kept, keep=2: 50.0% of their parameters; blocks.0.attn 2, blocks.0.mlp 2, blocks.1.attn 2" in told

    rows = list(csv.DictReader(io.StringIO((folder / "digits.sweep.csv").read_text())))
    assert [row["rule"] for row in rows[:3]] == ["", "min_usage=0.003", "min_usage=0.01"]
    assert float(rows[0]["digits top1"]) == metrics(whole, data, "digits")["top1"]
    assert [row["chosen"] for row in rows] == ["0"] * (len(rows) - 1) + ["1"]
    assert rows[-1]["rule"] == "keep=2" and float(rows[-1]["digits top1"]) == metrics(part, data, "digits")["top1"]
    assert float(rows[-1]["expert_parameters_kept"]) == 0.5 and int(rows[-1]["experts"]) == 8
    for row in rows:
        rule = PruneSpec(min_usage=float(row["rule"].split("=")[1])) if row["rule"].startswith("min") else None
        if row["chosen"] == "0":
            top_k = PerKind(int(row["mlp_top_k"]), int(row["attention_top_k"]))
            point = cut(whole, ["digits"], kept_experts(whole, ["digits"], rule, top_k), top_k)
            assert float(row["digits top1"]) == metrics(point, data, "digits")["top1"]
            assert int(row["parameters"]) == sum(t.numel() for n, t in point.state.items() if "visible" not in n)
    flops = {(row["mlp_top_k"], row["attention_top_k"]): int(row["digits flops"]) for row in rows}
    assert flops["2", "2"] > flops["1", "2"] > flops["1", "1"]
    with Image.open(folder / "digits.sweep.png") as picture:
        assert picture.size[0] > 500

    code, _, errors = shell.run("extract", str(model), "--task", "digits", "--out", "small/digits.safetensors")
    assert code == 2 and errors.startswith("error: --out small/digits.safetensors: exists already")


def test_several_tasks_without_data(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "part.safetensors"
    extract(model, ["textures", "scenes"], out, PruneSpec(keep=3))
    told = capsys.readouterr().out
    assert "scenes: one image of 24 x 32 px" in told and "textures: one image of" in told and "mIoU" not in told
    assert list(read_model(out).recipe.tasks) == ["scenes", "textures"]
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists already; give another name, or --overwrite"):
        extract(model, ["digits"], out)
    assert out.read_bytes() == before
    extract(model, ["digits"], out, overwrite=True)
    assert list(read_model(out).recipe.tasks) == ["digits"]
    run_folder = extract(model.parent, ["digits"], tmp_path / "by_folder.safetensors")
    assert run_folder is None and (tmp_path / "by_folder.safetensors").is_file()


REFUSED: dict[str, tuple[list[str], str]] = {
    "an unknown task": (["--task", "faces"], "error: task 'faces': the model has no such task; its tasks are: digits, scenes"),
    "a task twice": (["--task", "digits", "--task", "digits"], "error: --task digits, digits: name at least one task, each once"),
    "too few experts": (["--task", "digits", "--keep", "1"], "error: keep 1: blocks.0.attn needs 2 experts, as many as its"),
    "too few parameters": (
        ["--task", "digits", "--keep-params", "20%"],
        "error: keep_params 20.0%: each task's top-k experts of every layer are 50.0% of the experts' parameters (",
    ),
    "two rules": (["--task", "digits", "--keep", "2", "--min-usage", "0.1"], "error: --min-usage and --keep: give one of them"),
    "no share": (["--task", "digits", "--keep-params", "some"], "error: --keep-params some: expected a share such as 40% or 0.4"),
    "a share above 1": (["--task", "digits", "--keep-params", "40"], "error: --keep-params 40: input should be less than or"),
    "a threshold of 1": (["--task", "digits", "--min-usage", "1"], "error: --min-usage 1.0: input should be less than 1"),
    "no experts": (["--task", "digits", "--keep", "0"], "error: --keep 0: input should be greater than 0"),
    "a larger top-k": (["--task", "digits", "--mlp-top-k", "3"], "error: mlp top-k 3: the model was trained with 2; give 1 to 2"),
    "no top-k": (["--task", "digits", "--top-k", "0"], "error: mlp top-k 0: the model was trained with 2; give 1 to 2"),
    "top-k twice": (["--task", "digits", "--top-k", "1", "--mlp-top-k", "1"], "error: --top-k: sets both kinds"),
    "a sweep without data": (["--task", "digits", "--sweep"], "error: --sweep: measures metrics, for which it needs"),
    "no data there": (["--task", "digits", "--data", "nowhere"], "error: shard folder nowhere/d/val does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_nothing_is_written(case: str, model: Path, shell: Shell) -> None:
    arguments, message = REFUSED[case]
    told = shell.refused("extract", str(model), *arguments, "--out", "out.safetensors")
    assert told.startswith(message), told


def test_damaged_models_and_bad_places(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, out = tmp_path / "broken.safetensors", tmp_path / "out.safetensors"
    whole = model.read_bytes()
    for content, message in (
        (whole[:-200], "not a readable safetensors file"),
        (whole[:-200] + bytes(200), "differs from its checksum: edited or damaged"),
    ):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=message):
            extract(broken, ["digits"], out)
    with pytest.raises(UserError, match=r"--out .*: is a folder; give a file's name"):
        extract(model, ["digits"], tmp_path)
    with pytest.raises(UserError, match=r"--out .*x\.safetensors: .*broken\.safetensors is a file; give another place"):
        extract(model, ["digits"], broken / "x.safetensors")
    (tmp_path / "out.sweep.png").touch()
    with pytest.raises(UserError, match=r"--out .*out\.sweep\.png: exists already"):
        extract(model, ["digits"], out, data=data, sweep=True)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="works in one process; start it without a launcher"):
        extract(model, ["digits"], out)
    assert {path.name for path in tmp_path.iterdir()} == {"broken.safetensors", "out.sweep.png"}


def test_data_of_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    """A mismatching label count, and equal counts under other names. Of tasks that are left out, nothing is asked."""
    file, out = model_for(data), tmp_path / "out.safetensors"
    names = {**file.classes, "digits": ["naught", "one"], "textures": ["?"] * 3}
    write_model(tmp_path / "renamed.safetensors", file._replace(classes=names))
    with pytest.raises(UserError, match=r"tasks\.digits: class 0 is 'naught' in the model and 'n01' in"):
        extract(tmp_path / "renamed.safetensors", ["digits"], out, data=data)
    extract(tmp_path / "renamed.safetensors", ["scenes"], tmp_path / "scenes.safetensors", data=data)
    more = trained()  # five digits
    write_model(tmp_path / "more.safetensors", more)
    with pytest.raises(UserError, match=r"tasks\.digits\.num_classes: the recipe says 5, but .* has 2"):
        extract(tmp_path / "more.safetensors", ["digits"], out, data=data)
    assert not out.exists()


# ---------------------------------------------------------------- options


def test_rules_of_options() -> None:
    assert rule_from(None, None, None) == DEFAULT_RULE == PruneSpec(min_usage=0.03)
    assert rule_from(0.2, None, None) == PruneSpec(min_usage=0.2)
    assert rule_from(None, 3, None) == PruneSpec(keep=3)
    assert rule_from(None, None, "40%") == rule_from(None, None, "0.4") == PruneSpec(keep_params=0.4)
    assert rule_name(PruneSpec(keep_params=0.4)) == "keep_params=0.4" and rule_name(None) == ""


def test_top_k_of_options() -> None:
    model = trained()
    assert top_k_from(model, Fewer()) == (2, 2)
    assert top_k_from(model, Fewer(both=1)) == (1, 1)
    assert top_k_from(model, Fewer(attention=1)) == PerKind(mlp=2, attention=1)
    mlp_only = trained(**{"model.layout": "mlp_only"})
    assert top_k_from(mlp_only, Fewer(both=1)) == PerKind(mlp=1, attention=2)
    with pytest.raises(UserError, match="--attention-top-k 1: the model has no sparse attention layers"):
        top_k_from(mlp_only, Fewer(attention=1))
    with pytest.raises(UserError, match="--top-k 1: the model has no sparse layers"):
        top_k_from(trained(**{"model.layout": "dense"}), Fewer(both=1))


# ---------------------------------------------------------------- the sweep


def test_ladder_of_top_k() -> None:
    assert top_k_ladder(trained()) == [(2, 2), (1, 1)]
    wide: dict[str, Any] = {"model.mlp": {"num_experts": 5, "top_k": 5}, "model.attention": {"num_experts": 12, "top_k": 12}}
    assert top_k_ladder(trained(**wide)) == [(5, 12), (2, 6), (1, 3), (1, 1)]
    assert top_k_ladder(trained(**wide, **{"model.layout": "mlp_only"})) == [(5, 12), (2, 12), (1, 12)]
    assert top_k_ladder(trained(**{"model.layout": "dense"})) == [(2, 2)]


def test_points_of_a_sweep() -> None:
    model, top_k = trained(), PerKind(2, 1)
    chosen = Point(PruneSpec(keep=2), top_k, kept_experts(model, ["digits"], PruneSpec(keep=2), top_k), True)
    points = points_of(model, ["digits"], chosen)
    assert len(points) == 3 * (1 + len(THRESHOLDS)) + 1 and points[-1] is chosen
    assert list(dict.fromkeys(p.top_k for p in points)) == [(2, 2), (2, 1), (1, 1)]
    assert points[0] == Point(None, PerKind(2, 2), ((0, 1, 2, 3),) * 4, False)
    for point in points:
        assert point.kept == kept_experts(model, ["digits"], point.rule, point.top_k)


def test_equal_models_are_measured_once(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modsquad_ds import sweep

    measured = []

    def counted(network: Any, recipe: Any, plan: Any, split: str, quiet: bool = False) -> Any:
        measured.append((recipe.model.mlp, recipe.model.attention))
        return evaluate_network(network, recipe, plan, split, quiet)

    monkeypatch.setattr(sweep, "evaluate_network", counted)
    extract(model, ["digits"], tmp_path / "m.safetensors", PruneSpec(keep=2), data=data, sweep=True)
    # Usage of 1.2, 0.49, 0.2 and 0.08 of the tokens: 4, 3 or 2 experts at top-2, also 1 at top-1. The full model and the
    # chosen one are known already.
    assert len(measured) == len(set(measured)) == 5
    rows = list(csv.DictReader(io.StringIO((tmp_path / "m.sweep.csv").read_text())))
    assert len(rows) == 2 * (1 + len(THRESHOLDS)) + 1
    assert {row["experts"] for row in rows} == {"16", "12", "8", "4"}


def test_metrics_that_the_data_cannot_say_stay_empty() -> None:
    model = trained()
    point = Point(None, PerKind(2, 2), ((0, 1, 2, 3),) * 4, True)
    outcome = Outcome(1.0, 7, {"scenes": 9}, {"scenes": {"AP": None, "AP50": 0.5}})
    lines = sweep_csv(model, [point], [outcome]).decode().splitlines()
    assert lines == [
        "rule,mlp_top_k,attention_top_k,experts,expert_parameters_kept,parameters,scenes flops,scenes AP,scenes AP50,chosen",
        ",2,2,16,1.0,7,9,,0.5,1",
    ]
    assert sweep_png(model, [point], [outcome], outcome.metrics).startswith(b"\x89PNG")


def test_a_dense_model_gives_up_heads_alone(data: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "dense.safetensors", model_for(data, **{"model.layout": "dense"}))
    extract(tmp_path / "dense.safetensors", ["digits"], tmp_path / "d.safetensors", data=data, sweep=True)
    part, whole = read_model(tmp_path / "d.safetensors"), read_model(tmp_path / "dense.safetensors")
    assert {n for n in whole.state if not n.startswith(("heads.scenes", "heads.textures"))} == part.state.keys()
