"""Readers of the real layouts and the checks of each sample: what is accepted, and what is refused with which words."""

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import layouts
from layouts import assert_matches, bad_of, label_of
from modsquad_ds.data.layouts import read_source
from modsquad_ds.data.samples import encode
from modsquad_ds.errors import UserError

HEIGHT, WIDTH = layouts.HEIGHT, layouts.WIDTH


# ---------------------------------------------------------------- imagenet


def test_imagenet_classes_are_sorted_folders_and_bytes_stay(tmp_path: Path) -> None:
    source = read_source("imagenet", layouts.imagenet(tmp_path), "train")
    assert source.kind == "classification"
    assert source.classes == ("n01", "n02")
    assert [sample.key for sample in source.samples] == [f"{c}/{c}_{i}" for c in ("n01", "n02") for i in range(4)]
    fields = [encode(sample, source.root, source.labels) for sample in source.samples]
    assert [set(one) for one in fields] == [{"jpg", "cls"}, {"png", "cls"}, {"jpg", "cls"}, {"jpg", "cls"}] * 2
    assert [one["cls"] for one in fields] == [b"0"] * 4 + [b"1"] * 4
    assert fields[0]["jpg"] == (tmp_path / "train/n01/n01_0.JPEG").read_bytes()


def test_imagenet_without_split_folder(tmp_path: Path) -> None:
    layouts.imagenet(tmp_path, split=".")
    source = read_source("imagenet", tmp_path, "train")
    assert len(source.samples) == 8
    assert source.samples[0].image == "n01/n01_0.JPEG"


def test_imagenet_asked_for_a_split_that_is_not_there(tmp_path: Path) -> None:
    layouts.imagenet(tmp_path, "train")
    with pytest.raises(UserError, match=r"no image in a class folder .* split 'test': expected .*test/<class folder>"):
        read_source("imagenet", tmp_path, "test")


def test_imagenet_reports_what_is_out_of_place(tmp_path: Path) -> None:
    layouts.imagenet(tmp_path)
    train = tmp_path / "train"
    layouts.save(layouts.picture(), train / "stray.jpg")
    layouts.save(layouts.picture(), train / "n01/deep/inner.jpg")
    layouts.save(layouts.picture(), train / "n01/scan.tiff")
    layouts.save(layouts.picture(), train / "n01/a.b.jpg")
    layouts.save(layouts.picture(), train / "n01/n01_0.png")
    layouts.save(layouts.picture(), train / "__meta__/x.jpg")
    layouts.save(layouts.picture(), train / "n02/new\nline.jpg")
    (train / "n01/README.txt").write_text("passed over")
    (train / ".hidden").mkdir()
    source = read_source("imagenet", tmp_path, "train")
    assert source.classes == ("__meta__", "n01", "n02")
    bad = bad_of(source)
    assert bad.keys() == {
        "train/stray.jpg", "train/n01/deep", "train/n01/scan.tiff", "train/n01/a.b.jpg", "train/n01/n01_0.png",
        "train/__meta__/x.jpg", "train/n02/new\nline.jpg",
    }  # fmt: skip
    assert "outside a class folder" in bad["train/stray.jpg"]
    assert "folder inside a class folder" in bad["train/n01/deep"]
    assert ".tiff files are not read" in bad["train/n01/scan.tiff"]
    assert "'n01/a.b' has a dot" in bad["train/n01/a.b.jpg"]
    assert "same key 'n01/n01_0' as train/n01/n01_0.JPEG" in bad["train/n01/n01_0.png"]
    assert "webdataset skips folders named like '__meta__'" in bad["train/__meta__/x.jpg"]
    assert "control characters" in bad["train/n02/new\nline.jpg"]


def test_a_name_that_is_not_utf8_is_reported_and_printable(tmp_path: Path) -> None:
    layouts.imagenet(tmp_path)
    path = os.fsencode(tmp_path / "train/n01") + b"/caf\xe9.jpg"
    with open(path, "wb") as file:
        layouts.picture().save(file, "JPEG")
    (bad,) = read_source("imagenet", tmp_path, "train").bad
    assert "not UTF-8" in bad.reason
    str(bad).encode("utf-8")


# ---------------------------------------------------------------- coco


def test_coco_labels_boxes_crowds_and_empty_images(tmp_path: Path) -> None:
    source = read_source("coco", layouts.coco(tmp_path), "train")  # train stands for train2017
    assert source.kind == "detection"
    assert source.classes == ("dog", "cat")
    assert source.details["category_ids"] == [3, 7]
    assert source.details["source_split"] == "train2017"
    assert label_of(source, "000000") == {
        "image_id": 100, "width": 30, "height": 20, "boxes": [], "labels": [], "iscrowd": [], "area": [], "ids": [],
    }  # fmt: skip
    assert label_of(source, "000003") == {
        "image_id": 103,
        "width": 30,
        "height": 20,
        "boxes": [[1.5, 2.0, 5.0, 6.5], [2.5, 2.0, 5.0, 6.5], [3.5, 2.0, 5.0, 6.5]],
        "labels": [1, 0, 1],
        "iscrowd": [0, 0, 1],
        "area": [20.25, 20.25, 20.25],
        "ids": [30, 31, 32],
    }


def test_coco_without_area_and_iscrowd(tmp_path: Path) -> None:
    content = layouts.coco_content()
    for row in content["annotations"]:
        del row["area"], row["iscrowd"]
    label = label_of(read_source("coco", layouts.coco(tmp_path, content=content), "train2017"), "000001")
    assert (label["area"], label["iscrowd"]) == ([32.5], [0])


NAN = math.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [1, 2, 0, 5]}, r"annotation 10: bbox \[1, 2, 0, 5\] has no area"),
        ({"bbox": [1, 2, 5, -3]}, "has no area"),
        ({"bbox": [1, NAN, 5, 3]}, r"bbox is \[1, nan, 5, 3\], expected four finite numbers"),
        ({"bbox": [1, 2, math.inf, 3]}, "four finite numbers"),
        ({"bbox": [1, 2, 10**400, 3]}, "four finite numbers"),
        ({"bbox": [1, 2, 1e200, 3]}, "four finite numbers"),  # finite here, but not in the fp32 that training holds
        ({"bbox": [1, 2, 3]}, "four finite numbers"),
        ({"bbox": None}, "bbox is None"),
        ({"bbox": [1, 2, "3", 4]}, "four finite numbers"),
        ({"bbox": [30, 2, 4, 4]}, "lies outside the image of 30x20 pixels"),
        ({"bbox": [-5, 2, 5, 4]}, "lies outside the image"),
        ({"bbox": [2, -9, 5, 4]}, "lies outside the image"),
        ({"category_id": 99}, "category_id 99 is not in the json's categories"),
        ({"category_id": [3]}, r"category_id \[3\] is not in"),
        ({"iscrowd": 2}, "iscrowd is 2"),
        ({"area": -1.0}, "area is -1.0"),
        ({"area": NAN}, "area is nan"),
        ({"id": "x"}, r"annotations\[0\] has id 'x'"),
        ({"id": 20}, "annotation id 20 is used twice"),
    ],
)
def test_bad_annotations_rule_out_their_image(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    content = layouts.coco_content()
    content["annotations"][0].update(change)
    bad = bad_of(read_source("coco", layouts.coco(tmp_path, content=content), "train2017"))
    # Of two annotations with one id, the second is refused.
    assert list(bad) == ["train2017/000002.jpg" if change == {"id": 20} else "train2017/000001.jpg"]
    assert_matches(reason, next(iter(bad.values())))


def test_a_box_that_reaches_over_the_edge_is_kept(tmp_path: Path) -> None:
    content = layouts.coco_content()
    content["annotations"][0]["bbox"] = [-3.0, 15.0, 40.0, 6.0]
    source = read_source("coco", layouts.coco(tmp_path, content=content), "train2017")
    assert bad_of(source) == {}
    assert label_of(source, "000001")["boxes"] == [[-3.0, 15.0, 40.0, 6.0]]


@pytest.mark.parametrize("image_id", [999, None, "100", [100]])
def test_annotation_for_an_unknown_image(tmp_path: Path, image_id: Any) -> None:
    content = layouts.coco_content()
    content["annotations"][0]["image_id"] = image_id
    (bad,) = read_source("coco", layouts.coco(tmp_path, content=content), "train2017").bad
    assert bad.file == "annotations/instances_train2017.json"
    assert_matches("annotation 10 belongs to image_id .*, which 'images' does not list", bad.reason)


@pytest.mark.parametrize(
    ("change", "file", "reason"),
    [
        ({"width": 31}, "train2017/000001.jpg", r"the json says 31x20 pixels \(width x height\), the file has 30x20"),
        ({"width": "30"}, "annotations/instances_train2017.json", r"images\[1\] needs an integer id, width and height"),
        ({"file_name": None}, "annotations/instances_train2017.json", r"images\[1\] needs .* a file_name"),
        ({"file_name": "gone.png"}, "train2017/gone.png", "is missing"),
        ({"file_name": "../x.png"}, "train2017/../x.png", "points outside the image folder"),
        ({"file_name": "/etc/x.png"}, "train2017//etc/x.png", "points outside the image folder"),
        ({"file_name": "x.txt"}, "train2017/x.txt", "is no image file"),
        ({"file_name": "a.b.jpg"}, "train2017/a.b.jpg", "'a.b' has a dot"),
        ({"file_name": "sub/000002.jpg"}, "train2017/sub/000002.jpg", "same key '000002' as train2017/000002.jpg"),
    ],
)
def test_bad_images_in_coco(tmp_path: Path, change: dict[str, Any], file: str, reason: str) -> None:
    content = layouts.coco_content()
    content["images"][1].update(change)
    (tmp_path / "train2017/sub").mkdir(parents=True)
    bad = bad_of(read_source("coco", layouts.coco(tmp_path, content=content), "train2017"))
    if file.endswith(".json"):  # then its annotation has no image either
        assert_matches(reason, dict_of_first(tmp_path)[file])
    else:
        assert list(bad) == [file]
        assert_matches(reason, bad[file])


def dict_of_first(src: Path) -> dict[str, str]:
    first = read_source("coco", src, "train2017").bad[0]
    return {first.file: first.reason}


def test_two_images_with_one_id_are_both_refused(tmp_path: Path) -> None:
    content = layouts.coco_content()
    content["images"][2]["id"] = 101
    content["annotations"] = content["annotations"][:1]
    bad = bad_of(read_source("coco", layouts.coco(tmp_path, content=content), "train2017"))
    assert bad == {
        "train2017/000001.jpg": "image id 101 also belongs to 000002.jpg",
        "train2017/000002.jpg": "image id 101 also belongs to 000001.jpg",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n "annotations": [}', r"instances_train2017.json, line 2, column 18: not JSON"),
        ('{"images": [', r"instances_train2017.json, line 1, column 13: not JSON"),
        ("[]", "has no list 'images'"),
        ('{"images": [], "annotations": {}, "categories": []}', "has no list 'annotations'"),
        ('{"images": [3], "annotations": [], "categories": []}', r"images\[0\] is 3, expected an object"),
        ('{"images": [], "annotations": [], "categories": []}', "'categories' is empty"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', r"categories\[0\] needs an integer 'id'"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "category id 1 stands for both 'a' and 'b'",
        ),
        (b"\xff\xfe\x00", "not UTF-8|not JSON"),
    ],
)
def test_malformed_coco_json(tmp_path: Path, text: str | bytes, message: str) -> None:
    layouts.coco(tmp_path)
    data = text.encode() if isinstance(text, str) else text
    (tmp_path / "annotations/instances_train2017.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_source("coco", tmp_path, "train2017")


def test_coco_missing_parts(tmp_path: Path) -> None:
    layouts.coco(tmp_path)
    with pytest.raises(UserError, match=r"has no instances_val.json"):
        read_source("coco", tmp_path, "val")
    layouts.write_json(tmp_path, "val2017", layouts.coco_content())
    with pytest.raises(UserError, match=r"val2017 does not exist: expected the images of instances_val2017.json"):
        read_source("coco", tmp_path, "val")


# ---------------------------------------------------------------- ade20k


def test_ade20k_reduces_the_zero_label(tmp_path: Path) -> None:
    source = read_source("ade20k", layouts.ade20k(tmp_path), "train")  # train stands for training
    assert source.kind == "segmentation"
    assert source.classes == ("wall", "sky", "tree")
    assert source.details == {"source_split": "training", "reduce_zero_label": True}
    fields = encode(source.samples[0], source.root, source.labels)
    assert set(fields) == {"jpg", "seg.png"}
    with Image.open(io.BytesIO(fields["seg.png"])) as label:
        assert label.mode == "L"
        assert np.asarray(label)[0, :5].tolist() == [255, 0, 1, 2, 255]  # from 0, 1, 2, 3, 255
        assert label.size == (30, 20)


def test_ade20k_class_names(tmp_path: Path) -> None:
    layouts.ade20k(tmp_path)
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.15\t11\t1\t1\twall\n2\t0.1\t6\t6\t1\tbuilding, edifice\n"
    )
    assert read_source("ade20k", tmp_path, "training").classes == ("wall", "building, edifice")
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n3\tsky\n")
    with pytest.raises(UserError, match=r"objectInfo150.txt, line 3: index is '3', expected 2"):
        read_source("ade20k", tmp_path, "training")
    (tmp_path / "objectInfo150.txt").write_text("wall\nsky\n")
    with pytest.raises(UserError, match=r"objectInfo150.txt, line 1: expected ADE20K's header"):
        read_source("ade20k", tmp_path, "training")
    (tmp_path / "objectInfo150.txt").unlink()
    (tmp_path / "classes.txt").write_text("x\n" * 255)
    with pytest.raises(UserError, match="255 classes, expected 1 to 254"):
        read_source("ade20k", tmp_path, "training")
    (tmp_path / "classes.txt").unlink()
    classes = read_source("ade20k", tmp_path, "training").classes
    assert (len(classes), classes[0], classes[149]) == (150, "class_000", "class_149")


def test_ade20k_pairs(tmp_path: Path) -> None:
    layouts.ade20k(tmp_path)
    (tmp_path / "annotations/training/ADE_1.png").unlink()
    (tmp_path / "images/training/ADE_2.jpg").unlink()
    bad = bad_of(read_source("ade20k", tmp_path, "training"))
    assert bad == {
        "images/training/ADE_1.jpg": "image has no mask annotations/training/ADE_1.png",
        "annotations/training/ADE_2.png": "mask has no image images/training/ADE_2.jpg",
    }


PALETTE = layouts.mask([0, 1, 2, 3, 255])
PALETTE.putpalette([i for value in range(256) for i in (value, 255 - value, 7)])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (
            layouts.mask([0, 1], (20, 31)),
            r"its mask .*ADE_0.png has 31x20 pixels \(width x height\), the file has 30x20",
        ),
        (layouts.mask([0, 1], (30, 20)), r"its mask .*ADE_0.png has 20x30 pixels"),
        (layouts.mask([0, 4]), r"mask holds the value 4; with 3 classes expected 0..3 or 255"),
        (layouts.mask([0, 254]), "mask holds the value 254"),
        (layouts.picture(), "mask does not decode: .*expected 8-bit grey"),
        (Image.fromarray(np.zeros((20, 30), np.uint16)), "mask does not decode: .*bit depth 16"),
        (Image.fromarray(np.zeros((20, 30), bool)), "mask does not decode: .*bit depth 1"),
        (PALETTE, None),
        (layouts.mask([0]), None),
        (layouts.mask([255]), None),
    ],
    ids=["wider", "turned", "4 of 3 classes", "254", "rgb", "16 bit", "1 bit", "palette", "all 0", "all 255"],
)
def test_masks(tmp_path: Path, image: Image.Image, reason: str | None) -> None:
    layouts.ade20k(tmp_path)
    image.save(tmp_path / "annotations/training/ADE_0.png")
    bad = bad_of(read_source("ade20k", tmp_path, "training"))
    if reason is None:
        assert bad == {}
    else:
        assert_matches(reason, "".join(bad.values()))
        assert len(bad) == 1
        assert next(iter(bad)).endswith(("images/training/ADE_0.jpg", "annotations/training/ADE_0.png"))


@pytest.mark.parametrize("keep", [0, 40])
def test_cut_off_masks(tmp_path: Path, keep: int) -> None:
    layouts.ade20k(tmp_path)
    path = tmp_path / "annotations/training/ADE_0.png"
    path.write_bytes(path.read_bytes()[:keep])
    bad = bad_of(read_source("ade20k", tmp_path, "training"))
    assert_matches("mask is empty" if keep == 0 else "mask does not decode", bad["annotations/training/ADE_0.png"])


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source folder .*gone does not exist"):
        read_source("imagenet", tmp_path / "gone", "train")
    with pytest.raises(UserError, match="unknown layout 'voc': expected one of imagenet, coco, ade20k"):
        read_source("voc", tmp_path, "train")
    with pytest.raises(UserError, match="images has no folder train or training"):
        read_source("ade20k", tmp_path, "train")
    (tmp_path / "images/training").mkdir(parents=True)
    with pytest.raises(UserError, match="annotations/training does not exist"):
        read_source("ade20k", tmp_path, "train")
