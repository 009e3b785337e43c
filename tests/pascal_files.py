"""A small PASCAL_MT: four images with all that the real one's files hold, and the ways in which one of its files can be bad."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

import layouts

SIZES = {"2008_000003": (12, 16), "2008_000007": (16, 12), "2009_000011": (12, 16), "2010_000021": (9, 10)}
"""Height and width. The images show: two people; none, with semseg from the second folder; a person without parts and a dog
with some; sky and grass alone, where no normal means anything."""
SKY, GRASS, WALL, FLOOR, PERSON_CLASS, DOG_CLASS = 360, 187, 440, 158, 284, 113
"""Classes of a LabelMap."""

Part = tuple[str, NDArray[Any]]


def box(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> NDArray[np.uint8]:
    """A mask of 1 in a rectangle, its bottom row and right column excluded."""
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def struct(rows: Sequence[dict[str, Any]]) -> Any:
    """A MATLAB struct array of one row; none: MATLAB's []."""
    if not rows:
        return np.zeros((0, 0))
    array = np.zeros((1, len(rows)), [(name, object) for name in rows[0]])
    for place, row in enumerate(rows):
        array[0, place] = tuple(row.values())
    return array


def thing(class_ind: Any, mask: Any, *parts: Part) -> dict[str, Any]:
    """One object of PASCAL-Part."""
    rows = [{"part_name": name, "mask": mask} for name, mask in parts]
    return {"class": "thing", "class_ind": class_ind, "mask": mask, "parts": struct(rows)}


def anno(*things: dict[str, Any]) -> dict[str, Any]:
    """Content of a file of human_parts."""
    return {"anno": struct([{"imname": "image", "objects": struct(things)}])}


def two_people(size: tuple[int, int]) -> dict[str, Any]:
    """The second one's head lies over the first one's torso, and that over the first one's own arm."""
    first = (("luarm", box(size, 4, 2, 8, 6)), ("torso", box(size, 4, 3, 9, 6)))
    second = (("head", box(size, 3, 5, 6, 8)), ("rfoot", box(size, 9, 5, 11, 7)))
    dog = thing(12, box(size, 0, 0, 12, 16), ("head", box(size, 0, 0, 3, 3)))
    return anno(thing(15, box(size, 4, 2, 9, 6), *first), dog, thing(15, box(size, 3, 5, 11, 8), *second))


def stripes(size: tuple[int, int], *values: int) -> NDArray[np.uint16]:
    """Upright stripes of these classes, as wide as each other."""
    columns = np.arange(size[1]) * len(values) // size[1]
    return np.tile(np.array(values, np.uint16)[columns], (size[0], 1))


def mat_bytes(content: dict[str, Any]) -> bytes:
    """A MATLAB file, as MATLAB itself stores it: compressed."""
    file = io.BytesIO()
    savemat(file, content, do_compression=True)
    return file.getvalue()


def save_mat(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mat_bytes(content))


def palette(values: NDArray[np.uint8]) -> Image.Image:
    """A picture of these places in a palette whose colours are others."""
    image = Image.fromarray(values, "L").convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette([(7 * i) % 256 for i in range(768)])
    return image


def pascal(src: Path, split: str = "train") -> Path:
    """Write the four images of SIZES and the list of `split`."""
    for folder in ("semseg/VOC12", "semseg/pascal-context"):
        (src / folder).mkdir(parents=True)
    for number, (name, size) in enumerate(SIZES.items()):
        random = np.random.default_rng(number)
        layouts.save(layouts.picture(number, size), src / f"JPEGImages/{name}.jpg")
        folder = "pascal-context" if number == 1 else "VOC12"
        palette(stripes(size, 0, 15, 255).astype(np.uint8)).save(src / f"semseg/{folder}/{name}.png")
        shades, colours = random.integers(0, 256, size, np.uint8), random.integers(0, 256, (*size, 3), np.uint8)
        layouts.save(Image.fromarray(shades), src / f"sal_distill/{name}.png")
        layouts.save(Image.fromarray(colours), src / f"normals_distill/{name}.png")
    one, none, dog, sky = SIZES
    Image.fromarray(np.full(SIZES[one], 3, np.uint8)).save(src / f"semseg/pascal-context/{one}.png")  # VOC12 goes first
    classes = {one: (PERSON_CLASS, WALL), none: (WALL, FLOOR, SKY), dog: (DOG_CLASS, GRASS), sky: (SKY, GRASS)}
    for name, values in classes.items():
        save_mat(src / f"pascal-context/trainval/{name}.mat", {"LabelMap": stripes(SIZES[name], *values)})
    save_mat(src / f"human_parts/{one}.mat", two_people(SIZES[one]))
    save_mat(src / f"human_parts/{none}.mat", anno(thing(9, box(SIZES[none], 1, 1, 5, 5))))
    mask = box(SIZES[dog], 2, 2, 6, 6)
    save_mat(src / f"human_parts/{dog}.mat", anno(thing(15, mask), thing(12, mask, ("head", mask))))
    save_mat(src / f"human_parts/{sky}.mat", anno())
    write_list(src, list(SIZES), split)
    return src


def write_list(src: Path, ids: Sequence[str], split: str = "train") -> None:
    """The list of a split, with the blank line at its end that text editors leave."""
    path = src / f"ImageSets/Context/{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in ids) + "\n")


# ---------------------------------------------------------------- what can be wrong with one file

FIRST = "2008_000003"
SIZE = SIZES[FIRST]
CONTEXT, PARTS = f"pascal-context/trainval/{FIRST}.mat", f"human_parts/{FIRST}.mat"
SEMSEG, SAL, NORMALS = f"semseg/VOC12/{FIRST}.png", f"sal_distill/{FIRST}.png", f"normals_distill/{FIRST}.png"
IMAGE = f"JPEGImages/{FIRST}.jpg"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-25])


def _content(content: dict[str, Any]) -> Callable[[Path], None]:
    return lambda path: save_mat(path, content)


def _label_map(**changes: Any) -> Callable[[Path], None]:
    """The value of every pixel, its type, or another size."""
    value, dtype = changes.get("value", WALL), changes.get("dtype", np.uint16)
    return _content({"LabelMap": np.full(changes.get("size", SIZE), value, dtype)})


def _picture(values: NDArray[Any]) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(values).save(path, format="PNG")


def grey(value: int, dtype: Any = np.uint8, size: tuple[int, int] = SIZE) -> Callable[[Path], None]:
    return _picture(np.full(size, value, dtype))


def _part(name: Any, mask: Any, class_ind: Any = 15) -> Callable[[Path], None]:
    return _content(anno(thing(class_ind, box(SIZE, 0, 0, 1, 1), (name, mask))))


def _turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    layouts.picture(0, SIZE).save(path, format="JPEG", exif=exif)


def _flipped(path: Path) -> None:
    """A byte of the compressed numbers."""
    data = bytearray(path.read_bytes())
    data[-12] ^= 0x55
    path.write_bytes(bytes(data))


def _palette(path: Path) -> None:
    palette(np.full(SIZE, 1, np.uint8)).save(path)


EYE = np.eye(*SIZE, dtype=np.uint8)
DEFECTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "image cut": (IMAGE, _cut, "does not decode"),
    "image turned": (IMAGE, _turned, "EXIF orientation 6: .* turn the pixels for good"),
    "semseg cut": (SEMSEG, _cut, "truncated"),
    "semseg class": (SEMSEG, grey(21), r"holds the value 21; expected 0\.\.20 or 255"),
    "semseg colours": (SEMSEG, _picture(np.zeros((*SIZE, 3), np.uint8)), "PNG of 8-bit RGB, expected 8-bit grey or 8-bit"),
    "semseg size": (SEMSEG, grey(1, size=(16, 12)), "has 12x16 pixels .*, its image has 16x12"),
    "sal empty": (SAL, lambda path: path.write_bytes(b""), r"empty \(0 bytes\)"),
    "sal bits": (SAL, grey(9, np.uint16), "PNG of 16-bit grey, expected 8-bit grey"),
    "sal palette": (SAL, _palette, "PNG of 8-bit palette, expected 8-bit grey"),
    "sal size": (SAL, grey(9, size=(11, 16)), "has 16x11 pixels"),
    "normals grey": (NORMALS, grey(9), "PNG of 8-bit grey, expected 8-bit RGB"),
    "normals size": (NORMALS, _picture(np.zeros((12, 12, 3), np.uint8)), "has 12x12 pixels"),
    "LabelMap cut": (CONTEXT, _cut, "is damaged"),
    "LabelMap damaged": (CONTEXT, _flipped, "is damaged"),
    "LabelMap no mat": (CONTEXT, lambda path: path.write_text("LabelMap"), "is no MATLAB file of version 5 to 7"),
    "LabelMap missing": (CONTEXT, _content({"Labels": EYE}), "has no variable 'LabelMap', only 'Labels'"),
    "LabelMap class": (CONTEXT, _label_map(value=460), r"LabelMap holds the value 460; expected whole numbers 0\.\.459"),
    "LabelMap fraction": (CONTEXT, _label_map(value=1.5, dtype=np.float64), r"LabelMap holds the value 1\.5; expected"),
    "LabelMap nan": (CONTEXT, _label_map(value=np.nan, dtype=np.float64), "LabelMap holds the value nan; expected"),
    "LabelMap negative": (CONTEXT, _label_map(value=-1, dtype=np.int16), "LabelMap holds the value -1; expected"),
    "LabelMap size": (CONTEXT, _label_map(size=(16, 12)), "LabelMap has 12x16 pixels"),
    "LabelMap text": (CONTEXT, _content({"LabelMap": "wall"}), "LabelMap is no matrix of numbers"),
    "LabelMap volume": (CONTEXT, _label_map(size=(*SIZE, 2)), "LabelMap is no matrix of numbers"),
    "anno missing": (PARTS, _content({"objects": EYE}), "has no variable 'anno', only 'objects'"),
    "anno numbers": (PARTS, _content({"anno": EYE}), "anno is no struct with objects"),
    "anno empty": (PARTS, _content({"anno": np.zeros((0, 0))}), "anno has 0 elements, expected 1"),
    "anno objects": (PARTS, _content({"anno": struct([{"objects": EYE}])}), "anno.objects is no struct with class_ind and parts"),
    "anno parts": (
        PARTS,
        _content(anno({"class_ind": 15, "parts": struct([{"name": "head"}])})),
        r"anno.objects\(1\).parts is no struct with part_name and mask",
    ),
    "anno class": (PARTS, _part("head", EYE, class_ind="person"), r"anno.objects\(1\).class_ind is no single number"),
    "part name": (PARTS, _part("tail", EYE), r"anno.objects\(1\).parts\(1\).part_name is 'tail', no part of a person"),
    "part number": (PARTS, _part(3, EYE), r"parts\(1\).part_name is array\(\[\[3\]\]\), no part of a person"),
    "part size": (PARTS, _part("head", EYE.T), r"anno.objects\(1\).parts\(1\).mask has 12x16 pixels"),
    "part mask": (PARTS, _part("head", "head"), r"parts\(1\).mask is no matrix of numbers"),
}
"""What is wrong -> the file, what breaks it, and the reason that is given."""
