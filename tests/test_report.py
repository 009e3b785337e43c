"""What a person sees: drawings against pixels worked out by hand, curves, heat maps, tables, and a whole run's pictures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import layouts
from modsquad_ds import draw, report, runlog, tables
from modsquad_ds.config import Recipe
from modsquad_ds.data.convert import convert
from modsquad_ds.data.decode import decode_rgb
from modsquad_ds.data.types import RawSample
from modsquad_ds.errors import UserError
from modsquad_ds.model.network import build_network
from modsquad_ds.model_file import ModelFile, write_model
from modsquad_ds.objective import Usage
from set_tasks import set_task
from small import small_recipe

LAYERS = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
BLUE, ORANGE = (0, 114, 178), (230, 159, 0)
NAMES = ["cat", "dog"]


def grey(height: int, width: int, value: int = 100) -> torch.Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def pixels_of(image: Image.Image) -> torch.Tensor:
    """`[H, W, 3]`"""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


# ---------------------------------------------------------------- colours and sizes


def test_classes_have_colours_of_their_own() -> None:
    colours = [draw.colour_of(label) for label in range(256)]
    assert colours[:2] == [BLUE, ORANGE]
    assert len({*colours, draw.GREY, draw.IGNORED}) == 258
    assert all(0 <= channel <= 255 for colour in colours for channel in colour)


def test_ink_stands_out() -> None:
    assert draw.ink_on((255, 255, 255)) == draw.ink_on((240, 228, 66)) == draw.BLACK
    assert draw.ink_on((0, 0, 0)) == draw.ink_on(BLUE) == draw.WHITE


def test_small_pictures_are_magnified_by_whole_factors() -> None:
    assert [draw.enlargement(size) for size in ((48, 48), (32, 20), (239, 10), (240, 240), (3000, 2))] == [5, 8, 2, 1, 1]
    assert [draw.fitting(size, 240) for size in ((48, 48), (32, 20), (240, 9), (480, 100))] == [5, 7, 1, 0.5]


def test_magnified_pixels_are_blocks_and_reduced_ones_fit() -> None:
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2) * 20
    magnified = pixels_of(draw.picture(image, 3.0))
    expected = image.permute(1, 2, 0).repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert torch.equal(magnified, expected)
    assert draw.picture(grey(400, 800), draw.fitting((400, 800), 200)).size == (200, 100)


def test_text_is_cut_to_the_width() -> None:
    face = draw.font(13)
    assert draw.elided("a  b\nc", face, 100) == "a b c"
    cut = draw.elided("a class name that is much too long", face, 100)
    assert cut.startswith("a class") and cut.endswith("…") and face.getlength(cut) <= 100
    assert draw.elided("word", face, 0) == "…"


# ---------------------------------------------------------------- boxes and masks


def test_box_lies_where_its_pixels_are() -> None:
    found = draw.Boxes(torch.tensor([[30.0, 40.0, 70.0, 90.0]]), torch.tensor([1]))
    drawn = pixels_of(draw.with_boxes(grey(100, 100), found, NAMES, scale=2.0))
    orange = (drawn == torch.tensor(ORANGE)).all(-1)
    # Twice as large: columns 60 to 139, rows 80 to 179, a line two pixels thick; its label lies above.
    assert orange[80:180, 60:62].all() and orange[80:180, 138:140].all()
    assert orange[80:82, 60:140].all() and orange[178:180, 60:140].all()
    assert not orange[82:178, 62:138].any() and not orange[180:].any() and not orange[:, 140:].any()
    assert orange[60:80, 60:80].any() and not orange[:60].any()


def test_boxes_below_the_threshold_are_not_drawn() -> None:
    boxes, labels = torch.tensor([[10.0, 30.0, 50.0, 90.0], [60.0, 30.0, 90.0, 90.0]]), torch.tensor([0, 1])
    found = draw.Boxes(boxes, labels, torch.tensor([draw.DRAWN_SCORE, draw.DRAWN_SCORE - 0.01]))
    drawn = pixels_of(draw.with_boxes(grey(100, 100), found, NAMES))
    assert (drawn == torch.tensor(BLUE)).all(-1).any() and not (drawn == torch.tensor(ORANGE)).all(-1).any()


def test_crowds_are_grey_and_named() -> None:
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    found = draw.Boxes(*none, crowds=torch.tensor([[10.0, 40.0, 90.0, 90.0]]))
    drawn = pixels_of(draw.with_boxes(grey(100, 100), found, NAMES))
    assert (drawn[40:90, 10] == torch.tensor(draw.GREY)).all()
    assert (drawn[:40] == torch.tensor(draw.WHITE)).all(-1).any()  # letters above the box


def test_boxes_beyond_the_picture_and_without_area_are_drawn_inside() -> None:
    boxes = torch.tensor([[-20.0, -20.0, 500.0, 500.0], [400.0, 400.0, 500.0, 500.0], [7.0, 7.0, 7.0, 7.0]])
    drawn = draw.with_boxes(grey(12, 12), draw.Boxes(boxes, torch.tensor([0, 1, 1])), NAMES)
    assert drawn.size == (12, 12)


def test_labels_of_neighbours_do_not_cover_each_other() -> None:
    boxes = torch.tensor([[40.0, 60.0, 160.0, 140.0], [42.0, 60.0, 158.0, 138.0]])
    found = draw.Boxes(boxes, torch.tensor([0, 1]), torch.tensor([0.9, 0.8]))
    drawn = pixels_of(draw.with_boxes(grey(200, 200), found, NAMES))
    above, below = drawn[45:58, 42:100].reshape(-1, 3), drawn[142:155, 44:100].reshape(-1, 3)
    assert (above == torch.tensor(BLUE)).all(-1).any() and not (above == torch.tensor(ORANGE)).all(-1).any()
    assert (below == torch.tensor(ORANGE)).all(-1).any() and not (below == torch.tensor(BLUE)).all(-1).any()


def test_mask_colours_by_hand() -> None:
    mask = torch.zeros(4, 6, dtype=torch.uint8)
    mask[:, 2:4], mask[:, 4:] = 1, 255
    drawn = pixels_of(draw.with_mask(grey(4, 6), mask, scale=4.0))
    # 0.65 of the class's colour and 0.35 of the brightness 100; a white line where a region begins.
    for column, colour in ((4, BLUE), (12, ORANGE), (20, (0, 0, 0))):
        wanted = torch.tensor([0.65 * channel + 35 for channel in colour])
        assert (drawn[:, column].float() - wanted).abs().max() <= 1
    assert (drawn[:, 8] == 255).all() and (drawn[:, 16] == 255).all() and not (drawn[:, 9] == 255).all()


def test_legend_wraps_and_names_every_colour() -> None:
    entries = [(draw.colour_of(label), f"class {label}") for label in range(20)]
    drawn = draw.legend(entries, 240, 13)
    found = {tuple(pixel.tolist()) for pixel in pixels_of(drawn).view(-1, 3)}
    assert drawn.width == 240 and {colour for colour, _ in entries} <= found


def test_bars_are_as_long_as_their_values() -> None:
    drawn = pixels_of(draw.bars([("a", 1.0, BLUE), ("b", 0.25, ORANGE), ("c", 0.0, draw.GREY)], (208, 120)))
    widths = [(drawn == torch.tensor(colour)).all(-1).any(0).sum().item() for colour in (BLUE, ORANGE, draw.GREY)]
    assert widths[0] == 200 and abs(widths[1] - 50) <= 1 and widths[2] == 0


def test_grid_holds_every_panel() -> None:
    rows = [[Image.new("RGB", (60, 60), draw.colour_of(2 * i + j)) for j in range(2)] for i in range(20)]
    drawn = draw.grid(rows, ("left", "right"), 60)
    counts = [(pixels_of(drawn) == torch.tensor(draw.colour_of(i))).all(-1).sum().item() for i in range(40)]
    assert counts == [3600] * 40


# ---------------------------------------------------------------- records and curves


def test_smoothing_by_hand() -> None:
    assert report.smoothed([1.0, 2.0, 6.0, 4.0, 2.0], 1) == pytest.approx([1.0, 3.0, 4.0, 4.0, 2.0])
    assert report.smoothed([1.0, 2.0, 6.0, 4.0, 2.0], 9) == pytest.approx([1.0, 3.0, 3.0, 4.0, 2.0])
    assert report.smoothed([], 3) == []


def test_series_leaves_out_absent_and_null_values() -> None:
    records = [{"step": 1, "x": 0.5}, {"step": 2}, {"step": 3, "x": None}, {"step": 4, "x": 0.0}]
    assert report.series(records, "x") == ([1, 4], [0.5, 0.0])


def test_records_of_a_run_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert runlog.read_records(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("", "no records yet"), ('{"step": 1}\n{"st\n{"step": 3}\n', "no JSON")],
)
def test_bad_records_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        runlog.read_records(path)
    assert str(path) in str(error.value)


def records(steps: int = 12) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step, "loss": 3.0 / step, "lr": 1e-3 * step}
        row |= {f"loss/{task}": (i + 1) / step for i, task in enumerate(("digits", "scenes", "textures"))}
        rows.append(row | {f"information/{i}": 0.05 * step for i in range(len(LAYERS))})
    return rows


def test_curves_hold_the_records() -> None:
    figure = report.curves(records(), ("digits", "scenes", "textures"), LAYERS)
    losses, information, rate = figure.axes
    raw = losses.get_lines()[2]  # raw and smoothed alternate
    assert raw.get_xdata().tolist() == list(range(1, 13)) and raw.get_ydata().tolist() == [2 / s for s in range(1, 13)]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["digits", "scenes", "textures"]
    limit, *layers = information.get_lines()
    assert limit.get_ydata()[0] == pytest.approx(math.log(3)) and [line.get_label() for line in layers] == [*LAYERS]
    assert rate.get_lines()[0].get_ydata()[-1] == pytest.approx(0.012)
    assert rate.get_xlabel() == "optimizer step" and all(axes.get_ylabel() for axes in figure.axes)


def test_a_dense_network_has_no_information_panel() -> None:
    assert len(report.curves(records(1), ("digits",), ()).axes) == 2


# ---------------------------------------------------------------- routing and tables


def model_with(usage: tuple[Usage, ...]) -> ModelFile:
    recipe = small_recipe()
    return ModelFile(recipe, {}, {task: [] for task in recipe.active}, usage)


def one_each() -> torch.Tensor:
    return torch.eye(3, 4)


def test_information_by_hand() -> None:
    uniform = torch.full((3, 4), 0.25)
    unseen = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 0]])
    halves = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    layers = (one_each(), uniform, unseen, halves)
    found = tables.information_of(model_with(tuple(Usage(prob, prob) for prob in layers)))
    assert tuple(found) == LAYERS
    # Two tasks of three share a pair of experts: I = H(T) - H(T|E) = log 3 - 2/3 log 2.
    wanted = [math.log(3), 0.0, math.log(2), math.log(3) - 2 / 3 * math.log(2)]
    assert list(found.values()) == pytest.approx(wanted, abs=1e-6)


def test_untrained_model_has_no_information() -> None:
    assert tables.information_of(model_with(())) == {}


def test_heat_map_shows_the_table() -> None:
    axes, bar = draw.heat_map(one_each(), ("digits", "scenes", "textures"), "blocks.1.mlp").axes
    assert axes.get_images()[0].get_array().tolist() == one_each().tolist()
    assert [text.get_text() for text in axes.texts] == [f"{x:.2f}" for row in one_each().tolist() for x in row]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["digits", "scenes", "textures"]
    assert (axes.get_title(), axes.get_xlabel(), bar.get_ylabel()) == ("blocks.1.mlp", "expert", "P(expert | task)")
    assert not draw.heat_map(torch.rand(3, 64), ("a", "b", "c"), "many").axes[0].texts


def results(recipe: Recipe) -> dict[str, Any]:
    trained = {
        "digits": {"top1": 0.9712, "top5": 1.0},
        "scenes": dict.fromkeys(("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")) | {"AP50": 0.5555},
        "textures": {"mIoU": 0.8, "mAcc": 0.9, "aAcc": 0.95},
    }
    untrained = {task: dict.fromkeys(trained[task], 0.125) for task in recipe.active}
    return {task: trained[task] for task in recipe.active} | {"untrained": untrained}


def test_tables_fit_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recipe = small_recipe()
    tables.print_results(results(recipe), recipe, dict.fromkeys(LAYERS, 0.55))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    cells = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["digits", "top1", "0.971", "0.125"] in cells and ["AP50", "0.555", "0.125"] in cells
    assert ["scenes", "AP", "-", "0.125"] in cells
    assert ["blocks.1.mlp", "0.550", "1.099", "50.1%"] in cells


def test_tables_of_one_task_without_sparse_layers(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(only=["digits"], **{"model.layout": "dense"})
    tables.print_results(results(recipe), recipe, {})
    out = capsys.readouterr().out
    assert "digits" in out and "scenes" not in out and "mutual" not in out
    recipe = small_recipe(only=["digits"])
    tables.print_results(results(recipe), recipe, {"blocks.1.mlp": -1e-9})
    out = capsys.readouterr().out
    assert "digits" in out and "mutual" not in out, "one task has no information to tell"


def test_units_and_where_less_is_better_are_said() -> None:
    specs = [set_task(target) for target in ("normal", "edge", "sal")]
    names = [tables.metric_name(spec, spec.row.metrics[0]) for spec in specs]
    assert names == ["mErr, degrees, less is better", "odsF", "mIoU"]
    assert tables.metric_name(set_task("keypoints2d"), "L1") == "L1, less is better"
    assert tables.metric_name(set_task("depth_zbuffer"), "delta1") == "delta1"
    assert tables.metric_name(small_recipe().tasks["scenes"], "AP") == "AP"


def test_description_counts_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe()
    tables.print_description(recipe)
    out = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in build_network(recipe).parameters())
    assert f"{total:,}" in out and max(map(len, out.splitlines())) <= 80
    assert all(task in out for task in recipe.active)


# ---------------------------------------------------------------- a whole run


class Numbers:
    """Five samples in three shards."""

    kind, classes, shard_sizes = "classification", ("a", "b"), (2, 1, 2)

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}

    def fields(self, shard: int, sample: int) -> set[str]:
        return set()

    def read(self, shard: int, sample: int) -> RawSample:
        return RawSample(f"{shard}/{sample}", {}, "shard")


@pytest.mark.parametrize(("images", "sizes"), [(1, [1, 0, 0]), (3, [2, 1, 0]), (4, [2, 1, 1]), (9, [2, 1, 2])])
def test_excerpt_is_the_start_of_a_split(images: int, sizes: list[int]) -> None:
    excerpt = report._Excerpt(Numbers(), images)
    assert excerpt.shard_sizes == sizes
    everything = ["0/0", "0/1", "1/0", "2/0", "2/1"]
    assert [raw.key for raw in excerpt] == everything[:images]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an untrained model and records. Its held-out data lie in tmp_path/data, not where it says."""
    convert("imagenet", layouts.imagenet(tmp_path / "d", "val"), tmp_path / "data" / "d", "val", progress=False)
    convert("coco", layouts.coco(tmp_path / "s", "val"), tmp_path / "data" / "s", "val", progress=False)
    convert("ade20k", layouts.ade20k(tmp_path / "t", "val"), tmp_path / "data" / "t", "val", progress=False)
    counts = {"digits": 2, "scenes": 2, "textures": 3}
    changes: dict[str, Any] = {f"tasks.{task}.num_classes": count for task, count in counts.items()}
    changes |= {"tasks.scenes.transform.eval_canvas": [24, 32], "tasks.textures.transform.resize": [24, 32]}
    recipe = small_recipe(data_root="elsewhere", **changes)
    usage = tuple(Usage(one_each(), one_each()) for _ in LAYERS)
    classes = {task: [f"class {i}" for i in range(count)] for task, count in counts.items()}
    model = ModelFile(recipe, build_network(recipe).state_dict(), classes, usage)
    write_model(tmp_path / "run" / "model.safetensors", model)
    lines = [json.dumps(record) + "\n" for record in records()]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    return tmp_path / "run"


def test_pictures_of_a_run(run: Path) -> None:
    paths = report.write_pictures(run, run.parent / "data", images=3)
    names = {f"predictions_{task}.png" for task in ("digits", "scenes", "textures")} | {"losses.png"}
    assert {path.name for path in paths} == names | {f"routing_{layer}.png" for layer in LAYERS}
    # Nothing else is left behind, and every file is a whole picture.
    assert {path.name for path in (run / "pictures").iterdir()} == {path.name for path in paths}
    for path in paths:
        assert min(Image.open(path).convert("RGB").size) > 100
    # Of the four held-out pictures the first three are on the sheet, pixel for pixel.
    sheet = pixels_of(Image.open(run / "pictures" / "predictions_textures.png"))
    files = sorted((run.parent / "t" / "images" / "val").iterdir())
    found = [holds(sheet, decode_rgb(path.read_bytes())) for path in files]
    assert len(found) == 4 and found.count(True) == 3


def holds(sheet: torch.Tensor, image: torch.Tensor) -> bool:
    """Whether the image, magnified to 240 px, lies somewhere on the sheet `[H, W, 3]`."""
    block = pixels_of(draw.picture(image, draw.fitting(image.shape[1:], 240)))
    row = block[0, ::8].reshape(-1)
    places = sheet[:, : -block.shape[1] + 1]
    starts = (places == block[0, 0]).all(-1).nonzero().tolist()
    return any(
        torch.equal(sheet[y, x : x + block.shape[1] : 8].reshape(-1), row)
        and torch.equal(sheet[y : y + block.shape[0], x : x + block.shape[1]], block)
        for y, x in starts
    )


def test_pictures_need_a_whole_run(run: Path) -> None:
    data = run.parent / "data"
    with pytest.raises(UserError, match=r"elsewhere.* does not exist"):
        report.write_pictures(run)
    with pytest.raises(UserError, match="at least 1"):
        report.write_pictures(run, data, images=0)
    with pytest.raises(UserError, match="nowhere: no such file"):
        report.write_pictures(run.parent / "nowhere", data)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        report.write_pictures(run, data)
    assert not (run / "pictures").exists()
