"""Prediction: a model file and image files in, drawn pictures and JSON out. Called by cli.py; one process, no ranks.

    OUT/<stem>.png  OUT/<stem>.json  OUT/<stem>_mask.png (classes of pixels)  OUT/<stem>_values.npy (numbers of pixels)
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from modsquad_ds import draw
from modsquad_ds.answers import ANSWERS, Answer
from modsquad_ds.config import Recipe
from modsquad_ds.data.collate import Pixels, Ready, assemble
from modsquad_ds.data.decode import Decoded, DetectionLabel, decode_rgb
from modsquad_ds.data.set_decode import SetSample
from modsquad_ds.data.set_transforms import set_eval
from modsquad_ds.data.transforms import TRANSFORMS
from modsquad_ds.data.types import SubBatch
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import BATCH_IMAGES, model_path, predict_batch
from modsquad_ds.files import write_atomic, write_json
from modsquad_ds.model_file import network_of, read_model
from modsquad_ds.parallel.launch import device
from modsquad_ds.tasks import CLASSIFICATION, DETECTION, IGNORE_INDEX, SEGMENTATION, SetTask, TaskSpec

_MAPS = {
    **dict.fromkeys((SEGMENTATION, "semantic"), "_mask.png"),
    **dict.fromkeys(("regression", "unit_vectors", "binary", "segments"), "_values.npy"),
}
"""Kind -> end of the name of the file with its map."""

class _Prepared(NamedTuple):
    path: Path
    image: Tensor
    """What the answer is about: the whole picture, or what the network sees of it."""
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
    spec = recipe.active[task]
    _check_names(images, out, spec.kind)
    for image in _followed(images, "check"):
        _decode(image)
    _make_folder(out)
    network = network_of(file, str(path)).to(device()).eval()
    names = file.classes[task]
    with torch.inference_mode():
        for batch in _batches(_prepare(image, recipe, task) for image in _followed(images, f"predict {task}")):
            sub = _together(batch, spec, _pixels(recipe))
            for one, prediction in zip(batch, predict_batch(network, task, sub), strict=True):
                facts = {"image": str(one.path), "task": task, "model": str(path)}
                _write(out, one.path.stem, facts, ANSWERS[spec.kind](one.image, prediction, names, spec))


def _followed(images: Sequence[Path], what: str) -> Iterable[Path]:
    """The images, with a progress bar on a terminal if they are many."""
    console = Console()
    return track(images, what, console=console, disable=len(images) <= BATCH_IMAGES or not console.is_terminal)


def _check_names(images: Sequence[Path], out: Path, kind: str) -> None:
    """UserError if a result would overwrite another image's result, or an image."""
    inputs = {image.resolve(): image for image in images}
    owners: dict[Path, Path] = {}
    suffixes = (".png", ".json", *((_MAPS[kind],) if kind in _MAPS else ()))
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
    if not isinstance(spec, SetTask):
        decoded = Decoded(image, _NO_LABEL[spec.kind](image))
        return _Prepared(path, image, TRANSFORMS[spec.kind].evaluate(decoded, spec.transform, _pixels(recipe)))
    try:
        ready = set_eval(SetSample(image, {}, None), (), spec.transform, _pixels(recipe))
    except ValueError as error:
        raise UserError(f"image {path}: {error}") from None
    ready = ready._replace(meta={name: value for name, value in ready.meta.items() if name != "label"})
    return _Prepared(path, ready.image if ready.meta["window"] is None else image, ready)


def _together(batch: Sequence[_Prepared], spec: TaskSpec, pixels: Pixels) -> SubBatch:
    """Images of one canvas as a batch of the task."""
    ready, keys = [one.ready for one in batch], [str(one.path) for one in batch]
    if isinstance(spec, SetTask):
        return assemble(ready, keys, pixels, None, {})
    return TRANSFORMS[spec.kind].collate(ready, keys, pixels)


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
    """The picture, the maps and, last, the JSON that names them."""
    write_atomic(out / f"{stem}.png", draw.png(answer.picture))
    facts = facts | answer.facts
    if answer.mask is not None:
        facts["mask"] = f"{stem}_mask.png"
        write_atomic(out / facts["mask"], draw.png(answer.mask))
    if answer.values is not None:
        facts["values"] = f"{stem}_values.npy"
        content = io.BytesIO()
        np.save(content, answer.values.numpy(), allow_pickle=False)
        write_atomic(out / facts["values"], content.getvalue())
    write_json(out / f"{stem}.json", facts)
