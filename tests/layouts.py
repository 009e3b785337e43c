"""Small datasets in the three real layouts, for the tests of the readers, the shards and the converter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from modsquad_ds.data.convert import convert
from modsquad_ds.data.samples import BadSampleError, encode
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.data.sources import Source
from modsquad_ds.data.types import RawSample
from modsquad_ds.errors import UserError

HEIGHT, WIDTH = 20, 30


def picture(seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Image.Image:
    """Random RGB pixels of `size` (height, width)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def imagenet(src: Path, split: str = "train", per_class: int = 4) -> Path:
    """Two classes, `n01` and `n02`; one file has ImageNet's upper-case extension, one is a PNG."""
    for label, folder in enumerate(("n01", "n02")):
        for number in range(per_class):
            extension = ("JPEG", "png", "jpg", "jpeg")[number % 4]
            file_format = "PNG" if extension == "png" else "JPEG"
            path = src / split / folder / f"{folder}_{number}.{extension}"
            save(picture(10 * label + number), path, format=file_format)
    return src


def coco_content(images: int = 4) -> dict[str, Any]:
    """Categories 7 `cat` and 3 `dog`; image i holds i annotations; the last annotation of image 3 is a crowd."""
    rows = [
        {"id": 100 + i, "file_name": f"{i:06d}.jpg", "width": WIDTH, "height": HEIGHT, "license": 1}
        for i in range(images)
    ]
    annotations = [
        {
            "id": 10 * i + j,
            "image_id": 100 + i,
            "category_id": (7, 3)[j % 2],
            "bbox": [1.5 + j, 2.0, 5.0, 6.5],
            "area": 20.25,
            "iscrowd": int(i == 3 and j == 2),
            "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]],
        }
        for i in range(images)
        for j in range(i)
    ]
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    return {"images": rows, "annotations": annotations, "categories": categories}


def coco(src: Path, split: str = "train2017", content: dict[str, Any] | None = None) -> Path:
    """Images as `content` lists them (`coco_content()` without it), all of WIDTH x HEIGHT pixels."""
    content = coco_content() if content is None else content
    (src / split).mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(content["images"]):
        if Path(str(row.get("file_name"))).suffix == ".jpg":
            save(picture(number), src / split / row["file_name"])
    write_json(src, split, content)
    return src


def write_json(src: Path, split: str, content: dict[str, Any]) -> Path:
    path = src / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def mask(values: list[int], size: tuple[int, int] = (HEIGHT, WIDTH)) -> Image.Image:
    """A grey mask of `size` whose columns repeat `values`."""
    return Image.fromarray(np.resize(np.array(values, dtype=np.uint8), size))


def ade20k(src: Path, split: str = "training", count: int = 4) -> Path:
    """Masks of 0, 1, 2, 3 and 255; three classes named in `classes.txt`."""
    for number in range(count):
        save(picture(number), src / "images" / split / f"ADE_{number}.jpg")
        save(mask([0, 1, 2, 3, 255]), src / "annotations" / split / f"ADE_{number}.png")
    (src / "classes.txt").write_text("wall\nsky\ntree\n")
    return src


MAKERS = {"imagenet": imagenet, "coco": coco, "ade20k": ade20k}


def made(layout: str, root: Path, samples_per_shard: int = 3, **options: Any) -> Path:
    """Convert the layout's small dataset; return the shard folder."""
    src = MAKERS[layout](root / "src")
    convert(layout, src, root / "out", "train", samples_per_shard=samples_per_shard, progress=False, **options)
    return root / "out" / "train"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(UserError, match=pattern):
        raise UserError(text)


def bad_of(source: Source) -> dict[str, str]:
    """File -> reason of everything bad, from the listing and from checking each sample."""
    found = dict(source.bad)
    for sample in source.samples:
        try:
            encode(sample, source.root, source.labels)
        except BadSampleError as error:
            found[error.bad.file] = error.bad.reason
    return found


def label_of(source: Source, key: str) -> Any:
    sample = next(sample for sample in source.samples if sample.key == key)
    return json.loads(encode(sample, source.root, source.labels)["json"])


def all_samples(shards: ShardSet) -> list[RawSample]:
    return [shards.read(shard, place) for shard, size in enumerate(shards.shard_sizes) for place in range(size)]


def by_webdataset(folder: Path) -> list[dict[str, Any]]:
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(tars, shardshuffle=False))
