"""Prediction on image files: the same answers as evaluation on shards, the right files, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import layouts
from modsquad_ds.config import Recipe, recipe_from_tree
from modsquad_ds.data.convert import convert
from modsquad_ds.data.decode import decode_mask
from modsquad_ds.data.loader_plan import VAL
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import predict_split
from modsquad_ds.model.network import build_network
from modsquad_ds.model_file import ModelFile, network_of, read_model, write_model
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from modsquad_ds.predict import predict
from small import small_recipe, small_tree

COUNTS = {"digits": 2, "scenes": 2, "textures": 3}
CLASSES = {"digits": ["naught", "one"], "scenes": ["cat", "dog"], "textures": ["wall", "sky", "tree"]}


def recipe_for(data: Path) -> Recipe:
    changes: dict[str, Any] = {f"tasks.{task}.num_classes": count for task, count in COUNTS.items()}
    # Every cell detects something, so that an untrained network has boxes to show.
    changes |= {"tasks.scenes.transform.eval_canvas": [24, 32], "tasks.scenes.head.score_threshold": 0.001}
    changes |= {"tasks.textures.transform.resize": [24, 32]}
    return small_recipe(data_root=str(data), **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of an untrained network whose heads were shaken, so that its answers differ from image to image."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    recipe = recipe_for(Path("elsewhere"))
    network = build_network(recipe)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.heads.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    write_model(path, ModelFile(recipe, network.state_dict(), CLASSES, ()))
    return path


def told(out: Path, stem: str) -> dict[str, Any]:
    return json.loads((out / f"{stem}.json").read_text())


def by_evaluation(model: Path, task: str, data: Path) -> dict[str, dict[str, Any]]:
    """Key of each held-out sample -> prediction from its shard."""
    file = read_model(model)
    plan = loader_plan(recipe_for(data), Ranks())
    batches = predict_split(network_of(file, str(model)).eval(), plan, task, VAL)
    return {key: found for sub, predictions in batches for key, found in zip(sub.keys, predictions, strict=True)}


def files_in(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


# ---------------------------------------------------------------- the same answers as from shards


def test_labels_are_those_of_evaluation(model: Path, tmp_path: Path) -> None:
    source = layouts.imagenet(tmp_path / "src", "val")
    convert("imagenet", source, tmp_path / "data" / "d", "val", progress=False)
    wanted = by_evaluation(model, "digits", tmp_path / "data")
    images = sorted(source.glob("val/*/*"))
    predict(model, images, "digits", tmp_path / "out")
    assert files_in(tmp_path / "out") == {f"{p.stem}{s}" for p in images for s in (".png", ".json")}
    assert len(wanted) == len(images) == 8
    for key, prediction in wanted.items():
        facts = told(tmp_path / "out", Path(key).name)
        probabilities = prediction["probabilities"].tolist()
        found = {row["class"]: row["probability"] for row in facts["top"]}
        assert found == pytest.approx(dict(enumerate(probabilities)), abs=1e-6)
        assert facts["label"] == CLASSES["digits"][prediction["label"]] == facts["top"][0]["name"]
        assert (facts["task"], facts["model"]) == ("digits", str(model))
        assert Path(facts["image"]) in images


def test_boxes_are_those_of_evaluation(model: Path, tmp_path: Path) -> None:
    source = layouts.coco(tmp_path / "src", "val")
    convert("coco", source, tmp_path / "data" / "s", "val", progress=False)
    wanted = by_evaluation(model, "scenes", tmp_path / "data")
    # In the shard's order, since near ties between boxes can turn with the order of a batch.
    predict(model, [source / "val" / f"{key}.jpg" for key in wanted], "scenes", tmp_path / "out")
    for key, prediction in wanted.items():
        boxes = told(tmp_path / "out", key)["boxes"]
        assert len(boxes) > 3
        assert [row["class"] for row in boxes] == prediction["labels"].tolist()
        assert [row["name"] for row in boxes] == [CLASSES["scenes"][label] for label in prediction["labels"]]
        torch.testing.assert_close(torch.tensor([row["box"] for row in boxes]), prediction["boxes"])
        assert [row["score"] for row in boxes] == pytest.approx(prediction["scores"].tolist(), abs=1e-6)
        assert all(0 <= x1 <= x2 <= layouts.WIDTH for x1, _, x2, _ in (row["box"] for row in boxes))


def test_masks_are_those_of_evaluation(model: Path, tmp_path: Path) -> None:
    source = layouts.ade20k(tmp_path / "src", "val")
    convert("ade20k", source, tmp_path / "data" / "t", "val", progress=False)
    wanted = by_evaluation(model, "textures", tmp_path / "data")
    images = [source / "images" / "val" / f"{key}.jpg" for key in wanted]
    predict(model, images, "textures", tmp_path / "out")
    assert files_in(tmp_path / "out") == {f"{p.stem}{s}" for p in images for s in (".png", ".json", "_mask.png")}
    for key, prediction in wanted.items():
        facts = told(tmp_path / "out", key)
        mask = decode_mask((tmp_path / "out" / facts["mask"]).read_bytes())
        assert torch.equal(mask, prediction["mask"]) and mask.shape == (layouts.HEIGHT, layouts.WIDTH)
        shares = {row["class"]: row["share"] for row in facts["share"]}
        counts = mask.flatten().bincount(minlength=3) / mask.numel()
        assert shares == pytest.approx({c: share for c, share in enumerate(counts.tolist()) if share})
        assert [row["name"] for row in facts["share"]] == [CLASSES["textures"][row["class"]] for row in facts["share"]]
        assert list(shares.values()) == sorted(shares.values(), reverse=True)


# ---------------------------------------------------------------- pictures, sizes, batches


@pytest.mark.parametrize("task", COUNTS)
def test_answers_do_not_depend_on_the_company(model: Path, tmp_path: Path, task: str) -> None:
    sizes = [(20, 30), (20, 30), (40, 16), (20, 30), (90, 90)]
    images = [layouts.save(layouts.picture(i, size), tmp_path / f"{i}.png") for i, size in enumerate(sizes)]
    predict(model, images, task, tmp_path / "all")
    for image in images:
        predict(model, [image], task, tmp_path / "one")
        together, alone = told(tmp_path / "all", image.stem), told(tmp_path / "one", image.stem)
        assert numbers(together) == pytest.approx(numbers(alone), abs=1e-3)
    assert files_in(tmp_path / "all") == files_in(tmp_path / "one")


def numbers(facts: dict[str, Any]) -> list[float]:
    """Probabilities, scores or shares, the largest first."""
    lists = {"top": "probability", "boxes": "score", "share": "share"}
    return [row[number] for rows, number in lists.items() for row in facts.get(rows, ())]


def test_pictures_have_the_original_size_unless_small(model: Path, tmp_path: Path) -> None:
    small = layouts.save(layouts.picture(1, (20, 48)), tmp_path / "small.png")
    large = layouts.save(layouts.picture(2, (300, 400)), tmp_path / "large.png")
    for task in COUNTS:
        predict(model, [small, large], task, tmp_path / task)
        magnified, original = (Image.open(tmp_path / task / name).copy() for name in ("small.png", "large.png"))
        assert magnified.width == 240 and magnified.height > 100  # five times, with a caption below
        assert original.width == 400 and original.height > 300
    # The classified picture itself is untouched.
    shown = Image.open(tmp_path / "digits" / "large.png").crop((0, 0, 400, 300))
    assert shown.tobytes() == Image.open(large).tobytes()


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("grey.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("palette.png", "P", {}),
        ("alpha.png", "RGBA", {}),
        ("moving.gif", "RGB", {}),
        ("new.webp", "RGB", {}),
        ("wrong_suffix.txt", "RGB", {"format": "PNG"}),
    ],
)
def test_image_formats(model: Path, tmp_path: Path, name: str, mode: str, options: dict[str, str]) -> None:
    image = layouts.save(layouts.picture(3).convert(mode), tmp_path / name, **options)
    predict(model, [image], "digits", tmp_path / "out")
    assert told(tmp_path / "out", image.stem)["image"] == str(image)


def test_run_folder_stands_for_its_model(model: Path, tmp_path: Path) -> None:
    image = layouts.save(layouts.picture(), tmp_path / "a.png")
    predict(model.parent, [image], "digits", tmp_path / "deep" / "out")
    assert told(tmp_path / "deep" / "out", "a")["model"] == str(model)


def test_older_results_are_replaced(model: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        image = layouts.save(layouts.picture(seed), tmp_path / "a.png")
        predict(model, [image], "digits", tmp_path / "out")
    predict(model, [image], "digits", tmp_path / "fresh")
    assert told(tmp_path / "out", "a") == told(tmp_path / "fresh", "a")
    assert files_in(tmp_path / "out") == {"a.png", "a.json"}


# ---------------------------------------------------------------- what is refused


def refused(words: str, model: Path, images: list[Path], task: str, out: Path) -> None:
    """Refused with `words`, before anything was written."""
    before = out.exists()
    with pytest.raises(UserError, match=re.escape(words)) as error:
        predict(model, images, task, out)
    assert "\n" not in str(error.value)
    assert out.exists() == before


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return layouts.save(layouts.picture(), tmp_path / "good.png")


def test_unknown_task(model: Path, image: Path, tmp_path: Path) -> None:
    refused("its tasks are: digits, scenes, textures", model, [image], "depth", tmp_path / "out")


def test_missing_model(image: Path, tmp_path: Path) -> None:
    refused("nowhere: no such file", tmp_path / "nowhere", [image], "digits", tmp_path / "out")


def test_no_images(model: Path, tmp_path: Path) -> None:
    refused("no images given", model, [], "digits", tmp_path / "out")


@pytest.mark.parametrize("content", [None, b"", b"no image", "cut", "folder"])
def test_bad_image_is_named_and_nothing_written(
    model: Path, image: Path, tmp_path: Path, content: bytes | str | None
) -> None:
    bad = tmp_path / "bad.png"
    if content == "folder":
        bad.mkdir()
    elif content is not None:
        bad.write_bytes(image.read_bytes()[:400] if isinstance(content, str) else content)
    refused(f"image {bad}: cannot be", model, [image, bad], "digits", tmp_path / "out")


def test_equal_stems(model: Path, tmp_path: Path) -> None:
    images = [layouts.save(layouts.picture(), tmp_path / folder / "a.png") for folder in ("x", "y")]
    refused(f"images {images[0]} and {images[1]}: both would write", model, images, "digits", tmp_path / "out")
    refused("both would write", model, [images[0], images[0]], "digits", tmp_path / "out")


def test_mask_of_one_and_picture_of_another(model: Path, tmp_path: Path) -> None:
    images = [layouts.save(layouts.picture(), tmp_path / name) for name in ("a.png", "a_mask.png")]
    refused("a_mask.png; rename one", model, images, "textures", tmp_path / "out")
    predict(model, images, "digits", tmp_path / "out")
    assert files_in(tmp_path / "out") == {"a.png", "a.json", "a_mask.png", "a_mask.json"}


def test_images_are_never_overwritten(model: Path, image: Path) -> None:
    before = image.read_bytes()
    refused("good.png would overwrite an image", model, [image], "digits", image.parent)
    assert image.read_bytes() == before and files_in(image.parent) == {"good.png"}


def test_out_is_a_file(model: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    refused(f"out {tmp_path / 'out'}: cannot be made a folder", model, [image], "digits", tmp_path / "out")
    refused("cannot be made a folder", model, [image], "digits", tmp_path / "out" / "below")


# ---------------------------------------------------------------- tasks of an image set

SET_TASKS = ("class_scene", "human_parts", "depth_zbuffer", "normal", "sal", "segment_unsup2d")


def set_model(path: Path, **transform: Any) -> Path:
    """A model of one task of every kind."""
    views = {"data": "views", "batch_size": 4, "transform": {"crop": [32, 48], **transform}}
    tasks = {name: {"set": "views"} for name in SET_TASKS}
    recipe = recipe_from_tree(small_tree() | {"sets": {"views": views}, "tasks": tasks}, "views")
    classes = {name: [f"class {i}" for i in range(recipe.tasks[name].num_classes)] for name in SET_TASKS}
    write_model(path, ModelFile(recipe, build_network(recipe).state_dict(), classes, ()))
    return path


@pytest.mark.parametrize("task", SET_TASKS)
def test_a_task_of_a_set_answers_with_a_picture_facts_and_its_map(tmp_path: Path, task: str) -> None:
    """Scored as the network sees it: the middle of the picture; as stored: all of it."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(photo)
    for name, transform, size in (("seen", {}, (32, 48)), ("stored", {"resize": [32, 48], "score_at": "original"}, (40, 60))):
        out = tmp_path / name
        predict(set_model(tmp_path / f"{name}.safetensors", **transform), [photo], task, out)
        facts = told(out, "photo")
        with Image.open(out / "photo.png") as drawn:
            assert facts["task"] == task and drawn.width >= 240
        if task == "class_scene":
            assert len(facts["top"]) == 5 and sorted(p.name for p in out.iterdir()) == ["photo.json", "photo.png"]
        elif task == "human_parts":
            assert decode_mask((out / facts["mask"]).read_bytes()).shape == size
            assert sum(row["share"] for row in facts["share"]) == pytest.approx(1)
        else:
            values = np.load(out / facts["values"], allow_pickle=False)
            assert values.dtype == np.float32 and np.isfinite(values).all()
            channels = {"depth_zbuffer": (1, *size), "normal": (3, *size), "sal": size, "segment_unsup2d": (64, 4, 6)}
            assert values.shape == channels[task]
            if task == "depth_zbuffer":
                assert facts["unit"] == "metres" and facts["most"] == pytest.approx([float(values.max())])
                assert values.min() == pytest.approx(1 / 512), "nothing is nearer than a label can say"
            if task == "normal":
                assert np.linalg.norm(values, axis=0) == pytest.approx(np.ones(size), abs=1e-5)


def test_an_image_that_a_set_cannot_score_as_stored_is_refused(tmp_path: Path) -> None:
    photo = tmp_path / "large.png"
    Image.new("RGB", (100, 100)).save(photo)
    model = set_model(tmp_path / "model.safetensors", score_at="original")
    with pytest.raises(UserError, match=r"image .*large.png: the image of 100x100 is larger than transform.crop 32x48"):
        predict(model, [photo], "normal", tmp_path / "out")
