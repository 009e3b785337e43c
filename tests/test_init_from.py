"""Starting from a model file: tasks by name, experts by number, grids resized; what differs is refused unless allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modsquad_ds.config import Recipe, load_recipe, recipe_from_tree
from modsquad_ds.errors import UserError
from modsquad_ds.init_from import Started, grouped, initial_state, report
from modsquad_ds.model.network import MultiTaskNetwork, build_network
from modsquad_ds.model_file import ModelFile, write_model
from modsquad_ds.objective import Usage
from modsquad_ds.parallel import launch
from modsquad_ds.trainer import build_trainer
from modsquad_ds.upcycle import resized_grid
from ranks import run_ranks
from small import small_recipe, small_tree
from test_topology import Topology, config_file, curves

TASKS = ("digits", "scenes", "textures")


def randomised(network: MultiTaskNetwork, seed: int) -> dict[str, Tensor]:
    """A state in which every entry is random, also those that start at zero or one."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: tensor.clone() if tensor.dtype in (torch.bool, torch.int64) else 0.1 * torch.randn(tensor.shape, generator=g)
        for name, tensor in network.state_dict().items()
    }


def write(path: Path, **changes: Any) -> ModelFile:
    """A model file of random weights and usage."""
    recipe = small_recipe(**{"seed": 7, **changes})
    network = build_network(recipe)
    g = torch.Generator().manual_seed(3)
    counts = [layer.experts.num_experts for layer in network.backbone.sparse_layers().values()]
    rows = [torch.rand(2, len(network.task_names), n, generator=g) for n in counts]
    usage = tuple(Usage(*(both / both.sum(-1, keepdim=True))) for both in rows)
    model = ModelFile(recipe, randomised(network, 5), {}, usage)
    write_model(path, model)
    return model


def started(path: Path, allow: tuple[str, ...] = (), tree: dict[str, Any] | None = None, **changes: Any) -> Started:
    recipe = here(path, allow, tree, **changes)
    return initial_state(recipe, build_network(recipe))


def here(path: Path, allow: tuple[str, ...] = (), tree: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    start = {"path": str(path), "allow": list(allow)}
    if tree is not None:
        return recipe_from_tree({**tree, "init_from": start}, "here")
    return small_recipe(**{"init_from": start, **changes})


def own_state(tree: dict[str, Any] | None = None, **changes: Any) -> dict[str, Tensor]:
    recipe = recipe_from_tree(tree, "own") if tree else small_recipe(**changes)
    return build_network(recipe).state_dict()


def other_tasks() -> dict[str, Any]:
    """Textures and digits in another order, a new task between them, scenes gone."""
    tree = small_tree()
    tasks = tree["tasks"]
    faces = {**tasks["digits"], "num_classes": 2, "data": "f"}
    tree["tasks"] = {"textures": tasks["textures"], "faces": faces, "digits": tasks["digits"]}
    return tree


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "model.safetensors"


# ---------------------------------------------------------------- the same network


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_the_same_recipe_gets_everything(path: Path, router: str, weighting: str) -> None:
    changes = {"model.router.type": router, "loss.weighting": weighting}
    model = write(path, **changes)
    for source in (path, path.parent):
        found = started(source, **changes)
        assert found.state.keys() == model.state.keys()
        assert all(torch.equal(found.state[name], tensor) for name, tensor in model.state.items())
        for new, old in zip(found.usage, model.usage, strict=True):
            assert torch.equal(new.prob_TE, old.prob_TE) and torch.equal(new.share_TE, old.share_TE)
        assert (found.changed, found.at_random, found.left_over, found.notes) == ({}, (), (), ())
        n = len(model.state)
        assert report(found) == f"start from model file {path}: {n} of {n} tensors"


def test_nothing_is_changed_before_it_is_loaded(path: Path) -> None:
    write(path)
    recipe = here(path)
    network = build_network(recipe)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    initial_state(recipe, network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_half_precision_is_widened_and_no_usage_stays_none(path: Path) -> None:
    model = write(path)
    narrow = {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state.items()}
    write_model(path, model._replace(state=narrow, usage=()))
    found = started(path)
    assert found.usage == () and found.state["backbone.norm.bias"].dtype == torch.float32
    assert torch.equal(found.state["backbone.norm.bias"], narrow["backbone.norm.bias"].float())


# ---------------------------------------------------------------- other tasks


def by_loops(name: str, own: Tensor, given: Tensor, new: tuple[str, ...], old: tuple[str, ...]) -> Tensor:
    """The start of a tensor with rows of tasks or experts, entry by entry. `new` is empty where axis 0 is no task's."""
    out = own.clone()
    experts_first = ".experts." in name
    for i in range(len(out)):
        if experts_first:
            if i < len(given):
                out[i] = given[i]
            continue
        if new and new[i] not in old:
            continue
        row = given[old.index(new[i])] if new else given[i]
        for e in range(len(out[i]) if ".router." in name and "reduce" not in name else 0):
            if e < len(row):
                out[i, e] = row[e]
        if ".router." not in name or "reduce" in name:
            out[i] = row
    return out


def assert_by_loops(found: Started, own: dict[str, Tensor], given: dict[str, Tensor], new: tuple[str, ...]) -> int:
    """Every tensor of the backbone, and how many of them are mixed of both sides."""
    mixed = 0
    for name, tensor in own.items():
        if not name.startswith("backbone.") and name != "task_scale":
            continue
        of_tasks = ".router." in name or name.endswith("task_embed") or name == "task_scale"
        rows = of_tasks or ".experts." in name
        expected = by_loops(name, tensor, given[name], new if of_tasks else (), TASKS) if rows else given[name]
        assert torch.equal(found.state[name], expected), name
        own_entry = expected == tensor
        mixed += tensor.is_floating_point() and own_entry.any().item() and not own_entry.all().item()
    return mixed


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_tasks_are_matched_by_name(path: Path, router: str) -> None:
    changes = {"model.router.type": router, "loss.weighting": "uncertainty"}
    model = write(path, **changes)
    model.state["backbone.blocks.1.mlp.router.visible"][0, 3] = False  # digits
    write_model(path, model)
    tree = other_tasks()
    tree["model"]["router"], tree["loss"]["weighting"] = {"type": router}, "uncertainty"
    found, own = started(path, ("tasks",), tree), own_state(tree)
    new = tuple(tree["tasks"])
    assert assert_by_loops(found, own, model.state, new) >= 6
    assert found.state["backbone.blocks.1.mlp.router.visible"].tolist() == [[True] * 4, [True] * 4, [True, True, True, False]]
    for name in own:
        if name.startswith("heads."):
            source = own if name.startswith("heads.faces.") else model.state
            assert torch.equal(found.state[name], source[name]), name
    for layer, old in zip(found.usage, model.usage, strict=True):
        for kind, kind_old in zip(layer, old, strict=True):
            assert torch.equal(kind, torch.stack([kind_old[2], torch.zeros(4), kind_old[0]]))
    assert set(found.at_random) == {name for name in own if name.startswith("heads.faces.")}
    assert all(name.startswith("heads.scenes.") for name in found.left_over) and found.left_over
    text = report(found)
    assert "this run's own: heads.faces (2)" in text and "left over in the file: heads.scenes" in text
    assert "rows of the 2 shared tasks: " in text and "backbone.blocks.*.task_embed (2)" in text


def test_other_tasks_need_leave(path: Path) -> None:
    write(path)
    message = refusal(lambda: started(path, tree=other_tasks()))
    assert message == (
        f"init_from {path}: the file lacks task faces; this run lacks the file's task scenes; "
        "if this is meant, set init_from.allow=[tasks]"
    )
    message = refusal(lambda: started(path, ("experts",), other_tasks()))
    assert message.endswith("set init_from.allow=[experts,tasks]")
    fewer = refusal(lambda: started(path, only=["digits"]))
    assert "this run lacks the file's task scenes, textures" in fewer and "the file lacks" not in fewer


def test_no_shared_task_leaves_the_backbone(path: Path) -> None:
    model = write(path, only=["scenes"])
    found, own = started(path, ("tasks",), only=["digits"]), own_state(only=["digits"])
    for name, tensor in found.state.items():
        whole = name.startswith("backbone.") and ".router." not in name and not name.endswith("task_embed")
        assert torch.equal(tensor, model.state[name] if whole else own[name]), name
    assert all(not kind.any() for layer in found.usage for kind in layer)


def test_a_router_for_all_tasks(path: Path) -> None:
    model = write(path, **{"model.router.per_task": False})
    tree = other_tasks()
    tree["model"]["router"] = {"per_task": False}
    found = started(path, ("tasks",), tree)
    for name in ("backbone.blocks.0.attn.router.weight", "backbone.blocks.0.attn.router.visible"):
        assert torch.equal(found.state[name], model.state[name])
    message = refusal(lambda: started(path))
    shapes = "backbone.blocks.0.attn.router.weight is 1x4x32 there and 3x4x32 here"
    assert f"{shapes}; model.router.per_task is False there and True here" in message


@pytest.mark.parametrize("allow", [(), ("tasks", "experts", "tensors")])
def test_one_name_is_one_task(path: Path, allow: tuple[str, ...]) -> None:
    write(path)
    message = refusal(lambda: started(path, allow, **{"tasks.digits.num_classes": 7}))
    assert "task digits has 5 classes there and 7 here; give this run's task another name" in message
    tree = small_tree()
    tree["tasks"]["digits"] = {**tree["tasks"]["textures"], "num_classes": 5}
    message = refusal(lambda: started(path, allow, tree))
    assert "task digits is classification there and segmentation here" in message


def test_one_name_is_one_target_where_shapes_are_the_same(path: Path) -> None:
    of_set: dict[str, Any] = {"sets": {"v": {"data": "v", "batch_size": 4}}, "tasks": {"map": {"set": "v", "target": "sal"}}}
    name = "heads.map.linear.weight"
    assert torch.equal(write(path, **of_set).state[name], started(path, **of_set).state[name])
    of_set["tasks"]["map"]["target"] = "edge"
    assert "task map has target sal there and edge here; give this" in refusal(lambda: started(path, **of_set))


# ---------------------------------------------------------------- other numbers of experts


@pytest.mark.parametrize(("mlp", "attention"), [(6, 4), (3, 4), (5, 2), (3, 7)])
@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_experts_are_matched_by_number(path: Path, mlp: int, attention: int, router: str) -> None:
    model = write(path, **{"model.router.type": router})
    changes = {
        "model.router.type": router, "model.mlp.num_experts": mlp, "model.attention.num_experts": attention,
    }  # fmt: skip
    message = refusal(lambda: started(path, **changes))
    assert f"blocks.0.mlp has 4 experts there and {mlp} here" in message and "allow=[experts]" in message
    found, own = started(path, ("experts",), **changes), own_state(**changes)
    mixed = assert_by_loops(found, own, model.state, TASKS)
    assert (mixed > 0) == (mlp > 4 or attention > 4)
    assert all(found.state[name].all() for name in own if name.endswith("visible"))
    for i, (layer, old) in enumerate(zip(found.usage, model.usage, strict=True)):
        count = mlp if i % 2 else attention
        common = min(4, count)
        for kind, kind_old in zip(layer, old, strict=True):
            assert kind.shape == (3, count) and not kind[:, common:].any()
            total = kind_old[:, :common].sum(1, keepdim=True) if count < 4 else 1.0
            assert torch.allclose(kind[:, :common], kind_old[:, :common] / total)
            assert torch.allclose(kind.sum(1), torch.ones(3))
    assert found.at_random == () and found.left_over == ()
    assert f"experts 0 to {min(4, mlp) - 1} of 4: " in report(found)


def test_layers_that_differ_in_number(path: Path) -> None:
    model = write(path, **{"model.mlp.per_layer": [4, 3]})
    changes = {"model.mlp.per_layer": [4, 5]}
    message = refusal(lambda: started(path, **changes))
    assert "blocks.1.mlp has 3 experts there and 5 here" in message and "blocks.0" not in message
    found = started(path, ("experts",), **changes)
    assert_by_loops(found, own_state(**changes), model.state, TASKS)


def test_a_task_must_see_enough_of_the_experts_that_are_left(path: Path) -> None:
    model = write(path)
    model.state["backbone.blocks.1.mlp.router.visible"][1, :2] = False
    write_model(path, model)
    assert started(path).state["backbone.blocks.1.mlp.router.visible"].sum() == 10
    message = refusal(lambda: started(path, ("experts",), **{"model.mlp.num_experts": 3}))
    assert "task scenes sees 1 of the 3 experts of blocks.1.mlp, top_k is 2; keep more experts" in message
    message = refusal(lambda: started(path, **{"model.mlp.top_k": 3}))
    assert "task scenes sees 2 of the 4 experts of blocks.1.mlp, top_k is 3" in message


# ---------------------------------------------------------------- other shapes and settings


def test_another_grid_is_resized(path: Path) -> None:
    model = write(path)
    found = started(path, **{"model.grid": 6})
    assert torch.equal(found.state["backbone.pos_embed"], resized_grid(model.state["backbone.pos_embed"], 6))
    assert "resized from 4x4 to 6x6: backbone.pos_embed" in report(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 64}, "model.width is 32 there and 64 here"),
        ({"model.mlp.hidden": 32}, "fc1_weight is 4x24x32 there and 4x32x32 here; model.mlp.hidden is 24 there and 32 here"),
        ({"model.patch": 16}, "model.patch is 8 there and 16 here"),
        ({"model.attention.hidden": 8}, "model.attention.hidden is 16 there and 8 here"),
        ({"tasks.scenes.head.channels": 64}, "tasks.scenes.head is"),
    ],
)
def test_shapes_that_differ(path: Path, changes: dict[str, Any], message: str) -> None:
    write(path)
    for allow in ((), ("tasks", "experts", "tensors")):
        assert message in refusal(lambda allow=allow: started(path, allow, **changes))


def test_attention_cut_into_other_heads(path: Path) -> None:
    """No shape tells it: 2 heads of 16 and 4 of 8 have the same weights."""
    write(path, **{"model.layout": "mlp_only"})
    message = refusal(lambda: started(path, **{"model.layout": "mlp_only", "model.heads": 4}))
    assert "attention has 2 heads of width 16 there and 4 of 8 here; set model.heads and model.head_dim as there" in message


def test_other_tensors_need_leave(path: Path) -> None:
    model = write(path)
    changes = {"model.layout": "mlp_only", "model.task_embedding": False, "model.depth": 3}
    message = refusal(lambda: started(path, **changes))
    assert "the file lacks backbone.blocks.*.attn.qkv.weight (3), " in message
    assert "; this run has no place for the file's " in message and "backbone.blocks.*.task_embed (2)" in message
    assert message.endswith("if this is meant, set init_from.allow=[tensors]")
    found, own = started(path, ("tensors",), **changes), own_state(**changes)
    for name, tensor in own.items():
        assert torch.equal(found.state[name], model.state.get(name, tensor)), name
    assert set(found.at_random) == own.keys() - model.state.keys() and set(found.left_over) == model.state.keys() - own.keys()
    assert [bool(layer.share_TE.any()) for layer in found.usage] == [True, True, False]
    assert torch.equal(found.usage[1].share_TE, model.usage[3].share_TE)
    assert len(report(found).splitlines()) < 12


def test_settings_that_no_tensor_shows_are_told(path: Path) -> None:
    write(path)
    changes = {"model.mlp.top_k": 1, "model.router.renormalize": True, "mean": [0.0, 1.0, 2.0]}
    assert started(path, **changes).notes == (
        "mean is (123.675, 116.28, 103.53) there and (0.0, 1.0, 2.0) here",
        "model.router.renormalize is False there and True here",
        "model.mlp.top_k is 2 there and 1 here",
    )


def test_names_are_grouped() -> None:
    names = ["a.0.b", "a.1.b", "heads.x.p", "heads.x.q.1", "c", *(f"n{i}" for i in range(7))]
    assert grouped(names) == "a.*.b (2), heads.x (2), c, n0, n1, n2, n3, n4 and 2 more"


# ---------------------------------------------------------------- the recipe's words


def test_a_path_alone_is_short_for_the_section(tmp_path: Path) -> None:
    assert small_recipe(init_from="runs/quickstart") == small_recipe(**{"init_from.path": "runs/quickstart"})
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: quickstart\ninit_from: runs/quickstart\n")
    found = load_recipe(str(recipe), ["init_from.allow=[tasks]"]).init_from
    assert found is not None and (str(found.path), found.allow) == ("runs/quickstart", ("tasks",))
    assert load_recipe("quickstart", ["init_from=a/b"]).init_from == small_recipe(init_from="a/b").init_from
    message = refusal(lambda: load_recipe("quickstart", ["init_from=a", "init_from.alow=[tasks]"]))
    assert "init_from.alow: unknown key; did you mean allow?" in message


# ---------------------------------------------------------------- in training


@pytest.mark.dist
def test_two_ranks_start_and_learn_as_one(path: Path, tmp_path: Path) -> None:
    """Experts of the file, more of them here, one task more: spread over two ranks, the same losses as on one."""
    write(path, only=["digits", "scenes"])
    changes = {
        "init_from": {"path": str(path), "allow": ["tasks", "experts"]}, "model.mlp.num_experts": 6, "run": str(tmp_path / "new"),
    }  # fmt: skip
    plain = {key: value for key, value in changes.items() if key != "init_from"}
    config = config_file(tmp_path, 2)
    work = [(Topology(1, 1, 2, given), config) for given in (changes, plain)]
    alone, from_nothing = run_ranks(1, curves, work)[0]
    found = run_ranks(2, curves, [(Topology(2, 2, 2, changes), config)], timeout=200)[0][0]
    for step, (a, b) in enumerate(zip(found.values, alone.values, strict=True)):
        assert a[:-1] == pytest.approx(b[:-1], rel=5e-5, abs=5e-5), f"step {step}"
    assert abs(alone.values[0][0] - from_nothing.values[0][0]) > 0.01, "the file made a difference"


def begun(rank: int, world: int, recipes: list[tuple[Recipe, int]]) -> list[Any]:
    """Usage and some weights of every recipe's trainer, built to go on after a number of steps."""
    trainers = [build_trainer(recipe, launch.start(), done) for recipe, done in recipes]
    return [(trainer.usage, trainer.network.state_dict()["backbone.norm.bias"].clone()) for trainer in trainers]


def test_a_trainer_starts_from_the_file_unless_a_checkpoint_resumes(path: Path, tmp_path: Path) -> None:
    model = write(path)
    config = {"deepspeed_config": config_file(tmp_path, 1)}
    fresh = small_recipe(**config, init_from=str(path), run=str(tmp_path / "fresh"))
    going_on = small_recipe(**config, init_from=str(tmp_path / "gone"), run=str(tmp_path / "on"))
    (usage, norm), (no_usage, own_norm) = run_ranks(1, begun, [(fresh, 0), (going_on, 3)])[0]
    assert torch.equal(norm, model.state["backbone.norm.bias"]) and not own_norm.any()
    assert no_usage == () and torch.equal(usage[3].share_TE, model.usage[3].share_TE)
