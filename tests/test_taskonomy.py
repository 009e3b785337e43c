"""Taskonomy's layout -> shards: every file bit for bit where it belongs; what is missing or broken is told by file and reason."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import taskonomy_files as files
from layouts import all_samples, by_webdataset, contents, imagenet
from modsquad_ds import cli
from modsquad_ds.data.convert import convert
from modsquad_ds.data.layouts import encode, read_source
from modsquad_ds.data.part_job import Part
from modsquad_ds.data.parts import convert_part, merge_parts
from modsquad_ds.data.samples import BadSampleError
from modsquad_ds.data.shards import Index, ShardSet
from modsquad_ds.data.sources import Options, Source
from modsquad_ds.data.taskonomy import FORBIDDEN, read_split_list
from modsquad_ds.errors import UserError
from modsquad_ds.targets import TARGETS
from taskonomy_files import ALL, HEIGHT, HOLE, WIDTH, file_bytes, key, place, split_csv, taskonomy, values, write_list

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:webdataset.tariterators")
TRAIN = [("ackley", 0), ("ackley", 1), ("ackley", 2), ("bolton", 0), ("bolton", 1)]
FEW = ("class_scene", "depth_zbuffer", "edge_texture", "normal")


def shards(src: Path, out: Path, split: str = "train", *, targets: tuple[str, ...] | None = None, **given: Any) -> Index:
    given = {"samples_per_shard": 2, "progress": False} | given
    return convert("taskonomy", src, out, split, options=Options("tiny", targets), **given)


def listed(src: Path, *targets: str) -> Source:
    return read_source("taskonomy", src, "train", Options("tiny", targets or None))


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    return {sample.key: sample.fields for sample in all_samples(ShardSet(folder))}


def mask_of(png: bytes) -> Any:
    return np.array(Image.open(io.BytesIO(png)))


def change(src: Path, task: str, view: tuple[str, int], defect: Callable[[bytes], bytes]) -> str:
    """Spoil a view's file; return its path below the source."""
    name = place(task, *view)
    (src / name).write_bytes(defect((src / name).read_bytes()))
    return name


# ---------------------------------------------------------------- what is good


def test_every_view_has_all_its_files_bit_for_bit(tmp_path: Path) -> None:
    src = taskonomy(tmp_path / "src")
    index = shards(src, tmp_path / "out")
    found = samples_of(tmp_path / "out/train")
    assert sorted(found) == sorted(key(*view) for view in TRAIN)
    hole = np.full((HEIGHT, WIDTH), 255)
    hole[HOLE] = 0
    for view in TRAIN:
        fields = found[key(*view)]
        assert set(fields) == {"png", "valid.png", *(TARGETS[name].field for name in ALL)}
        for task in ("rgb", *ALL):  # the files are found by name: points and views are listed in opposite orders
            field = "png" if task == "rgb" else TARGETS[task].field
            assert fields[field] == (src / place(task, *view)).read_bytes()
        assert np.array_equal(mask_of(fields["valid.png"]), hole)
    assert found[key("ackley", 1)]["depth_zbuffer.png"] == file_bytes(values("depth_zbuffer", 1))
    assert index.details == {
        "source_split": "train",
        "split_list": "train_val_test_tiny.csv",
        "buildings": ["ackley", "bolton"],
        "left_out": {"rough": FORBIDDEN["rough"]},
        "targets": dict.fromkeys(ALL, 5),
        "skipped_targets": [],
    }
    assert (index.kind, index.classes, index.skipped) == ("multilabel", (), 0)
    rows = {row["__key__"]: row for row in by_webdataset(tmp_path / "out/train")}
    assert rows[key("bolton", 1)]["class_scene.npy"] == (src / "class_scene/taskonomy" / _scene("bolton", 1)).read_bytes()


def _scene(building: str, view: int) -> str:
    return f"{building}/point_{10 - view}_view_{view}_domain_class_places.npy"


def test_shards_tell_a_samples_fields_without_reading_it(tmp_path: Path) -> None:
    src = taskonomy(tmp_path / "src", FEW)
    (src / place("normal", "corozal", 1)).unlink()
    shards(src, tmp_path / "out", "val", targets=FEW)
    store = ShardSet(tmp_path / "out/val")
    found = {store.read(0, place).key: store.fields(0, place) for place in range(2)}
    every = {"png", "valid.png", "class_scene.npy", "depth_zbuffer.png", "edge_texture.png"}
    assert found == {key("corozal", 0): every | {"normal.png"}, key("corozal", 1): every}


def test_tasks_may_lie_without_the_folder_in_between(tmp_path: Path) -> None:
    shards(taskonomy(tmp_path / "a", FEW), tmp_path / "out_a", targets=FEW)
    shards(taskonomy(tmp_path / "b", FEW, below=""), tmp_path / "out_b", targets=FEW)
    assert samples_of(tmp_path / "out_a/train") == samples_of(tmp_path / "out_b/train")


@pytest.mark.parametrize("ending", ["\r", "\r\n", "\n"])
def test_split_lists_with_any_line_ends(tmp_path: Path, ending: str) -> None:
    path = write_list(tmp_path, split_csv(ending=ending))
    expected = {"ackley": ("train", 2), "bolton": ("train", 3), "corozal": ("val", 4), "rough": ("train", 5)}
    assert read_split_list(path) == expected
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip())  # a BOM, and no end of the last line
    assert read_split_list(path) == expected


def test_semantic_segments_are_for_those_who_ask(tmp_path: Path) -> None:
    src = taskonomy(tmp_path / "src", ("segment_semantic",))
    assert place("segment_semantic", "ackley", 0).endswith("_domain_segmentsemantic.png")
    shards(src, tmp_path / "out", targets=("segment_semantic",))
    (fields,) = [fields for name, fields in samples_of(tmp_path / "out/train").items() if name == key("ackley", 2)]
    assert np.array_equal(mask_of(fields["segment_semantic.png"]), values("segment_semantic", 2) - np.uint8(1))  # 0 -> 255
    name = change(src, "segment_semantic", ("ackley", 2), lambda _: file_bytes(np.full((HEIGHT, WIDTH), 18, np.uint8)))
    with pytest.raises(UserError, match=rf"{name}: holds the value 18, expected 0\.\.17"):
        shards(src, tmp_path / "again", targets=("segment_semantic",))
    change(src, "segment_semantic", ("ackley", 2), lambda _: file_bytes(np.zeros((HEIGHT, WIDTH), np.uint8)))
    with pytest.raises(UserError, match=f"{place('rgb', 'ackley', 2)}: no target is left of .*: nothing on it is labelled"):
        shards(src, tmp_path / "again", targets=("segment_semantic",))


# ---------------------------------------------------------------- what is masked


def mask_case(tmp_path: Path, *targets: str) -> tuple[Path, Callable[[], dict[str, bytes]]]:
    src = taskonomy(tmp_path / "src", ("edge_texture", "normal", "depth_zbuffer", "depth_euclidean"))

    def members() -> dict[str, bytes]:
        source = listed(src, *targets)
        (sample,) = [sample for sample in source.samples if sample.key == key("bolton", 0)]
        return encode(sample, src, source.labels).members

    return src, members


def test_the_mask_is_that_of_z_buffer_else_of_euclidean_depth(tmp_path: Path) -> None:
    src, members = mask_case(tmp_path, "edge_texture", "normal")
    near = np.full((HEIGHT, WIDTH), 7, np.uint16)
    near[3, 4] = 65535
    change(src, "depth_euclidean", ("bolton", 0), lambda _: file_bytes(near))
    by_zbuffer = members()
    assert sorted(by_zbuffer) == ["edge_texture.png", "normal.png", "png", "valid.png"]  # depth masks, though it is no target
    assert int((mask_of(by_zbuffer["valid.png"]) == 0).sum()) == 50
    (src / place("depth_zbuffer", "bolton", 0)).unlink()
    mask = mask_of(members()["valid.png"])
    assert mask[3, 4] == 0 and int((mask == 0).sum()) == 1
    (src / place("depth_euclidean", "bolton", 0)).unlink()
    assert sorted(members()) == ["edge_texture.png", "png"]  # nothing says which normals mean something


def test_masked_targets_without_a_valid_pixel_are_not_written(tmp_path: Path) -> None:
    src, members = mask_case(tmp_path, "edge_texture", "normal", "depth_zbuffer")
    change(src, "depth_zbuffer", ("bolton", 0), lambda _: file_bytes(np.full((HEIGHT, WIDTH), 65535, np.uint16)))
    assert sorted(members()) == ["edge_texture.png", "png"]
    (src / place("edge_texture", "bolton", 0)).unlink()
    with pytest.raises(BadSampleError, match="no target is left of this view: it has no pixel of valid depth"):
        members()


def test_a_depth_without_depths_is_not_written(tmp_path: Path) -> None:
    src, members = mask_case(tmp_path, "normal", "depth_zbuffer", "depth_euclidean")
    change(src, "depth_euclidean", ("bolton", 0), lambda _: file_bytes(np.full((HEIGHT, WIDTH), 65535, np.uint16)))
    assert sorted(members()) == ["depth_zbuffer.png", "normal.png", "png", "valid.png"]


def test_a_depth_that_is_neither_asked_for_nor_needed_is_not_read(tmp_path: Path) -> None:
    src, _ = mask_case(tmp_path)
    change(src, "depth_euclidean", ("bolton", 0), files.truncated)
    source = listed(src, "normal")
    (sample,) = [sample for sample in source.samples if sample.key == key("bolton", 0)]
    encoded = encode(sample, src, source.labels)
    assert sorted(encoded.members) == ["normal.png", "png", "valid.png"] and not encoded.bad


def test_a_set_without_masked_targets_has_no_mask(tmp_path: Path) -> None:
    src = taskonomy(tmp_path / "src", ("class_object", "edge_texture", "depth_zbuffer"))
    change(src, "depth_zbuffer", ("ackley", 0), files.truncated)  # nobody asks for it
    assert shards(src, tmp_path / "out", targets=("edge_texture", "class_object")).details["targets"] == {
        "class_object": 5,
        "edge_texture": 5,
    }
    assert {frozenset(fields) for fields in samples_of(tmp_path / "out/train").values()} == {
        frozenset({"png", "class_object.npy", "edge_texture.png"})
    }


# ---------------------------------------------------------------- what is bad

DEFECTS: dict[tuple[str, tuple[str, int]], tuple[Callable[[bytes], bytes], str]] = {
    ("edge_texture", ("ackley", 0)): (files.broken_crc, "damaged (chunk 'IDAT' at byte 33 differs from its CRC)"),
    ("depth_euclidean", ("ackley", 0)): (files.grey8, "PNG of 8-bit grey, expected 16-bit grey"),
    ("normal", ("ackley", 1)): (files.one_channel, "PNG of 8-bit grey, expected 8-bit RGB"),
    ("keypoints2d", ("ackley", 1)): (
        files.half_size,
        "has 20x16 pixels (width x height), its image has 40x32",
    ),
    ("class_object", ("ackley", 1)): (lambda _: files.npy(np.ones(365)), ".npy of shape (365,), expected 1000 scores"),
    ("segment_unsup2d", ("bolton", 1)): (lambda _: b"", "empty (0 bytes)"),
    ("rgb", ("bolton", 0)): (files.broken_crc, "does not decode: damaged (chunk 'IDAT' at byte 33 differs from its CRC)"),
}


def defective(src: Path) -> tuple[Path, list[str], list[str]]:
    """A source with one of each defect; what is told of targets, and of images."""
    taskonomy(src)
    of_targets, of_images = [], []
    for (task, view), (defect, reason) in DEFECTS.items():
        row = f"{change(src, task, view, defect)}: {reason}"
        (of_images if task == "rgb" else of_targets).append(row)
    (src / place("normal", "bolton", 1)).unlink()  # one target less: no fault
    (src / place("rgb", "ackley", 2)).unlink()
    of_images.append(f"{place('rgb', 'ackley', 2)}: is missing, the view has {', '.join(ALL)}")
    write_list(src, split_csv({**files.SPLIT_OF, "zion": "train"}))
    reason = "is missing: building 'zion' (train_val_test_tiny.csv, line 6) has no folder for any task"
    of_images.append(f"rgb/taskonomy/zion: {reason}")
    misnamed = src / place("class_scene", "bolton", 1).replace("class_places", "class_scene")
    (src / place("class_scene", "bolton", 1)).rename(misnamed)
    reason = "is not named as a file of this folder, expected point_<P>_view_<V>_domain_class_places.npy"
    of_images.append(f"{misnamed.relative_to(src)}: {reason}")
    return src, sorted(of_targets), sorted(of_images)


def told(bad: Any) -> list[str]:
    return [f"{one['file']}: {one['reason']}" if isinstance(one, dict) else f"{one.file}: {one.reason}" for one in bad]


def test_defects_are_told_by_file_and_reason_and_nothing_is_written(tmp_path: Path) -> None:
    src, of_targets, of_images = defective(tmp_path / "src")
    with pytest.raises(UserError) as error:
        shards(src, tmp_path / "out")
    title, *rows, hint = str(error.value).splitlines()
    assert title == f"10 bad files and 3 good samples in {src} (taskonomy, split train):"
    assert [row.strip() for row in rows] == sorted(of_targets + of_images)
    assert hint == "mend them, or leave them out with --skip-bad"
    assert not list((tmp_path / "out").glob("*"))


def test_skip_bad_leaves_out_what_is_bad_and_keeps_the_rest_of_the_view(tmp_path: Path) -> None:
    src, of_targets, of_images = defective(tmp_path / "src")
    index = shards(src, tmp_path / "out", skip_bad=True)
    assert told(index.skipped_samples) == of_images and index.skipped == 4
    assert told(index.details["skipped_targets"]) == of_targets
    lost = {"edge_texture": 1, "depth_euclidean": 1, "normal": 2, "keypoints2d": 1, "class_object": 1, "segment_unsup2d": 1}
    lost |= {"class_scene": 1}
    assert index.details["targets"] == {name: 3 - lost.get(name, 0) for name in ALL}
    found = samples_of(tmp_path / "out/train")
    assert sorted(found) == sorted([key("ackley", 0), key("ackley", 1), key("bolton", 1)])
    assert set(found[key("ackley", 0)]) == {
        "png",
        "valid.png",
        *(TARGETS[name].field for name in ALL if name not in ("edge_texture", "depth_euclidean")),
    }
    # In parts and by several processes: the same bytes.
    given: dict[str, Any] = {"options": Options("tiny"), "samples_per_shard": 2, "skip_bad": True, "progress": False}
    for number in range(2):
        convert_part("taskonomy", src, tmp_path / "parts", "train", Part(number, 2), workers=1 + number, **given)
    assert merge_parts("taskonomy", src, tmp_path / "parts", "train", 2, **given) == index
    assert contents(tmp_path / "parts/train") == contents(tmp_path / "out/train")
    # What is merged already is recognized, and its parts are not made again.
    assert convert_part("taskonomy", src, tmp_path / "parts", "train", Part(0, 2), **given) == index


def test_a_part_with_a_bad_target_is_refused_and_settled_once_it_is_mended(tmp_path: Path) -> None:
    src = taskonomy(tmp_path / "src", FEW)
    whole = (src / place("normal", "ackley", 0)).read_bytes()
    name = change(src, "normal", ("ackley", 0), files.truncated)
    given: dict[str, Any] = {"options": Options("tiny", FEW), "samples_per_shard": 9, "progress": False}
    with pytest.raises(UserError, match=f"1 bad and 5 good samples in part 0/1 .*\n  {name}: truncated .*\n.*--split-list tiny "):
        convert_part("taskonomy", src, tmp_path / "out", "train", Part(0, 1), **given)
    with pytest.raises(
        UserError, match=f"1 bad files and 5 good samples .*\n  {name}: truncated .*\n.*\n.*--targets {FEW[0]},{FEW[1]}"
    ):
        merge_parts("taskonomy", src, tmp_path / "out", "train", 1, **given)
    (src / name).write_bytes(whole)
    convert_part("taskonomy", src, tmp_path / "out", "train", Part(0, 1), merge=True, **given)
    shards(src, tmp_path / "one", targets=FEW, samples_per_shard=9)
    assert contents(tmp_path / "out/train") == contents(tmp_path / "one/train")


def test_views_and_buildings_that_are_not_there(tmp_path: Path) -> None:
    src = taskonomy(tmp_path / "src", ("edge_texture",))
    (src / place("edge_texture", "ackley", 0)).unlink()
    copy = src / place("rgb", "ackley", 1).replace(".png", ".jpg")
    Image.fromarray(files.photo(0)).save(copy)
    for view in range(2):
        (src / place("rgb", "bolton", view)).unlink()
    (src / place("rgb", "bolton", 0)).parent.rmdir()
    source = listed(src, "edge_texture")
    assert sorted(str(bad) for bad in source.bad) == [
        f"{place('rgb', 'ackley', 0)}: has none of the targets",
        f"{place('rgb', 'ackley', 1)}: is of the same view as {copy.name}",
        "rgb/taskonomy/bolton: is missing: building 'bolton' (train_val_test_tiny.csv, line 3) has no folder with images",
    ]
    assert [sample.key for sample in source.samples] == [key("ackley", 2), key("ackley", 1)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"id,train,val\rackley,1,0\r", r", line 1: header is 'id,train,val', expected id,train,val,test"),
        (b"", r", line 1: header is '', expected id,train,val,test"),
        (
            b"id,train,val,test\rallensville,1,1,1\r",
            r", line 2: 'allensville,1,1,1': expected a building and three flags, one of ",
        ),
        (b"id,train,val,test\r\na,1,0,0\r\nb,0,0,0", r", line 3: 'b,0,0,0': expected a building and three flags"),
        (b"id,train,val,test\ra,1,0\r", r", line 2: 'a,1,0': expected a building"),
        (b"id,train,val,test\r../a,1,0,0\r", r", line 2: '../a,1,0,0': expected a building"),
        (b"id,train,val,test\na,1,0,0\n\nb,0,1,0\na,0,0,1\n", r", line 5: building 'a' is in line 2 already"),
        (b"id,train,val,test\r\xff,1,0,0\r", r": not UTF-8 text at byte 18"),
        (b"id,train,val,test\ra,0,1,0\r", r": has no building of split 'train'"),
        (split_csv({"rough": "train", "bolton": "val"}), r": has only buildings of split 'train' that are not read: rough"),
    ],
)
def test_split_lists_that_are_none(tmp_path: Path, content: bytes, reason: str) -> None:
    src = taskonomy(tmp_path, ("edge_texture",))
    path = write_list(src, content)
    with pytest.raises(UserError, match=f"^{path}{reason}"):
        listed(src, "edge_texture")


def test_what_is_missing_is_named_with_a_way_out(tmp_path: Path) -> None:
    src = taskonomy(tmp_path / "src", FEW)

    def refused(reason: str, split_list: str | None, *targets: str, layout: str = "taskonomy") -> None:
        with pytest.raises(UserError, match=reason):
            read_source(layout, src, "train", Options(split_list, targets or None))

    refused(r"src/class_object/taskonomy does not exist: fetch it, or name the targets to read with --targets", "tiny")
    refused(r"^--targets: taskonomy has no 'nromal'; it has class_object, ", "tiny", "nromal")
    refused(r"^--targets: 'normal' is there twice", "tiny", "normal", "normal")
    refused(r"^--split-list is missing: taskonomy needs one of tiny, medium, full, fullplus, or a CSV file", None, *FEW)
    refused(r"train_val_test_medium.csv does not exist: unpack Taskonomy's splits_taskonomy.zip there", "medium", *FEW)
    refused(r"^split list some.csv does not exist: expected a CSV file, or one of tiny, medium, ", "some.csv", *FEW)
    refused(rf"^split list {src} is a folder: expected a CSV file", str(src), *FEW)
    refused(r"^cannot read x{300}: File name too long: taskonomy at .*src is not listed", "x" * 300, *FEW)
    refused(r"^--split-list is for layout taskonomy: leave it out for imagenet", "tiny", layout="imagenet")
    (src / "depth_zbuffer").rename(src / "elsewhere")
    refused(r"depth_zbuffer/taskonomy does not exist: by it alone is known where normal mean something: fetch", "tiny", "normal")
    (src / "rgb").rename(src / "rbg")
    refused(r"src/rgb does not exist: expected the images there", "tiny", "class_scene")


def test_splits_of_one_folder_must_belong_together(tmp_path: Path) -> None:
    src, out = taskonomy(tmp_path / "src", FEW), tmp_path / "out"
    shards(src, out, targets=FEW)
    with pytest.raises(UserError, match=r"split 'val' has other targets than .*out/train \(.* there, normal here\): give"):
        shards(src, out, "val", targets=("normal",))
    own = tmp_path / "own.csv"
    own.write_bytes(split_csv({"corozal": "val", "bolton": "val"}))
    with pytest.raises(UserError, match=r"building 'bolton' is in split 'val' of own.csv and in .*out/train, made with train"):
        convert("taskonomy", src, out, "val", options=Options(str(own), FEW), progress=False)
    with pytest.raises(UserError, match="holds multilabel shards, these would be classification"):
        convert("imagenet", imagenet(tmp_path / "in", "val"), out, "val", progress=False)
    shards(src, out, "val", targets=FEW)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = taskonomy(tmp_path / "src", FEW)
    change(src, "edge_texture", ("bolton", 0), files.truncated)
    given: dict[str, Any] = {"workers": 1, "split_list": "tiny", "targets": ",".join(FEW), "skip_bad": True}
    cli.shards("taskonomy", src, tmp_path / "out", **given)
    said = capsys.readouterr().out
    assert "5 samples with several labels in 1 shards" in said
    assert "samples by target: class_scene 5, depth_zbuffer 5, edge_texture 4, normal 5\n" in said
    assert "buildings left out:\n  rough: some of its viewpoints are wrong\n" in said
    assert f"left out 1 bad labels:\n  {place('edge_texture', 'bolton', 0)}: truncated" in said
    assert json.loads((tmp_path / "out/train/index.json").read_text())["details"]["split_list"] == "train_val_test_tiny.csv"
