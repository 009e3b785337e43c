"""Undecoded bytes -> pixels and label: the second stop of a sample, between the shard and its transform.

torchvision.io decodes all that occurs in the supported datasets: JPEG (grey, CMYK, YCCK), PNG (grey, alpha, palette,
1 to 16 bits), GIF, and WebP unless it has EXIF data. Images are turned upright by their EXIF orientation, and labels
lie in that frame. `decode_sample` refuses with a UserError that names shard, key and field.
"""

import io
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from modsquad_ds.data.png_check import SIGNATURE, check_png
from modsquad_ds.data.types import RawSample
from modsquad_ds.errors import UserError
from modsquad_ds.tasks import CLASSIFICATION, DETECTION, IGNORE_INDEX, KINDS, SEGMENTATION

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif")
"""Members of a sample that can hold its image; exactly one is there."""
_BOX_FIELDS = ("image_id", "height", "width", "boxes", "labels", "iscrowd", "area", "ids")

# Since 0.29 torchvision announces, once per process, that image decoding will move to another package one day.
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")


class DetectionLabel(NamedTuple):
    """The boxes of one image, in pixels of the upright original."""

    boxes: Tensor
    """float32 `[n, 4]`, x1 y1 x2 y2."""
    labels: Tensor
    """int64 `[n]`, 0-based."""
    ignore: Tensor
    """float32 `[m, 4]`: crowd boxes, neither object nor background."""
    annotations: dict[str, Any]
    """The shard's json as it is (boxes as x, y, width, height), for the metric."""


class Decoded(NamedTuple):
    """One sample in memory."""

    image: Tensor
    """uint8 RGB `[3, H, W]`, upright."""
    label: int | DetectionLabel | Tensor
    """By kind: class index; DetectionLabel; mask uint8 `[H, W]`, 255 = ignored."""


def decode_rgb(data: bytes) -> Tensor:
    """Image file -> uint8 RGB `[3, H, W]`, EXIF orientation applied. RuntimeError, ValueError or OSError if it is none.

    Alpha is dropped as PIL's convert("RGB") does; 16 bits are rounded to 8 (65535 -> 255); of an animation comes the
    first frame.
    """
    if data[:4] == b"RIFF" and b"EXIF" in data:
        # torchvision applies the orientation to JPEG and PNG only.
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
        return F.pil_to_tensor(image.convert("RGB"))
    pixels = decode_image(_as_tensor(data), ImageReadMode.RGB, apply_exif_orientation=True)
    if pixels.ndim == 4:
        pixels = pixels[0]
    if pixels.dtype == torch.uint16:
        pixels = ((pixels.to(torch.int32) * 255 + 32767) // 65535).to(torch.uint8)
    return pixels


def decode_mask(data: bytes) -> Tensor:
    """Label PNG (8-bit grey or palette) -> its values as they are, uint8 `[H, W]`. RuntimeError or ValueError if not.

    Other bit depths are refused: a decoder would stretch 1, 2 or 4 bits to the range of 8 and so change the classes.
    """
    # The header chunk is always first: signature 8, length 4, name 4, width 4, height 4, bit depth, colour type.
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 26:
        raise ValueError("not a PNG file")
    depth, colour = data[24], data[25]
    if depth != 8 or colour not in (0, 3):
        raise ValueError(f"PNG of bit depth {depth} and colour type {colour}, expected 8-bit grey (0) or palette (3)")
    return decode_image(_as_tensor(data), ImageReadMode.UNCHANGED)[0]


def _as_tensor(data: bytes) -> Tensor:
    if not data:
        raise RuntimeError("empty file")
    if data[:8] == SIGNATURE:
        check_png(data)
    # bytearray: torch warns about memory that it may not write to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode_sample(raw: RawSample, kind: str, num_classes: int) -> Decoded:
    """Image and label of a sample of `kind`. UserError with shard, key and field for whatever is missing or broken."""
    image, label_field = decode_image_of(raw), KINDS[kind].label_field
    if label_field not in raw.fields:
        refuse(raw, label_field, f"the label of a {kind} sample is missing; members are {sorted(raw.fields)}")
    return Decoded(image, _LABEL_DECODERS[kind](raw, image.shape[1:], num_classes))


def decode_image_of(raw: RawSample) -> Tensor:
    """A sample's image, uint8 RGB `[3, H, W]`, upright. UserError with shard, key and field if it is missing or broken."""
    fields = [field for field in IMAGE_FIELDS if field in raw.fields]
    if len(fields) != 1:
        refuse(raw, "image", f"found {fields or 'none'} among members {sorted(raw.fields)}; expected exactly one")
    field = fields[0]
    try:
        return decode_rgb(raw.fields[field])
    except (RuntimeError, OSError, ValueError) as error:
        refuse(raw, field, f"the image cannot be decoded ({_first_line(error)})")


def _class_label(raw: RawSample, size: Sequence[int], num_classes: int) -> int:
    text = raw.fields["cls"].strip()
    if not text.isdigit():
        refuse(raw, "cls", f"{text[:40]!r} is not a class index")
    if int(text) >= num_classes:
        refuse(raw, "cls", f"class {int(text)} is out of range, the task has {num_classes} classes (0-based)")
    return int(text)


def _box_label(raw: RawSample, size: Sequence[int], num_classes: int) -> DetectionLabel:
    try:
        content = json.loads(raw.fields["json"])
    except ValueError as error:
        refuse(raw, "json", f"not JSON ({_first_line(error)})")
    missing = [name for name in _BOX_FIELDS if not isinstance(content, dict) or name not in content]
    if missing:
        refuse(raw, "json", f"{', '.join(missing)} missing; a detection label holds {', '.join(_BOX_FIELDS)}")
    if (content["height"], content["width"]) != tuple(size):
        stated = by((content["height"], content["width"]))
        refuse(raw, "json", f"the label is for an image of {stated} but the image is {by(size)} (height x width)")
    try:
        boxes = torch.tensor(content["boxes"], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor(content["labels"], dtype=torch.int64)
        crowd = torch.tensor(content["iscrowd"], dtype=torch.bool)
    except (TypeError, ValueError, RuntimeError) as error:
        refuse(raw, "json", f"boxes, labels or iscrowd are no lists of numbers ({_first_line(error)})")
    if not len(boxes) == len(labels) == len(crowd) or not boxes.isfinite().all():
        counts = f"{len(boxes)} boxes, {len(labels)} labels, {len(crowd)} iscrowd"
        refuse(raw, "json", f"{counts}; expected as many of each, and finite boxes")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        found = f"{int(labels.min())}..{int(labels.max())}"
        refuse(raw, "json", f"labels {found} are out of range, the task has {num_classes} classes (0-based)")
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    return DetectionLabel(corners[~crowd], labels[~crowd], corners[crowd], content)


def _mask_label(raw: RawSample, size: Sequence[int], num_classes: int) -> Tensor:
    try:
        mask = decode_mask(raw.fields["seg.png"])
    except (RuntimeError, ValueError) as error:
        refuse(raw, "seg.png", f"the mask cannot be decoded ({_first_line(error)})")
    if mask.shape != size:
        refuse(raw, "seg.png", f"the mask is {by(mask.shape)} but the image is {by(size)} (height x width)")
    counts = torch.bincount(mask.flatten(), minlength=256)
    if counts[num_classes:IGNORE_INDEX].any():
        worst = int(counts[:IGNORE_INDEX].nonzero().max())
        refuse(raw, "seg.png", f"class {worst} is out of range, the task has {num_classes} classes (0-based, or 255)")
    return mask


_LABEL_DECODERS: dict[str, Callable[[RawSample, Sequence[int], int], int | DetectionLabel | Tensor]] = {
    CLASSIFICATION: _class_label,
    DETECTION: _box_label,
    SEGMENTATION: _mask_label,
}
"""Kind -> (sample, height and width of its image, number of classes) -> label."""


def by(size: Sequence[int]) -> str:
    """`480x640`."""
    return f"{size[0]}x{size[1]}"


def _first_line(error: Exception) -> str:
    """The message's first line, without the place in C++ that torchvision puts in front of it."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    _, place, rest = line.rpartition(".cpp:")
    return rest.partition(", ")[2] if place else line


def refuse(raw: RawSample, field: str, what: str) -> NoReturn:
    """UserError about a field of a sample."""
    raise UserError(f"{raw.shard}: sample {raw.key!r}, field {field!r}: {what}")
