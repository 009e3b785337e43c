"""Who uses which expert: hand-worked overlaps, measured usage against a loop over single tokens, any number of ranks, files."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

import layouts
from modsquad_ds import cli, evaluate, usage
from modsquad_ds.config import Recipe
from modsquad_ds.data.convert import convert
from modsquad_ds.data.finish import finished_images
from modsquad_ds.data.loader import eval_batches
from modsquad_ds.errors import UserError
from modsquad_ds.model.network import MultiTaskNetwork, build_network
from modsquad_ds.model_file import ModelFile, write_model
from modsquad_ds.objective import Usage
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from modsquad_ds.tables import without_memory
from modsquad_ds.usage import LayerUse, jaccard, measure_usage, overlap, print_usage, report_of, similarity, used_experts
from ranks import run_ranks
from small import small_recipe

TASKS = ("digits", "scenes", "textures")
LAYERS = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
COUNTS = {"digits": 2, "scenes": 2, "textures": 3}
"""Classes in the small datasets."""
SHARE = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]])
NAN = math.nan


# ---------------------------------------------------------------- by hand


def test_overlap_by_hand() -> None:
    expected = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 1.0]], dtype=torch.float64)
    assert torch.equal(overlap(SHARE), expected)
    unseen = torch.cat([SHARE[:1], torch.zeros(1, 4)])
    assert_close(overlap(unseen), torch.tensor([[1.0, NAN], [NAN, NAN]], dtype=torch.float64), equal_nan=True)


def test_overlap_is_at_most_one_whatever_rounding() -> None:
    share_TE = torch.rand(5, 7).softmax(1)
    assert overlap(share_TE).max() <= 1 and overlap(share_TE).diagonal().min() > 1 - 1e-6


def test_experts_in_use_are_counted_by_tokens() -> None:
    """Of top-2 choices a share of 0.015 is 3 % of the tokens: in use; of top-1 choices it is not."""
    share_TE = torch.tensor([[0.985, 0.0155, 0.0145]])
    both = Usage(share_TE, share_TE)
    assert used_experts(LayerUse("a", 2, both)).tolist() == [[True, True, False]]
    assert used_experts(LayerUse("a", 1, both)).tolist() == [[True, False, False]]
    assert used_experts(LayerUse("a", 1, both), least=0.014).tolist() == [[True, True, True]]


def test_jaccard_by_hand() -> None:
    """{0, 1}, {0, 1, 2, 3}, {3}, {}: 2 of 4, nothing of 3, 1 of 4; nothing in use cannot be compared."""
    used = torch.cat([SHARE > 0, torch.zeros(1, 4, dtype=torch.bool)])
    rows = [[1.0, 0.5, 0.0, NAN], [0.5, 1.0, 0.25, NAN], [0.0, 0.25, 1.0, NAN], [NAN] * 4]
    assert_close(jaccard(used), torch.tensor(rows, dtype=torch.float64), equal_nan=True)


def test_similarity_is_the_mean_over_layers() -> None:
    """A second layer, of another number of experts, where all tasks choose alike; the third has seen two tasks."""
    alike, part = torch.full((3, 2), 0.5), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    layers = [LayerUse("a", 2, Usage(SHARE, SHARE)), LayerUse("b", 1, Usage(alike, alike)), LayerUse("c", 1, Usage(part, part))]
    found = similarity(layers)
    assert found.keys() == {"overlap", "jaccard"}
    for table in found.values():
        assert table[0].tolist() == [1.0, pytest.approx((0.5 + 1 + 0) / 3), pytest.approx((0 + 1) / 2)]
        assert table[2].tolist() == [pytest.approx((0 + 1) / 2), pytest.approx((0.25 + 1) / 2), 1.0]


def test_report_by_hand() -> None:
    """Each task its own expert: log 3 nats; all alike: none."""
    own, alike = torch.eye(3), torch.full((3, 3), 1 / 3)
    layers = [LayerUse("a", 1, Usage(own, own)), LayerUse("b", 3, Usage(alike, alike))]
    report = json.loads(json.dumps(report_of(layers, TASKS), allow_nan=False))
    assert report["tasks"] == list(TASKS) and report["least_share_of_tokens"] == 0.03
    a, b = report["layers"]
    assert (a["layer"], a["experts"], a["top_k"]) == ("a", 3, 1)
    assert a["information"] == pytest.approx(math.log(3)) and b["information"] == pytest.approx(0, abs=1e-6)
    assert a["share"] == a["prob"] == dict(zip(TASKS, own.tolist(), strict=True))
    assert a["used"] == {"digits": [0], "scenes": [1], "textures": [2]} and b["used"]["scenes"] == [0, 1, 2]
    assert a["overlap"] == a["jaccard"] == own.tolist()
    assert_close(torch.tensor(report["similarity"]["overlap"]), (1 + own) / 2)


def test_dendrogram_joins_the_closest_first() -> None:
    """a and c overlap 0.9, b joins at the mean of 1 - 0.3 and 1 - 0.1."""
    table = torch.tensor([[1.0, 0.3, 0.9], [0.3, 1.0, 0.1], [0.9, 0.1, 1.0]], dtype=torch.float64)
    left, right = usage.similarity_picture(table, ("a", "b", "c")).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert set(names[:2]) == {"a", "c"} or set(names[1:]) == {"a", "c"}
    order = ["abc".index(name) for name in names]
    assert left.get_images()[0].get_array().tolist() == table[order][:, order].tolist()
    joins = {round(max(line.get_xdata()), 6): sorted(set(line.get_ydata())) for line in right.lines}
    assert set(joins) == {0.1, 0.8}
    pair = sorted((names.index("a"), names.index("c")))
    assert joins[0.1] == pair and joins[0.8] == sorted((names.index("b"), sum(pair) / 2))


def test_one_task_has_no_dendrogram() -> None:
    (axes,) = usage.similarity_picture(torch.ones(1, 1, dtype=torch.float64), ("digits",)).axes
    assert axes.get_images()[0].get_array().tolist() == [[1.0]]


# ---------------------------------------------------------------- measured


def shards(root: Path) -> Path:
    """Held-out shards of the three tasks; the textures are of several canvases, neighbours unlike each other."""
    convert("imagenet", layouts.imagenet(root / "d", "val", per_class=3), root / "data/d", "val", progress=False)
    convert("coco", layouts.coco(root / "s", "val"), root / "data/s", "val", progress=False)
    for number, size in enumerate(((20, 30), (30, 20), (24, 24), (20, 30), (28, 20))):
        layouts.save(layouts.picture(number, size), root / "t/images/val" / f"{number}.jpg")
        layouts.save(layouts.mask([0, 1, 2, 3], size), root / "t/annotations/val" / f"{number}.png")
    (root / "t/classes.txt").write_text("wall\nsky\ntree\n")
    convert("ade20k", root / "t", root / "data/t", "val", progress=False)
    return root / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("usage"))


def recipe_of(data: Path | str, **changes: Any) -> Recipe:
    counts = {f"tasks.{task}.num_classes": count for task, count in COUNTS.items()}
    sizes = {"tasks.scenes.transform.eval_canvas": [24, 32], "tasks.textures.transform.resize": [24, 32]}
    # Attention and MLP choose other numbers of experts, of other numbers.
    moe = {"model.mlp": {"num_experts": 5, "top_k": 2, "hidden": 8}, "model.attention": {"num_experts": 4, "top_k": 3}}
    return small_recipe(data_root=str(data), **counts, **sizes, **moe, **changes)


def measured(recipe: Recipe, tasks: tuple[str, ...] = TASKS, ranks: Ranks | None = None) -> tuple[Usage, ...]:
    plan = loader_plan(recipe, ranks or Ranks())
    return measure_usage(build_network(recipe), recipe, plan, "val", tasks)


def by_loop(network: MultiTaskNetwork, recipe: Recipe, tasks: tuple[str, ...]) -> list[tuple[Tensor, Tensor]]:
    """One image after the other, one token after the other: mean softmax of the router's own weights, and counted choices."""
    sums: list[dict[str, list[Tensor]]] = []
    for layer in network.backbone.sparse_layers().values():
        zero = torch.zeros(len(network.task_names), layer.router.num_experts, dtype=torch.float64)
        sums.append({"prob": list(zero.clone()), "count": list(zero.clone())})
        layer.router.register_forward_hook(lambda router, inputs, _, kept=sums[-1]: count_tokens(router, *inputs, kept))
    for task in tasks:
        for sub in eval_batches(loader_plan(recipe, Ranks()), task, "val", 1):
            network.eval()({task: finished_images(sub)})
    of_layer = [(torch.stack(kept["prob"]), torch.stack(kept["count"])) for kept in sums]
    return [(p / p.sum(1, keepdim=True).clamp(min=1e-9), c / c.sum(1, keepdim=True).clamp(min=1)) for p, c in of_layer]


def count_tokens(router: Any, x_SD: Tensor, segments: Any, kept: dict[str, list[Tensor]]) -> None:
    (segment,) = segments
    assert segment.batch == 1
    for x_D in x_SD.double():
        prob_E = (router.weight[segment.task].detach().double() @ x_D.detach()).softmax(0)
        kept["prob"][segment.task] += prob_E
        for expert in sorted(range(len(prob_E)), key=lambda e: -float(prob_E[e]))[: router.top_k]:
            kept["count"][segment.task][expert] += 1


def test_measured_usage_equals_a_loop_over_tokens(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(data)
    monkeypatch.setattr(evaluate, "BATCH_IMAGES", 4)
    found = measured(recipe)
    expected = by_loop(build_network(recipe), recipe, TASKS)
    assert [layer.share_TE.shape for layer in found] == [(3, 4), (3, 5)] * 2
    for layer, (prob_TE, share_TE) in zip(found, expected, strict=True):
        assert layer.prob_TE.dtype == layer.share_TE.dtype == torch.float32
        assert_close(layer.prob_TE.double(), prob_TE, rtol=1e-5, atol=1e-6)
        assert_close(layer.share_TE.double(), share_TE, rtol=1e-6, atol=1e-7)
        assert_close(layer.share_TE.sum(1), torch.ones(3))
        assert (layer.share_TE[0] - layer.share_TE[1]).abs().max() > 0.01, "tasks differ, or rows could be mixed up"


def test_tasks_that_are_not_asked_for_keep_zeros(data: Path) -> None:
    recipe = recipe_of(data)
    everything, some = measured(recipe), measured(recipe, ("textures",))
    for all_tasks, one in zip(everything, some, strict=True):
        assert torch.equal(one.share_TE[2], all_tasks.share_TE[2]) and torch.equal(one.prob_TE[2], all_tasks.prob_TE[2])
        assert not one.share_TE[:2].any() and not one.prob_TE[:2].any()


def on_rank(rank: int, world: int, data: str) -> tuple[Usage, ...]:
    evaluate.BATCH_IMAGES = 2
    ranks = launch.start()
    assert (ranks.rank, ranks.world) == (rank, world)
    return measured(recipe_of(data), ranks=ranks)


@pytest.mark.dist
def test_ranks_measure_what_one_measures(data: Path) -> None:
    """Five textures on two ranks: one fills up with an image that must not count, in a batch of its own."""
    alone = measured(recipe_of(data))
    for found in run_ranks(2, on_rank, str(data), timeout=240):
        for mine, expected in zip(found, alone, strict=True):
            assert torch.equal(mine.share_TE, expected.share_TE), "counts are exact"
            assert_close(mine.prob_TE, expected.prob_TE, rtol=1e-6, atol=1e-7)


def test_experts_that_a_task_does_not_see_are_not_used(data: Path) -> None:
    recipe = recipe_of(data)
    network = build_network(recipe)
    for layer in network.backbone.sparse_layers().values():
        layer.router.restrict(1, (0, 1, 3))
    found = measure_usage(network, recipe, loader_plan(recipe, Ranks()), "val", ("scenes",))
    for layer in found:
        assert not layer.share_TE[1, 2] and not layer.prob_TE[1, 2]
        assert_close(layer.prob_TE[1].sum(), torch.tensor(1.0))


# ---------------------------------------------------------------- the command


def written(folder: Path, recipe: Recipe, stored_TE: Tensor | None = None) -> Path:
    """A model file whose layers all keep the same table, of both values."""
    layers = without_memory(recipe).backbone.sparse_layers()
    stored = () if stored_TE is None else tuple(Usage(stored_TE.clone(), stored_TE.clone()) for _ in layers)
    classes = {task: [f"class {i}" for i in range(COUNTS[task])] for task in recipe.active}
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model.safetensors", ModelFile(recipe, build_network(recipe).state_dict(), classes, stored))
    return folder


def named_classes(model: Path, data: Path, recipe: Recipe) -> Path:
    """A model file whose classes are those of the shards."""
    names = {task: list(loader_plan(recipe, Ranks()).open_store(data / task[0] / "val").classes) for task in recipe.active}
    write_model(model / "model.safetensors", ModelFile(recipe, build_network(recipe).state_dict(), names, ()))
    return model


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    """A run folder whose recipe looks for its data elsewhere."""
    (tmp_path / "run").mkdir()
    return named_classes(tmp_path / "run", data, recipe_of("elsewhere"))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["usage", *map(str, arguments)])


def test_command_writes_everything(run: Path, data: Path) -> None:
    found = invoke(run, "--data", data)
    assert found.exit_code == 0, found.output
    out = run / "usage"
    assert {path.name for path in out.iterdir()} == {"usage.json", "similarity.png", *(f"usage_{name}.png" for name in LAYERS)}
    for path in out.glob("*.png"):
        assert min(Image.open(path).convert("RGB").size) > 100
    report = json.loads((out / "usage.json").read_text(), parse_constant=pytest.fail)
    assert report["source"] == "val" and report["model"] == str(run / "model.safetensors")
    assert [layer["layer"] for layer in report["layers"]] == list(LAYERS)
    expected = measured(recipe_of(data))
    for layer, of_layer in zip(report["layers"], expected, strict=True):
        assert layer["share"] == dict(zip(TASKS, of_layer.share_TE.tolist(), strict=True))
        assert layer["prob"] == dict(zip(TASKS, of_layer.prob_TE.tolist(), strict=True))
    lines = found.output.splitlines()
    assert max(map(len, lines)) <= 100 and all(any(layer in line for line in lines) for layer in LAYERS)


def test_stored_averages_need_no_data(tmp_path: Path) -> None:
    """Of a task that training never met nothing is known: null, and no row in the picture of pairs."""
    recipe = recipe_of("elsewhere", **{"model.layout": "mlp_only"})
    table = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0]])
    run = written(tmp_path / "run", recipe, table)
    report = usage.usage(run, out=tmp_path / "out", stored=True)
    assert json.loads((tmp_path / "out/usage.json").read_text(), parse_constant=pytest.fail) == report
    assert report["source"] == "moving average of training" and not (run / "usage").exists()
    assert report["layers"][1]["used"] == {"digits": [0, 1], "scenes": [1, 2], "textures": []}
    assert report["similarity"]["overlap"] == [[1.0, 0.5, None], [0.5, 1.0, None], [None] * 3]
    assert report["similarity"]["jaccard"] == [[1.0, pytest.approx(1 / 3), None], [pytest.approx(1 / 3), 1.0, None], [None] * 3]
    assert report["layers"][0]["information"] == pytest.approx(0.5 * math.log(2))


def test_one_task(tmp_path: Path) -> None:
    recipe = recipe_of("elsewhere", only=["digits"], **{"model.layout": "mlp_only"})
    table = torch.tensor([[0.5, 0.5, 0, 0, 0]])
    run = written(tmp_path / "run", recipe, table)
    found = invoke(run, "--stored")
    assert found.exit_code == 0, found.output
    report = json.loads((run / "usage/usage.json").read_text())
    assert report["similarity"]["overlap"] == [[1.0]] and report["layers"][0]["information"] == pytest.approx(0, abs=1e-7)
    assert (run / "usage/similarity.png").is_file()


def test_table_of_many_tasks_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tasks = [f"a task with a long name {i}" for i in range(18)]
    share_TE = torch.rand(18, 24).softmax(1)
    print_usage(report_of([LayerUse("blocks.11.attn", 12, Usage(share_TE, share_TE))], tasks))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("24 of 24" in line for line in lines) == 18
    values = [line.split()[-18:] for line in lines if line.split()[-18:].count("100") == 1]
    assert len(values) == 18 and values[0][0] == values[17][17] == "100"


def no_data(run: Path, data: Path) -> dict[str, Any]:
    return {}


def other_split(run: Path, data: Path) -> dict[str, Any]:
    return {"data": data, "split": "test"}


def dense(run: Path, data: Path) -> dict[str, Any]:
    named_classes(run, data, recipe_of(data, **{"model.layout": "dense"}))
    return {}


def nothing_stored(run: Path, data: Path) -> dict[str, Any]:
    return {"stored": True}


def stored_and_data(run: Path, data: Path) -> dict[str, Any]:
    return {"stored": True, "data": data}


def out_is_a_file(run: Path, data: Path) -> dict[str, Any]:
    return {"data": data, "out": run / "model.safetensors"}


def other_classes(run: Path, data: Path) -> dict[str, Any]:
    written(run, recipe_of("elsewhere"))
    return {"data": data}


def no_model(run: Path, data: Path) -> dict[str, Any]:
    (run / "model.safetensors").unlink()
    return {"data": data}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_data, r"tasks\.digits: shard folder elsewhere/d/val does not exist; .*--data FOLDER.*--stored"),
        (other_split, r"tasks\.digits: shard folder .*/data/d/test does not exist"),
        (dense, r"model .*model\.safetensors: layout 'dense' has no sparse layers"),
        (nothing_stored, r"model .*: keeps no use of experts.*without --stored"),
        (stored_and_data, r"--data .*: --stored reads what the model file keeps.*one of the two"),
        (out_is_a_file, r"--out .*model\.safetensors: cannot be written to .*another folder"),
        (other_classes, r"tasks\.digits: class 0 is 'class 0' in the model"),
        (no_model, r"model .*: no such file"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    make: Callable[[Path, Path], dict[str, Any]], message: str, run: Path, data: Path
) -> None:
    arguments = make(run, data)
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        usage.usage(run, **arguments)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in run.iterdir()) == before
