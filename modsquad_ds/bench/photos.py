"""Shards of real photographs for the loader's benchmark, as large as the sets that the heterogeneous recipe names.

Pixels come from the photographs that scikit-learn and scikit-image install: crops of them, scaled to the sets' usual sizes.
The JPEG quality is chosen so that files are about as large as those of the sets: ILSVRC2012's training images have 115 kB
in the mean, COCO's train2017 163 kB, ADE20K's about 40 kB (bytes of the archives over images). Boxes and masks are made up;
only their cost matters here.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modsquad_ds.data.convert import convert
from modsquad_ds.data.quickstart import PHOTOS, load_pictures

Pixels = NDArray[np.uint8]


class Look(NamedTuple):
    """Images of one set."""

    height: int
    width: int
    kilobytes: int
    """Mean size of the set's files."""


LOOKS = {"imagenet": Look(375, 500, 115), "coco": Look(480, 640, 163), "ade20k": Look(512, 683, 40)}
CLASSES = {"imagenet": 1000, "coco": 80, "ade20k": 150}
BOXES = 7
"""Boxes per image, as in COCO."""
REGIONS = 8
"""Vertical stripes of classes in a mask."""


def write_shards(folder: Path, images: int, seed: int = 0) -> None:
    """Write FOLDER/shards/{imagenet,coco,ade20k}/train of `images` images each. UserError without the quickstart's packages."""
    pictures = load_pictures()
    photos = [pictures[name] for name in PHOTOS]
    for number, (layout, write) in enumerate((("imagenet", _imagenet), ("coco", _coco), ("ade20k", _ade20k))):
        source = folder / "sources" / layout
        rng = np.random.default_rng([seed, number])
        write(source, photograph(photos, LOOKS[layout], images, rng), rng)
        convert(layout, source, folder / "shards" / layout, "train", workers=1, progress=False)


def photograph(photos: list[Pixels], look: Look, count: int, rng: np.random.Generator) -> Iterator[bytes]:
    """`count` JPEG files: a random crop of each photograph in turn, scaled to the look's size and about its file size."""
    for index in range(count):
        photo = photos[index % len(photos)]
        share = rng.uniform(0.7, 1.0)
        height = int(share * min(photo.shape[0], photo.shape[1] * look.height / look.width))
        width = int(height * look.width / look.height)
        top = int(rng.integers(photo.shape[0] - height + 1))
        left = int(rng.integers(photo.shape[1] - width + 1))
        crop = Image.fromarray(photo[top : top + height, left : left + width])
        yield _jpeg(crop.resize((look.width, look.height), Image.Resampling.BICUBIC), look.kilobytes)


def _jpeg(image: Image.Image, kilobytes: int) -> bytes:
    """The file of the largest quality that is no larger than `kilobytes`, or of quality 50."""
    low, high = 50, 100
    best = b""
    while low <= high:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if not best or buffer.tell() <= 1000 * kilobytes:
            best = buffer.getvalue()
        if buffer.tell() <= 1000 * kilobytes:
            low = quality + 1
        else:
            high = quality - 1
    return best


def _imagenet(source: Path, files: Iterator[bytes], rng: np.random.Generator) -> None:
    for label in range(CLASSES["imagenet"]):
        (source / "train" / f"n{label:04d}").mkdir(parents=True)
    for index, data in enumerate(files):
        label = int(rng.integers(CLASSES["imagenet"]))
        (source / "train" / f"n{label:04d}" / f"{index:05d}.jpg").write_bytes(data)


def _coco(source: Path, files: Iterator[bytes], rng: np.random.Generator) -> None:
    look = LOOKS["coco"]
    (source / "train").mkdir(parents=True)
    (source / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, data in enumerate(files, start=1):
        name = f"{index:012d}.jpg"
        (source / "train" / name).write_bytes(data)
        images.append({"id": index, "file_name": name, "height": look.height, "width": look.width})
        for _ in range(BOXES):
            left, top = rng.uniform(0, look.width - 40), rng.uniform(0, look.height - 40)
            width, height = rng.uniform(20, look.width - left), rng.uniform(20, look.height - top)
            row = {"bbox": [left, top, width, height], "category_id": int(rng.integers(1, CLASSES["coco"] + 1))}
            annotations.append(row | {"id": len(annotations) + 1, "image_id": index, "iscrowd": 0, "area": width * height})
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES["coco"] + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (source / "annotations" / "instances_train.json").write_text(json.dumps(content), encoding="ascii")


def _ade20k(source: Path, files: Iterator[bytes], rng: np.random.Generator) -> None:
    look = LOOKS["ade20k"]
    images, masks = source / "images" / "training", source / "annotations" / "training"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for index, data in enumerate(files):
        (images / f"{index:05d}.jpg").write_bytes(data)
        stripes = rng.integers(0, CLASSES["ade20k"] + 1, size=REGIONS, dtype=np.uint8)
        columns = stripes[np.arange(look.width) * REGIONS // look.width]
        Image.fromarray(np.tile(columns, (look.height, 1))).save(masks / f"{index:05d}.png")
