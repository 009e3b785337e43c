"""Images of the real layouts: which files are refused with which words, every pixel format kept, EXIF orientation."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import layouts
from layouts import assert_matches, bad_of, label_of
from modsquad_ds.data.decode import decode_mask, decode_rgb
from modsquad_ds.data.layouts import read_source
from modsquad_ds.data.samples import encode, turn_box, turn_mask

HEIGHT, WIDTH = layouts.HEIGHT, layouts.WIDTH


# ---------------------------------------------------------------- images


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


GOOD = jpeg(layouts.picture())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (GOOD[: len(GOOD) // 2], "does not decode: .*(truncated|incomplete)"),
        (GOOD[:-2], "does not decode"),
        (b"<html>404</html>", "does not decode: .*[Uu]nsupported"),
        (None, "is missing"),
    ],
    ids=["empty", "half", "no end marker", "html", "dangling link"],
)
def test_unusable_image_files(tmp_path: Path, data: bytes | None, reason: str) -> None:
    layouts.imagenet(tmp_path)
    path = tmp_path / "train/n01/broken.jpg"
    if data is None:
        path.symlink_to(tmp_path / "nowhere.jpg")
    else:
        path.write_bytes(data)
    bad = bad_of(read_source("imagenet", tmp_path, "train"))
    assert list(bad) == ["train/n01/broken.jpg"]
    assert_matches(reason, bad["train/n01/broken.jpg"])


def test_every_pixel_format_is_accepted_unchanged(tmp_path: Path) -> None:
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16))
    images = {
        "grey.jpg": layouts.picture().convert("L"),
        "cmyk.jpg": layouts.picture().convert("CMYK"),
        "deep.png": deep,
        "palette.png": layouts.picture().convert("P"),
        "one_bit.png": layouts.picture().convert("1"),
        "alpha.png": layouts.picture().convert("RGBA"),
        "modern.webp": layouts.picture(),
        "PNG_INSIDE.JPEG": None,
    }
    for name, image in images.items():
        if image is None:  # one such file is in the real ImageNet
            layouts.save(layouts.picture(), tmp_path / "train/c" / name, format="PNG")
        else:
            layouts.save(image, tmp_path / "train/c" / name)
    source = read_source("imagenet", tmp_path, "train")
    assert bad_of(source) == {}
    for sample in source.samples:
        data = (tmp_path / sample.image).read_bytes()
        fields = encode(sample, source.root, source.labels)
        assert data in fields.values()
        assert len(fields) == 2

# ---------------------------------------------------------------- EXIF orientation


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def marked(box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """`size` pixels, 200 inside `box` (x, y, width, height), 0 elsewhere."""
    pixels = np.zeros(size, dtype=np.uint8)
    x, y, width, height = box
    pixels[y : y + height, x : x + width] = 200
    return pixels


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_labels_of_rotated_images_fit_the_upright_pixels(tmp_path: Path, orientation: int, frame: str) -> None:
    stored_box = (4, 2, 6, 9)
    stored = marked(stored_box, (HEIGHT, WIDTH))
    upright = np.asarray(decode_rgb(png(stored, orientation)).numpy()[0])
    rows, columns = np.flatnonzero(upright.any(1)), np.flatnonzero(upright.any(0))
    upright_box = [int(columns[0]), int(rows[0]), len(columns), len(rows)]
    labelled, box = (stored, list(stored_box)) if frame == "stored" else (upright, upright_box)

    image = tmp_path / "images/training/a.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(png(stored, orientation))
    layouts.save(
        Image.fromarray(np.where(labelled > 0, 2, 1).astype(np.uint8)), tmp_path / "annotations/training/a.png"
    )
    masks = read_source("ade20k", tmp_path, "training")
    label = decode_mask(encode(masks.samples[0], tmp_path, masks.labels)["seg.png"]).numpy()
    assert np.array_equal(label == 1, upright > 0)

    row = {"id": 1, "file_name": "a.png", "width": labelled.shape[1], "height": labelled.shape[0]}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box}
    content = {"images": [row], "annotations": [annotation], "categories": [{"id": 1, "name": "x"}]}
    layouts.save(layouts.picture(), tmp_path / "train2017/a.png")
    (tmp_path / "train2017/a.png").write_bytes(png(stored, orientation))
    layouts.write_json(tmp_path, "train2017", content)
    found = label_of(read_source("coco", tmp_path, "train2017"), "a")
    assert found["boxes"] == [upright_box]
    assert (found["height"], found["width"]) == upright.shape


def png(pixels: np.ndarray, orientation: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif(orientation))
    return buffer.getvalue()


@pytest.mark.parametrize(("orientation", "size"), [(3, (20, 30)), (2, (20, 30)), (6, (20, 20))])
def test_rotations_that_no_size_gives_away_are_refused(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    layouts.save(layouts.picture(0, size), tmp_path / "images/val/a.jpg", exif=exif(orientation))
    layouts.save(layouts.mask([1, 2], size), tmp_path / "annotations/val/a.png")
    bad = bad_of(read_source("ade20k", tmp_path, "val"))
    assert_matches(
        f"EXIF orientation {orientation}: its label may mean the stored or the upright", bad["images/val/a.jpg"]
    )


def test_orientation_does_not_matter_for_classes(tmp_path: Path) -> None:
    layouts.save(layouts.picture(), tmp_path / "train/c/a.jpg", exif=exif(3))
    source = read_source("imagenet", tmp_path, "train")
    assert bad_of(source) == {}


def test_turning_a_box_and_its_mask_agree() -> None:
    mask = torch.from_numpy(marked((4, 2, 6, 9), (HEIGHT, WIDTH)))
    for orientation in (5, 6, 7, 8):
        x, y, width, height = (int(side) for side in turn_box([4.0, 2.0, 6.0, 9.0], (HEIGHT, WIDTH), orientation))
        expected = torch.from_numpy(marked((x, y, width, height), (WIDTH, HEIGHT)))
        assert torch.equal(turn_mask(mask, orientation), expected)
