"""PASCAL-Context's five labels: the maps by hand, what each image has, and what is refused with which words."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import layouts
import pascal_files
from modsquad_ds.data.convert import convert
from modsquad_ds.data.decode import decode_mask
from modsquad_ds.data.mat_file import read_mat
from modsquad_ds.data.pascal_context import (
    NORMALS_CLASSES,
    PARTS,
    borders,
    context_edges,
    human_parts,
    label_map,
    pascal_members,
    read_pascal_context,
)
from modsquad_ds.data.samples import BadSampleError
from modsquad_ds.data.shards import Index, ShardSet
from modsquad_ds.data.sources import Options, Source
from modsquad_ds.errors import UserError
from modsquad_ds.targets import PART_CLASSES
from pascal_files import DEFECTS, FIRST, SIZES, box, stripes

ONE, NOBODY, DOG, OUTSIDE = SIZES


def source_of(src: Path, *targets: str) -> Source:
    return read_pascal_context(src, "train", Options(targets=targets or None))


def members_of(source: Source, key: str) -> dict[str, bytes]:
    sample = next(sample for sample in source.samples if sample.key == key)
    members, bad = pascal_members(sample, source.root)
    assert not bad
    return members


def values(data: bytes) -> NDArray[np.uint8]:
    return decode_mask(data).numpy()


# ---------------------------------------------------------------- the maps by hand


def dumb_borders(classes: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixel by pixel; a neighbour beyond the image's border is the one on the other side."""
    height, width = classes.shape
    found = np.zeros(classes.shape, bool)
    for y in range(height):
        for x in range(width):
            up, down = (y - 1 if y > 0 else min(1, height - 1)), (y + 1 if y < height - 1 else max(height - 2, 0))
            left, right = (x - 1 if x > 0 else min(1, width - 1)), (x + 1 if x < width - 1 else max(width - 2, 0))
            around = [int(classes[place]) for place in ((up, x), (down, x), (y, left), (y, right))]
            found[y, x] = sum(around) - 4 * int(classes[y, x]) != 0
    return found


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ([[5, 5, 8, 8], [5, 5, 8, 8]], ["0110", "0110"]),  # both sides of a border
        ([[1, 1, 1], [1, 4, 1], [1, 1, 1]], ["010", "111", "010"]),
        ([[9, 7, 7], [7, 7, 7], [7, 7, 7]], ["110", "100", "000"]),  # in a corner, where both neighbours count twice
        ([[1, 2, 3], [1, 2, 3]], ["101", "101"]),  # 1 + 3 = 2 * 2: none in the middle
        ([[6, 6], [6, 6]], ["00", "00"]),
        ([[3]], ["0"]),
    ],
)
def test_borders_by_hand(classes: list[list[int]], expected: list[str]) -> None:
    found = borders(np.array(classes, np.int64))
    assert ["".join(str(int(one)) for one in row) for row in found] == expected


def test_borders_equal_the_loop() -> None:
    random = np.random.default_rng(0)
    for size in ((1, 1), (1, 6), (6, 1), (2, 2), (9, 13)):
        for highest in (2, 4, 460):
            classes = random.integers(0, highest, size)
            assert np.array_equal(borders(classes), dumb_borders(classes)), (size, highest)


def test_edges_are_borders_thinned_to_one_pixel() -> None:
    straight = context_edges(np.array([[1, 1, 1, 2, 2, 2]] * 6))
    assert straight[1:].sum(1).tolist() == [1] * 5 and straight[:, [0, 1, 4, 5]].sum() == 0
    random = np.random.default_rng(1)
    classes = np.kron(random.integers(1, 5, (3, 4)), np.ones((8, 8), int))
    edges = context_edges(classes)
    assert 0 < edges.sum() < borders(classes).sum() and not (edges & ~borders(classes)).any()
    assert not (edges[:-1, :-1] & edges[1:, :-1] & edges[:-1, 1:] & edges[1:, 1:]).any()  # nowhere two wide


def painted(*things: dict[str, Any], size: tuple[int, int] = (4, 5)) -> list[list[int]]:
    """Classes of a file with these objects, read from MATLAB's format."""
    anno = read_mat(pascal_files.mat_bytes(pascal_files.anno(*things)), "anno")
    return human_parts(anno, "a.mat", size).tolist()


def test_each_part_is_folded_to_its_group() -> None:
    groups = {
        "head": ["hair", "head", "lear", "rear", "leye", "reye", "lebrow", "rebrow", "nose", "mouth"],
        "torso": ["neck", "torso"],
        "upper arm": ["luarm", "ruarm"],
        "lower arm": ["llarm", "rlarm", "lhand", "rhand"],
        "upper leg": ["luleg", "ruleg"],
        "lower leg": ["llleg", "rlleg", "lfoot", "rfoot"],
    }
    assert {part: PART_CLASSES.index(group) for group, parts in groups.items() for part in parts} == PARTS
    assert len(PARTS) == 24


def test_parts_are_painted_in_order_and_only_of_people() -> None:
    size = (4, 5)
    body = pascal_files.thing(15, box(size, 0, 0, 4, 4), ("torso", box(size, 1, 0, 4, 3)), ("lhand", box(size, 2, 1, 3, 4)))
    dog = pascal_files.thing(12, box(size, 0, 0, 4, 5), ("head", box(size, 0, 0, 4, 5)))
    other = pascal_files.thing(15, box(size, 0, 2, 4, 5), ("rfoot", box(size, 3, 2, 4, 5)), ("hair", box(size, 1, 2, 2, 3)))
    plain = pascal_files.thing(15, box(size, 0, 0, 2, 2))
    assert painted(body, dog, other, plain) == [
        [0, 0, 0, 0, 0],
        [2, 2, 1, 0, 0],  # the second one's hair over the first one's torso
        [2, 4, 4, 4, 0],  # the hand over the torso
        [2, 2, 6, 6, 6],
    ]
    assert painted(other, body)[3] == [2, 2, 2, 6, 6]
    assert painted(plain, dog) == painted() == [[0] * 5] * 4


def test_normals_mean_something_in_170_classes() -> None:
    """The number that the two lists of classes give, and ten of VOC's twenty classes (by their numbers in a LabelMap)."""
    assert len(set(NORMALS_CLASSES.values())) == len(NORMALS_CLASSES) == 170
    # Both lists are in alphabetical order, so a slip of the pen would show.
    assert sorted(NORMALS_CLASSES) == list(NORMALS_CLASSES) and sorted(NORMALS_CLASSES.values()) == list(NORMALS_CLASSES.values())
    voc = [2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416, 427]
    assert {number for number in voc if number in NORMALS_CLASSES.values()} == {23, 34, 59, 65, 72, 397, 113, 284, 368, 427}
    assert not {"sky", "grass", "road", "ground", "tree", "building", "horse", "unknown"} & NORMALS_CLASSES.keys()
    assert {"person", "wall", "floor", "ceiling", "sofa", "tvmonitor", "sign"} <= NORMALS_CLASSES.keys()


def test_label_map_may_be_of_any_type(tmp_path: Path) -> None:
    for dtype in (np.uint16, np.int32, np.float64):
        pascal_files.save_mat(tmp_path / "a.mat", {"LabelMap": np.array([[0, 459, 3]], dtype)})
        classes = label_map(tmp_path, "a.mat", (1, 3))
        assert classes.tolist() == [[0, 459, 3]] and classes.dtype == np.int64


# ---------------------------------------------------------------- whole images


def test_members_are_the_targets_that_an_image_has(tmp_path: Path) -> None:
    source = source_of(pascal_files.pascal(tmp_path))
    assert (source.kind, source.classes, source.details["source_split"]) == ("multilabel", (), "train")
    assert [sample.key for sample in source.samples] == list(SIZES)
    always = {"jpg", "semseg.png", "sal.png", "edge.png"}
    normals = {"normals.png", "valid.png"}
    assert {key: members_of(source, key).keys() for key in SIZES} == {
        ONE: always | normals | {"human_parts.png"},
        NOBODY: always | normals,
        DOG: always | normals,
        OUTSIDE: always,
    }


def test_members_hold_what_the_files_say(tmp_path: Path) -> None:
    source = source_of(pascal_files.pascal(tmp_path))
    members = members_of(source, ONE)
    same = {"jpg": "JPEGImages/{}.jpg", "sal.png": "sal_distill/{}.png", "normals.png": "normals_distill/{}.png"}
    for field, place in same.items():
        assert members[field] == (tmp_path / place.format(ONE)).read_bytes(), field
    size = SIZES[ONE]
    assert np.array_equal(values(members["semseg.png"]), stripes(size, 0, 15, 255))  # a palette's places, from VOC12
    assert np.array_equal(values(members_of(source, NOBODY)["semseg.png"]), stripes(SIZES[NOBODY], 0, 15, 255))  # from the other
    assert np.array_equal(values(members["valid.png"]), np.full(size, 255))  # a person before a wall
    assert np.array_equal(values(members_of(source, DOG)["valid.png"]), stripes(SIZES[DOG], 255, 0))  # a dog on grass
    edges = context_edges(stripes(size, pascal_files.PERSON_CLASS, pascal_files.WALL).astype(np.int64))
    assert edges.any() and np.array_equal(values(members["edge.png"]), 255 * edges)
    parts = np.zeros(size, int)
    parts[4:8, 2:6], parts[4:9, 3:6], parts[3:6, 5:8], parts[9:11, 5:7] = 3, 2, 1, 6
    assert np.array_equal(values(members["human_parts.png"]), parts)


def test_a_label_of_nothing_is_none(tmp_path: Path) -> None:
    source = source_of(pascal_files.pascal(tmp_path))
    for value in (255, 20):
        pascal_files.grey(value)(tmp_path / pascal_files.SEMSEG)
        assert ("semseg.png" in members_of(source, ONE)) == (value == 20)


def test_an_image_without_a_file_has_a_target_less(tmp_path: Path) -> None:
    pascal_files.pascal(tmp_path)
    whole = members_of(source_of(tmp_path), ONE)
    for file, gone in {
        pascal_files.SAL: {"sal.png"},
        pascal_files.PARTS: {"human_parts.png"},
        pascal_files.NORMALS: {"normals.png", "valid.png"},
        pascal_files.CONTEXT: {"edge.png", "normals.png", "valid.png"},
    }.items():
        kept = (tmp_path / file).read_bytes()
        (tmp_path / file).unlink()
        assert whole.keys() - members_of(source_of(tmp_path), ONE).keys() == gone
        (tmp_path / file).write_bytes(kept)
    (tmp_path / pascal_files.SEMSEG).unlink()  # now the second folder's counts
    assert values(members_of(source_of(tmp_path), ONE)["semseg.png"]).max() == 3


def test_only_the_targets_that_are_asked_for(tmp_path: Path) -> None:
    pascal_files.pascal(tmp_path)
    for folder in ("sal_distill", "human_parts", "semseg"):
        shutil.rmtree(tmp_path / folder)
    source = source_of(tmp_path, "edge", "normals")
    assert source.targets == ("normals", "edge")
    assert members_of(source, ONE).keys() == {"jpg", "normals.png", "valid.png", "edge.png"}
    assert members_of(source_of(tmp_path, "normals"), ONE).keys() == {"jpg", "normals.png", "valid.png"}
    with pytest.raises(UserError, match="--targets: pascal_context has no 'depth'"):
        source_of(tmp_path, "depth")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("folder", "needs"),
    [
        ("human_parts", "human_parts does not exist, which human_parts needs"),
        ("sal_distill", "sal_distill does not exist, which sal needs"),
        ("normals_distill", "normals_distill does not exist, which normals needs"),
        ("pascal-context", "pascal-context/trainval does not exist, which (normals|edge) needs"),
        ("semseg", "semseg/VOC12 and .*semseg/pascal-context do not exist, which semseg needs"),
        ("JPEGImages", "JPEGImages does not exist: expected the photos"),
        ("ImageSets", "ImageSets/Context/train.txt does not exist: expected the ids"),
    ],
)
def test_a_missing_folder_is_named(tmp_path: Path, folder: str, needs: str) -> None:
    pascal_files.pascal(tmp_path)
    shutil.rmtree(tmp_path / folder)
    with pytest.raises(UserError, match=needs):
        source_of(tmp_path)


def test_one_of_the_two_folders_of_semseg_suffices(tmp_path: Path) -> None:
    pascal_files.pascal(tmp_path)
    shutil.rmtree(tmp_path / "semseg/pascal-context")
    assert "semseg.png" not in members_of(source_of(tmp_path), NOBODY)


def test_lists_and_images_that_do_not_fit(tmp_path: Path) -> None:
    pascal_files.pascal(tmp_path)
    pascal_files.write_list(tmp_path, [ONE, "2011_000001", "20.11", "../2012"])
    bad = dict(source_of(tmp_path).bad)
    reason = "is missing, ImageSets/Context/train.txt lists it"
    assert bad == {f"JPEGImages/{name}.jpg": reason for name in ("2011_000001", "20.11", "../2012")}
    shutil.copy(tmp_path / pascal_files.IMAGE, tmp_path / "JPEGImages/2011_000001.jpg")
    assert dict(source_of(tmp_path).bad)["JPEGImages/2011_000001.jpg"] == "has none of the targets"
    pascal_files.write_list(tmp_path, [ONE, NOBODY, ONE])
    with pytest.raises(UserError, match=f"train.txt lists '{ONE}' twice"):
        source_of(tmp_path)
    pascal_files.write_list(tmp_path, [])
    with pytest.raises(UserError, match=r"train\.txt is empty: expected one id a line"):
        source_of(tmp_path)
    (tmp_path / "ImageSets/Context/train.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"train\.txt: not UTF-8 text at byte 3"):
        source_of(tmp_path)


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_told_with_its_file(tmp_path: Path, defect: str) -> None:
    source = source_of(pascal_files.pascal(tmp_path))
    whole = members_of(source, ONE)
    file, spoil, reason = DEFECTS[defect]
    spoil(tmp_path / file)
    sample = next(sample for sample in source.samples if sample.key == FIRST)
    if file == pascal_files.IMAGE:
        with pytest.raises(BadSampleError) as caught:
            pascal_members(sample, tmp_path)
        bad = [caught.value.bad]
    else:
        members, bad = pascal_members(sample, tmp_path)
        gone = {
            pascal_files.SEMSEG: {"semseg.png"}, pascal_files.PARTS: {"human_parts.png"}, pascal_files.SAL: {"sal.png"},
            pascal_files.NORMALS: {"normals.png", "valid.png"}, pascal_files.CONTEXT: {"edge.png", "normals.png", "valid.png"},
        }[file]  # fmt: skip
        assert members == {field: data for field, data in whole.items() if field not in gone}
    ((found, why),) = bad
    assert found == file and re.search(reason, why), why


# ---------------------------------------------------------------- conversion


def converted(root: Path, **options: Any) -> Index:
    return convert("pascal_context", root / "src", root / "out", "train", samples_per_shard=3, progress=False, **options)


def test_shards_hold_the_members_and_the_index_counts_them(tmp_path: Path) -> None:
    source = source_of(pascal_files.pascal(tmp_path / "src"))
    index = converted(tmp_path)
    assert (index.kind, index.layout, index.num_samples, index.classes) == ("multilabel", "pascal_context", 4, ())
    assert index.details["targets"] == {"semseg": 4, "human_parts": 1, "sal": 4, "normals": 3, "edge": 4}
    samples = {raw.key: raw.fields for raw in layouts.all_samples(ShardSet(tmp_path / "out/train"))}
    assert samples == {key: members_of(source, key) for key in SIZES}


def test_the_same_bytes_again_whatever_the_order_of_the_list(tmp_path: Path) -> None:
    for root, ids in ((tmp_path / "one", list(SIZES)), (tmp_path / "two", list(reversed(SIZES)))):
        pascal_files.write_list(pascal_files.pascal(root / "src"), ids)
        converted(root)
    assert layouts.contents(tmp_path / "one/out/train") == layouts.contents(tmp_path / "two/out/train")


def test_bad_files_refuse_the_conversion_or_are_left_out(tmp_path: Path) -> None:
    src = pascal_files.pascal(tmp_path / "src")
    for defect in ("part name", "sal size", "LabelMap class"):
        file, spoil, _ = DEFECTS[defect]
        spoil(src / file)
    (src / f"JPEGImages/{DOG}.jpg").write_bytes(b"")
    with pytest.raises(UserError) as refused:
        converted(tmp_path)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("4 bad files and 3 good samples in ") and lines[-1].endswith("--skip-bad")
    files = [f"JPEGImages/{DOG}.jpg", pascal_files.PARTS, pascal_files.CONTEXT, pascal_files.SAL]
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == files
    assert not (tmp_path / "out").exists()  # nothing half-written

    index = converted(tmp_path, skip_bad=True)
    assert (index.num_samples, index.skipped, index.skipped_samples[0].file) == (3, 1, files[0])
    assert [one["file"] for one in index.details["skipped_targets"]] == files[1:]
    assert index.details["targets"] == {"semseg": 3, "human_parts": 0, "sal": 2, "normals": 1, "edge": 2}
    samples = {raw.key: raw.fields for raw in layouts.all_samples(ShardSet(tmp_path / "out/train"))}
    assert samples[ONE].keys() == {"jpg", "semseg.png"}


def test_an_image_that_keeps_no_target_is_bad(tmp_path: Path) -> None:
    src = pascal_files.pascal(tmp_path / "src")
    index = converted(tmp_path, options=Options(targets=("human_parts",)), skip_bad=True)
    assert index.num_samples == 1 and index.details["targets"] == {"human_parts": 1}
    assert index.skipped_samples[0].reason == "no target is left of the image: there is nothing on it for human_parts"
    (src / pascal_files.PARTS).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{FIRST}\.jpg: no target is left of the image: {pascal_files.PARTS}: is empty"):
        converted(tmp_path, options=Options(targets=("human_parts",)), overwrite=True)
