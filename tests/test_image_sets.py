"""Tasks that share their images: the recipe's sections, one patch embedding for all, rows that only fill up, parts of a count."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modsquad_ds.config import Recipe, recipe_from_tree, recipe_to_tree
from modsquad_ds.data.types import Rows
from modsquad_ds.errors import UserError
from modsquad_ds.losses import weighted_mean_terms
from modsquad_ds.model.heads.base import LossTerm
from modsquad_ds.model.pack import Shared
from modsquad_ds.model.vit import SparseViT, init_weights
from modsquad_ds.model_spec import ModelSpec
from modsquad_ds.objective import flatten, unflatten
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan, step_shares, step_tokens
from modsquad_ds.tasks import SetTask, higher_is_better, metrics_of, streams_of

SPARSE = {"num_experts": 4, "top_k": 2, "hidden": 12}


def tree(**tasks: Any) -> dict[str, Any]:
    return {
        "name": "views",
        "run": "unused",
        "model": {"size": "tiny", "width": 24, "depth": 2, "heads": 3, "patch": 8, "mlp": SPARSE, "attention": SPARSE},
        "sets": {"views": {"data": "v", "batch_size": 4, "sampling_weight": 3.0, "transform": {"crop": [32, 32]}}},
        "tasks": {"normal": {"set": "views"}, "depth": {"set": "views", "target": "depth_zbuffer"}, **tasks},
        "train": {"steps": 3, "optimizer": {"lr": 1e-3}},
    }


def spec_of(recipe: Recipe, task: str) -> SetTask:
    spec = recipe.tasks[task]
    assert isinstance(spec, SetTask)
    return spec


# ---------------------------------------------------------------- the recipe


ONE_SIZE = "give exactly one of batch_size (whole step, all ranks) and batch_size_per_rank"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size_per_rank": 2}, f"sets.views: {ONE_SIZE}"),
        ({"transform": {"crp": 3}}, "sets.views.transform.crp: unknown key; did you mean crop?"),
        ({"transform": {"flip": 2}}, "sets.views.transform.flip: Input should be less than or equal to 1 (given 2)"),
    ],
)
def test_what_is_wrong_with_a_set_is_said_once(change: dict[str, Any], message: str) -> None:
    wrong = tree()
    wrong["sets"]["views"] |= change
    with pytest.raises(UserError) as caught:
        recipe_from_tree(wrong, "x")
    assert str(caught.value) == f"recipe x: {message}"


def test_a_task_takes_from_its_set_and_its_row_what_it_does_not_say() -> None:
    other = {"kind": "classification", "data": "d", "num_classes": 5, "batch_size": 8}
    scene = {"set": "views", "loss": "cross_entropy", "loss_weight": 2}
    recipe = recipe_from_tree(tree(class_scene=scene, digits=other, edge={"set": "views", "head": {"type": "conv_map"}}), "x")
    normal, depth, scene_task, edge = (spec_of(recipe, name) for name in ("normal", "depth", "class_scene", "edge"))
    assert (normal.kind, normal.loss, normal.head.type, normal.loss_weight) == ("unit_vectors", "cosine", "patch", 1.0)
    assert (normal.batch_size, normal.transform.crop, str(normal.data)) == (4, (32, 32), "v")
    assert (depth.target, depth.row.metrics, depth.num_classes) == ("depth_zbuffer", ("rmse", "delta1"), 1)
    assert (scene_task.head.type, scene_task.loss, scene_task.loss_weight) == ("pooled", "cross_entropy", 2.0)
    assert (edge.head.type, edge.loss_weight, edge.row.positive_weight) == ("conv_map", 50.0, 0.95)
    assert streams_of(recipe.tasks) == {"views": ("normal", "depth", "class_scene", "edge"), "digits": ("digits",)}
    assert step_shares(recipe.tasks, "weighted") == {**dict.fromkeys(streams_of(recipe.tasks)["views"], 0.75), "digits": 0.25}
    assert [metrics_of(spec)[0] for spec in recipe.tasks.values()] == ["mErr", "rmse", "top1", "top1", "odsF"]
    assert [higher_is_better(spec, metrics_of(spec)[0]) for spec in recipe.tasks.values()] == [False, False, True, True, True]
    assert recipe_from_tree(recipe_to_tree(recipe), "again") == recipe


def test_a_set_of_a_recipe_that_was_written_can_be_changed_in_one_place() -> None:
    written = recipe_to_tree(recipe_from_tree(tree(), "x"))
    written["sets"]["views"] |= {"batch_size": 6, "data": "elsewhere"}
    again = recipe_from_tree(written, "again")
    assert [(str(task.data), task.batch_size) for task in again.tasks.values()] == [("elsewhere", 6)] * 2


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"set": "view"}, "tasks.edge.set: 'view' is not under sets: views"),
        ({"set": "views", "target": "edges"}, "tasks.edge.target: 'edges' has no row in targets.py"),
        ({"set": "views", "batch_size": 8}, "tasks.edge.batch_size: is the image set's to say: sets.views.batch_size"),
        ({"set": "views", "loss": "l1"}, "tasks.edge: loss l1: kind binary has balanced"),
        ({"set": "views", "head": {"type": "pooled"}}, "tasks.edge: head.type pooled: does not fit kind binary"),
        ({"set": "views", "kind": "regression"}, "tasks.edge: kind regression: target edge is of kind binary"),
        ({"set": ["views"]}, "tasks.edge.set: ['views'] is not under sets: views"),
        ({"set": "views", "target": ["edge"]}, "tasks.edge.target: ['edge'] has no row in targets.py"),
        ({"set": "views", "head": "conv_map"}, "tasks.edge.head: expected keys and values such as type: conv_map, found"),
        ({"set": "views", "batch_size_per_rank": 2}, "tasks.edge.batch_size_per_rank: is the image set's to say"),
        ({"set": "views", "lossweight": 1}, "tasks.edge.lossweight: unknown key; did you mean loss_weight?"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(task: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_from_tree(tree(edge=task), "x")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_wrong_with_a_set_is_told_once_and_not_of_each_task() -> None:
    def told(**views: Any) -> str:
        with pytest.raises(UserError) as error:
            recipe_from_tree(tree() | {"sets": {"views": {"data": "v", "batch_size": 4, **views}}}, "x")
        return str(error.value)

    assert told(transform={"rotate": 500}) == (
        "recipe x: sets.views.transform.rotate: Input should be less than or equal to 180 (given 500)"
    )
    assert told(batch_size_per_rank=4).count("give exactly one of") == 1
    with pytest.raises(UserError, match=r"sets\.views: expected keys and values, found 3"):
        recipe_from_tree(tree() | {"sets": {"views": 3}}, "x")


def test_a_key_of_another_section_is_not_proposed_again() -> None:
    with pytest.raises(UserError) as error:
        recipe_from_tree(tree(edge={"set": "views", "num_classes": 1}), "x")
    assert str(error.value) == "recipe x: tasks.edge.num_classes: unknown key"


def test_what_a_set_leaves_open_no_task_of_it_may_say() -> None:
    views = {"views": {"data": "v", "batch_size": 4}}
    for key, value in (("sampling_weight", 3.0), ("transform", {"crop": [32, 32]})):
        with pytest.raises(UserError, match=f"tasks.edge.{key}: is the image set's to say: sets.views.{key}"):
            recipe_from_tree(tree(edge={"set": "views", key: value}) | {"sets": views}, "x")


def test_a_set_and_a_task_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="views names a set and a task"):
        recipe_from_tree(tree(views={"set": "views", "target": "edge"}), "x")


def test_of_a_step_only_images_with_the_label_count_as_a_tasks_tokens() -> None:
    class Labelled:
        kind, classes, shard_sizes = "multilabel", (), (6, 2)
        details: ClassVar = {"targets": {"normal": 2, "depth_zbuffer": 8}}

    store: Any = Labelled()
    plan = replace(loader_plan(recipe_from_tree(tree(), "x"), Ranks(0, 1)), open_store=lambda folder: store)
    assert step_tokens(plan) == (4 * 16 / 4, 4 * 16)  # 4 images of 4 x 4 patches; a quarter of them have normals


# ---------------------------------------------------------------- the backbone


def backbone() -> SparseViT:
    torch.manual_seed(0)
    net = SparseViT(ModelSpec.model_validate(tree()["model"] | {"layout": "every_block"}), 3)
    init_weights(net, seed=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4.0)
    return net


def rows(*index: int, counted: int | None = None) -> Rows:
    return Rows(torch.tensor(index), len(index) if counted is None else counted)


def passed(net: SparseViT, images: dict[int, Tensor], shared: tuple[Shared, ...]) -> tuple[list[Tensor], ...]:
    """Maps by task, statistics, and gradients of a loss on both."""
    net.zero_grad()
    maps, stats = net(images, shared)
    loss = sum((m.square().sum() for m in maps.values()), torch.zeros(()))
    loss = loss + sum(s.prob_TE.square().sum() + s.lse2_T.sum() for s in stats)
    loss.backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [maps[t].detach() for t in sorted(maps)], [x.detach() for s in stats for x in s], gradients


def test_shared_images_are_the_same_as_images_of_every_task() -> None:
    """The stupid twin embeds the patches of every task's images anew."""
    net, x = backbone(), torch.randn(3, 3, 32, 16)
    own = torch.randn(2, 3, 16, 16)
    shared = Shared(x, {0: rows(0, 1, 2), 2: rows(2, 0)})
    found = passed(net, {1: own}, (shared,))
    expected = passed(net, {1: own, 0: x, 2: x[[2, 0]]}, ())
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rows_that_fill_up_count_in_no_statistics() -> None:
    net, x = backbone().eval(), torch.randn(3, 3, 16, 16)
    filled = net({}, (Shared(x, {0: rows(0, 1, 2), 1: rows(1, 0, 0, counted=1), 2: rows(2, counted=0)}),))
    plain = net({}, (Shared(x, {0: rows(0, 1, 2), 1: rows(1)}),))
    for with_fill, without in zip(filled[1], plain[1], strict=True):
        assert with_fill.token_T.tolist() == [12.0, 4.0, 0.0]
        for a, b in zip(with_fill, without, strict=True):
            assert_close(a, b)
    assert len(filled[0][1]) == 3 and len(filled[0][2]) == 1
    assert_close(filled[0][1][:1], plain[0][1])


# ---------------------------------------------------------------- loss terms with a part


def test_a_part_of_the_count_by_hand_and_over_ranks() -> None:
    # Two ranks with 3 of 8 and 1 of 2 positive pixels: each side is weighed by the other's share of all ten.
    def terms(positive: float, negative: float, count: float) -> dict[str, dict[str, LossTerm]]:
        numbers = (torch.tensor(x) for x in (2.0, count, negative, 5.0, count, positive))
        sums = list(numbers)
        return {"edge": {"pos": LossTerm(*sums[:2], 1.0, sums[2]), "neg": LossTerm(*sums[3:5], 1.0, sums[5])}}

    first, second = terms(3.0, 5.0, 8.0), terms(1.0, 1.0, 2.0)
    total = [a + b for a, b in zip(flatten(first, ()), flatten(second, ()), strict=True)]
    rebuilt, _ = unflatten(total, first, ())
    edge = list(rebuilt["edge"].values())
    value = weighted_mean_terms(*([getattr(t, name) for t in edge] for name in ("sum", "count", "weight", "part")))
    assert value.item() == pytest.approx(4 / 10 * 6 / 10 + 10 / 10 * 4 / 10)
