"""The loader meets data: mismatches with the recipe are refused before training, real shards become batches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memory import EmptyStore, assert_equal, classification, detection, plan, segmentation
from modsquad_ds.data.convert import convert
from modsquad_ds.data.loader import eval_batches, train_loader
from modsquad_ds.data.loader_plan import LoaderPlan, check_data
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.errors import UserError

# ---------------------------------------------------------------- checks


def test_good_plan_passes() -> None:
    check_data(plan(world=2, accumulation=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"tasks": {"a": detection(data="digits")}},
            "tasks.a.kind: the recipe says detection, but memory/digits/train",
        ),
        (
            {"tasks": {"a": classification(num_classes=4)}},
            "tasks.a.num_classes: the recipe says 4, but memory/digits/train has 3",
        ),
        ({"world": 3}, "tasks.digits.batch_size: 8 images cannot be divided over 3 ranks x 1 micro-batches"),
        ({"world": 4, "accumulation": 4}, "8 images cannot be divided over 4 ranks x 4 micro-batches"),
        ({"world": 8, "tasks": {"digits": classification()}}, "a rank's micro-batch holds 1 images (8 over 8 ranks"),
        (
            {"patch_size": 16, "tasks": {"a": classification(transform={"image_size": 40})}},
            "a.transform.image_size: 40 px",
        ),
        ({"patch_size": 16}, "tasks.scenes.transform.canvases[2]: 40 x 40 px; expected multiples of the patch size 16"),
        ({"tasks": {"a": detection(transform={"eval_canvas": (50, 48)})}}, "tasks.a.transform.eval_canvas: 50 x 48 px"),
        ({"tasks": {"a": detection(transform={"canvases": ()})}}, "tasks.a.transform.canvases: empty"),
        ({"tasks": {"a": segmentation(transform={"resize": (0, 64)})}}, "tasks.a.transform.resize: 0 x 64 px; expected"),
        ({"tasks": {"a": detection(transform={"scale": (1.0, 0.5)})}}, "tasks.a.transform.scale: 1.0 to 0.5"),
        ({"tasks": {"a": segmentation(transform={"crop": (32, 36)})}}, "tasks.a.transform.crop: 32 x 36 px"),
        ({"tasks": {"a": segmentation(transform={"ratio": (0.0, 1.0)})}}, "tasks.a.transform.ratio: 0.0 to 1.0"),
        (
            {"tasks": {"a": classification(transform={"image_size": 64, "eval_resize": 32})}},
            "tasks.a.transform.eval_resize: 32 px is less than image_size 64",
        ),
        ({"open_store": EmptyStore}, "tasks.digits.data: memory/digits/train holds no samples"),
    ],
)
def test_mismatches_are_refused_before_training(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_data(plan(**changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_missing_shards_are_refused(tmp_path: Path) -> None:
    real = replace(plan(root=tmp_path), open_store=LoaderPlan.open_store)
    with pytest.raises(UserError, match="does not exist"):
        check_data(real)


# ---------------------------------------------------------------- with real shards


def write_datasets(folder: Path) -> None:
    """Eight images of 20 .. 27 x 30 pixels in each of the three layouts, under the split name `train`."""
    rng = np.random.default_rng(0)
    for path in ("i/train/cat", "i/train/dog", "c/train", "c/annotations", "a/images/train", "a/annotations/train"):
        (folder / path).mkdir(parents=True)
    images, boxes = [], []
    for index in range(8):
        size = (20 + index, 30)
        picture = Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8))
        picture.save(folder / "i/train" / ("cat", "dog")[index % 2] / f"{index}.jpg", quality=90)
        picture.save(folder / f"c/train/{index}.png")
        picture.save(folder / f"a/images/train/{index}.jpg", quality=90)
        mask = rng.integers(4, size=size, dtype=np.uint8)
        Image.fromarray(mask).save(folder / f"a/annotations/train/{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": size[0], "width": size[1]})
        box = {"bbox": [1, 2, 10, 12], "category_id": 7, "iscrowd": index % 2, "area": 120}
        boxes.append(box | {"id": 100 + index, "image_id": index})
    categories = [{"id": 3, "name": "bird"}, {"id": 7, "name": "fish"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "c/annotations/instances_train.json").write_text(json.dumps(content))
    (folder / "a/classes.txt").write_text("sky\nsea\nsand\n")


def test_from_dataset_to_batches_with_real_shards(tmp_path: Path) -> None:
    write_datasets(tmp_path)
    for layout, source, name in (("imagenet", "i", "digits"), ("coco", "c", "scenes"), ("ade20k", "a", "textures")):
        convert(layout, tmp_path / source, tmp_path / name, "train", samples_per_shard=3, progress=False)
    specs = {
        "digits": classification(num_classes=2),
        "scenes": detection(num_classes=2),
        "textures": segmentation(num_classes=3, batch_size=4, batch_size_per_rank=None),
    }
    real = replace(plan(tasks=specs, root=tmp_path), open_store=LoaderPlan.open_store)
    check_data(real, splits=("train",))
    store = real.train_store("digits")
    assert isinstance(store, ShardSet) and store.open_shards == 2 * real.shuffle_window
    with pytest.raises(UserError, match=r"val does not exist"):
        check_data(real)
    epoch = list(train_loader(real, 0, 4, workers=2))
    assert_equal(epoch[1:], list(train_loader(real, 1, 4, workers=0)))
    assert len({key for batch in epoch[:1] for key in batch["digits"].keys}) == 8
    assert {key for batch in epoch[:2] for key in batch["scenes"].keys} == {str(index) for index in range(8)}
    for batch in epoch:
        scenes = batch["scenes"]
        crowds = [len(ignore) for ignore in scenes.targets["ignore"]]
        assert crowds == [int(key) % 2 for key in scenes.keys]
        assert [labels.tolist() for labels in scenes.targets["labels"]] == [[] if crowd else [1] for crowd in crowds]
        assert set(batch["textures"].targets["labels"].unique().tolist()) <= {0, 1, 2, 255}
    valid = [key for batch in eval_batches(real, "textures", "train", 3) for key in batch.keys]
    assert sorted(valid) == [str(index) for index in range(8)]


def test_a_truncated_shard_is_named_and_nothing_hangs(tmp_path: Path) -> None:
    write_datasets(tmp_path)
    convert("imagenet", tmp_path / "i", tmp_path / "digits", "train", samples_per_shard=4, progress=False)
    real = plan(tasks={"digits": classification(num_classes=2)}, root=tmp_path)
    real = replace(real, open_store=LoaderPlan.open_store)
    loader = train_loader(real, 0, 4, workers=2)
    shard = sorted((tmp_path / "digits/train").glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(shard) in str(caught.value) and "key '" in str(caught.value) and "\n" not in str(caught.value)
