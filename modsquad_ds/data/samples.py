"""One sample on its way from a dataset to a shard: the cheap descriptor, its checks, and the members it becomes.

`sources.py` lists descriptors; `convert.py` hands them to worker processes, which call `encode` here (for image sets, what
`layouts.py` says). Whatever can be wrong with one sample ends as a `BadSample` (file, reason), so that a conversion can list
all of them at once.

The image's bytes are stored as they are; labels lie in the frame of the upright image, as `decode_rgb` returns it.
"""

import io
import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torchvision.io import encode_png

from modsquad_ds.data.decode import decode_mask, decode_rgb
from modsquad_ds.data.png_check import SIGNATURE, check_png
from modsquad_ds.tasks import CLASSIFICATION, DETECTION, IGNORE_INDEX, KINDS, SEGMENTATION

IMAGE_EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp", ".gif": "gif"}
"""Extension of an image file (lower case) -> name of its member in a shard."""

Size = tuple[int, int]
"""Height and width in pixels."""


class BadSample(NamedTuple):
    """A sample that cannot be used."""

    file: str
    """Path below the source folder."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file if _is_portable(self.file) else repr(self.file)}: {self.reason}"


class BadSampleError(Exception):
    """Raised while one sample is checked; caught by the converter, never shown as it is."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.bad = BadSample(file, reason)


class Sample(NamedTuple):
    """Descriptor of one sample: cheap to list and to pickle; `encode` does the heavy work."""

    key: str
    """Name of the sample in the shard, without dots."""
    image: str
    """Path of the image below the source folder."""
    label: Any
    """By kind. classification: class index. detection: `CocoRecord`. segmentation: the mask's path below the source. Image
    sets: by layout, which targets there are."""


class CocoRecord(NamedTuple):
    """What a COCO file says about one image, unchecked."""

    image_id: int
    width: int
    height: int
    annotations: list[dict[str, Any]]


class Labels(NamedTuple):
    """What the samples of a source share."""

    kind: str
    layout: str
    num_classes: int
    category_ids: dict[int, int]
    """detection: id in the COCO file -> 0-based label; empty for other kinds."""


class Picture(NamedTuple):
    """What a label has to agree with."""

    file: str
    size: Size
    """Of the upright image."""
    orientation: int
    """EXIF's 1..8: how the stored pixels have to be turned to stand upright; 5..8 swap height and width."""


def key_problem(key: str) -> str | None:
    """Why `key` cannot name a sample in a tar that webdataset reads; None if it can.

    webdataset cuts a member's name at the first dot (before it the key, after it the field) and skips folders `__x__`.
    """
    if "." in key:
        return f"the name {key!r} has a dot before its extension; webdataset would cut the key there: rename the file"
    if not _is_portable(key):
        return f"the name {key!r} has control characters or is not UTF-8, which a tar cannot carry: rename the file"
    first = key.split("/", 1)[0]
    if "/" in key and first.startswith("__") and first.endswith("__"):
        return f"webdataset skips folders named like {first!r}: rename the folder"
    return None


def _is_portable(name: str) -> bool:
    """No control characters, and no lone surrogates, which is how bytes that are not UTF-8 arrive."""
    return not any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in name)


def encode(sample: Sample, root: Path, labels: Labels) -> dict[str, bytes]:
    """Read and check one sample completely; return its members, field -> bytes. Raises BadSampleError."""
    data = read_file(root, sample.image)
    picture = examine(data, sample.image)
    image_field = IMAGE_EXTENSIONS[Path(sample.image).suffix.lower()]
    label = _LABEL_ENCODERS[labels.kind](sample, root, labels, picture)
    return {image_field: data, KINDS[labels.kind].label_field: label}


def examine(data: bytes, file: str) -> Picture:
    """Decode an image to its end, as training will. BadSampleError if that fails (truncated files included)."""
    if not data:
        raise BadSampleError(file, "is empty (0 bytes)")
    try:
        if data.startswith(SIGNATURE):
            check_png(data, deep=True)
        pixels = decode_rgb(data)
    except (RuntimeError, OSError, ValueError) as error:
        raise BadSampleError(file, f"does not decode: {_short(error)}") from error
    return Picture(file, (pixels.shape[1], pixels.shape[2]), _orientation(data, file))


def _orientation(data: bytes, file: str) -> int:
    # PIL would decode a PNG without EXIF once more to look for it at the end of the file.
    if not any(mark in data for mark in (b"Exif\0\0", b"eXIf", b"EXIF")):
        return 1
    try:
        orientation = PIL.Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise BadSampleError(file, f"has EXIF data that cannot be read: {_short(error)}") from error
    return orientation if orientation in range(1, 9) else 1


def _short(error: Exception) -> str:
    """First line of an error without the C++ file in front of torchvision's."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    _, mark, rest = line.partition(".cpp:")
    return rest.partition(", ")[2] or line if mark else line


def read_file(root: Path, file: str) -> bytes:
    """Content of a file below the source folder. BadSampleError if it cannot be read."""
    try:
        return (root / file).read_bytes()
    except FileNotFoundError as error:
        raise BadSampleError(file, "is missing") from error
    except OSError as error:
        raise BadSampleError(file, f"cannot be read: {error.strerror}") from error


def _lies_stored(label: str, size: Size, picture: Picture) -> bool:
    """Whether a label of `size` was drawn on the stored pixels rather than on the upright image.

    Without EXIF rotation the two are one. With it, the sizes tell; where they cannot (half turns, mirrors, squares) the
    sample is refused, since half of all tools would read it one way and half the other. Raises BadSampleError.
    """
    stored = picture.size if picture.orientation < 5 else picture.size[::-1]
    if size not in (stored, picture.size):
        raise BadSampleError(picture.file, f"{label} {size_text(size)} pixels (width x height), the file has {size_text(stored)}")
    if picture.orientation != 1 and stored == picture.size:
        reason = f"EXIF orientation {picture.orientation}: its label may mean the stored or the upright pixels"
        raise BadSampleError(picture.file, f"{reason}, nothing tells which: turn the pixels for good and drop the tag")
    return size != picture.size


def size_text(size: Size) -> str:
    """Width x height, as people say it."""
    return f"{size[1]}x{size[0]}"


# ---------------------------------------------------------------- labels, one encoder per kind


def _encode_class(sample: Sample, root: Path, labels: Labels, picture: Picture) -> bytes:
    return str(sample.label).encode("ascii")


def _encode_boxes(sample: Sample, root: Path, labels: Labels, picture: Picture) -> bytes:
    record: CocoRecord = sample.label
    stored = _lies_stored("the json says", (record.height, record.width), picture)
    rows = [_check_annotation(annotation, record, sample.image, labels) for annotation in record.annotations]
    label: dict[str, Any] = {"image_id": record.image_id, "width": picture.size[1], "height": picture.size[0]}
    for column, name in enumerate(("boxes", "labels", "iscrowd", "area", "ids")):
        label[name] = [row[column] for row in rows]
    if stored:
        label["boxes"] = [turn_box(box, (record.height, record.width), picture.orientation) for box in label["boxes"]]
    return json.dumps(label).encode("ascii")


_Annotation = tuple[list[float], int, int, float, int]
"""Box x, y, width, height; 0-based label; iscrowd; area; id."""


def _check_annotation(annotation: dict[str, Any], record: CocoRecord, file: str, labels: Labels) -> _Annotation:
    """Check one annotation. `iscrowd` and `area` may be absent: 0 and the box's own area. Raises BadSampleError."""

    def bad(reason: str) -> BadSampleError:
        return BadSampleError(file, f"annotation {annotation.get('id')}: {reason}")

    box, category, crowd = annotation.get("bbox"), annotation.get("category_id"), annotation.get("iscrowd", 0)
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
        raise bad(f"bbox is {box!r:.80}, expected four finite numbers x, y, width, height")
    x, y, width, height = (float(value) for value in box)
    if width <= 0 or height <= 0:
        raise bad(f"bbox {box} has no area (width and height must be positive)")
    if x >= record.width or y >= record.height or x + width <= 0 or y + height <= 0:
        raise bad(f"bbox {box} lies outside the image of {record.width}x{record.height} pixels")
    if type(category) is not int or category not in labels.category_ids:
        raise bad(f"category_id {category!r:.40} is not in the json's categories")
    if crowd not in (0, 1):
        raise bad(f"iscrowd is {crowd!r:.40}, expected 0 or 1")
    area = annotation.get("area", width * height)
    if not _is_finite(area) or area < 0:
        raise bad(f"area is {area!r:.40}, expected a number of at least 0")
    return [x, y, width, height], labels.category_ids[category], int(crowd), float(area), annotation["id"]


LARGEST = 1e12
"""No coordinate or area of an image is larger; training holds them in fp32, where 1e39 is infinite."""


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < LARGEST and not math.isnan(value)  # an int of 400 digits would overflow in math.isfinite


def turn_box(box: list[float], size: Size, orientation: int) -> list[float]:
    """Box x, y, width, height on stored pixels of `size` (height, width) -> on the upright image; orientation 5..8."""
    x, y, width, height = box
    from_bottom, from_right = size[0] - y - height, size[1] - x - width
    left, top = {5: (y, x), 6: (from_bottom, x), 7: (from_bottom, from_right), 8: (y, from_right)}[orientation]
    return [left, top, height, width]


def turn_mask(mask: Tensor, orientation: int) -> Tensor:
    """Mask on stored pixels `[h, w]` -> the same on the upright image `[w, h]`; orientation 5..8."""
    turned = {5: mask.T, 6: mask.rot90(-1), 7: mask.rot90(2).T, 8: mask.rot90(1)}[orientation]
    return turned.contiguous()


def _encode_mask(sample: Sample, root: Path, labels: Labels, picture: Picture) -> bytes:
    """Mask with zero reduced (0 -> 255, v -> v-1, 255 stays) as a single-channel 8-bit PNG."""
    file: str = sample.label
    data = read_file(root, file)
    if not data:
        raise BadSampleError(file, "mask is empty (0 bytes)")
    try:
        mask = decode_mask(data)
    except (RuntimeError, ValueError) as error:
        raise BadSampleError(file, f"mask does not decode: {_short(error)}") from error
    if _lies_stored(f"its mask {file} has", (mask.shape[0], mask.shape[1]), picture):
        mask = turn_mask(mask, picture.orientation)
    highest = int(torch.where(mask == IGNORE_INDEX, 0, mask).max())
    if highest > labels.num_classes:
        expected = f"with {labels.num_classes} classes expected 0..{labels.num_classes} or {IGNORE_INDEX}"
        raise BadSampleError(file, f"mask holds the value {highest}; {expected}")
    reduced = torch.where(mask == IGNORE_INDEX, mask, mask - 1)  # uint8 wraps: 0 - 1 = 255
    return bytes(encode_png(reduced[None]).numpy())


_LABEL_ENCODERS = {CLASSIFICATION: _encode_class, DETECTION: _encode_boxes, SEGMENTATION: _encode_mask}
