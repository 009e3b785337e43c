"""The quickstart's small datasets: real pixels from installed packages, in the real layouts, then `convert`ed.

    OUT/sources/digits    ImageNet folders: scikit-learn's handwritten digits, 1437 train, 360 val
    OUT/sources/scenes    COCO: one to three of those digits drawn on 48 px crops of photos (composed, not photographed)
    OUT/sources/textures  ADE20K: 48 px mosaics of two or three of six textures (composed)
    OUT/sources/faces     ImageNet folders: scikit-image's 100 faces and 100 other pieces of photos, 150 train, 50 val
    OUT/shards/<dataset>/{train,val}

The quickstart learns the first three; the fourth is the new task that its model is adapted to (recipe `faces`).

What is held out: val digits, in both digits and scenes, are never train digits (36 of each class, drawn at random, so
the same writers occur in both); val crops come from the right halves of the photos and textures, train crops from the
left. Val faces and other pieces are drawn at random, 25 of each.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from modsquad_ds.data.convert import convert
from modsquad_ds.data.shards import INDEX_NAME
from modsquad_ds.data.staging import staged_folder
from modsquad_ds.errors import UserError

VERSION = 3
"""Raised with every change of what is built, so that an older build is replaced."""
MARKER = "quickstart.json"
LAYOUTS = {"digits": "imagenet", "scenes": "coco", "textures": "ade20k", "faces": "imagenet"}
SPLITS = ("train", "val")
COUNTS = {"scenes": {"train": 2000, "val": 300}, "textures": {"train": 1200, "val": 200}}
VAL_DIGITS_PER_CLASS = 36
VAL_FACES_PER_CLASS = 25
SAMPLES_PER_SHARD = 256
SIDE = 48
"""Height and width of scenes and mosaics in pixels."""
MARGIN = 4
"""Pixels of black on each side of an enlarged digit."""
DIGIT_SIDES = (14, 24)
"""Smallest and largest side of a digit in a scene, in pixels, before its empty margin is cut off."""
INK = 0.35
"""Share of full ink from which a pixel belongs to the digit, and so to its box."""
MIN_SHARE = 0.1
"""Smallest share of a mosaic that a region covers."""

PHOTOS = ("china", "flower", "astronaut", "coffee", "chelsea", "rocket")
TEXTURES = ("brick", "grass", "tissue", "stars", "retina", "flower")
FACES = ("face", "other")

Pixels = NDArray[np.uint8]
Generator = np.random.Generator


class Digits(NamedTuple):
    """The handwritten digits of one split."""

    images: Pixels
    """`[n, 8, 8]`, 0 = paper, 255 = full ink."""
    labels: NDArray[np.int64]
    """`[n]`, 0..9."""
    numbers: NDArray[np.int64]
    """`[n]`, place in `sklearn.datasets.load_digits()`."""


def build(out: Path, seed: int = 0) -> None:
    """Make the datasets and their shards in `out`; does nothing where this version's build for `seed` is there.

    `out` appears as a whole at the end. UserError if `out` holds something else, or if a package that the pixels come
    from is missing.
    """
    out = Path(out)
    wanted = {"version": VERSION, "seed": seed, "counts": COUNTS}
    if _is_complete(out, wanted):
        return
    with staged_folder(out) as stage:
        pictures = load_pictures()
        digits = split_digits(*_load_digits(), seed)
        _write_digits(stage / "sources" / "digits", digits)
        _write_scenes(stage / "sources" / "scenes", digits, pictures, seed)
        _write_textures(stage / "sources" / "textures", pictures, seed)
        _write_faces(stage / "sources" / "faces", *_load_faces(), seed)
        (stage / "sources" / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
        for name, layout in LAYOUTS.items():
            for split in SPLITS:
                source, shards = stage / "sources" / name, stage / "shards" / name
                convert(layout, source, shards, split, samples_per_shard=SAMPLES_PER_SHARD, progress=False)
        (stage / MARKER).write_text(json.dumps(wanted, indent=1), encoding="utf-8")


def _is_complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` is a finished build of this kind. UserError if it holds anything that is not the quickstart's."""
    marker = out / MARKER
    if not marker.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not quickstart data, so it is left alone: choose another folder")
        return False
    try:
        found = json.loads(marker.read_bytes())
    except ValueError as error:
        raise UserError(f"{marker} is not JSON ({error}): delete {out} and build it again") from error
    folders = [out / "shards" / name / split for name in LAYOUTS for split in SPLITS]
    return found == wanted and all((folder / INDEX_NAME).is_file() for folder in folders)


# ---------------------------------------------------------------- pixels from the packages


def _load_digits() -> tuple[Pixels, NDArray[np.int64]]:
    """Images `[1797, 8, 8]` with ink 0..255, labels `[1797]`."""
    with needs_package("scikit-learn"):
        from sklearn.datasets import load_digits
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def _load_faces() -> tuple[Pixels, NDArray[np.int64]]:
    """Grey pieces of photos `[200, 25, 25]`, labels `[200]`: places in FACES."""
    with needs_package("scikit-image"):
        from skimage.data import lfw_subset
    return np.rint(lfw_subset() * 255).astype(np.uint8), np.repeat(np.arange(len(FACES)), 100)


def load_pictures() -> dict[str, Pixels]:
    """The photos and textures, RGB `[height, width, 3]`, by the names of PHOTOS and TEXTURES."""
    with needs_package("scikit-learn"):
        from sklearn.datasets import load_sample_image
    with needs_package("scikit-image"):
        from skimage import data
    pictures = {"china": load_sample_image("china.jpg"), "flower": load_sample_image("flower.jpg")}
    pictures |= {"tissue": data.immunohistochemistry(), "stars": data.hubble_deep_field()}
    pictures |= {name: getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket", "brick", "grass")}
    # The middle of the eye's picture; around it is only black.
    pictures["retina"] = data.retina()[505:905, 505:905]
    return {name: _rgb(picture) for name, picture in pictures.items()}


def _rgb(picture: Pixels) -> Pixels:
    return picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)


@contextmanager
def needs_package(package: str) -> Iterator[None]:
    """Imports inside it that fail are a UserError which says what to install."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"these data come from {package}: pip install 'modsquad_ds[quickstart]'") from error


# ---------------------------------------------------------------- what is held out


def split_digits(images: Pixels, labels: NDArray[np.int64], seed: int) -> dict[str, Digits]:
    """Hold out `VAL_DIGITS_PER_CLASS` random digits of every class; the rest train. Both in the package's order."""
    numbers = _hold_out(labels, VAL_DIGITS_PER_CLASS, np.random.default_rng([seed, 0]))
    return {split: Digits(images[chosen], labels[chosen], chosen) for split, chosen in numbers.items()}


def _hold_out(labels: NDArray[np.int64], per_class: int, rng: Generator) -> dict[str, NDArray[np.int64]]:
    """Split -> its places in `labels`, ascending; val has `per_class` random ones of every class."""
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(labels.max() + 1):
        held_out[rng.permutation(np.flatnonzero(labels == label))[:per_class]] = True
    return {"train": np.flatnonzero(~held_out), "val": np.flatnonzero(held_out)}


def half(picture: Pixels, split: str) -> Pixels:
    """Left half for train, right half for val `[height, width / 2, 3]`."""
    middle = picture.shape[1] // 2
    return picture[:, :middle] if split == "train" else picture[:, middle:]


def _crop(picture: Pixels, rng: Generator) -> tuple[Pixels, int, int]:
    """A random square of SIDE pixels `[SIDE, SIDE, 3]` (a view), and its left and top."""
    top = int(rng.integers(0, picture.shape[0] - SIDE + 1))
    left = int(rng.integers(0, picture.shape[1] - SIDE + 1))
    return picture[top : top + SIDE, left : left + SIDE], left, top


# ---------------------------------------------------------------- digits, ImageNet layout


def _write_digits(folder: Path, digits: dict[str, Digits]) -> None:
    """`<split>/<digit>/<number>.png`: each digit enlarged from 8 to 32 pixels, grey, bright ink on black.

    A margin of black around it leaves random crops room to move and scale the digit without cutting off its ink.
    """
    for split, part in digits.items():
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
        for image, label, number in zip(*part, strict=True):
            enlarged = ImageOps.expand(_enlarge(image, 32), border=MARGIN)
            enlarged.save(folder / split / str(label) / f"{number:04d}.png")


def _enlarge(digit: Pixels, side: int) -> Image.Image:
    return Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------- scenes, COCO layout


class Drawn(NamedTuple):
    """One digit of a scene."""

    box: tuple[int, int, int, int]
    """Left, top, width, height of its ink in pixels."""
    digit: int
    """Its place in the split's `Digits`."""


def draw_scene(background: Pixels, digits: Digits, rng: Generator) -> tuple[Pixels, list[Drawn]]:
    """Draw one to three digits, none over another, on a copy of `background` `[SIDE, SIDE, 3]`."""
    scene = background.astype(np.float32)
    drawn: list[Drawn] = []
    for _ in range(rng.integers(1, 4)):
        digit = int(rng.integers(len(digits.images)))
        ink = _ink(digits.images[digit], int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1)))
        box = _free_place(ink.shape[1], ink.shape[0], [other.box for other in drawn], rng)
        if box is None:
            continue
        left, top, width, height = box
        below = scene[top : top + height, left : left + width]
        # Bright on dark, dark on bright: any colour, but always readable.
        colour = rng.integers(190, 256, 3) if below.mean() < 128 else rng.integers(0, 66, 3)
        cover = ink[:, :, None] * rng.uniform(0.8, 1.0)
        below += (colour - below) * cover
        drawn.append(Drawn(box, digit))
    return np.rint(scene).astype(np.uint8), drawn


def _ink(digit: Pixels, side: int) -> NDArray[np.floating]:
    """The digit enlarged to `side`, cut to the rows and columns that hold ink `[height, width]`, 0..1."""
    ink = np.asarray(_enlarge(digit, side), dtype=np.float32) / 255
    rows, columns = np.flatnonzero((ink >= INK).any(axis=1)), np.flatnonzero((ink >= INK).any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _free_place(
    width: int, height: int, taken: list[tuple[int, int, int, int]], rng: Generator
) -> tuple[int, int, int, int] | None:
    """A random box inside the scene that keeps a pixel's distance from the `taken` ones; None if 50 draws find none."""
    for _ in range(50):
        left, top = int(rng.integers(0, SIDE - width + 1)), int(rng.integers(0, SIDE - height + 1))
        apart = [
            left > x + w or x > left + width or top > y + h or y > top + height  # strict: a pixel lies between
            for x, y, w, h in taken
        ]
        if all(apart):
            return left, top, width, height
    return None


def _write_scenes(folder: Path, digits: dict[str, Digits], pictures: dict[str, Pixels], seed: int) -> None:
    """`<split>/*.jpg` and `annotations/instances_<split>.json`, which also notes what each scene was composed from."""
    (folder / "annotations").mkdir(parents=True)
    for number, split in enumerate(SPLITS):
        (folder / split).mkdir()
        rng = np.random.default_rng([seed, 1, number])
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, COUNTS["scenes"][split] + 1):
            photo = PHOTOS[rng.integers(len(PHOTOS))]
            crop, left, top = _crop(half(pictures[photo], split), rng)
            scene, drawn = draw_scene(crop, digits[split], rng)
            name = f"{image_id:06d}.jpg"
            _save_jpeg(scene, folder / split / name)
            offset = 0 if split == "train" else pictures[photo].shape[1] // 2
            place = {"photo": photo, "crop": [left + offset, top]}
            images.append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE, **place})
            for box, digit in drawn:
                label, source = int(digits[split].labels[digit]), int(digits[split].numbers[digit])
                annotations.append(_annotation(len(annotations) + 1, image_id, label, box) | {"digit": source})
        content = {
            "info": {"description": "handwritten digits drawn on crops of photos"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": str(label), "supercategory": "digit"} for label in range(10)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="ascii")


def _annotation(number: int, image_id: int, label: int, box: tuple[int, int, int, int]) -> dict[str, Any]:
    row = {"id": number, "image_id": image_id, "category_id": label + 1, "iscrowd": 0}
    return row | {"bbox": list(box), "area": box[2] * box[3]}


# ---------------------------------------------------------------- textures, ADE20K layout


def draw_mosaic(textures: list[Pixels], rng: Generator) -> tuple[Pixels, Pixels]:
    """A mosaic of two or three of the textures: pixels `[SIDE, SIDE, 3]`, and `[SIDE, SIDE]` with texture number + 1.

    Regions are the Voronoi cells of random points, drawn again until none is tiny.
    """
    regions = int(rng.integers(2, 4))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    share = 0.0
    while share < MIN_SHARE:
        points = rng.uniform(0, SIDE, (regions, 2))
        cell = np.argmin([(rows - y) ** 2 + (columns - x) ** 2 for y, x in points], axis=0)
        share = np.bincount(cell.ravel(), minlength=regions).min() / cell.size
    chosen = rng.permutation(len(textures))[:regions]
    pixels = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    for region, texture in enumerate(chosen):
        crop, _, _ = _crop(textures[texture], rng)
        pixels[cell == region] = crop[cell == region]
    return pixels, (chosen[cell] + 1).astype(np.uint8)


def _write_textures(folder: Path, pictures: dict[str, Pixels], seed: int) -> None:
    """`images/<split>/*.jpg`, `annotations/<split>/*.png` with ADE20K's names of the splits, and `classes.txt`."""
    for number, (split, name) in enumerate(zip(SPLITS, ("training", "validation"), strict=True)):
        images, masks = folder / "images" / name, folder / "annotations" / name
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        rng = np.random.default_rng([seed, 2, number])
        textures = [half(pictures[texture], split) for texture in TEXTURES]
        for image in range(COUNTS["textures"][split]):
            pixels, mask = draw_mosaic(textures, rng)
            _save_jpeg(pixels, images / f"mosaic_{image:05d}.jpg")
            Image.fromarray(mask).save(masks / f"mosaic_{image:05d}.png")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in TEXTURES), encoding="ascii")


def _save_jpeg(pixels: Pixels, path: Path) -> None:
    # Full-resolution colour: at 48 pixels the usual halving would blur what there is to learn.
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)


# ---------------------------------------------------------------- faces, ImageNet layout


def _write_faces(folder: Path, images: Pixels, labels: NDArray[np.int64], seed: int) -> None:
    """`<split>/<face or other>/<number>.png`, 25 px, grey, as they are; the number is the place in the package's array."""
    for split, numbers in _hold_out(labels, VAL_FACES_PER_CLASS, np.random.default_rng([seed, 3])).items():
        for name in FACES:
            (folder / split / name).mkdir(parents=True)
        for number in numbers:
            Image.fromarray(images[number]).save(folder / split / FACES[labels[number]] / f"{number:03d}.png")


ATTRIBUTION = """\
The pictures in this folder were made from data that come with scikit-learn and scikit-image: pieces were cut out,
enlarged and composed. CC BY 2.0 is https://creativecommons.org/licenses/by/2.0/.

digits/, and the digits in scenes/
  Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, by way of
  scikit-learn (sklearn.datasets.load_digits).

photos behind the digits in scenes/
  china.jpg       danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/, CC BY 2.0
  flower.jpg      vultilion, https://www.flickr.com/photos/vultilion/6056698931/, CC BY 2.0
  astronaut.png   NASA, public domain
  coffee.png      Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0
  chelsea.png     Stefan van der Walt, CC0
  rocket.jpg      SpaceX, public domain

textures/
  brick           CC0Textures, CC0
  grass           linolafett (DeviantArt), CC0
  tissue          immunohistochemistry, Center for Microscopy And Molecular Imaging (CMMI), no known restrictions
  stars           Hubble eXtreme Deep Field, NASA, public domain
  retina          Mikael Häggström, "Medical gallery of Mikael Häggström 2014", CC0
  flower          flower.jpg as above, CC BY 2.0

faces/
  Labeled Faces in the Wild, G. Huang, M. Ramesh, T. Berg and E. Learned-Miller, University of Massachusetts, Amherst,
  http://vis-www.cs.umass.edu/lfw/; 100 faces and 100 pieces of background of 25 x 25 pixels, by way of scikit-image
  (skimage.data.lfw_subset).
"""
