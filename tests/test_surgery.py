"""Surgery: the smaller model against the larger one that is told to use the same experts, and a larger one whose old tasks
compute what they did, both bit for bit."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from modsquad_ds.config import recipe_from_tree, recipe_to_tree
from modsquad_ds.errors import UserError
from modsquad_ds.model.network import MultiTaskNetwork, build_network
from modsquad_ds.model_file import ModelFile, network_of
from modsquad_ds.objective import Usage
from modsquad_ds.selection import Kept, kept_experts
from modsquad_ds.structure import PerKind, structure_of
from modsquad_ds.surgery import expand, extract
from modsquad_ds.tasks import ClassificationTask, TaskSpec
from small import small_recipe

TASKS = ("digits", "scenes", "textures")
SIZES = {"digits": (3, 3, 32, 32), "scenes": (2, 3, 32, 48), "textures": (2, 3, 32, 32), "faces": (3, 3, 24, 24)}
FACES = ClassificationTask(kind="classification", data="f", num_classes=2, batch_size=4, transform={"image_size": 24})  # type: ignore[arg-type]
CLASSES = {"digits": list("abcde"), "scenes": list("xyz"), "textures": list("klmn")}


def trained(**changes: Any) -> ModelFile:
    """A model whose routers are sharp and whose biases, embeddings and scales are not zero, with made-up usage."""
    recipe = small_recipe(**changes)
    network, g = build_network(recipe), torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        scale = 0.5 if ".router." in name or name.startswith("heads.") else 0.05
        parameter.data += scale * torch.randn(parameter.shape, generator=g)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    usage = []
    for layer in network.backbone.sparse_layers().values():
        shares = [torch.rand(len(recipe.active), layer.router.num_experts, generator=g) for _ in "ab"]
        usage.append(Usage(*(share / share.sum(1, keepdim=True) for share in shares)))
    return ModelFile(recipe, state, {t: CLASSES[t] for t in recipe.active}, tuple(usage))


def images_of(tasks: Sequence[str]) -> dict[str, Tensor]:
    return {t: torch.randn(SIZES[t], generator=torch.Generator().manual_seed(i)) for i, t in enumerate(tasks)}


def flat(value: Any) -> list[Tensor]:
    """All tensors of a head's outputs."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in flat(part)]


@torch.no_grad()
def outputs(network: MultiTaskNetwork, tasks: Sequence[str], dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    network = network.to(dtype).eval()
    found = network({t: x.to(dtype) for t, x in images_of(tasks).items()}).outputs
    return {task: flat(found[task]) for task in tasks}


def assert_same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for task, tensors in expected.items():
        assert tensors and all(bool(x.isfinite().all()) and x.float().std() > 0 for x in tensors)
        for a, b in zip(found[task], tensors, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), task


def assert_equal(found: ModelFile, expected: ModelFile) -> None:
    assert found.recipe == expected.recipe and found.classes == expected.classes
    assert found.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert torch.equal(found.state[name], tensor), name
    for a, b in zip(found.usage, expected.usage, strict=True):
        assert torch.equal(a.prob_TE, b.prob_TE) and torch.equal(a.share_TE, b.share_TE)


def everything(model: ModelFile, tasks: Sequence[str]) -> Kept:
    return kept_experts(model, tasks, None)


# ---------------------------------------------------------------- a smaller model


KINDS_OF_MODEL: dict[str, dict[str, Any]] = {
    "linear": {},
    "two-layer routers": {"model.router": {"type": "mlp"}},
    "one router for all": {"model.router": {"per_task": False}},
    "one two-layer router for all, renormalised": {"model.router": {"type": "mlp", "per_task": False, "renormalize": True}},
    "odd sizes": {"model.width": 36, "model.mlp": {"num_experts": 5, "top_k": 3, "hidden": 7}, "model.router": {"type": "mlp"}},
    "sparse MLPs alone": {"model.layout": "mlp_only"},
    "alternating": {"model.layout": "alternate", "model.depth": 3, "model.task_embedding": False},
    "learned scales": {"loss.weighting": "uncertainty"},
    "dense": {"model.layout": "dense"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_every_expert_kept_gives_the_models_outputs_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model = trained(**KINDS_OF_MODEL[kind])
    for tasks in (*([t] for t in TASKS), ["textures", "digits"]):
        part = extract(model, tasks, everything(model, tasks))
        assert list(part.recipe.tasks) == [t for t in TASKS if t in tasks], "in the recipe's order"
        assert part.classes == {t: CLASSES[t] for t in part.recipe.tasks}
        assert_same(outputs(network_of(part, "part"), tasks, dtype), outputs(network_of(model, "model"), tasks, dtype))
        for mine, whole in zip(part.usage, model.usage, strict=True):
            rows = [TASKS.index(t) for t in part.recipe.tasks]
            assert torch.equal(mine.share_TE, whole.share_TE[rows]) and torch.equal(mine.prob_TE, whole.prob_TE[rows])


@pytest.mark.parametrize("kind", ["linear", "two-layer routers", "one router for all", "odd sizes", "alternating"])
def test_the_rest_is_cut_as_if_the_routers_did_not_see_it(kind: str) -> None:
    """The twin: the full network with its routers restricted to the same experts, and with a lower top-k."""
    model = trained(**KINDS_OF_MODEL[kind])
    tasks = ["digits", "textures"]
    experts = [place.expert_axes for place in structure_of(model.recipe).layers]
    kept = tuple(((0, 2), (1, 2, 3), (0, 1, 3), (2, 3))[i] for i in range(len(experts)))
    part = extract(model, tasks, kept, PerKind(2, 1))
    twin = network_of(model, "model")
    for sparse, keep in zip(twin.backbone.sparse_layers().values(), kept, strict=True):
        top_k = 1 if hasattr(sparse, "kv") else 2
        sparse.router.top_k = top_k
        for task in tasks:
            sparse.router.restrict(TASKS.index(task), keep)
    found, expected = outputs(network_of(part, "part"), tasks), outputs(twin, tasks)
    assert_same(found, expected)
    whole = outputs(network_of(model, "model"), tasks)
    assert not torch.equal(found["digits"][0], whole["digits"][0]), "and it does differ from the model's"


def test_what_is_left_and_what_is_gone() -> None:
    model = trained(**{"model.mlp": {"num_experts": 4, "top_k": 2}, "parallel": {"ep_size": 2, "attention_ep_size": 4},
                       "adapt": {"train": "heads", "tasks": ["scenes"]}, "init_from": {"path": "x"}})  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state.items()}
    kept = ((0, 1, 3), (2, 3), (1, 2, 3), (0, 3))
    part = extract(model, ["scenes"], kept, PerKind(1, 2))
    assert all(torch.equal(model.state[name], tensor) for name, tensor in before.items()), "the model is left as it was"
    spec = part.recipe.model
    assert (spec.attention.num_experts, spec.attention.per_layer, spec.attention.top_k) == (3, (), 2)
    assert (spec.mlp.num_experts, spec.mlp.per_layer, spec.mlp.top_k) == (2, (), 1)
    assert spec.mlp.hidden == model.recipe.model.expert_hidden == 64, "no longer derived from top_k"
    assert part.recipe.init_from is None and part.recipe.adapt.tasks == () and part.recipe.adapt.train == "all"
    assert (part.recipe.parallel.ep_size, part.recipe.parallel.attention_ep_size) == (1, 1)
    uneven = extract(model, ["scenes"], ((0, 1), (2, 3, 0), (1, 2, 3), (0, 3))).recipe.model
    assert (uneven.attention.num_experts, uneven.attention.per_layer, uneven.mlp.per_layer) == (3, (2, 3), (3, 2))
    for name, tensor in {
        "backbone.blocks.1.mlp.experts.fc1_weight": before["backbone.blocks.1.mlp.experts.fc1_weight"][[0, 3]],
        "backbone.blocks.0.attn.experts.q_weight": before["backbone.blocks.0.attn.experts.q_weight"][[0, 1, 3]],
        "backbone.blocks.0.attn.router.weight": before["backbone.blocks.0.attn.router.weight"][1:2][:, [0, 1, 3]],
        "backbone.blocks.0.attn.router.visible": torch.ones(1, 3, dtype=torch.bool),
        "backbone.blocks.1.task_embed": before["backbone.blocks.1.task_embed"][1:2],
        "backbone.pos_embed": before["backbone.pos_embed"],
    }.items():
        assert torch.equal(part.state[name], tensor), name
    heads = {name for name in part.state if name.startswith("heads.")}
    assert heads == {name for name in before if name.startswith("heads.scenes.")} != set()


def test_usage_is_cut_and_keeps_its_sums() -> None:
    """Of 0.5, 0.25, 0.25 and 0 the second and third are half: each is doubled. Nothing is made of nothing."""
    model = trained()
    row = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0] * 4, [0.0, 0.0, 0.0, 1.0]])
    model = model._replace(usage=tuple(Usage(row, row.clone()) for _ in range(4)))
    part = extract(model, TASKS, ((1, 2),) * 4)
    for layer_usage in part.usage:
        for table in layer_usage:
            assert table.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]


def test_a_part_of_a_part() -> None:
    model = trained()
    first = extract(model, ["digits", "scenes"], ((0, 1, 3),) * 4)
    again = extract(first, ["scenes"], ((1, 2),) * 4)
    direct = extract(model, ["scenes"], ((1, 3),) * 4)
    assert again.recipe == direct.recipe and all(torch.equal(again.state[n], t) for n, t in direct.state.items())
    for a, b in zip(again.usage, direct.usage, strict=True):
        torch.testing.assert_close(a.share_TE, b.share_TE)


def test_only_the_runs_tasks_count() -> None:
    model = trained(only=["scenes", "textures"])
    part = extract(model, ["textures"], everything(model, ["textures"]))
    assert list(part.recipe.tasks) == ["textures"] and part.recipe.only == ()
    assert_same(outputs(network_of(part, "part"), ["textures"]), outputs(network_of(model, "model"), ["textures"]))
    with pytest.raises(UserError, match="task 'digits': the model has no such task; its tasks are: scenes, textures"):
        extract(model, ["digits"], ((0, 1),) * 4)


def test_too_few_experts_and_a_larger_top_k_are_refused() -> None:
    model = trained()
    with pytest.raises(UserError, match=r"top_k 2 is larger than num_experts 1"):
        extract(model, ["digits"], ((0,),) * 4)
    with pytest.raises(UserError, match=r"mlp top-k 3: the model was trained with 2; give 1 to 2"):
        extract(model, ["digits"], ((0, 1, 2),) * 4, PerKind(3, 2))
    with pytest.raises(UserError, match=r"attention top-k 0: the model was trained with 2; give 1 to 2"):
        extract(model, ["digits"], ((0, 1, 2),) * 4, PerKind(2, 0))
    grown = expand(model, "faces", FACES, PerKind(2, 2), ["no", "yes"])
    with pytest.raises(UserError, match=r"blocks\.0\.attn: 1 of the kept experts are seen by task 'digits', and its top-k is 2"):
        extract(grown, ["digits", "faces"], ((0, 4, 5),) * 4)


# ---------------------------------------------------------------- a larger model

MORE: dict[str, tuple[dict[str, Any], PerKind]] = {
    "both kinds": ({}, PerKind(2, 1)),
    "MLP experts alone": ({}, PerKind(1, 0)),
    "no experts": ({}, PerKind(0, 0)),
    "two-layer routers, odd numbers": ({"model.router": {"type": "mlp"}, "model.width": 36, "model.head_dim": 9}, PerKind(1, 3)),
    "more than there were": ({"model.layout": "alternate", "loss.weighting": "uncertainty"}, PerKind(6, 5)),
    "renormalised": ({"model.router": {"renormalize": True}, "model.task_embedding": False}, PerKind(2, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MORE)
def test_old_tasks_compute_what_they_did(case: str, dtype: torch.dtype) -> None:
    changes, new = MORE[case]
    model = trained(**changes)
    grown = expand(model, "faces", FACES, new, ["no", "yes"])
    old, larger = network_of(model, "old"), network_of(grown, "new")
    for tasks in (*([t] for t in TASKS), TASKS, ["textures", "digits"]):
        expected = outputs(old, tasks, dtype)
        assert_same(outputs(larger, tasks, dtype), expected)
    with_new = outputs(larger, [*TASKS, "faces"], dtype)
    if dtype == torch.float32:  # in company of another task, products have other sizes and may round otherwise
        for task, tensors in outputs(old, TASKS).items():
            for a, b in zip(with_new[task], tensors, strict=True):
                torch.testing.assert_close(a, b)
    assert with_new["faces"][0].shape == (3, 2)


def test_what_is_added() -> None:
    model = trained()
    share_TE = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.3, 0.0], [0.0, 0.0, 0.5, 0.5]])  # sums 0.5 0.5 1.1 0.9
    tables = [share_TE.roll(i, 1) for i in range(4)]
    model = model._replace(usage=tuple(Usage(table, table) for table in tables))
    grown = expand(model, "faces", FACES, PerKind(mlp=3, attention=0), ["no", "yes"])
    most_used = {0: [3, 0, 1], 1: [1, 2, 0]}  # of blocks, whose MLPs are layers 1 and 3: sums 0.9 0.5 0.5 1.1 and 0.5 1.1 0.9 0.5
    assert list(grown.recipe.tasks) == [*TASKS, "faces"] and grown.recipe.tasks["faces"] == FACES
    assert grown.classes == {**CLASSES, "faces": ["no", "yes"]}
    assert (grown.recipe.model.mlp.num_experts, grown.recipe.model.attention.num_experts) == (7, 4)
    fresh = build_network(grown.recipe).state_dict()
    assert grown.state.keys() == fresh.keys()
    for name, tensor in fresh.items():
        found, old = grown.state[name], model.state.get(name)
        assert found.shape == tensor.shape
        if name.startswith("heads.faces."):
            assert torch.equal(found, tensor)
        elif name.endswith("mlp.router.visible"):
            assert found.tolist() == [[True] * 4 + [False] * 3] * 3 + [[True] * 7]
        elif ".mlp.experts." in name:
            assert old is not None and torch.equal(found[:4], old) and torch.equal(found[4:], old[most_used[int(name[16])]])
        elif name.endswith("mlp.router.weight"):
            assert old is not None and torch.equal(found[:3, :4], old) and torch.equal(found[3], tensor[3])
        elif name.endswith(("attn.router.weight", "task_embed", "attn.router.visible")):
            assert old is not None and torch.equal(found[:3], old) and torch.equal(found[3], tensor[3])
        else:
            assert old is not None and torch.equal(found, old), name
    for experts, table, usage in zip((4, 7, 4, 7), tables, grown.usage, strict=True):
        expected = torch.zeros(4, experts)
        expected[:3, :4] = table
        assert torch.equal(usage.share_TE, expected) and torch.equal(usage.prob_TE, expected)
    assert_equal(expand(model, "faces", FACES, PerKind(3, 0), ["no", "yes"]), grown)


def test_an_untrained_model_copies_its_first_experts() -> None:
    model = trained()._replace(usage=())
    grown = expand(model, "faces", FACES, PerKind(6, 0), ["no", "yes"])
    old = model.state["backbone.blocks.0.mlp.experts.fc1_weight"]
    assert torch.equal(grown.state["backbone.blocks.0.mlp.experts.fc1_weight"], old[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]])
    assert grown.usage == ()


def named(name: str, spec: TaskSpec = FACES, classes: Sequence[str] = ("no", "yes")) -> Any:
    return name, spec, PerKind(2, 1), classes


def test_several_additions_and_each_taken_out_again() -> None:
    model = trained(**{"model.layout": "alternate", "loss.weighting": "uncertainty"})
    once = expand(model, *named("faces"))
    twice = expand(once, *named("cats", FACES.model_copy(update={"num_classes": 3}), list("abc")))
    again = expand(twice, *named("dogs"))
    assert again.recipe.model.mlp.num_experts == 10 and again.recipe.model.attention.num_experts == 7
    visible = again.state["backbone.blocks.1.mlp.router.visible"].sum(1).tolist()
    assert visible == [4, 4, 4, 6, 8, 10], "a task sees what came before it and its own"
    for before, tasks in ((model, TASKS), (once, ("faces",)), (twice, ("cats", "digits"))):
        for task in tasks:
            kept = everything(before, [task])
            assert everything(again, [task]) == kept
            assert_equal(extract(again, [task], kept), extract(before, [task], kept))
    SIZES.update(cats=SIZES["faces"], dogs=SIZES["faces"])
    part = extract(again, ["dogs"], everything(again, ["dogs"]))
    assert_same(outputs(network_of(part, "part"), ["dogs"]), outputs(network_of(again, "again"), ["dogs"]))
    assert_same(outputs(network_of(again, "again"), [*TASKS]), outputs(network_of(model, "model"), [*TASKS]))


def test_old_tasks_of_a_restricted_layer_stay_restricted() -> None:
    model = trained()
    model.state["backbone.blocks.0.mlp.router.visible"][1, [0, 2]] = False
    grown = expand(model, *named("faces"))
    assert grown.state["backbone.blocks.0.mlp.router.visible"].int().tolist() == [
        [1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1] * 6
    ]  # fmt: skip
    assert_same(outputs(network_of(grown, "new"), TASKS), outputs(network_of(model, "old"), TASKS))


def test_layers_of_different_numbers_grow_alike() -> None:
    model = trained()
    part = extract(model, ["digits", "scenes"], ((0, 1), (2, 3, 0), (1, 2, 3), (0, 3)))
    grown = expand(part, *named("faces"))
    assert grown.recipe.model.attention.per_layer == (3, 4) and grown.recipe.model.mlp.per_layer == (5, 4)
    tasks = ["digits", "scenes"]
    assert_same(outputs(network_of(grown, "new"), tasks), outputs(network_of(part, "old"), tasks))


def test_ranks_share_experts_where_the_numbers_still_divide() -> None:
    model = trained(**{"parallel": {"ep_size": 2, "attention_ep_size": 2}})
    parallel = expand(model, *named("faces")).recipe.parallel
    assert (parallel.ep_size, parallel.attention_ep_size) == (2, 1), "6 and 5 experts"


def test_one_router_for_all_cannot_hide_new_experts() -> None:
    model = trained(**{"model.router": {"per_task": False}})
    with pytest.raises(UserError, match="new experts: the model has one router for all tasks"):
        expand(model, *named("faces"))
    grown = expand(model, "faces", FACES, PerKind(0, 0), ["no", "yes"])
    assert_same(outputs(network_of(grown, "new"), TASKS), outputs(network_of(model, "old"), TASKS))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, named("digits"), "task 'digits': the model has a task of this name; choose another"),
        ({}, named("Faces"), "task name 'Faces': use lower-case letters"),
        ({}, named("faces", classes=["a"]), r"tasks\.faces\.num_classes: 2, but its data have 1 classes"),
        ({"model.layout": "mlp_only"}, named("faces"), "1 new attention experts: the model has 0 sparse attention layers"),
        ({}, ("faces", FACES, PerKind(-1, 0), ["a", "b"]), "-1 new mlp experts"),
    ],
)
def test_what_cannot_be_added(changes: dict[str, Any], arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(trained(**changes), *arguments)


def test_recipes_of_the_results_are_recipes() -> None:
    """They come back from their trees, as a file's must."""
    model = trained()
    for one in (extract(model, ["scenes"], ((0, 1), (2, 3, 0), (1, 2, 3), (0, 3))), expand(model, *named("faces"))):
        assert recipe_from_tree(recipe_to_tree(one.recipe), "x") == one.recipe
