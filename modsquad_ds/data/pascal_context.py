"""PASCAL-Context with five labels per image (the folder PASCAL_MT) -> samples of an image set: where such data start.

    ImageSets/Context/<split>.txt     one id a line; the published lists hold 4,998 (train) and 5,105 (val)
    JPEGImages/<id>.jpg               the photo
    semseg/VOC12/<id>.png             semseg: VOC's 21 classes, 255 ignored; where there is none,
    semseg/pascal-context/<id>.png      the same classes as seen by PASCAL-Context
    human_parts/<id>.mat              human_parts: PASCAL-Part's `anno`
    sal_distill/<id>.png              sal: grey, training cuts it at one half
    normals_distill/<id>.png          normals: RGB, channel = (n + 1) / 2 * 255
    pascal-context/trainval/<id>.mat  edge, and where normals mean something: `LabelMap`, 459 classes

Layout and rules are those of the loaders that the field shares (SimonVandenhende/Multi-Task-Learning-PyTorch,
data/pascal_context.py; arXiv 2004.13379), except that a map of another size than its image is refused, not stretched.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.io import encode_png

from modsquad_ds.data.mat_file import Value, read_mat
from modsquad_ds.data.png_check import PALETTE, header_of
from modsquad_ds.data.samples import BadSample, BadSampleError, Sample, Size, read_file, size_text
from modsquad_ds.data.set_samples import Encoded, chosen_targets, read_image, read_map
from modsquad_ds.data.sources import Options, Source, files_in, lines_of, usable
from modsquad_ds.data.target_files import mask_png
from modsquad_ds.errors import UserError
from modsquad_ds.targets import IGNORE_CLASS, PART_CLASSES, PASCAL_CONTEXT, TARGETS, VALID_FIELD, VOC_CLASSES
from modsquad_ds.tasks import MULTILABEL

Members = dict[str, bytes]
"""Field -> bytes."""
CONTEXT_CLASSES = 459
"""Classes of a LabelMap are 1 to this; 0 where there is none."""
PERSON = VOC_CLASSES.index("person")
_HEAD, _TORSO, _UPPER_ARM, _LOWER_ARM, _UPPER_LEG, _LOWER_LEG = range(1, len(PART_CLASSES))
PARTS = {
    **dict.fromkeys(("hair", "head", "lear", "rear", "leye", "reye", "lebrow", "rebrow", "nose", "mouth"), _HEAD),
    **dict.fromkeys(("neck", "torso"), _TORSO),
    **dict.fromkeys(("luarm", "ruarm"), _UPPER_ARM),
    **dict.fromkeys(("llarm", "rlarm", "lhand", "rhand"), _LOWER_ARM),
    **dict.fromkeys(("luleg", "ruleg"), _UPPER_LEG),
    **dict.fromkeys(("llleg", "rlleg", "lfoot", "rfoot"), _LOWER_LEG),
}
"""PASCAL-Part's 24 parts of a person (l and r: left and right, then u and l: upper and lower) -> class of human_parts."""

NORMALS_CLASSES = {
    "air conditioner": 3, "antenna": 4, "ashtray": 6, "bag": 9, "ball": 10, "balloon": 11, "barrel": 13, "basket": 15,
    "bathtub": 17, "bed": 18, "bench": 22, "bicycle": 23, "blackboard": 29, "board": 30, "book": 33, "bottle": 34,
    "bowl": 36, "box": 37, "bracelet": 38, "brick": 39, "broom": 41, "bucket": 43, "cabinet": 46, "cake": 49,
    "calculator": 50, "calendar": 51, "camera": 53, "can": 55, "candle": 56, "car": 59, "cart": 61, "case": 62, "cat": 65,
    "cd": 66, "ceiling": 68, "cell phone": 69, "chair": 72, "chessboard": 73, "clock": 78, "coffee machine": 83, "comb": 84,
    "computer": 85, "cone": 87, "container": 88, "corkscrew": 95, "counter": 96, "crate": 101, "cup": 104, "curtain": 105,
    "cutting board": 107, "dishwasher": 111, "dog": 113, "door": 115, "drum": 122, "duck": 124, "envelope": 135, "fan": 141,
    "faucet": 142, "fax machine": 143, "fire extinguisher": 146, "fish tank": 150, "flag": 154, "flashlight": 157,
    "floor": 158, "flower": 159, "fork": 165, "fruit": 172, "furnace": 174, "glass": 181, "globe": 183, "glove": 184,
    "guitar": 191, "hammer": 193, "handle": 195, "hanger": 197, "hat": 199, "heater": 202, "ipod": 213, "ironing board": 215,
    "jar": 216, "key": 219, "keyboard": 220, "knife": 223, "ladder": 225, "laptop": 228, "lid": 230, "light": 232,
    "light bulb": 233, "lock": 238, "machine": 239, "map": 242, "mask": 243, "mattress": 246, "microphone": 250,
    "microwave": 251, "mirror": 252, "money": 255, "mouse": 260, "mouse pad": 261, "napkin": 263, "oven": 269, "pan": 272,
    "paper": 273, "paper cutter": 275, "pen": 281, "pencil": 283, "person": 284, "photo": 285, "piano": 286, "picture": 287,
    "pig": 288, "pillow": 290, "pipe": 291, "pitcher": 292, "plant": 293, "plate": 295, "pool table": 304, "pot": 307,
    "printer": 309, "projector": 310, "radiator": 314, "radio": 315, "range hood": 319, "remote control": 323, "rope": 329,
    "rug": 330, "ruler": 331, "scale": 336, "sculpture": 342, "sewing machine": 345, "shelves": 349, "shoe": 350,
    "shopping cart": 351, "shovel": 352, "sign": 355, "sink": 357, "sofa": 368, "spatula": 370, "speaker": 371, "spoon": 374,
    "stapler": 379, "stick": 380, "stool": 383, "stove": 384, "table": 397, "tape": 401, "telephone": 403, "tent": 405,
    "toaster": 407, "toilet": 408, "toothbrush": 411, "towel": 412, "toy": 413, "toy car": 414, "trampoline": 417,
    "tray": 419, "tricycle": 421, "trophy": 423, "tvmonitor": 427, "typewriter": 429, "umbrella": 430,
    "vacuum cleaner": 432, "wall": 440, "wallet": 441, "wardrobe": 442, "washing machine": 443, "watch": 444,
    "water dispenser": 446, "window": 454, "wire": 457,
}  # fmt: skip
"""Where the distilled normals mean something: the classes of a LabelMap that NYUDv2, which the network that drew them had
seen, names alike (both lists: SimonVandenhende/Multi-Task-Learning-PyTorch, data/db_info), and tvmonitor."""


# ---------------------------------------------------------------- listing

_PLACES = {
    "semseg": ("semseg/VOC12/{}.png", "semseg/pascal-context/{}.png"),
    "human_parts": ("human_parts/{}.mat",),
    "sal": ("sal_distill/{}.png",),
    "normals": ("normals_distill/{}.png",),
    "edge": ("pascal-context/trainval/{}.mat",),
}
"""Where the file of a target lies, the best place first."""
_LABEL_MAP = _PLACES["edge"]


def read_pascal_context(src: Path, split: str, options: Options) -> Source:
    """The images that `SRC/ImageSets/Context/<split>.txt` lists; a sample's label: each of its targets -> its file.

    A file that is not there is a target less of that image (no LabelMap: neither edges nor normals); images that are not there
    or have no target are bad samples. UserError if the list, or the folder of a target, is missing: that would be a target
    less of every image.
    """
    targets = chosen_targets("pascal_context", options.targets, PASCAL_CONTEXT)
    ids = _ids(src / "ImageSets/Context", split)
    images = _names(src, "JPEGImages/{}.jpg")
    if images is None:
        raise UserError(f"{src / 'JPEGImages'} does not exist: expected the photos of PASCAL_MT there")
    files = {target: _first_of_each(src, target, _PLACES[target], ids) for target in targets}
    if "normals" in targets:
        mapped = _first_of_each(src, "normals", _LABEL_MAP, ids)
        files["normals"] = {name: file for name, file in files["normals"].items() if name in mapped}
    bad: list[BadSample] = []
    samples = []
    for name in ids:
        image = f"JPEGImages/{name}.jpg"
        label = {target: found[name] for target, found in files.items() if name in found}
        if image not in images:
            bad.append(BadSample(image, f"is missing, ImageSets/Context/{split}.txt lists it"))
        elif not label:
            bad.append(BadSample(image, "has none of the targets"))
        else:
            samples.append(Sample(name, image, label))
    details = {"source_split": split}
    return Source(MULTILABEL, "pascal_context", src, split, (), usable(samples, bad), tuple(bad), details, targets)


def _ids(folder: Path, split: str) -> list[str]:
    path = folder / f"{split}.txt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected the ids of a split there, one a line (PASCAL_MT has train and val)")
    ids = [line.strip() for line in lines_of(path)]
    twice = next((name for name, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{path} lists {twice!r} twice: an image can be in a split only once")
    if not ids:
        raise UserError(f"{path} is empty: expected one id a line, like 2008_000003")
    return ids


def _names(src: Path, place: str) -> set[str] | None:
    """Paths below `src` of the files in the folder of `place`; None if there is no such folder."""
    folder = place.rpartition("/")[0]
    return {f"{folder}/{name}" for name in files_in(src / folder)} if (src / folder).is_dir() else None


def _first_of_each(src: Path, target: str, places: Sequence[str], ids: Iterable[str]) -> dict[str, str]:
    """Id -> the file in the first of the places that has one. UserError if the folder of none of the places exists."""
    listed = [_names(src, place) for place in places]
    if all(names is None for names in listed):
        folders = " and ".join(str(src / place.rpartition("/")[0]) for place in places)
        way = "unpack PASCAL_MT whole, or name the targets to read with --targets"
        raise UserError(f"{folders} {'does' if len(places) == 1 else 'do'} not exist, which {target} needs: {way}")
    found = {}
    for place, names in reversed(list(zip(places, listed, strict=True))):
        found.update({name: place.format(name) for name in ids if place.format(name) in (names or ())})
    return found


# ---------------------------------------------------------------- one sample


def pascal_members(sample: Sample, root: Path) -> Encoded:
    """Read and check one sample completely: its image, its targets, and `valid.png` where it has normals.

    PNG files are stored as they are. Not written, as if there were no file: `human_parts` without a part of a person,
    `normals` that mean nothing anywhere, `semseg` that is 255 everywhere. BadSampleError if the image is bad or no target
    is left.
    """
    image = read_image(root, sample.image)
    files: dict[str, str] = sample.label
    members: dict[str, bytes] = {}
    bad: list[BadSample] = []
    for target, file in files.items():
        try:
            members |= _ENCODERS[target](root, file, image.size)
        except BadSampleError as error:
            if error.bad not in bad:  # two targets read the LabelMap
                bad.append(error.bad)
    if not members:
        reasons = "; ".join(map(str, bad)) or f"there is nothing on it for {', '.join(files)}"
        raise BadSampleError(sample.image, f"no target is left of the image: {reasons}")
    return Encoded({"jpg": image.data} | members, bad)


def _semseg(root: Path, file: str, size: Size) -> Members:
    data, classes = read_map(root, file, TARGETS["semseg"], size)
    known = (classes < len(VOC_CLASSES)) | (classes == IGNORE_CLASS)
    if not known.all():
        expected = f"expected 0..{len(VOC_CLASSES) - 1} or {IGNORE_CLASS}"
        raise BadSampleError(file, f"holds the value {int(classes[~known].max())}; {expected}")
    return {"semseg.png": data} if bool((classes != IGNORE_CLASS).any()) else {}


def _human_parts(root: Path, file: str, size: Size) -> Members:
    parts = human_parts(_variable(root, file, "anno"), file, size)
    return {"human_parts.png": bytes(encode_png(torch.from_numpy(parts)[None]).numpy())} if parts.any() else {}


def _sal(root: Path, file: str, size: Size) -> Members:
    data, _ = read_map(root, file, TARGETS["sal"], size)
    if header_of(data).colour == PALETTE:
        raise BadSampleError(file, "PNG of 8-bit palette, expected 8-bit grey")
    return {"sal.png": data}


def _normals(root: Path, file: str, size: Size) -> Members:
    data, _ = read_map(root, file, TARGETS["normals"], size)
    classes = label_map(root, _LABEL_MAP[0].format(Path(file).stem), size)
    valid = np.isin(classes, list(NORMALS_CLASSES.values()))
    return {"normals.png": data, VALID_FIELD: mask_png(torch.from_numpy(valid))} if valid.any() else {}


def _edge(root: Path, file: str, size: Size) -> Members:
    return {"edge.png": mask_png(torch.from_numpy(context_edges(label_map(root, file, size))))}


_ENCODERS = {"semseg": _semseg, "human_parts": _human_parts, "sal": _sal, "normals": _normals, "edge": _edge}
"""Target -> (source folder, file, size of the image) -> the members that it becomes. Raise BadSampleError."""


# ---------------------------------------------------------------- what the maps mean


def context_edges(classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Edges `[h, w]` of a LabelMap `[h, w]`: its borders, thinned to lines of one pixel."""
    from skimage.morphology import thin  # takes a second to import

    edges: NDArray[np.bool_] = thin(borders(classes))
    return edges


def borders(classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where the Laplacian of class numbers is not 0, `[h, w]`: the pixels on both sides of a border.

    The Laplacian is the sum of the four neighbours minus four times the pixel; beyond the image's border lies the row that is
    one inside it (OpenCV's defaults). It can vanish between classes, as at the 2 of 1 2 3: such is the field's label.
    """
    padded = np.pad(classes, 1, mode="reflect")
    around: NDArray[np.int64] = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return around != 4 * classes


def label_map(root: Path, file: str, size: Size) -> NDArray[np.int64]:
    """LabelMap of a .mat file: classes 1 to 459, 0 where there is none, `[h, w]`. Raises BadSampleError."""
    values = _matrix(_variable(root, file, "LabelMap"), "LabelMap", file, size)
    wrong = ~((values >= 0) & (values <= CONTEXT_CLASSES) & (values == np.floor(values)))
    if wrong.any():
        raise BadSampleError(file, f"LabelMap holds the value {values[wrong][0]}; expected whole numbers 0..{CONTEXT_CLASSES}")
    return values.astype(np.int64)


def human_parts(anno: Value, file: str, size: Size) -> NDArray[np.uint8]:
    """PASCAL-Part's `anno` -> classes `[h, w]` of PART_CLASSES; 0 everywhere if no person has parts. Raises BadSampleError.

    anno.objects(i) has class_ind (VOC's number) and parts, parts(j) has part_name and mask. Painted in this order, later
    parts over earlier ones. A person without parts stays background, as in the field's loaders.
    """
    painted = np.zeros(size, np.uint8)
    records = _records(anno, ("objects",), "anno", file)
    if len(records) != 1:
        raise BadSampleError(file, f"anno has {len(records)} elements, expected 1")
    for number, thing in enumerate(_records(records[0]["objects"], ("class_ind", "parts"), "anno.objects", file), 1):
        name = f"anno.objects({number})"
        if _number(thing["class_ind"], f"{name}.class_ind", file) != PERSON:
            continue
        for place, part in enumerate(_records(thing["parts"], ("part_name", "mask"), f"{name}.parts", file), 1):
            of_part = f"{name}.parts({place})"
            part_name = part["part_name"]
            if not isinstance(part_name, str) or part_name not in PARTS:
                raise BadSampleError(file, f"{of_part}.part_name is {part_name!r:.40}, no part of a person")
            painted[_matrix(part["mask"], f"{of_part}.mask", file, size) != 0] = PARTS[part_name]
    return painted


# ---------------------------------------------------------------- MATLAB's values


def _variable(root: Path, file: str, name: str) -> Value:
    try:
        return read_mat(read_file(root, file), name)
    except ValueError as error:
        raise BadSampleError(file, str(error)) from error


def _records(value: Value, fields: Sequence[str], name: str, file: str) -> list[dict[str, Value]]:
    """The elements of a struct array that have these fields; none of an empty matrix. Raises BadSampleError."""
    if isinstance(value, np.ndarray) and value.size == 0:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) and set(fields) <= set(one) for one in value):
        raise BadSampleError(file, f"{name} is no struct with {' and '.join(fields)}")
    return value


def _number(value: Value, name: str, file: str) -> float:
    if not isinstance(value, np.ndarray) or value.size != 1:
        raise BadSampleError(file, f"{name} is no single number")
    return float(value.item())


def _matrix(value: Value, name: str, file: str, size: Size) -> NDArray[Any]:
    """Numbers `[h, w]` of this size. Raises BadSampleError."""
    if not isinstance(value, np.ndarray) or value.ndim != 2:
        raise BadSampleError(file, f"{name} is no matrix of numbers")
    found = (value.shape[0], value.shape[1])
    if found != size:
        raise BadSampleError(file, f"{name} has {size_text(found)} pixels (width x height), its image has {size_text(size)}")
    return value
