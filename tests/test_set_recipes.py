"""The recipes of the many-label benchmarks: parameters counted by hand, held against Mod-Squad's; what their variants change."""

from pathlib import Path

import pytest
import torch

from modsquad_ds.config import Recipe, load_recipe, recipe_to_tree
from modsquad_ds.model.counts import Counts, count_parameters
from modsquad_ds.model.network import build_network
from modsquad_ds.targets import PASCAL_CONTEXT, TASKONOMY

BASELINES = ("dense", "plain_moe", "m3vit")
VARIANTS = [(), *((name,) for name in (*BASELINES, "small")), *(("small", name) for name in BASELINES)]


def counted(name: str, *variants: str, changes: tuple[str, ...] = ()) -> Counts:
    with torch.device("meta"):
        return count_parameters(build_network(load_recipe(name, [f"variant=[{', '.join(variants)}]", *changes])))


# ---------------------------------------------------------------- parameters


def mod_squads(d: int, attention_experts: int, heads: int, classes: tuple[int, ...] = (1000, 365), channels: int = 16) -> int:
    """Parameters of the published alternating model (models_mt.py), counted from the shapes of its modules."""
    tasks, expert, wide, norm = 13, d, heads * 128, 2 * d
    dense_mlp = 2 * d * 4 * d + 4 * d + d
    # Attention experts of head width 128 without biases, one key and value for all, a gate per task.
    sparse_attention = attention_experts * 2 * d * 128 + d * 2 * 128 + tasks * d * attention_experts
    dense_attention = d * 3 * wide + 3 * wide + wide * d + d
    sparse_mlp = 16 * (2 * d * expert + expert + d) + tasks * d * 16
    blocks = 6 * (sparse_attention + dense_mlp + 2 * norm) + 6 * (dense_attention + sparse_mlp + 2 * norm)
    return blocks + mod_squads_rest(d, classes, channels)


def mod_squads_rest(d: int, classes: tuple[int, ...] = (1000, 365), channels: int = 16) -> int:
    """All but the blocks: patches, 197 positions, CLS token, two norms, one embedding per task, heads."""
    patches, positions, cls = 3 * 16 * 16 * d + d, 197 * d, d
    heads = sum(2 * d + d * n + n for n in classes) + channels * (d * 256 + 256)
    return patches + positions + cls + 2 * 2 * d + 13 * d + heads


def surplus(d: int, sparse_attention_layers: int) -> int:
    """What this network has more than the published one: nothing that a token's path through the experts would notice.

    Task embeddings of each block's own (12, there one for all); biases of keys and values; a norm of its own in each of the 11
    heads of maps and two in those of classes (there one shared by each kind, and one per class head); the 13 learned loss
    weights, which there are no part of the model. Less: the CLS token, which no head reads, and its position.
    """
    return 11 * 13 * d + sparse_attention_layers * 2 * 128 + (11 + 2 * 2 - 1 - 2) * 2 * d + 13 - 2 * d


def test_base_has_mod_squads_parameters() -> None:
    published = mod_squads(768, attention_experts=24, heads=12)
    assert published == 206_954_581
    total = counted("taskonomy").total
    assert total == published + surplus(768, 6) == 207_082_850
    assert total == pytest.approx(207.0e6, abs=0.1e6)


def test_small_has_mod_squads_parameters() -> None:
    published = mod_squads(384, attention_experts=15, heads=6)
    assert published == 55_434_709
    total = counted("taskonomy", "small").total
    assert total == published + surplus(384, 6)
    assert total == pytest.approx(55.4e6, abs=0.1e6)


def test_dense_models_have_mod_squads_parameters() -> None:
    """Its comments say 89.42 M and 23.48 M, of a time when maps had 13 channels in all; now they have 16."""
    for size, d, comment in (("base", 768, 89.42e6), ("small", 384, 23.48e6)):
        block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
        published = 12 * block + mod_squads_rest(d)
        assert 12 * block + mod_squads_rest(d, channels=13) == pytest.approx(comment, abs=0.005e6)
        total = counted("taskonomy", "dense", changes=(f"model.size={size}",)).total
        assert total == published + surplus(d, 0)
        assert total - 3 * (d + 1) * 256 == pytest.approx(comment, abs=0.15e6)


def test_single_task_model_has_one_head_and_a_dense_backbone() -> None:
    counts = counted("taskonomy", "dense", changes=("only=[normal]",))
    assert list(counts.heads) == ["normal"] and counts.heads["normal"] == 2 * 768 + 769 * 3 * 256
    whole = counted("taskonomy", "dense")
    assert counts.backbone == whole.backbone - 12 * 12 * 768, "embeddings of twelve tasks in twelve blocks"


# ---------------------------------------------------------------- what the recipes say


def changed(name: str, variant: str) -> set[str]:
    """Dotted keys, two deep, in which a variant differs from its recipe."""
    plain, other = (recipe_to_tree(load_recipe(name, change)) for change in ([], [f"variant={variant}"]))
    top = {key for key in plain if plain[key] != other[key]} - {"name", "run"}
    return {f"{key}.{k}" for key in top for k in plain[key] if plain[key][k] != other[key][k]}


@pytest.mark.parametrize("name", ["taskonomy", "pascal_context"])
def test_every_variant_loads_into_a_run_of_its_own(name: str) -> None:
    recipes = [load_recipe(name, [f"variant=[{', '.join(chosen)}]"]) for chosen in VARIANTS]
    assert len({recipe.run for recipe in recipes}) == len(VARIANTS)
    assert {recipe.run for recipe in recipes} == {Path("runs", "-".join((name, *chosen))) for chosen in VARIANTS}
    for chosen, recipe in zip(VARIANTS, recipes, strict=True):
        assert recipe.model.shape.width == (384 if "small" in chosen else 768)
        assert (recipe.loss.mutual_information > 0) == (not set(chosen) & set(BASELINES))


@pytest.mark.parametrize("name", ["taskonomy", "pascal_context"])
def test_baselines_change_only_what_makes_them_baselines(name: str) -> None:
    dense = {"model.layout", "model.head_dim", "loss.mutual_information"}
    assert changed(name, "dense") == dense | ({"train.optimizer", "train.schedule"} if name == "taskonomy" else set())
    assert changed(name, "m3vit") == dense | {"loss.load_balance"}
    losses = {"loss.mutual_information", "loss.load_balance", "loss.z_loss"}
    assert changed(name, "plain_moe") == losses | {"model.layout", "model.router"}
    assert all(load_recipe(name, [f"variant={v}"]).model.router.per_task for v in BASELINES)


def layout_of(recipe: Recipe) -> tuple[int, ...]:
    model = recipe.model
    return (model.attention.num_experts, model.attention.top_k, model.attention_width, model.mlp.num_experts, model.mlp.top_k,
            model.expert_hidden)  # fmt: skip


def test_experts_are_mod_squads() -> None:
    for name in ("taskonomy", "pascal_context"):
        assert layout_of(load_recipe(name)) == (24, 12, 128, 16, 4, 768)
        assert layout_of(load_recipe(name, ["variant=small"])) == (15, 6, 128, 16, 4, 384)
        assert load_recipe(name).model.layout == "alternate" and not load_recipe(name).model.router.renormalize


def test_taskonomy_schedule_is_the_papers() -> None:
    for variant, images, rate in (("[]", 1440, 4e-4), ("dense", 1440, 2e-4), ("small", 2688, 6e-4)):
        recipe = load_recipe("taskonomy", [f"variant={variant}"])
        assert list(recipe.tasks) == [row.name for row in TASKONOMY]
        assert recipe.sets["taskonomy"].batch_size == images
        assert recipe.train.optimizer.lr == pytest.approx(rate * images / 256)
        assert recipe.train.steps == 100 * 3_349_691 // images
        assert recipe.train.schedule.warmup == pytest.approx(recipe.train.steps / 10, abs=1)
        assert recipe.train.schedule.final * recipe.train.optimizer.lr == pytest.approx(1e-6, rel=1e-3)
    # RGB in [-1, 1].
    assert [(x - recipe.mean[0]) / recipe.std[0] for x in (0, 255)] == [-1, 1]


def test_pascal_context_protocol_is_m3vits() -> None:
    recipe = load_recipe("pascal_context")
    assert list(recipe.tasks) == [row.name for row in PASCAL_CONTEXT]
    weights = {name: task.loss_weight for name, task in recipe.tasks.items()}
    assert weights == {"semseg": 1, "human_parts": 2, "sal": 5, "normals": 10, "edge": 50}
    assert recipe.loss.weighting == "fixed"
    assert recipe.train.steps == round(100 * 4998 / 16)
    assert recipe.tasks["edge"].transform.score_at == "original"
    assert {task.head.type for task in recipe.tasks.values()} == {"conv_map"}
    # 512 x 512 pixels are a grid of 32 x 32 patches, so position embeddings are used as they are.
    assert recipe.model.grid * recipe.model.shape.patch == recipe.tasks["edge"].transform.crop[0]


def test_models_of_the_photographs_have_one_active_size() -> None:
    sparse, dense, plain = (counted("photo_scenes", *variant) for variant in ((), ("dense",), ("plain_moe",)))
    assert all(dense.active[task] == pytest.approx(sparse.active[task], rel=0.05) for task in sparse.active)
    assert plain.active == sparse.active and sparse.total > 1.3 * dense.total
    assert set(sparse.heads) == {row.name for row in TASKONOMY} - {"class_object", "class_scene"}
