"""What a person sees of a run: RUN/pictures/*.png and tables on the terminal. Called by cli.py after evaluation.

    RUN/metrics.jsonl      -> losses.png
    RUN/model.safetensors  -> routing_<layer>.png
    both and held-out data -> predictions_<task>.png
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from modsquad_ds import draw, draw_maps
from modsquad_ds.data.decode import DetectionLabel, decode_sample
from modsquad_ds.data.loader_plan import VAL, LoaderPlan, SampleStore, check_data
from modsquad_ds.data.types import RawSample
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import model_path, predict_split
from modsquad_ds.files import write_atomic
from modsquad_ds.location import Location
from modsquad_ds.model.heads.base import Prediction
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model_file import network_of, read_model, recipe_on
from modsquad_ds.parallel.launch import device
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from modsquad_ds.runlog import Record, read_records
from modsquad_ds.tables import information_of
from modsquad_ds.tasks import CLASSIFICATION, DETECTION, IGNORE_INDEX, SEGMENTATION, SetTask

LARGEST_SIDE = 480
"""Pictures on a sheet are reduced to this many pixels."""
TOP_CLASSES = 5


def write_pictures(run: Path, data: Location | None = None, images: int = 8) -> list[Path]:
    """Write RUN/pictures/*.png, each atomically, and return their paths.

    Args:
        run: folder of a finished run.
        data: folder or URL that relative `data:` paths of the tasks start from, in place of the recipe's.
        images: how many held-out pictures of each task are shown, from the start of the split.

    Raises UserError where the run's files or the held-out data are missing or damaged.
    """
    if images < 1:
        raise UserError(f"images: {images}; expected at least 1")
    path = model_path(run)
    model = read_model(path)
    records = read_records(run / "metrics.jsonl")
    recipe = recipe_on(model, data)
    plan = loader_plan(recipe, Ranks())
    check_data(plan, splits=(VAL,))
    network = network_of(model, str(path)).to(device()).eval()
    tasks, information = tuple(recipe.active), information_of(model)
    pictures: dict[str, bytes] = {}
    for task in tasks:
        sheet = prediction_sheet(network, plan, task, model.classes[task], images)
        pictures[f"predictions_{task}.png"] = draw.png(sheet)
    pictures["losses.png"] = draw.figure_png(curves(records, tasks, tuple(information)))
    limit = f"at most log {len(tasks)} = {math.log(len(tasks)):.2f}"
    for (layer, value), usage in zip(information.items(), model.usage, strict=True):
        title = f"{layer}\nI(task; expert) = {value:.2f} nats, {limit}"
        pictures[f"routing_{layer}.png"] = draw.figure_png(draw.heat_map(usage.prob_TE, tasks, title))
    for name, content in pictures.items():
        write_atomic(run / "pictures" / name, content)
    return [run / "pictures" / name for name in pictures]


# ---------------------------------------------------------------- predictions beside ground truth


class _Excerpt:
    """The first samples of a split, as a `SampleStore` of its own."""

    def __init__(self, store: SampleStore, images: int) -> None:
        self._store, self.kind, self.classes, self.details = store, store.kind, store.classes, store.details
        self.shard_sizes: list[int] = []
        for size in store.shard_sizes:
            self.shard_sizes.append(min(size, images - sum(self.shard_sizes)))

    def read(self, shard: int, sample: int) -> RawSample:
        return self._store.read(shard, sample)

    def fields(self, shard: int, sample: int) -> Collection[str]:
        return self._store.fields(shard, sample)

    def __iter__(self) -> Iterator[RawSample]:
        for shard, size in enumerate(self.shard_sizes):
            for sample in range(size):
                yield self.read(shard, sample)


class _Shown(NamedTuple):
    """One held-out picture of a sheet."""

    image: Tensor
    """uint8 RGB `[3, H, W]`."""
    label: Any
    """As `Decoded.label`; of a task of an image set, as `SubBatch.meta` has it."""
    prediction: Prediction


def prediction_sheet(
    network: MultiTaskNetwork, plan: LoaderPlan, task: str, names: Sequence[str], images: int
) -> Image.Image:
    """The first held-out pictures of a task with ground truth and prediction, as they lie on disk or as they are scored."""
    spec = plan.tasks[task]
    shown = (_scored if isinstance(spec, SetTask) else _stored)(network, plan, task, images)
    side = min(max(draw.SMALLEST_SIDE, *(max(one.image.shape[1:]) for one in shown)), LARGEST_SIDE)
    sheet = SHEETS[spec.kind]
    rows = [sheet.panels(one, names, side) for one in shown]
    body = draw.grid(rows, sheet.headings, side)
    parts = [draw.heading(f"{task}: held-out pictures{sheet.note}", body.width, 20, bold=True), body]
    if sheet.legend is not None:
        parts.append(sheet.legend(shown, names, body.width))
    return draw.framed(draw.stacked(parts, gap=12))


def _stored(network: MultiTaskNetwork, plan: LoaderPlan, task: str, images: int) -> list[_Shown]:
    """The first samples of a split as they lie in the shards."""
    spec, store = plan.tasks[task], _Excerpt(plan.store(task, VAL), images)
    batches = predict_split(network, replace(plan, open_store=lambda folder: store), task, VAL)
    predictions = [prediction for _, of_batch in batches for prediction in of_batch]
    samples = [decode_sample(raw, spec.kind, spec.num_classes) for raw in store]
    return [_Shown(*sample, prediction) for sample, prediction in zip(samples, predictions, strict=True)]


def _scored(network: MultiTaskNetwork, plan: LoaderPlan, task: str, images: int) -> list[_Shown]:
    """The first samples that have the task's target, as the network sees them."""
    shown = []
    for sub, predictions in predict_split(network, plan, task, VAL, first=images):
        for image_CHW, meta, prediction in zip(sub.images_BCHW, sub.meta, predictions, strict=True):
            top, left, height, width = meta["window"] or (0, 0, *meta["canvas"])
            seen = image_CHW[:, top : top + height, left : left + width]
            shown += [_Shown(seen, meta["label"], prediction)] if meta["valid"] else []
    return shown[:images]


def _class_panels(shown: _Shown, names: Sequence[str], side: int) -> list[Image.Image]:
    image, truth = shown.image, shown.label
    probabilities = shown.prediction["probabilities"]
    best = probabilities.topk(min(TOP_CLASSES, len(probabilities)))
    rows = []
    for value, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        colour = draw.RIGHT if label == truth else draw.WRONG if label == shown.prediction["label"] else draw.GREY
        rows.append((names[label], value, colour))
    scale = draw.fitting(image.shape[1:], side)
    assert isinstance(truth, int)
    return [draw.captioned(draw.picture(image, scale), names[truth], side), draw.bars(rows, (side, side))]


def _box_panels(shown: _Shown, names: Sequence[str], side: int) -> list[Image.Image]:
    image, label, found = shown
    assert isinstance(label, DetectionLabel)
    truth = draw.Boxes(label.boxes, label.labels, crowds=label.ignore)
    predicted = draw.Boxes(found["boxes"], found["labels"], found["scores"])
    scale = draw.fitting(image.shape[1:], side)
    return [draw.with_boxes(image, boxes, names, scale) for boxes in (truth, predicted)]


def _mask_panels(shown: _Shown, names: Sequence[str], side: int) -> list[Image.Image]:
    image, truth, _ = shown
    scale = draw.fitting(image.shape[1:], side)
    masks = [draw.with_mask(image, mask, scale) for mask in (truth, shown.prediction["mask"])]
    return [draw.picture(image, scale), *masks]


def _mask_legend(shown: Sequence[_Shown], names: Sequence[str], width: int) -> Image.Image:
    masks = [mask for one in shown for mask in (one.label, one.prediction["mask"])]
    labels = torch.cat([mask.flatten() for mask in masks]).unique().tolist()
    entries = [(draw.colour_of(label), names[label]) for label in labels if label != IGNORE_INDEX]
    ignored = [(draw.IGNORED, "not labelled")] if IGNORE_INDEX in labels else []
    return draw.legend(entries + ignored, width, 14)


def _score_panels(shown: _Shown, names: Sequence[str], side: int) -> list[Image.Image]:
    """The likeliest classes by the label's own scores, and by the prediction's."""
    charts = []
    for scores in (shown.label["probabilities"], shown.prediction["probabilities"]):
        best = scores.topk(min(TOP_CLASSES, len(scores)))
        rows = zip(best.indices.tolist(), best.values.clamp(0, 1).tolist(), strict=True)
        charts.append(draw.bars([(names[label], value, draw.RIGHT) for label, value in rows], (side, side)))
    return [draw_maps.panel(shown.image, side), *charts]


def _class_map_panels(shown: _Shown, names: Sequence[str], side: int) -> list[Image.Image]:
    label = {"label": shown.label["labels"].to(torch.uint8)}
    return _mask_panels(shown._replace(**label), names, side)


def _class_map_legend(shown: Sequence[_Shown], names: Sequence[str], width: int) -> Image.Image:
    return _mask_legend([one._replace(label=one.label["labels"].to(torch.uint8)) for one in shown], names, width)


def _value_panels(shown: _Shown, names: Sequence[str], side: int) -> list[Image.Image]:
    truth_CHW, valid_HW = shown.label["values"], shown.label["valid"]
    span = draw_maps.span_of(truth_CHW, valid_HW)
    maps = (draw_maps.values(truth_CHW, span, valid_HW), draw_maps.values(shown.prediction["values"], span))
    return [draw_maps.panel(image, side) for image in (shown.image, *maps)]


def _binary_panels(shown: _Shown, names: Sequence[str], side: int) -> list[Image.Image]:
    truth = draw_maps.probabilities(shown.label["values"], shown.label["valid"])
    found = draw_maps.probabilities(shown.prediction["probability"])
    return [draw_maps.panel(image, side) for image in (shown.image, truth, found)]


def _segment_panels(shown: _Shown, names: Sequence[str], side: int) -> list[Image.Image]:
    maps = (draw_maps.segments(shown.label["labels"]), draw_maps.embedding(shown.prediction["embedding"]))
    return [draw_maps.panel(image, side) for image in (shown.image, *maps)]


@dataclass(frozen=True)
class Sheet:
    """How the held-out pictures of a kind of task are shown."""

    headings: tuple[str, ...]
    note: str
    panels: Callable[[_Shown, Sequence[str], int], list[Image.Image]]
    """(sample and prediction, class names, side in pixels) -> one picture per heading, none wider than the side."""
    legend: Callable[[Sequence[_Shown], Sequence[str], int], Image.Image] | None = None


_PAIR = ("ground truth", "prediction")
_TRIPLE = ("picture", *_PAIR)
SHEETS: dict[str, Sheet] = {
    CLASSIFICATION: Sheet(_PAIR, " (blue: the true class, orange: a wrong answer)", _class_panels),
    DETECTION: Sheet(_PAIR, f" (boxes that score {draw.DRAWN_SCORE} or more)", _box_panels),
    SEGMENTATION: Sheet(_TRIPLE, "", _mask_panels, _mask_legend),
    "soft_classification": Sheet(_TRIPLE, " (likeliest classes)", _score_panels),
    "semantic": Sheet(_TRIPLE, "", _class_map_panels, _class_map_legend),
    "regression": Sheet(_TRIPLE, " (black: not valid)", _value_panels),
    "unit_vectors": Sheet(_TRIPLE, " (x, y, z as red, green, blue; black: not valid)", _value_panels),
    "binary": Sheet(_TRIPLE, "", _binary_panels),
    "segments": Sheet(_TRIPLE, " (prediction: like colours are one segment)", _segment_panels),
}
"""Kind -> its sheet."""


# ---------------------------------------------------------------- curves


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that hold a finite `key`."""
    pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and up to `reach` values on either side, as many on both, so that no curve lags behind."""
    sums = list(accumulate(values, initial=0.0))
    reaches = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [(sums[i + near + 1] - sums[i - near]) / (2 * near + 1) for i, near in enumerate(reaches)]


def curves(records: Sequence[Record], tasks: Sequence[str], layers: Sequence[str]) -> Figure:
    """Loss per task, mutual information per sparse layer (where there are any), learning rate; all over steps."""
    draws: list[Callable[[Axes], None]] = [lambda axes: _loss_panel(axes, records, tasks)]
    if layers:
        draws.append(lambda axes: _information_panel(axes, records, len(tasks), layers))
    draws.append(lambda axes: _rate_panel(axes, records))
    figure = Figure(figsize=(9, 3 * len(draws) + 0.5), dpi=110, layout="constrained")
    all_axes = figure.subplots(len(draws), 1, sharex=True, squeeze=False)[:, 0]
    for axes, draw_panel in zip(all_axes, draws, strict=True):
        draw_panel(axes)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].set_xlim(left=0)
    all_axes[-1].set_xlabel("optimizer step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _loss_panel(axes: Axes, records: Sequence[Record], tasks: Sequence[str]) -> None:
    for i, task in enumerate(tasks):
        steps, values = series(records, f"loss/{task}")
        _line(axes, (steps, values), draw.colour_of(i), alpha=0.3, linewidth=1)
        _line(axes, (steps, smoothed(values, 1 + len(values) // 30)), draw.colour_of(i), linewidth=2, label=task)
    axes.set_ylim(bottom=0)
    axes.set_title("training loss of each task, smoothed (faint: as recorded)")
    axes.set_ylabel("loss")
    _legend(axes, len(tasks))


def _information_panel(axes: Axes, records: Sequence[Record], tasks: int, layers: Sequence[str]) -> None:
    limit = math.log(tasks)
    axes.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"limit log {tasks} = {limit:.2f}")
    for i, layer in enumerate(layers):
        _line(axes, series(records, f"information/{i}"), draw.colour_of(i), linewidth=1.5, label=layer)
    axes.set_ylim(bottom=0)
    axes.set_title("mutual information of task and expert")
    axes.set_ylabel("I(task; expert), nats")
    _legend(axes, len(layers) + 1)


def _rate_panel(axes: Axes, records: Sequence[Record]) -> None:
    _line(axes, series(records, "lr"), draw.BLACK, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.set_title("learning rate")
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def _legend(axes: Axes, entries: int) -> None:
    """Beside the panel, where it covers no curve."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9, ncols=1 + (entries - 1) // 14)


def _line(axes: Axes, points: tuple[list[int], list[float]], colour: draw.Colour, **style: Any) -> None:
    """A curve; a single point, of which no line can be drawn, as a dot."""
    red, green, blue = colour
    axes.plot(*points, color=(red / 255, green / 255, blue / 255), marker="o" if len(points[0]) == 1 else None, **style)
