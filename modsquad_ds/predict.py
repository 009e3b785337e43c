"""Prediction: a model file and image files in, drawn pictures and JSON out. Called by cli.py; one process, no ranks.

    OUT/<stem>.png  OUT/<stem>.json  and for segmentation OUT/<stem>_mask.png
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from modsquad_ds import draw
from modsquad_ds.config import Recipe
from modsquad_ds.data.collate import Pixels, Ready
from modsquad_ds.data.decode import Decoded, DetectionLabel, decode_rgb
from modsquad_ds.data.transforms import TRANSFORMS
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import BATCH_IMAGES, model_path, predict_batch
from modsquad_ds.files import write_atomic, write_json
from modsquad_ds.model.heads.base import Prediction
from modsquad_ds.model_file import network_of, read_model
from modsquad_ds.parallel.launch import device
from modsquad_ds.tasks import CLASSIFICATION, DETECTION, IGNORE_INDEX, SEGMENTATION

TOP_CLASSES = 5


class Answer(NamedTuple):
    """What is written about one image."""

    picture: Image.Image
    facts: dict[str, Any]
    """The task's part of the JSON."""
    mask: Image.Image | None = None
    """Class of every pixel, 8-bit."""


class _Prepared(NamedTuple):
    path: Path
    image: Tensor
    ready: Ready


def predict(model: Path, images: list[Path], task: str, out: Path) -> None:
    """Write OUT/<stem>.png (the picture with label, boxes or mask) and OUT/<stem>.json for every image.

    Images are transformed as the task's evaluation transforms them. All are checked before the first file is written.
    Raises UserError for an unknown task, an image that is missing or cannot be decoded, results that would overwrite
    each other or an image, and a folder that cannot be written.

    Args:
        model: a model file, or a run folder.
        images: files of the formats that shards hold: JPEG, PNG, WebP, GIF (its first frame).
        task: name of one of the model's tasks.
        out: folder for the results; made if it is not there. Older results of the same names are replaced.
    """
    path = model_path(model)
    file = read_model(path)
    recipe = file.recipe
    if task not in recipe.active:
        raise UserError(f"task {task!r}: {path} has no such task; its tasks are: {', '.join(recipe.active)}")
    if not images:
        raise UserError("no images given; name at least one image file")
    kind = recipe.active[task].kind
    _check_names(images, out, kind)
    for image in _followed(images, "check"):
        _decode(image)
    _make_folder(out)
    network = network_of(file, str(path)).to(device()).eval()
    names, row = file.classes[task], TRANSFORMS[kind]
    with torch.inference_mode():
        for batch in _batches(_prepare(image, recipe, task) for image in _followed(images, f"predict {task}")):
            sub = row.collate([one.ready for one in batch], [str(one.path) for one in batch], _pixels(recipe))
            for one, prediction in zip(batch, predict_batch(network, task, sub), strict=True):
                facts = {"image": str(one.path), "task": task, "model": str(path)}
                _write(out, one.path.stem, facts, ANSWERS[kind](one.image, prediction, names))


def _followed(images: Sequence[Path], what: str) -> Iterable[Path]:
    """The images, with a progress bar on a terminal if they are many."""
    console = Console()
    return track(images, what, console=console, disable=len(images) <= BATCH_IMAGES or not console.is_terminal)


def _check_names(images: Sequence[Path], out: Path, kind: str) -> None:
    """UserError if a result would overwrite another image's result, or an image."""
    inputs = {image.resolve(): image for image in images}
    owners: dict[Path, Path] = {}
    suffixes = (".png", ".json", *(("_mask.png",) if kind == SEGMENTATION else ()))
    for image in images:
        for target in (out / f"{image.stem}{suffix}" for suffix in suffixes):
            if target in owners:
                both = f"images {owners[target]} and {image}"
                raise UserError(f"{both}: both would write {target}; rename one, or predict them into two folders")
            owners[target] = image
            if target.resolve() in inputs:
                raise UserError(f"out {out}: the result {target} would overwrite an image; give another folder")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {out}: cannot be made a folder ({error.strerror}); give another one") from None


def _decode(path: Path) -> Tensor:
    """uint8 RGB `[3, H, W]`. UserError naming the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror})") from None
    try:
        return decode_rgb(data)
    except (RuntimeError, OSError, ValueError):
        raise UserError(f"image {path}: cannot be decoded; expected an intact JPEG, PNG, WebP or GIF file") from None


def _prepare(path: Path, recipe: Recipe, task: str) -> _Prepared:
    """Decode and transform as the task's evaluation does, with an empty label where a shard holds one."""
    spec, image = recipe.active[task], _decode(path)
    decoded = Decoded(image, _NO_LABEL[spec.kind](image))
    return _Prepared(path, image, TRANSFORMS[spec.kind].evaluate(decoded, spec.transform, _pixels(recipe)))


def _pixels(recipe: Recipe) -> Pixels:
    return Pixels(recipe.mean, recipe.std, recipe.model.shape.patch)


_NO_LABEL: dict[str, Callable[[Tensor], int | DetectionLabel | Tensor]] = {
    CLASSIFICATION: lambda image: 0,
    DETECTION: lambda image: DetectionLabel(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 4), {}),
    SEGMENTATION: lambda image: torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8),
}
"""Kind -> what stands in for the label, which no prediction looks at."""


def _batches(prepared: Iterable[_Prepared]) -> Iterator[list[_Prepared]]:
    """Neighbours of one canvas together: padding to a common one would change what the model sees."""
    for _, same in groupby(prepared, key=lambda one: one.ready.image.shape):
        while batch := list(islice(same, BATCH_IMAGES)):
            yield batch


def _write(out: Path, stem: str, facts: dict[str, Any], answer: Answer) -> None:
    """The picture, the mask and, last, the JSON that names them."""
    write_atomic(out / f"{stem}.png", draw.png(answer.picture))
    facts = facts | answer.facts
    if answer.mask is not None:
        facts["mask"] = f"{stem}_mask.png"
        write_atomic(out / facts["mask"], draw.png(answer.mask))
    write_json(out / f"{stem}.json", facts)


# ---------------------------------------------------------------- answers by kind


def _class_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str]) -> Answer:
    best = prediction["probabilities"].topk(min(TOP_CLASSES, len(names)))
    top = [
        {"class": label, "name": names[label], "probability": value}
        for value, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    text = f"{top[0]['name']} ({_percent(top[0]['probability'])})"
    drawn = draw.captioned(draw.picture(image_CHW, draw.enlargement(image_CHW.shape[1:])), text)
    return Answer(drawn, {"label": top[0]["name"], "top": top})


def _box_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str]) -> Answer:
    found = draw.Boxes(prediction["boxes"], prediction["labels"], prediction["scores"])
    rows = zip(found.boxes.tolist(), prediction["scores"].tolist(), found.labels.tolist(), strict=True)
    boxes = [{"box": box, "score": score, "class": label, "name": names[label]} for box, score, label in rows]
    drawn = draw.with_boxes(image_CHW, found, names, draw.enlargement(image_CHW.shape[1:]))
    shown = sum(box["score"] >= draw.DRAWN_SCORE for box in boxes)
    drawn = draw.captioned(drawn, f"{shown} of {len(boxes)} boxes score {draw.DRAWN_SCORE} or more")
    return Answer(drawn, {"boxes": boxes, "box_format": "x1, y1, x2, y2 in pixels"})


def _mask_answer(image_CHW: Tensor, prediction: Prediction, names: Sequence[str]) -> Answer:
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


ANSWERS: dict[str, Callable[[Tensor, Prediction, Sequence[str]], Answer]] = {
    CLASSIFICATION: _class_answer,
    DETECTION: _box_answer,
    SEGMENTATION: _mask_answer,
}
"""Kind -> (image, prediction, class names) -> what is written."""
