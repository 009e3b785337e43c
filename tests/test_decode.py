"""Decoding: every image format against PIL, labels by kind, and what is refused with which words."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from modsquad_ds.data.decode import Decoded, DetectionLabel, decode_mask, decode_rgb, decode_sample
from modsquad_ds.data.types import RawSample
from modsquad_ds.errors import UserError

HEIGHT, WIDTH = 40, 60
ROWS, COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB = np.stack([COLUMNS * 4, ROWS * 6, (COLUMNS + ROWS) * 2], -1).astype(np.uint8)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def by_pil(data: bytes) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RGB).convert(mode)


def with_alpha() -> Image.Image:
    return Image.fromarray(np.dstack([RGB, (COLUMNS * 4).astype(np.uint8)]))


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says that its first three channels are YCC."""
    data = bytearray(encoded(picture("CMYK"), "JPEG", quality=95))
    marker = data.find(b"\xff\xee")
    data[marker + 15] = 2
    return bytes(data)


def unmarked_cmyk() -> bytes:
    data = encoded(picture("CMYK"), "JPEG", quality=95)
    marker = data.find(b"\xff\xee")
    return data[:marker] + data[marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big") :]


FORMATS = {
    "jpeg": encoded(picture(), "JPEG", quality=90),
    "jpeg progressive": encoded(picture(), "JPEG", quality=90, progressive=True),
    "jpeg grey": encoded(picture("L"), "JPEG", quality=90),
    "jpeg cmyk": encoded(picture("CMYK"), "JPEG", quality=90),
    "jpeg cmyk unmarked": unmarked_cmyk(),
    "jpeg ycck": ycck(),
    "png": encoded(picture(), "PNG"),
    "png grey": encoded(picture("L"), "PNG"),
    "png grey alpha": encoded(picture("LA"), "PNG"),
    "png rgba": encoded(with_alpha(), "PNG"),
    "png palette": encoded(picture("P"), "PNG"),
    "png palette transparent": encoded(picture("P"), "PNG", transparency=3),
    "png one bit": encoded(picture("1"), "PNG"),
    "webp": encoded(picture(), "WEBP", quality=90),
    "webp rgba": encoded(with_alpha(), "WEBP", lossless=True),
    "gif": encoded(picture(), "GIF"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_equal_pil(name: str) -> None:
    decoded = decode_rgb(FORMATS[name])
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, HEIGHT, WIDTH)
    difference = np.abs(decoded.permute(1, 2, 0).numpy().astype(int) - by_pil(FORMATS[name]).astype(int))
    # Two builds of libjpeg or libwebp may round differently; a wrong colour space is off by tens.
    assert difference.max() <= 3 and difference.mean() < 0.5


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    options = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}}[file_format]
    data = encoded(picture(), file_format, exif=oriented(orientation), **options)
    decoded = decode_rgb(data).permute(1, 2, 0).numpy()
    assert decoded.shape == ((WIDTH, HEIGHT, 3) if orientation >= 5 else (HEIGHT, WIDTH, 3))
    assert np.abs(decoded.astype(int) - by_pil(data).astype(int)).max() <= 3


def test_sixteen_bits_are_scaled_to_eight() -> None:
    values = np.zeros((2, 6), dtype=np.uint16)
    values[0] = [0, 128, 129, 257, 32896, 65535]
    values[1] = [65534, 65406, 65407, 65278, 386, 385]
    decoded = decode_rgb(encoded(Image.fromarray(values), "PNG"))
    # 65535 / 255 = 257: steps of 257, rounded to the nearest.
    expected = torch.tensor([[0, 0, 1, 1, 128, 255], [255, 254, 255, 254, 2, 1]], dtype=torch.uint8)
    assert torch.equal(decoded, expected.expand(3, 2, 6))


def test_animation_gives_its_first_frame() -> None:
    data = encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(180)])
    assert np.abs(decode_rgb(data).permute(1, 2, 0).numpy().astype(int) - by_pil(data).astype(int)).max() <= 3


def test_mask_values_are_unchanged() -> None:
    mask = (COLUMNS * 4 + ROWS % 4).astype(np.uint8)
    mask[0, :3] = [0, 254, 255]
    assert np.array_equal(decode_mask(encoded(Image.fromarray(mask), "PNG")).numpy(), mask)
    palette = Image.fromarray(mask, "P")
    palette.putpalette([255 - value // 3 for value in range(768)])
    data = encoded(palette, "PNG")
    assert np.array_equal(decode_mask(data).numpy(), mask)


@pytest.mark.parametrize("mode", ["1", "RGB", "LA", "I;16"])
def test_mask_of_another_kind_is_refused(mode: str) -> None:
    image = Image.fromarray((COLUMNS * 1000).astype(np.uint16)) if mode == "I;16" else picture(mode)
    with pytest.raises(ValueError, match="expected 8-bit grey"):
        decode_mask(encoded(image, "PNG"))


# ---------------------------------------------------------------- samples


def raw(**fields: bytes) -> RawSample:
    return RawSample("dog/7", {name.replace("_", "."): data for name, data in fields.items()}, "train/shard-00003.tar")


def label_json(**changes: Any) -> bytes:
    label = {
        "image_id": 5,
        "height": HEIGHT,
        "width": WIDTH,
        "boxes": [[1, 2, 10, 20], [0, 0, 60, 40], [5.5, 6, 1, 2]],
        "labels": [2, 0, 1],
        "iscrowd": [0, 1, 0],
        "area": [200, 2400, 2],
        "ids": [11, 12, 13],
    }
    return json.dumps({name: value for name, value in (label | changes).items() if value is not None}).encode()


PNG = FORMATS["png"]


def test_class_label() -> None:
    assert decode_sample(raw(png=PNG, cls=b"9"), "classification", 10).label == 9


def test_box_label() -> None:
    decoded: Decoded = decode_sample(raw(png=PNG, json=label_json()), "detection", 3)
    assert isinstance(decoded.label, DetectionLabel)
    assert decoded.label.boxes.tolist() == [[1, 2, 11, 22], [5.5, 6, 6.5, 8]]
    assert decoded.label.labels.tolist() == [2, 1]
    assert decoded.label.ignore.tolist() == [[0, 0, 60, 40]]
    assert decoded.label.annotations["ids"] == [11, 12, 13]


def test_image_without_boxes() -> None:
    empty: dict[str, Any] = {name: [] for name in ("boxes", "labels", "iscrowd", "area", "ids")}
    label = decode_sample(raw(png=PNG, json=label_json(**empty)), "detection", 3).label
    assert isinstance(label, DetectionLabel)
    assert label.boxes.shape == (0, 4) and label.labels.shape == (0,) and label.ignore.shape == (0, 4)


def test_mask_label() -> None:
    mask = (COLUMNS // 20).astype(np.uint8)
    mask[0] = 255
    decoded = decode_sample(raw(png=PNG, seg_png=encoded(Image.fromarray(mask), "PNG")), "segmentation", 3)
    assert np.array_equal(decoded.label, mask)


MASK = encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 7, np.uint8)), "PNG")
SMALL = encoded(Image.fromarray(np.zeros((10, 20), np.uint8)), "PNG")


@pytest.mark.parametrize(
    ("kind", "sample", "field", "words"),
    [
        ("classification", raw(png=PNG), "cls", "label of a classification sample is missing"),
        ("classification", raw(cls=b"1"), "image", "found none"),
        ("classification", raw(cls=b"1", png=PNG, jpg=PNG), "image", "exactly one"),
        ("classification", raw(cls=b"10", png=PNG), "cls", "class 10 is out of range, the task has 10 classes"),
        ("classification", raw(cls=b"-1", png=PNG), "cls", "not a class index"),
        ("classification", raw(cls=b"cat", png=PNG), "cls", "not a class index"),
        ("classification", raw(cls=b"1", jpg=FORMATS["jpeg"][:300]), "jpg", "incomplete or truncated"),
        ("classification", raw(cls=b"1", png=PNG[:60]), "png", "cannot be decoded"),
        ("classification", raw(cls=b"1", png=b"hello"), "png", "cannot be decoded"),
        ("classification", raw(cls=b"1", jpg=b""), "jpg", "empty file"),
        ("detection", raw(png=PNG), "json", "missing"),
        ("detection", raw(png=PNG, json=b"{"), "json", "not JSON"),
        ("detection", raw(png=PNG, json=b"[1]"), "json", "image_id, height, width, boxes"),
        ("detection", raw(png=PNG, json=label_json(boxes=None)), "json", "boxes missing"),
        ("detection", raw(png=PNG, json=label_json(width=61)), "json", "image of 40x61 but the image is 40x60"),
        ("detection", raw(png=PNG, json=label_json(labels=[0, 1, 10])), "json", "labels 0..10 are out of range"),
        ("detection", raw(png=PNG, json=label_json(labels=[0, 1])), "json", "3 boxes, 2 labels, 3 iscrowd"),
        ("detection", raw(png=PNG, json=label_json(boxes=[[0, 0, float("nan"), 1]] * 3)), "json", "finite"),
        ("detection", raw(png=PNG, json=label_json(boxes=[["a", 0, 1, 1]])), "json", "no lists of numbers"),
        ("segmentation", raw(png=PNG), "seg.png", "missing"),
        ("segmentation", raw(png=PNG, seg_png=MASK[:50]), "seg.png", "cannot be decoded"),
        ("segmentation", raw(png=PNG, seg_png=SMALL), "seg.png", "the mask is 10x20 but the image is 40x60"),
        ("segmentation", raw(png=PNG, seg_png=PNG), "seg.png", "colour type 2"),
    ],
)
def test_bad_samples_name_shard_key_and_field(kind: str, sample: RawSample, field: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        decode_sample(sample, kind, 10)
    message = str(caught.value)
    assert message.startswith(f"train/shard-00003.tar: sample 'dog/7', field '{field}': ")
    assert words in message and "\n" not in message and ".cpp" not in message


def test_mask_class_out_of_range() -> None:
    sample = raw(png=PNG, seg_png=MASK)
    decode_sample(sample, "segmentation", 8)
    with pytest.raises(UserError, match="class 7 is out of range, the task has 7 classes"):
        decode_sample(sample, "segmentation", 7)
