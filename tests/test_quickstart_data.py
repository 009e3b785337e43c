"""The quickstart's data: counts, labels, what is held out is really held out, same bytes on every build."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from modsquad_ds.data import quickstart
from modsquad_ds.data.shards import ShardSet, load_index
from modsquad_ds.errors import UserError

SMALL = {"scenes": {"train": 12, "val": 6}, "textures": {"train": 12, "val": 6}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "data"
    quickstart.build(out)
    return out


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    return quickstart.load_pictures()


def scenes(built: Path, split: str) -> dict[str, Any]:
    return json.loads((built / f"sources/scenes/annotations/instances_{split}.json").read_text())


@pytest.mark.parametrize(
    ("dataset", "split", "count"),
    [
        ("digits", "train", 1437),
        ("digits", "val", 360),
        ("scenes", "train", 2000),
        ("scenes", "val", 300),
        ("textures", "train", 1200),
        ("textures", "val", 200),
        ("faces", "train", 150),
        ("faces", "val", 50),
    ],
)
def test_counts_and_classes(built: Path, dataset: str, split: str, count: int) -> None:
    shards = ShardSet(built / "shards" / dataset / split)
    assert len(shards) == count
    assert shards.index.skipped == 0
    assert shards.classes == {"textures": quickstart.TEXTURES, "faces": quickstart.FACES}.get(dataset, tuple("0123456789"))
    kinds = {"scenes": "detection", "textures": "segmentation"}
    assert shards.kind == kinds.get(dataset, "classification")
    if split == "train" and dataset != "faces":
        assert len(shards.shard_sizes) >= 4


def test_nothing_but_the_data_is_there(built: Path) -> None:
    assert sorted(path.name for path in built.parent.iterdir()) == ["data"]
    assert sorted(path.name for path in built.iterdir()) == ["quickstart.json", "shards", "sources"]


def test_every_digit_is_used_once_under_its_own_label(built: Path) -> None:
    digits = load_digits()
    files = sorted((built / "sources/digits").glob("*/*/*.png"), key=lambda path: path.stem)
    assert [int(path.stem) for path in files] == list(range(1797))
    assert [int(path.parent.name) for path in files] == digits.target.tolist()
    held_out = [path for path in files if path.parts[-3] == "val"]
    assert np.bincount([int(path.parent.name) for path in held_out]).tolist() == [36] * 10
    for path in files[::100]:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (40, 40))
            small = np.asarray(image.crop((4, 4, 36, 36)).resize((8, 8), Image.Resampling.BOX), dtype=float)
        nearest = np.abs(digits.images * (255 / 16) - small).mean(axis=(1, 2)).argmin()
        assert nearest == int(path.stem)


def test_scenes_hold_digits_of_their_own_split_only(built: Path) -> None:
    targets = load_digits().target
    used = {}
    for split in ("train", "val"):
        content = scenes(built, split)
        names = {row["id"]: row["name"] for row in content["categories"]}
        allowed = {int(path.stem) for path in (built / f"sources/digits/{split}").glob("*/*.png")}
        used[split] = {row["digit"] for row in content["annotations"]}
        assert used[split] <= allowed
        for row in content["annotations"]:
            assert names[row["category_id"]] == str(targets[row["digit"]])
    assert not used["train"] & used["val"]
    assert len(used["train"]) > 1200


def test_boxes_are_inside_apart_and_of_the_stated_sizes(built: Path) -> None:
    content = scenes(built, "train")
    boxes: dict[int, list[list[int]]] = {row["id"]: [] for row in content["images"]}
    for row in content["annotations"]:
        boxes[row["image_id"]].append(row["bbox"])
        assert row["area"] == row["bbox"][2] * row["bbox"][3]
    for of_image in boxes.values():
        assert 1 <= len(of_image) <= 3
        taken = np.zeros((48, 48), dtype=int)
        for x, y, width, height in of_image:
            assert x >= 0
            assert y >= 0
            assert x + width <= 48
            assert y + height <= 48
            taken[y : y + height, x : x + width] += 1
        assert taken.max() == 1
    heights = [box[3] for of_image in boxes.values() for box in of_image]
    assert min(heights) >= 10
    assert max(heights) == 24
    assert 1.8 < np.mean([len(of_image) for of_image in boxes.values()]) < 2.05


def test_scenes_show_their_own_half_of_the_photos(built: Path, pictures: dict[str, np.ndarray]) -> None:
    for split in ("train", "val"):
        content = scenes(built, split)
        drawn: dict[int, list[list[int]]] = {row["id"]: [] for row in content["images"]}
        for row in content["annotations"]:
            drawn[row["image_id"]].append(row["bbox"])
        for row in content["images"][:200]:
            left, top = row["crop"]
            middle = pictures[row["photo"]].shape[1] // 2
            assert left + 48 <= middle if split == "train" else left >= middle
            photo = pictures[row["photo"]][top : top + 48, left : left + 48].astype(int)
            with Image.open(built / f"sources/scenes/{split}/{row['file_name']}") as image:
                shown = np.asarray(image).astype(int)
            background = np.ones((48, 48), dtype=bool)
            for x, y, width, height in drawn[row["id"]]:
                background[max(0, y - 8) : y + height + 8, max(0, x - 8) : x + width + 8] = False  # JPEG's blocks
            if background.any():
                assert np.abs(shown - photo)[background].mean() < 6


def test_drawn_digits_stand_out_and_boxes_are_tight() -> None:
    digits = quickstart.split_digits(*quickstart._load_digits(), 0)["train"]
    rng = np.random.default_rng(5)
    for grey in (0, 60, 127, 128, 190, 255):
        background = np.full((48, 48, 3), grey, dtype=np.uint8)
        scene, drawn = quickstart.draw_scene(background, digits, rng)
        changed = np.abs(scene.astype(int) - grey).max(axis=2)
        assert len(drawn) >= 1
        for (x, y, width, height), _ in drawn:
            inside = changed[y : y + height, x : x + width]
            assert inside.max() >= 50
            # Every side of the box touches ink.
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.max() >= 0.25 * inside.max()
            changed[y : y + height, x : x + width] = 0
        assert changed.max() == 0


def test_mosaics_have_two_or_three_large_regions_and_no_zero(built: Path) -> None:
    seen = np.zeros(256, dtype=int)
    masks = sorted((built / "sources/textures/annotations/training").iterdir())
    for path in masks[::4]:
        with Image.open(path) as mask:
            counts = np.bincount(np.asarray(mask).ravel(), minlength=256)
        present = counts[counts > 0]
        assert len(present) in (2, 3)
        assert present.min() >= 0.1 * 48 * 48
        seen += counts
    assert np.flatnonzero(seen).tolist() == [1, 2, 3, 4, 5, 6]
    assert seen[1:7].max() < 2 * seen[1:7].min()


@pytest.mark.parametrize(("split", "folder"), [("train", "training"), ("val", "validation")])
def test_mosaics_show_their_own_half_of_the_texture(
    built: Path, pictures: dict[str, np.ndarray], split: str, folder: str
) -> None:
    grass = quickstart.TEXTURES.index("grass") + 1
    other = "val" if split == "train" else "train"
    for path in sorted((built / "sources/textures/annotations" / folder).iterdir()):
        with Image.open(path) as opened:
            inside = np.argwhere(np.asarray(opened) == grass)
        if len(inside) > 1100:
            break
    points = inside[np.random.default_rng(0).permutation(len(inside))[:60]]
    with Image.open(built / "sources/textures/images" / folder / path.with_suffix(".jpg").name) as image:
        shown = np.asarray(image.convert("L")).astype(int)[points[:, 0], points[:, 1]]

    def best_match(half: str) -> float:
        texture = quickstart.half(pictures["grass"], half)[:, :, 0]
        windows = np.lib.stride_tricks.sliding_window_view(texture, (48, 48))
        return min(np.abs(row[:, points[:, 0], points[:, 1]].astype(int) - shown).mean(axis=1).min() for row in windows)

    assert best_match(split) < 5 < 20 < best_match(other)


def test_a_finished_build_is_kept(built: Path) -> None:
    marker = built / "quickstart.json"
    before = marker.stat().st_mtime_ns, marker.stat().st_ino
    quickstart.build(built)
    assert (marker.stat().st_mtime_ns, marker.stat().st_ino) == before


def checksums(out: Path) -> list[str]:
    folders = sorted((out / "shards").glob("*/*"))
    return [entry.sha256 for folder in folders for entry in load_index(folder).shards]


def test_same_bytes_for_a_seed_others_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "COUNTS", SMALL)
    quickstart.build(tmp_path / "a")
    first = checksums(tmp_path / "a")
    quickstart.build(tmp_path / "b")
    assert checksums(tmp_path / "b") == first
    quickstart.build(tmp_path / "b", seed=1)  # replaces the build for another seed
    assert not set(checksums(tmp_path / "b")) & set(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_incomplete_build_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "COUNTS", SMALL)
    quickstart.build(tmp_path / "data")
    (tmp_path / "data/shards/scenes/val/index.json").unlink()
    quickstart.build(tmp_path / "data")
    assert len(ShardSet(tmp_path / "data/shards/scenes/val")) == 6
    (tmp_path / "data/quickstart.json").write_text("{")
    with pytest.raises(UserError, match=r"quickstart.json is not JSON .*: delete .*data and build it again"):
        quickstart.build(tmp_path / "data")


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_write_digits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quickstart.build(tmp_path / "deep/data")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not quickstart data, so it is left alone"):
        quickstart.build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_attribution_names_every_picture(built: Path) -> None:
    text = (built / "sources/ATTRIBUTION.txt").read_text()
    for name in (*quickstart.PHOTOS, *quickstart.TEXTURES):
        assert name in text
    assert text.count("CC BY 2.0") >= 3
