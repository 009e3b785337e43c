"""What `predict` says of one image, by kind of task: a drawn picture, facts for the JSON, and maps. predict.py writes them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from modsquad_ds import draw, draw_maps
from modsquad_ds.data.set_transforms import scale_of
from modsquad_ds.metrics.maps import metres_of, raw_of
from modsquad_ds.model.heads.base import Prediction
from modsquad_ds.tasks import CLASSIFICATION, DETECTION, SEGMENTATION, SetTask, TaskSpec

TOP_CLASSES = 5


class Answer(NamedTuple):
    """What is written about one image."""

    picture: Image.Image
    facts: dict[str, Any]
    """The task's part of the JSON."""
    mask: Image.Image | None = None
    """Class of every pixel, 8-bit."""
    values: Tensor | None = None
    """float32: numbers of every pixel, `[C, H, W]` or `[H, W]`."""


def _class_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str], spec: TaskSpec) -> Answer:
    best = prediction["probabilities"].topk(min(TOP_CLASSES, len(names)))
    top = [
        {"class": label, "name": names[label], "probability": value}
        for value, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    text = f"{top[0]['name']} ({_percent(top[0]['probability'])})"
    drawn = draw.captioned(draw.picture(image_CHW, draw.enlargement(image_CHW.shape[1:])), text)
    return Answer(drawn, {"label": top[0]["name"], "top": top})


def _box_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str], spec: TaskSpec) -> Answer:
    found = draw.Boxes(prediction["boxes"], prediction["labels"], prediction["scores"])
    rows = zip(found.boxes.tolist(), prediction["scores"].tolist(), found.labels.tolist(), strict=True)
    boxes = [{"box": box, "score": score, "class": label, "name": names[label]} for box, score, label in rows]
    drawn = draw.with_boxes(image_CHW, found, names, draw.enlargement(image_CHW.shape[1:]))
    shown = sum(box["score"] >= draw.DRAWN_SCORE for box in boxes)
    drawn = draw.captioned(drawn, f"{shown} of {len(boxes)} boxes score {draw.DRAWN_SCORE} or more")
    return Answer(drawn, {"boxes": boxes, "box_format": "x1, y1, x2, y2 in pixels"})


def _mask_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str], spec: TaskSpec) -> Answer:
    mask_HW = prediction["mask"]
    counts = mask_HW.flatten().bincount(minlength=len(names))
    share = [
        {"class": label, "name": names[label], "share": int(counts[label]) / mask_HW.numel()}
        for label in counts.argsort(descending=True, stable=True).tolist()
        if counts[label]
    ]
    drawn = draw.with_mask(image_CHW, mask_HW, draw.enlargement(image_CHW.shape[1:]))
    entries = [(draw.colour_of(row["class"]), f"{row['name']} {_percent(row['share'])}") for row in share]
    key = draw.legend(entries, max(drawn.width, draw.SMALLEST_SIDE), draw.text_size(max(drawn.size)))
    return Answer(draw.stacked([drawn, key], gap=4), {"share": share}, Image.fromarray(mask_HW.numpy()))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "< 0.1 %"


# ---------------------------------------------------------------- tasks of image sets


def _value_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str], spec: TaskSpec) -> Answer:
    """Raw numbers as the dataset stores them; depths in metres."""
    assert isinstance(spec, SetTask)
    row, scaled_CHW = spec.row, prediction["values"]
    if row.metres is None:
        values_CHW, unit = raw_of(scaled_CHW, scale_of(row)), "raw numbers, as the dataset stores them"
    else:
        values_CHW, unit = metres_of(scaled_CHW, row), "metres"
    flat_CN = values_CHW.flatten(1)
    facts = {"unit": unit, "least": flat_CN.amin(1).tolist(), "mean": flat_CN.mean(1).tolist(), "most": flat_CN.amax(1).tolist()}
    everywhere_HW = torch.ones(scaled_CHW.shape[1:], dtype=torch.bool)
    drawn = draw_maps.values(scaled_CHW, draw_maps.span_of(scaled_CHW, everywhere_HW))
    return Answer(_beside(image_CHW, drawn), facts, values=values_CHW)


def _direction_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str], spec: TaskSpec) -> Answer:
    values_CHW = prediction["values"]
    facts = {"unit": "x to the right, y and z of a unit vector", "mean": values_CHW.flatten(1).mean(1).tolist()}
    return Answer(_beside(image_CHW, draw_maps.values(values_CHW, (-1.0, 1.0))), facts, values=values_CHW)


def _probability_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str], spec: TaskSpec) -> Answer:
    share_HW = prediction["probability"]
    facts = {"unit": "probability", "share_above_half": (share_HW > 0.5).float().mean().item()}
    return Answer(_beside(image_CHW, draw_maps.probabilities(share_HW)), facts, values=share_HW)


def _segment_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str], spec: TaskSpec) -> Answer:
    """Pixels belong together where the squared distance of their vectors is below log 3."""
    vectors_DHW = prediction["embedding"]
    facts = {"unit": "embedding; one segment where the squared distance is below log 3", "cells": list(vectors_DHW.shape[1:])}
    return Answer(_beside(image_CHW, draw_maps.embedding(vectors_DHW)), facts, values=vectors_DHW)


def _beside(image_CHW: Tensor, map_CHW: Tensor) -> Image.Image:
    """The picture and its map at the same size."""
    shown = draw.picture(image_CHW, draw.enlargement(image_CHW.shape[1:]))
    drawn = draw.picture(map_CHW).resize(shown.size, Image.Resampling.NEAREST)
    return draw.beside([shown, drawn], gap=6)


ANSWERS: dict[str, Callable[[Tensor, Prediction, Sequence[str], TaskSpec], Answer]] = {
    CLASSIFICATION: _class_answer,
    DETECTION: _box_answer,
    SEGMENTATION: _mask_answer,
    "soft_classification": _class_answer,
    "semantic": _mask_answer,
    "regression": _value_answer,
    "unit_vectors": _direction_answer,
    "binary": _probability_answer,
    "segments": _segment_answer,
}
"""Kind -> (image, prediction, class names, task) -> what is written."""
