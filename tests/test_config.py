"""Recipes: the shipped ones load and survive a round trip, files build on each other, every mistake is one line with its key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from modsquad_ds.config import ParallelSpec, Recipe, load_recipe, recipe_from_tree, recipe_to_tree
from modsquad_ds.errors import UserError
from modsquad_ds.recipe_tree import RECIPES, recipe_file
from small import small_recipe, small_tree

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def refusal(action: Callable[[], Any]) -> str:
    """The message of the UserError that `action` raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


def write(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


# ---------------------------------------------------------------- shipped recipes


def test_the_promised_recipes_are_shipped() -> None:
    baselines = {"quickstart_dense", "quickstart_plain_moe", "quickstart_single"}
    assert {"quickstart", "heterogeneous"} | baselines <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.run == Path("runs") / name, "two recipes must not share a run folder"
    tree = recipe_to_tree(recipe)
    assert recipe_from_tree(yaml.safe_load(yaml.safe_dump(tree)), "copy") == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_round_trip_keeps_values_that_are_not_the_defaults(name: str) -> None:
    changes = ["seed=7", "train.ema=0.5", "train.optimizer.betas=[0.8, 0.95]", "model.drop_path=0.25", "log.wandb=disabled"]
    recipe = load_recipe(name, changes)
    again = recipe_from_tree(recipe_to_tree(recipe), "copy")
    assert again == recipe != load_recipe(name)
    assert (again.seed, again.train.optimizer.betas, again.model.drop_path) == (7, (0.8, 0.95), 0.25)


def test_quickstart_is_what_it_says() -> None:
    recipe = load_recipe("quickstart")
    assert {name: task.kind for name, task in recipe.tasks.items()} == {
        "digits": "classification", "scenes": "detection", "textures": "segmentation",
    }  # fmt: skip
    assert recipe.parallel.ep_size == 2 and recipe.deepspeed_config == "zero2"
    assert recipe.loss.mutual_information > 0
    assert recipe.model.shape.model_dump() == {"width": 96, "depth": 4, "heads": 3, "patch": 8}


def test_baselines_change_only_what_makes_them_baselines() -> None:
    whole = recipe_to_tree(load_recipe("quickstart"))
    for name, sections in {"dense": {"model", "loss", "parallel"}, "plain_moe": {"model", "loss"}}.items():
        other = recipe_to_tree(load_recipe(f"quickstart_{name}"))
        assert {key for key in whole if whole[key] != other[key]} == {"name", "run", *sections}
    single = load_recipe("quickstart_single")
    assert list(single.active) == ["digits"] and list(single.tasks) == ["digits", "scenes", "textures"]
    assert single.model.layout == "dense"


def test_sizes_are_those_of_the_paper() -> None:
    sizes = {"tiny": (192, 12, 3, 16), "small": (384, 12, 6, 16), "base": (768, 12, 12, 16)}
    for size, expected in sizes.items():
        shape = small_recipe(model={"size": size}).model.shape
        assert (shape.width, shape.depth, shape.heads, shape.patch) == expected
    shape = small_recipe(model={"size": "base", "depth": 3}).model.shape
    assert (shape.width, shape.depth) == (768, 3)


def test_widths_follow_from_the_shape() -> None:
    model = small_recipe(model={"size": "base", "mlp": {"num_experts": 16, "top_k": 4}}).model
    assert model.attention_width == 64
    assert model.expert_hidden == 768, "active FLOPs of 4 experts equal one dense MLP of hidden width 4 * 768"
    model = small_recipe(model={"size": "base", "head_dim": 128, "mlp_ratio": 2, "mlp": {"num_experts": 8, "top_k": 1}}).model
    assert (model.attention_width, model.expert_hidden) == (128, 1536)


# ---------------------------------------------------------------- overrides


def test_overrides_reach_every_depth_and_are_yaml() -> None:
    recipe = load_recipe(
        "quickstart",
        [
            "name=other", "train.steps=7", "tasks.digits.transform.image_size=40", "only=[digits, scenes]",
            "model.router={type: mlp}", "tasks.scenes.transform.canvases=[[48, 64]]", "train.optimizer.lr=2e-3", "seed=3",
        ],
    )  # fmt: skip
    assert (recipe.name, recipe.train.steps, recipe.seed) == ("other", 7, 3)
    assert recipe.tasks["digits"].transform.image_size == 40
    assert list(recipe.active) == ["digits", "scenes"]
    assert recipe.model.router.type == "mlp" and not recipe.model.router.renormalize, "a mapping replaces the section"
    assert recipe.tasks["scenes"].transform.canvases == ((48, 64),)
    assert recipe.train.optimizer.lr == pytest.approx(0.002)


def test_later_overrides_win_and_sections_may_be_new() -> None:
    recipe = load_recipe("quickstart", ["train.steps=7", "train.steps=8", "log.wandb=disabled"])
    assert recipe.train.steps == 8 and recipe.log.wandb == "disabled"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps", ["'train.steps'", "expected key=value", "e.g. train.steps=100"]),
        ("=5", ["'=5'", "expected key=value"]),
        ("name.steps=5", ["'name.steps=5'", "name is a value, not a section"]),
        ("train.steps.more.yet=5", ["train.steps is a value, not a section"]),
        ("only=[digits", ["'[digits' is not a YAML value", "quote it"]),
        ("train.stepz=5", ["quickstart", "train.stepz: unknown key; did you mean steps?"]),
        ("train.steps=", ["train.steps: ", "valid integer", "(given None)"]),
        ("tasks.digits.batch_size_per_rank=2", ["tasks.digits: give exactly one of batch_size", "batch_size_per_rank"]),
    ],
)
def test_bad_override(override: str, parts: list[str]) -> None:
    message = refusal(lambda: load_recipe("quickstart", [override]))
    assert all(part in message for part in parts), message


# ---------------------------------------------------------------- files and their bases


def test_file_over_a_shipped_base(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", {"base": "quickstart", "name": "mine", "train": {"steps": 9}})
    recipe = load_recipe(str(path), ["train.log_every=3"])
    shipped = load_recipe("quickstart")
    assert (recipe.name, recipe.train.steps, recipe.train.log_every) == ("mine", 9, 3)
    assert recipe.train.optimizer == shipped.train.optimizer and recipe.tasks == shipped.tasks


def test_bases_chain_and_the_nearest_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = small_tree()
    write(tmp_path / "deep" / "a.yml", tree)
    write(tmp_path / "deep" / "b.yaml", {"base": "a.yml", "seed": 1, "loss": {"z_loss": 0.5}, "only": ["digits"]})
    last = write(tmp_path / "c.yaml", {"base": "deep/b.yaml", "seed": 2, "loss": {"load_balance": 0.25}, "only": []})
    # Files name each other as seen from themselves, so the working directory does not matter.
    monkeypatch.chdir(tmp_path / "deep")
    recipe = load_recipe(str(last))
    assert recipe.seed == 2 and recipe.only == ()
    assert (recipe.loss.z_loss, recipe.loss.load_balance, recipe.loss.mutual_information) == (0.5, 0.25, 0.5)
    assert tree == small_tree()


def test_null_takes_back_what_the_base_says(tmp_path: Path) -> None:
    changes = {"base": "quickstart", "tasks": {"digits": {"batch_size": None, "batch_size_per_rank": 5}}}
    task = load_recipe(str(write(tmp_path / "mine.yaml", changes))).tasks["digits"]
    assert (task.batch_size, task.batch_size_per_rank) == (None, 5)


@pytest.mark.parametrize("chain", [["a.yaml"], ["b.yaml", "a.yaml"], ["sub/../a.yaml"]])
def test_base_loop_is_refused(chain: list[str], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["a.yaml", *chain]
    for name, base in zip(names, chain, strict=False):
        write(tmp_path / name, {"base": base})
    message = refusal(lambda: load_recipe(str(tmp_path / "a.yaml")))
    assert "leads back to itself; remove one base: key" in message and "a.yaml" in message


def test_missing_file_lists_what_is_shipped(tmp_path: Path) -> None:
    for name in ("quickstrat", str(tmp_path / "none.yaml"), str(tmp_path)):
        message = refusal(lambda name=name: load_recipe(name))
        assert name in message and ", ".join(SHIPPED) in message
    path = write(tmp_path / "mine.yaml", {"base": "gone.yaml"})
    assert str(tmp_path / "gone.yaml") in refusal(lambda: load_recipe(str(path)))
    assert recipe_file("quickstart").is_file()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"train: {steps: 5", "not valid YAML"),
        (b"a: 1\n  b: 2\n", "not valid YAML"),
        (b"key: \x01", "not valid YAML"),
        (b"tasks:\n  pets: {kind: a}\n  pets: {kind: b}\n", "key pets stands twice"),
        (b"? [a, b]\n: c\n", "not valid YAML: while constructing a mapping"),
        (b"\xff\xfe\x00\x00broken", "cannot be read as text"),
        (b"- a\n- b\n", "expected a mapping of keys to values, found list"),
        (b"just words", "found str"),
        (b"", "found NoneType"),
    ],
)
def test_file_that_is_no_recipe(content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = refusal(lambda: load_recipe(str(path)))
    assert message.startswith(f"recipe {path}: ") and part in message


# ---------------------------------------------------------------- variants

VARIANTS = {
    "dense": {"model": {"layout": "dense"}, "loss": {"mutual_information": 0.0}},
    "slow": {"train": {"steps": 50, "optimizer": {"lr": 1e-4}}},
    "brief": {"train": {"steps": 3}, "only": ["digits"]},
}


def with_variants(folder: Path, **changes: Any) -> str:
    return str(write(folder / "mine.yaml", {**small_tree(), "run": "runs/mine", "variants": VARIANTS, **changes}))


def test_variant_changes_its_keys_the_name_and_the_folder(tmp_path: Path) -> None:
    path = with_variants(tmp_path)
    plain, dense = (recipe_to_tree(load_recipe(path, changes)) for changes in ([], ["variant=dense"]))
    assert {key for key in plain if plain[key] != dense[key]} == {"name", "run", "model", "loss"}
    assert (dense["name"], dense["run"]) == ("small-dense", "runs/mine-dense")
    assert dense["model"]["layout"] == "dense" and dense["model"]["width"] == plain["model"]["width"]
    assert recipe_from_tree(dense, "copy") == load_recipe(path, ["variant=dense"]), "a variant is a recipe like others"


def test_variants_are_laid_over_each_other_in_order_and_overrides_go_before_them(tmp_path: Path) -> None:
    path = with_variants(tmp_path)
    recipe = load_recipe(path, ["train.steps=9", "variant=[slow, dense]", "seed=4"])
    assert (recipe.name, recipe.run) == ("small-slow-dense", Path("runs/mine-slow-dense"))
    assert (recipe.train.steps, recipe.train.optimizer.lr, recipe.model.layout, recipe.seed) == (9, 1e-4, "dense", 4)
    assert load_recipe(path, ["variant=[slow, brief]"]).train.steps == 3
    assert load_recipe(path, ["variant=[brief, slow]"]).train.steps == 50
    assert load_recipe(path, ["variant=slow", "variant=brief"]).name == "small-brief", "a later override wins"
    assert load_recipe(path, ["variant=[]"]) == load_recipe(path)


def test_name_and_run_that_are_given_stay(tmp_path: Path) -> None:
    recipe = load_recipe(with_variants(tmp_path), ["run=runs/a", "variant=brief", "name=b"])
    assert (recipe.name, recipe.run, list(recipe.active)) == ("b", Path("runs/a"), ["digits"])


def test_variants_of_the_base_are_inherited_and_merged(tmp_path: Path) -> None:
    with_variants(tmp_path)
    own = {"dense": {"loss": {"z_loss": 0.5}}, "slow": None, "long": {"train": {"steps": 99}}}
    path = str(write(tmp_path / "mine2.yaml", {"base": "mine.yaml", "name": "two", "seed": 3, "variants": own}))
    dense = load_recipe(path, ["variant=dense"])
    assert (dense.model.layout, dense.loss.z_loss, dense.loss.mutual_information, dense.seed) == ("dense", 0.5, 0.0, 3)
    assert dense.name == "two-dense" and load_recipe(path, ["variant=[brief, long]"]).train.steps == 99
    assert refusal(lambda: load_recipe(path, ["variant=slow"])).endswith("no variant slow; it has brief, dense, long")


@pytest.mark.parametrize(
    ("variants", "override", "part"),
    [
        (VARIANTS, "variant=dens", "no variant dens; it has brief, dense, slow"),
        (VARIANTS, "variant=[dense, Slow]", "no variant Slow; it has brief, dense, slow"),
        (VARIANTS, "variant={dense: 1}", "no variant {'dense': 1}; it has"),
        (VARIANTS, "variant=", "no variant None; it has"),
        (VARIANTS, "variant", "override 'variant': expected key=value"),
        (None, "variant=dense", "no variant dense; it has no variants:"),
        ({"dense": {"model": {"layot": "dense"}}}, "variant=dense", "model.layot: unknown key; did you mean layout?"),
        ({"dense": "small"}, "seed=1", "variants.dense: expected keys and values, found str"),
        ({"My One": {}}, "seed=1", "variants.My One: use lower-case letters"),
        (["dense"], "seed=1", "variants: expected names with changes to the recipe, found list"),
    ],
)
def test_mistake_in_variants(variants: Any, override: str, part: str, tmp_path: Path) -> None:
    path = with_variants(tmp_path, variants=variants)
    message = refusal(lambda: load_recipe(path, [override]))
    assert part in message and (message.startswith(f"recipe {path}: ") or override == "variant"), message


# ---------------------------------------------------------------- mistakes in values


def set_to(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for part in path:
            tree = tree[part]
        tree[last] = value

    return change


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for part in path:
            tree = tree[part]
        del tree[last]

    return change


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], None], list[str]]] = {
    "unknown key": (set_to("model.layot", "dense"), ["model.layot: unknown key; did you mean layout?"]),
    "unknown key at the top": (set_to("taskz", {}), ["taskz: unknown key; did you mean tasks?"]),
    "unknown key deep down": (
        set_to("tasks.scenes.head.chanels", 3), ["tasks.scenes.head.chanels: unknown key; did you mean channels?"],
    ),
    "unknown key like nothing": (set_to("model.zzzzzz", 3), ["model.zzzzzz: unknown key"]),
    "key of another head": (set_to("tasks.textures.head.strides", [4, 8]), ["tasks.textures.head.strides: unknown key"]),
    "missing": (drop("train.optimizer.lr"), ["train.optimizer.lr: missing; this key is required"]),
    "missing section": (drop("train"), ["train: missing; this key is required"]),
    "missing in a task": (drop("tasks.digits.data"), ["tasks.digits.data: missing"]),
    "no kind": (drop("tasks.digits.kind"), ["tasks.digits.kind: missing"]),
    "no head type": (drop("tasks.scenes.head.type"), ["tasks.scenes.head.type: missing"]),
    "unknown kind": (set_to("tasks.digits.kind", "depth"), ["tasks.digits: ", "'depth'", "'classification'", "'detection'"]),
    "unknown head": (set_to("tasks.scenes.head.type", "yolo"), ["tasks.scenes.head: ", "'yolo'", "'anchor_free'", "'retinanet'"]),
    "wrong type": (set_to("train.steps", "many"), ["train.steps: ", "integer", "(given 'many')"]),
    "fraction": (set_to("train.steps", 1.5), ["train.steps: ", "(given 1.5)"]),
    "out of range": (set_to("train.optimizer.lr", -1), ["train.optimizer.lr: ", "greater than 0", "(given -1)"]),
    "not a section": (set_to("model", [1]), ["model: ", "dictionary", "(given [1])"]),
    "too short": (set_to("mean", [1, 2]), ["mean.2: missing"]),
    "not one of": (set_to("model.layout", "some"), ["model.layout: ", "'alternate'", "'every_block'", "(given 'some')"]),
    "no such size": (set_to("model.size", "giant"), ["model: size 'giant' is not one of tiny, small, base, quickstart"]),
    "heads": (set_to("model.heads", 5), ["model: width 32 is not a multiple of heads 5: set head_dim"]),
    "top_k": (set_to("model.mlp.top_k", 5), ["model.mlp: top_k 5 is larger than num_experts 4"]),
    "top_k of attention": (set_to("model.attention.top_k", 9), ["model.attention: top_k 9 is larger than num_experts 4"]),
    "ep_size": (set_to("parallel.ep_size", 3), ["parallel.ep_size 3 does not divide the 4 experts of a layer"]),
    "attention_ep_size": (set_to("parallel.attention_ep_size", 8), ["parallel.attention_ep_size 8 does not divide the 4"]),
    "capacity of nothing": (set_to("parallel.capacity_factor", 0), ["parallel.capacity_factor: ", "greater than 0", "(given 0)"]),
    "negative capacity": (set_to("parallel.capacity_factor", -1.5), ["parallel.capacity_factor: ", "(given -1.5)"]),
    "only": (set_to("only", ["digit", "scenes"]), ["only names digit, not among tasks: digits, scenes, textures"]),
    "only is no list": (set_to("only", "digits"), ["only: ", "(given 'digits')"]),
    "no tasks": (set_to("tasks", {}), ["tasks: ", "at least 1"]),
    "task name": (lambda t: t["tasks"].update({"My Task": t["tasks"].pop("digits")}), ["task name 'My Task'", "lower-case"]),
    "task name with a dot": (lambda t: t["tasks"].update({"a.b": t["tasks"].pop("digits")}), ["task name 'a.b'"]),
    "two batch sizes": (set_to("tasks.digits.batch_size_per_rank", 2), ["tasks.digits: give exactly one of batch_size"]),
    "no batch size": (drop("tasks.scenes.batch_size"), ["tasks.scenes: give exactly one of batch_size"]),
    "key that is a number": (lambda t: t.update({3: 1}), ["3: ", "(given 3)"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_told_with_its_key(mistake: str) -> None:
    tree = small_tree()
    change, parts = MISTAKES[mistake]
    change(tree)
    message = refusal(lambda: recipe_from_tree(tree, "mine.yaml"))
    assert message.startswith("recipe mine.yaml: ")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("change", ["train.optimizer.lr=.inf", "std=[1.0, .nan, 1.0]"])
def test_numbers_are_finite(change: str) -> None:
    message = refusal(lambda: load_recipe("quickstart", [change]))
    assert change.split("=")[0] in message and "finite number" in message


def test_several_mistakes_are_told_together() -> None:
    tree = small_tree()
    tree["model"]["layot"] = "dense"
    del tree["train"]["steps"]
    message = refusal(lambda: recipe_from_tree(tree, "x"))
    assert "model.layot" in message and "train.steps: missing" in message


@pytest.mark.parametrize("name", ["segmentation", "detection", "linear", "upernet"])
def test_task_called_like_a_kind_or_a_head_keeps_its_name_in_errors(name: str) -> None:
    tree = small_tree()
    tree["tasks"] = {name: tree["tasks"]["textures"]}
    tree["tasks"][name]["head"]["chanels"] = 3
    assert f"tasks.{name}.head.chanels: unknown key" in refusal(lambda: recipe_from_tree(tree, "x"))
    del tree["tasks"][name]["head"]["chanels"]
    assert list(recipe_from_tree(tree, "x").tasks) == [name]


def test_recipes_cannot_be_changed_in_place() -> None:
    recipe: Recipe = small_recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 9  # type: ignore[misc]


def test_only_keeps_the_order_of_tasks() -> None:
    assert list(small_recipe(only=["textures", "digits"]).active) == ["digits", "textures"]
    assert list(small_recipe().active) == ["digits", "scenes", "textures"]


def test_a_limit_in_minutes_from_an_older_file_is_read() -> None:
    assert ParallelSpec.model_validate({"timeout_minutes": 2.5}).collective_timeout == 150.0
    assert ParallelSpec().collective_timeout == 600.0
    with pytest.raises(ValidationError, match="timeout_minutes"):
        ParallelSpec.model_validate({"timeout_minutes": "soon"})
