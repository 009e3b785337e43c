"""Readers of the datasets with one label per image: a folder on disk -> `Source`, cheap sample descriptors. The data start here.

Layouts: `imagenet` (class folders), `coco` (instances json + images), `ade20k` (images + annotations). A reader only
lists files and parses the annotation file; reading and checking the samples is `samples.encode`, in worker processes.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from modsquad_ds.data.samples import IMAGE_EXTENSIONS, BadSample, CocoRecord, Labels, Sample, key_problem
from modsquad_ds.errors import UserError
from modsquad_ds.tasks import CLASSIFICATION, DETECTION, IGNORE_INDEX, SEGMENTATION

UNREAD_IMAGES = (".avif", ".bmp", ".heic", ".jp2", ".ppm", ".tif", ".tiff")
"""Picture files that are reported as bad, where other files (README, .DS_Store) are passed over."""
ADE20K_CLASSES = 150


class Options(NamedTuple):
    """What a user may say of a layout besides its folder and split. None: not given."""

    split_list: str | None = None
    """Name or file of the list that says what is of which split."""
    targets: tuple[str, ...] | None = None
    """Targets to read, of an image set's."""


NO_OPTIONS = Options()


@dataclass(frozen=True)
class Source:
    """A split of a dataset, listed but not read."""

    kind: str
    layout: str
    root: Path
    split: str
    """As asked for; `details["source_split"]` is the name on disk."""
    classes: tuple[str, ...]
    """Name of each 0-based label."""
    samples: tuple[Sample, ...]
    """Sorted by key; keys are unique and fit for a tar."""
    bad: tuple[BadSample, ...]
    """What the listing alone already ruled out."""
    details: dict[str, Any] = field(default_factory=dict)
    """What this layout adds to the index."""
    targets: tuple[str, ...] = ()
    """Image sets: what the images may be labelled with, rows of `targets.py`."""

    @property
    def labels(self) -> Labels:
        """What `samples.encode` needs to know."""
        category_ids = {number: label for label, number in enumerate(self.details.get("category_ids", ()))}
        return Labels(self.kind, self.layout, len(self.classes), category_ids)


# ---------------------------------------------------------------- listing


def files_in(folder: Path) -> list[str]:
    """Names of a folder's files, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _images(names: Iterable[str], prefix: str, bad: list[BadSample]) -> list[str]:
    """Names of the readable image files; picture formats that are not read go to `bad`, other files are passed over."""
    images = []
    for name in names:
        extension = Path(name).suffix.lower()
        if extension in IMAGE_EXTENSIONS:
            images.append(name)
        elif extension in UNREAD_IMAGES:
            reason = f"{extension} files are not read, expected {', '.join(IMAGE_EXTENSIONS)}"
            bad.append(BadSample(prefix + name, reason))
    return images


def _stem(name: str) -> str:
    """Name without its last extension (`a.b.jpg` -> `a.b`, which `key_problem` then refuses)."""
    return name[: len(name) - len(Path(name).suffix)]


def usable(samples: Iterable[Sample], bad: list[BadSample]) -> tuple[Sample, ...]:
    """Samples sorted by key. Those whose key cannot be stored, or was taken by an earlier file, go to `bad` instead."""
    taken: dict[str, Sample] = {}
    for sample in sorted(samples, key=lambda sample: (sample.key, sample.image)):
        problem = key_problem(sample.key)
        if problem is None and sample.key in taken:
            problem = f"has the same key {sample.key!r} as {taken[sample.key].image}: rename one of them"
        if problem is None:
            taken[sample.key] = sample
        else:
            bad.append(BadSample(sample.image, problem))
    return tuple(taken.values())


def _first_existing(candidates: Iterable[str], exists: Callable[[str], bool]) -> str | None:
    return next((candidate for candidate in candidates if exists(candidate)), None)


# ---------------------------------------------------------------- imagenet


def read_imagenet(src: Path, split: str) -> Source:
    """`SRC/<split>/<class folder>/*.JPEG`, or `SRC/<class folder>/` where there is no split folder at all.

    Classes are the sorted folder names, the label is the folder's rank, the key is `class folder/stem`.
    """
    prefix = f"{split}/" if (src / split).is_dir() else ""
    root = src / prefix
    classes = _folders(root)
    bad: list[BadSample] = [
        BadSample(prefix + name, "image lies outside a class folder") for name in _images(files_in(root), prefix, [])
    ]
    samples = []
    for label, name in enumerate(classes):
        below = f"{prefix}{name}/"
        bad += [BadSample(below + inner, "folder inside a class folder") for inner in _folders(root / name)]
        for image in _images(files_in(root / name), below, bad):
            samples.append(Sample(f"{name}/{_stem(image)}", below + image, label))
    if not samples:
        wanted = f"{src / split}/<class folder>/*.JPEG (or {src}/<class folder>/*.JPEG)"
        raise UserError(f"no image in a class folder of {root} for split {split!r}: expected {wanted}")
    details = {"source_split": prefix.rstrip("/")}
    return Source(CLASSIFICATION, "imagenet", src, split, tuple(classes), usable(samples, bad), tuple(bad), details)


# ---------------------------------------------------------------- coco


def read_coco(src: Path, split: str) -> Source:
    """`SRC/annotations/instances_<split>.json` and `SRC/<split>/`; `train`, `val` also mean `train2017`, `val2017`.

    The json decides what belongs to the split: images that it does not list are left out, images without annotation
    are kept. Categories sorted by id become labels 0, 1, ...; the key is the stem of the image's file name.
    """
    names = [split, f"{split}2017"] if split in ("train", "val") else [split]
    found = _first_existing(names, lambda name: (src / "annotations" / f"instances_{name}.json").is_file())
    if found is None:
        raise UserError(f"{src / 'annotations'} has no instances_{split}.json: expected COCO's annotations there")
    if not (src / found).is_dir():
        raise UserError(f"{src / found} does not exist: expected the images of instances_{found}.json there")
    file = f"annotations/instances_{found}.json"
    content = _coco_json(src / file)
    bad: list[BadSample] = []
    categories = _coco_categories(src / file, content["categories"])
    images = _coco_images(content["images"], file, found, bad)
    _attach_annotations(images, content["annotations"], file, found, bad)
    kept = [(name, record) for name, record in images.values() if record is not None]
    samples = [Sample(_stem(Path(name).name), f"{found}/{name}", record) for name, record in kept]
    details = {"source_split": found, "category_ids": list(categories), "annotation_file": file}
    classes = tuple(categories.values())
    return Source(DETECTION, "coco", src, split, classes, usable(samples, bad), tuple(bad), details)


def _coco_json(path: Path) -> dict[str, Any]:
    """Parse an instances file; polygons and run-lengths, most of its bulk, are dropped as they are met."""

    def without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop("segmentation", None)
        return entry

    try:
        content = json.loads(path.read_bytes(), object_hook=without_segmentation)
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise UserError(f"{place}: not JSON ({error.msg}): is the file complete?") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}: expected COCO's instances json") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{path}: has no list {name!r} at its top: expected COCO's instances json")
        for number, entry in enumerate(content[name]):
            if not isinstance(entry, dict):
                raise UserError(f"{path}: {name}[{number}] is {entry!r:.60}, expected an object")
    return content


def _coco_categories(path: Path, entries: list[dict[str, Any]]) -> dict[int, str]:
    """Id -> name, sorted by id."""
    categories: dict[int, str] = {}
    for place, entry in enumerate(entries):
        number, name = entry.get("id"), entry.get("name")
        if type(number) is not int or not isinstance(name, str):
            raise UserError(f"{path}: categories[{place}] needs an integer 'id' and a text 'name', has {entry!r:.80}")
        if number in categories:
            raise UserError(f"{path}: category id {number} stands for both {categories[number]!r} and {name!r}")
        categories[number] = name
    if not categories:
        raise UserError(f"{path}: 'categories' is empty: expected at least one class")
    return dict(sorted(categories.items()))


_CocoImages = dict[int, tuple[str, CocoRecord | None]]
"""Image id -> file name and record; the record is None for an image that is already reported as bad."""


def _coco_images(entries: list[dict[str, Any]], file: str, folder: str, bad: list[BadSample]) -> _CocoImages:
    images: _CocoImages = {}
    for place, entry in enumerate(entries):
        number, name = entry.get("id"), entry.get("file_name")
        size = entry.get("width"), entry.get("height")
        if type(number) is not int or not isinstance(name, str) or any(type(side) is not int for side in size):
            reason = f"images[{place}] needs an integer id, width and height and a file_name, has {entry!r:.120}"
            bad.append(BadSample(file, reason))
        elif number in images:  # which of the two the annotations mean cannot be told
            bad.append(BadSample(f"{folder}/{name}", f"image id {number} also belongs to {images[number][0]}"))
            _rule_out(images, number, folder, f"image id {number} also belongs to {name}", bad)
        else:
            images[number] = name, CocoRecord(number, entry["width"], entry["height"], [])
            if problem := _image_name_problem(name):
                _rule_out(images, number, folder, problem, bad)
    return images


def _rule_out(images: _CocoImages, number: int, folder: str, reason: str, bad: list[BadSample]) -> None:
    """Report an image as bad, once, whatever else is found about it."""
    name, record = images[number]
    if record is not None:
        images[number] = name, None
        bad.append(BadSample(f"{folder}/{name}", reason))


def _image_name_problem(name: str) -> str | None:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return f"file_name {name!r} points outside the image folder"
    if path.suffix.lower() not in IMAGE_EXTENSIONS:
        return f"file_name {name!r} is no image file, expected {', '.join(IMAGE_EXTENSIONS)}"
    return None


def _attach_annotations(
    images: _CocoImages, entries: list[dict[str, Any]], file: str, folder: str, bad: list[BadSample]
) -> None:
    """Hand each annotation to its image's record. An image that would lose one of its objects by that is ruled out."""
    seen: set[int] = set()
    for place, entry in enumerate(entries):
        number, image_id = entry.get("id"), entry.get("image_id")
        if type(image_id) is not int or image_id not in images:
            reason = f"annotation {number!r:.40} belongs to image_id {image_id!r:.40}, which 'images' does not list"
            bad.append(BadSample(file, reason))
        elif type(number) is not int:
            _rule_out(images, image_id, folder, f"annotations[{place}] has id {number!r:.40}, expected an integer", bad)
        elif number in seen:
            _rule_out(images, image_id, folder, f"annotation id {number} is used twice", bad)
        else:
            seen.add(number)
            record = images[image_id][1]
            if record is not None:
                record.annotations.append(entry)


# ---------------------------------------------------------------- ade20k


def read_ade20k(src: Path, split: str) -> Source:
    """`SRC/images/<split>/*.jpg`, `SRC/annotations/<split>/*.png`; `train`, `val` also mean `training`, `validation`.

    Mask values: 0 no label, 1..n the classes; they become 255 and 0..n-1 (reduce zero label). Keys are file stems.
    """
    names = {"train": ["train", "training"], "val": ["val", "validation"]}.get(split, [split])
    found = _first_existing(names, lambda name: (src / "images" / name).is_dir())
    if found is None:
        raise UserError(f"{src / 'images'} has no folder {' or '.join(names)}: expected the images of the split there")
    if not (src / "annotations" / found).is_dir():
        raise UserError(f"{src / 'annotations' / found} does not exist: expected the masks of images/{found} there")
    bad: list[BadSample] = []
    image_prefix, mask_prefix = f"images/{found}/", f"annotations/{found}/"
    images = _images(files_in(src / image_prefix), image_prefix, bad)
    masks = {_stem(name): name for name in files_in(src / mask_prefix) if Path(name).suffix.lower() == ".png"}
    stems = {_stem(name) for name in images}
    samples = []
    for name in images:
        if _stem(name) in masks:
            samples.append(Sample(_stem(name), image_prefix + name, mask_prefix + masks[_stem(name)]))
        else:
            bad.append(BadSample(image_prefix + name, f"image has no mask {mask_prefix}{_stem(name)}.png"))
    for stem, name in masks.items():
        if stem not in stems:
            bad.append(BadSample(mask_prefix + name, f"mask has no image {image_prefix}{stem}.jpg"))
    details = {"source_split": found, "reduce_zero_label": True}
    return Source(SEGMENTATION, "ade20k", src, split, _ade20k_classes(src), usable(samples, bad), tuple(bad), details)


def _ade20k_classes(src: Path) -> tuple[str, ...]:
    """Names from `objectInfo150.txt` (tab separated, last column `Name`), `classes.txt` (one a line), or made up."""
    table, plain = src / "objectInfo150.txt", src / "classes.txt"
    if table.is_file():
        rows = [line.split("\t") for line in lines_of(table)]
        if not rows or rows[0][-1].strip() != "Name":
            raise UserError(f"{table}, line 1: expected ADE20K's header, tab separated, last column 'Name'")
        for place, row in enumerate(rows[1:], start=1):
            if row[0].strip() != str(place):
                raise UserError(f"{table}, line {place + 1}: index is {row[0].strip()!r}, expected {place}")
        names = tuple(row[-1].strip() for row in rows[1:])
    elif plain.is_file():
        names = tuple(line.strip() for line in lines_of(plain))
    else:
        names = tuple(f"class_{number:03d}" for number in range(ADE20K_CLASSES))
    if not 0 < len(names) < IGNORE_INDEX:
        file = table if table.is_file() else plain
        raise UserError(f"{file}: {len(names)} classes, expected 1 to {IGNORE_INDEX - 1}")
    return names


def lines_of(path: Path) -> list[str]:
    """Lines of a text file that are not blank. UserError if it is not UTF-8."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}") from error
