"""The faces: real pixels, cut into train and val once; and the recipe that learns them on the quickstart's model."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.data import lfw_subset

from modsquad_ds.config import load_recipe
from modsquad_ds.data import quickstart
from modsquad_ds.data.convert import convert
from modsquad_ds.data.finish import finished_images
from modsquad_ds.data.loader import eval_batches, train_loader
from modsquad_ds.data.loader_plan import check_data
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.model.counts import count_parameters
from modsquad_ds.model.network import build_network
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan


def write(folder: Path, seed: int = 0) -> Path:
    """The faces' sources, without the other datasets, which take longer."""
    quickstart._write_faces(folder, *quickstart._load_faces(), seed)
    return folder


def numbers(source: Path, split: str, name: str = "*") -> set[int]:
    return {int(path.stem) for path in (source / split).glob(f"{name}/*.png")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("faces") / "source")


@pytest.fixture(scope="module")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_root."""
    root = tmp_path_factory.mktemp("shards")
    for split in quickstart.SPLITS:
        convert("imagenet", source, root / "faces", split, progress=False)
    return root


def test_every_image_is_used_once_as_many_of_each_class(source: Path) -> None:
    train, val = (numbers(source, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (150, 50)
    assert train | val == set(range(200))
    assert numbers(source, "train", "face") | numbers(source, "val", "face") == set(range(100))
    assert [len(numbers(source, "val", name)) for name in ("face", "other")] == [25, 25]
    assert numbers(source, "val", "face") != set(range(75, 100)), "drawn, not the last ones"


def test_files_hold_the_packages_pixels(source: Path) -> None:
    images = lfw_subset()
    for path in source.glob("*/*/*.png"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (25, 25))
            assert np.abs(np.asarray(image) / 255 - images[int(path.stem)]).max() <= 0.5 / 255 + 1e-12


def test_faces_look_more_like_the_mean_face_than_the_others(source: Path) -> None:
    """That the first hundred are the faces is the package's word; their classes must not be swapped."""
    images = lfw_subset().reshape(200, -1)
    centred = (images - images.mean(1, keepdims=True)) / (images.std(1, keepdims=True) + 1e-6)
    mean_face = centred[sorted(numbers(source, "train", "face"))].mean(0)
    likeness = {name: (centred[sorted(numbers(source, "val", name))] @ mean_face).mean() for name in ("face", "other")}
    assert likeness["face"] > 3 * abs(likeness["other"])


def test_same_split_for_a_seed_another_for_another(source: Path, tmp_path: Path) -> None:
    again, other = write(tmp_path / "again"), write(tmp_path / "other", seed=1)
    for path in source.glob("*/*/*.png"):
        assert (again / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert numbers(other, "val") != numbers(source, "val")
    assert len(numbers(other, "val")) == 50


def test_classes_of_the_shards(shards: Path) -> None:
    for split, count in (("train", 150), ("val", 50)):
        found = ShardSet(shards / "faces" / split)
        assert (len(found), found.classes, found.kind) == (count, quickstart.FACES, "classification")
    assert quickstart.FACES == ("face", "other")


def test_the_recipe_learns_faces_alone_and_feeds_its_network(shards: Path) -> None:
    recipe = load_recipe("faces", [f"data_root={shards}"])
    assert list(recipe.active) == ["faces"]
    assert recipe.init_from is not None
    assert (recipe.init_from.path, recipe.init_from.allow) == (Path("runs/quickstart"), ("tasks",))
    assert recipe.model == load_recipe("quickstart").model
    assert (recipe.mean, recipe.std) == (load_recipe("quickstart").mean, load_recipe("quickstart").std)
    plan = loader_plan(recipe, Ranks())
    check_data(plan)
    (batch,) = train_loader(plan, 0, 1, 0)
    assert batch["faces"].images_BCHW.shape == (32, 3, 32, 32)
    logits = build_network(recipe)({"faces": finished_images(batch["faces"])}).outputs["faces"]["logits"]
    assert logits.shape == (32, 2)
    seen = [label for sub in eval_batches(plan, "faces", "val", 16) for label in sub.targets["labels"].tolist()]
    assert seen.count(0) == seen.count(1) == 25


def test_the_recipe_has_the_quickstarts_size_with_one_task() -> None:
    faces, whole = (count_parameters(build_network(load_recipe(name))) for name in ("faces", "quickstart"))
    assert faces.heads.keys() == {"faces"}
    assert faces.heads["faces"] == 2 * (load_recipe("faces").model.shape.width + 1)
    assert faces.backbone < whole.backbone, "one router and one embedding per layer instead of three"


def test_the_same_recipe_describes_the_grown_model() -> None:
    """All four tasks in the order in which adding faces to the quickstart's model leaves them; faces alone learn."""
    changes = ["only=[]", "init_from=null", "model.mlp.num_experts=10", "adapt.tasks=[faces]", "adapt.train=experts"]
    recipe = load_recipe("faces", changes)
    assert list(recipe.active) == [*load_recipe("quickstart").active, "faces"]
    assert list(recipe.adapted) == ["faces"]


def test_attribution_names_the_source() -> None:
    assert "Labeled Faces in the Wild" in quickstart.ATTRIBUTION
