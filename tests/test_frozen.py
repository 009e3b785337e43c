"""Training a part of a network: what learns, that the rest is frozen in every sense, and that any topology trains it the same."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lives import resume, save
from modsquad_ds.config import Recipe
from modsquad_ds.data.finish import finished_images
from modsquad_ds.data.types import Batch
from modsquad_ds.errors import UserError
from modsquad_ds.model.network import build_network
from modsquad_ds.objective import Usage
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.frozen import freeze, overlaid
from modsquad_ds.parallel.optimizer import learning_rate_factor, parameter_groups, set_learning_rate
from modsquad_ds.parallel.state import gather_network
from modsquad_ds.parallel.traffic import counted
from modsquad_ds.resume import find, progress_of
from modsquad_ds.trainable import Chosen, choose_experts, count_trainable, trainable_entries
from modsquad_ds.trainer import Trainer, build_trainer, forward_backward, train_step, widened
from ranks import run_ranks
from small import small_batch, small_recipe
from test_topology import config_file

STEPS = 4
ONE: Chosen = ((0,), (1,), (2, 3), (3,))
MODES = ("heads", "routers", "routers+heads", "experts")


def adapting(train: str, **changes: Any) -> Recipe:
    """The small recipe with its classification task alone adapted."""
    no_routing_losses = {f"loss.{name}": 0.0 for name in ("mutual_information", "load_balance", "z_loss")}
    return small_recipe(**{"adapt.train": train, "adapt.tasks": ["digits"], **no_routing_losses, **changes})


def batch_of(step: int, rank: int, world: int) -> Batch:
    return {"digits": small_batch(step, rank, world)["digits"]}


# ---------------------------------------------------------------- what learns


def test_what_learns_by_hand() -> None:
    recipe = adapting("experts", **{"model.depth": 1, "loss.weighting": "uncertainty"})
    network = build_network(recipe)
    head = {"heads.digits.fc.weight": None, "heads.digits.fc.bias": None}
    head = {name: None for name, _ in network.named_parameters() if name.split(".")[:2] == ["heads", "digits"]}
    routers = dict.fromkeys(
        ("backbone.blocks.0.attn.router.weight", "backbone.blocks.0.mlp.router.weight", "backbone.blocks.0.task_embed"), (0,)
    )
    attention = dict.fromkeys((f"backbone.blocks.0.attn.experts.{n}_weight" for n in ("q", "proj")), (2,))
    mlp = (f"backbone.blocks.0.mlp.experts.{n}" for n in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))
    scale = {"task_scale": (0,)}
    expected = {
        "heads": head | scale,
        "routers": routers | scale,
        "routers+heads": head | routers | scale,
        "experts": head | routers | scale | attention | dict.fromkeys(mlp, (0, 1, 2, 3)),
    }
    for mode, names in expected.items():
        chosen = ((2,), (0, 1, 2, 3)) if mode == "experts" else ()
        assert trainable_entries(network, adapting(mode, **{"model.depth": 1}), 0, chosen) == names, mode
    assert trainable_entries(network, adapting("all", **{"model.depth": 1})) is None
    # One row of 4 x 32 in each of two routers, one task embedding of 32.
    assert count_trainable(network, dict(routers.items())) == 2 * 4 * 32 + 32


def test_what_has_learned_is_laid_over_the_whole_under_its_own_names() -> None:
    """Entries of the network's own parameter (`task_scale`) among them, whose name has no module before it."""
    recipe = adapting("experts", **{"loss.weighting": "uncertainty"})
    network = build_network(recipe)
    whole = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trainable = trainable_entries(network, recipe, 0, ONE)
    assert trainable is not None
    freeze(network, trainable, whole, torch.float32)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    found = overlaid(whole, network.state_dict(), trainable)
    assert found.keys() == whole.keys() and found["task_scale"].tolist() == [2.0, 1.0, 1.0]
    weight = found["backbone.blocks.0.mlp.router.weight"] - whole["backbone.blocks.0.mlp.router.weight"]
    assert_close(weight.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))


def test_routers_first_then_experts() -> None:
    recipe = adapting("experts", **{"adapt.router_steps": 3})
    network = build_network(recipe)
    assert trainable_entries(network, recipe, 2, ()) == trainable_entries(network, adapting("routers+heads"))
    later = trainable_entries(network, recipe, 3, ONE)
    assert later is not None and later["backbone.blocks.1.attn.experts.q_weight"] == (2, 3)


def test_a_router_for_all_tasks_learns_as_a_whole() -> None:
    recipe = small_recipe(**{"model.router.per_task": False, "adapt.train": "routers"})
    found = trainable_entries(build_network(recipe), recipe)
    assert found is not None and found["backbone.blocks.0.mlp.router.weight"] is None
    assert found["backbone.blocks.0.task_embed"] is None and not any(name.startswith("heads") for name in found)
    with pytest.raises(UserError, match=r"adapt.tasks: with one router for all tasks .* others would change too"):
        adapting("routers", **{"model.router.per_task": False})


def test_experts_are_chosen_by_usage() -> None:
    share_TE = torch.tensor([[0.1, 0.4, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    usage = [Usage(share_TE, share_TE)] * 4

    def chosen(choose: str, tasks: list[str], experts: int | None, seen: Any = usage) -> tuple[int, ...]:
        changes: dict[str, Any] = {"adapt.choose": choose, "adapt.tasks": tasks, "adapt.train": "experts"}
        recipe = small_recipe(**changes | ({"adapt.experts": experts} if experts else {}))
        return choose_experts(build_network(recipe), recipe, seen)[2]

    assert chosen("best", ["digits"], None) == (1,), "of equals the lower number"
    assert chosen("best", ["digits"], 2) == (1, 2)
    assert chosen("best", ["scenes"], 1) == (0,)
    assert chosen("worst", ["digits"], 1) == (0,)
    # 0.4, 0.25, 0.25, 0.1 is the mean of the two tasks that were seen; over all three the order is the same.
    assert chosen("best", ["digits", "scenes"], 1) == (0,) and chosen("worst", ["digits", "scenes"], 1) == (3,)
    assert chosen("best", ["textures"], 1) == (0,), "a task not seen yet goes by all others"
    for nothing in ((), [Usage(torch.zeros(3, 4), torch.zeros(3, 4))] * 4):
        with pytest.raises(UserError, match=r"adapt.choose best: nothing is known yet .* set adapt.router_steps"):
            chosen("best", ["digits"], 1, nothing)
    with pytest.raises(UserError, match=r"no layer has an expert that only digits may choose; add some with `expand`"):
        chosen("added", ["digits"], None)


def test_added_experts_are_those_that_no_other_task_sees() -> None:
    recipe = adapting("experts", **{"adapt.choose": "added"})
    network = build_network(recipe)
    for layer in list(network.backbone.sparse_layers().values())[:3]:
        layer.router.restrict(1, [0, 1, 2])
        layer.router.restrict(2, [0, 1])
    layers = list(network.backbone.sparse_layers().values())
    layers[1].router.restrict(0, [0, 1, 2])
    layers[2].router.restrict(1, [0, 1])
    assert choose_experts(network, recipe, ()) == ((3,), (), (2, 3), ())
    assert choose_experts(network, adapting("experts", **{"adapt.choose": "added", "adapt.experts": 1}), ())[2] == (2,)
    # Experts that the adapted task cannot choose are never chosen.
    even = [Usage(torch.full((3, 4), 0.25), torch.full((3, 4), 0.25))] * 4
    assert choose_experts(network, adapting("experts", **{"adapt.choose": "worst", "adapt.experts": 4}), even)[1] == (0, 1, 2)


# ---------------------------------------------------------------- freezing, one process


def test_frozen_network_computes_the_same_and_its_parts_have_the_entries_gradients() -> None:
    recipe = adapting("experts")
    network, frozen = build_network(recipe), build_network(recipe)
    whole = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trainable = trainable_entries(frozen, recipe, 0, ONE)
    assert trainable is not None
    freeze(frozen, trainable, frozen.state_dict(), torch.float32)
    images = {"digits": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    outputs = [n(images).outputs["digits"]["logits"] for n in (network, frozen)]
    assert torch.equal(*outputs), "bit for bit"
    for output in outputs:
        output.square().sum().backward()
    parts = dict(frozen.named_parameters())
    assert sum(p.numel() for p in parts.values()) == count_trainable(network, trainable)
    for name, entries in trainable.items():
        module, _, last = name.rpartition(".")
        part = parts[name if entries is None else f"{module}.parametrizations.{last}.original"]
        gradient = network.get_parameter(name).grad
        assert part.grad is not None and gradient is not None
        assert_close(part.grad, gradient if entries is None else gradient[list(entries)], rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        for part in parts.values():
            part += 1
    after = overlaid(whole, frozen.state_dict(), trainable)
    assert after.keys() == whole.keys()
    for name, tensor in after.items():
        entries = trainable.get(name, ())
        learned = torch.zeros_like(tensor) if entries == () else torch.ones_like(tensor)
        if entries:
            learned.zero_()[list(entries)] = 1
        assert_close(tensor.float(), whole[name].float() + learned.float(), rtol=0, atol=1e-6, msg=name)
        kept = learned == 0
        assert torch.equal(tensor[kept], whole[name][kept]), f"frozen bytes of {name}"


def test_frozen_bytes_keep_their_precision() -> None:
    recipe = adapting("routers")
    network = build_network(recipe).to(torch.bfloat16)
    whole = dict(network.state_dict())
    trainable = trainable_entries(network, recipe)
    assert trainable is not None
    freeze(network, trainable, whole, torch.float32)
    network.float()
    after = overlaid(whole, network.state_dict(), trainable)
    assert {tensor.dtype for name, tensor in after.items() if not name.endswith("visible")} == {torch.bfloat16}


# ---------------------------------------------------------------- freezing, under the engine


class Life(NamedTuple):
    """What a rank saw of a training."""

    values: list[list[float]]
    weights: dict[str, Tensor]
    values_of_optimizer: int
    """Elements in this rank's optimizer state, both moments."""
    reduced: int
    """Elements that DeepSpeed reduced in one step."""
    learning: int


def lives(rank: int, world: int, recipes: list[Recipe]) -> list[Life]:
    ranks = launch.start()
    return [life(build_trainer(recipe, ranks, 0, ONE if recipe.adapt.train == "experts" else ())) for recipe in recipes]


def life(trainer: Trainer) -> Life:
    ranks = trainer.ranks
    values = []
    for step in range(STEPS):
        micro = iter([batch_of(step, ranks.rank, ranks.world)])
        report, _ = train_step(trainer, micro, step)
        norm = trainer.engine.get_global_grad_norm() or 0.0
        values.append([float(report.total), *report.task_T.tolist(), float(norm)])
    with counted() as traffic:
        forward_backward(trainer, batch_of(STEPS, ranks.rank, ranks.world))
    reduced = sum(call.elements for call in traffic.calls if call.deepspeed and call.kind in ("all_reduce", "reduce"))
    optimizer = getattr(trainer.engine.optimizer, "optimizer", trainer.engine.optimizer)
    states = sum(x.numel() for state in optimizer.state.values() for name, x in state.items() if name != "step")
    assert trainer.start is not None and trainer.trainable is not None
    learned = gather_network(trainer.network, {})
    weights = overlaid(trainer.start.whole, learned, trainer.trainable) if ranks.first else {}
    return Life(values, weights, states, reduced, sum(p.numel() for p in trainer.network.parameters()))


def by_masks(recipe: Recipe) -> dict[str, Tensor]:
    """The dumbest way: everything learns, and after each step what is frozen is put back. One process, no DeepSpeed."""
    network = build_network(recipe)
    trainable = trainable_entries(network, recipe, 0, ONE)
    assert trainable is not None
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    spec = recipe.train.optimizer
    groups = [group | {"moe": False} for group in parameter_groups(network, spec)]
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)
    for step in range(STEPS):
        set_learning_rate(optimizer, spec.lr * learning_rate_factor(recipe.train.schedule, step, recipe.train.steps))
        sub = batch_of(step, 0, 1)["digits"]
        output = network({"digits": finished_images(sub)})
        terms = network.head("digits").losses(output.outputs["digits"], sub.targets)
        loss = sum(term.weight * term.sum / term.count for term in terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in network.named_parameters():
                entries = trainable.get(name, ())
                if entries is None:
                    continue
                frozen = [i for i in range(len(p)) if i not in entries]
                p[frozen] = before[name][frozen]
    return network.state_dict()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Life]:
    """Every mode on one rank, ZeRO-2, without clipping."""
    config = config_file(tmp_path_factory.mktemp("ds"), 2)
    recipes = [adapting(mode, deepspeed_config=config) for mode in MODES]
    return dict(zip(MODES, run_ranks(1, lives, recipes)[0], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_frozen_training_is_that_of_the_dumbest_loop(alone: dict[str, Life], mode: str) -> None:
    recipe, found = adapting(mode), alone[mode]
    expected, before = by_masks(recipe), build_network(recipe).state_dict()
    trainable = trainable_entries(build_network(recipe), recipe, 0, ONE)
    assert trainable is not None
    assert found.learning == count_trainable(build_network(recipe), trainable)
    assert found.learning <= found.values_of_optimizer // 2 < found.learning + 64 * len(trainable), "and ZeRO's padding"
    for name, tensor in expected.items():
        assert_close(found.weights[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
        entries = trainable.get(name, ())
        frozen = torch.ones(len(tensor), dtype=torch.bool)
        frozen[list(range(len(tensor)) if entries is None else entries)] = False
        assert torch.equal(found.weights[name][frozen], before[name][frozen]), f"frozen bytes of {name}"
    moved = [name for name in trainable if not torch.equal(found.weights[name], before[name])]
    assert set(moved) == set(trainable), "and the rest learns"


@pytest.mark.dist
def test_two_ranks_freeze_and_learn_the_same_at_any_topology(alone: dict[str, Life], tmp_path: Path) -> None:
    configs = {stage: config_file(tmp_path, stage) for stage in (0, 1, 2)}
    layouts = [
        (mode, {"parallel.ep_size": ep, "parallel.attention_ep_size": attention, "deepspeed_config": configs[stage]})
        for mode, ep, attention, stage in (
            ("experts", 1, 1, 2), ("experts", 2, 1, 2), ("experts", 2, 2, 1), ("experts", 1, 2, 0),
            ("routers", 2, 2, 2), ("routers+heads", 2, 1, 2), ("heads", 2, 2, 2),
        )
    ]  # fmt: skip
    found = run_ranks(2, lives, [adapting(mode, **changes) for mode, changes in layouts], timeout=240)
    for (mode, changes), first, second in zip(layouts, *found, strict=True):
        expected, zero0 = alone[mode], changes["deepspeed_config"] == configs[0]
        for a, b in zip(first.values, expected.values, strict=True):
            skip = 1 if zero0 else 0  # without ZeRO DeepSpeed tells no norm
            assert a[: len(a) - skip] == pytest.approx(b[: len(b) - skip], rel=2e-5, abs=2e-5), (mode, changes)
        assert first.values == second.values
        for name, tensor in expected.weights.items():
            apart = (first.weights[name].float() - tensor.float()).square().mean().sqrt().item()
            assert apart <= 1e-5, f"{mode} {changes} {name}"
        assert first.learning == second.learning == expected.learning
        assert expected.learning <= first.reduced < expected.learning * 1.1 + 2000, "no gradient of what is frozen is sent"
        if not zero0:
            assert first.values_of_optimizer + second.values_of_optimizer < 2 * (expected.learning + 2000)


def lives_of_all_experts(rank: int, world: int, recipe: Recipe) -> Life:
    return life(build_trainer(recipe, launch.start(), 0, (tuple(range(4)),) * 4))


@pytest.mark.dist
def test_spread_layers_of_which_all_experts_learn(tmp_path: Path) -> None:
    """Each rank's experts are its own: their gradients must not meet those of the other ranks' experts."""
    recipe = adapting("experts", deepspeed_config=config_file(tmp_path, 2))
    expected = run_ranks(1, lives_of_all_experts, recipe)[0]
    spread = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"ep_size": 2, "attention_ep_size": 2})})
    found = run_ranks(2, lives_of_all_experts, spread, timeout=240)[0]
    for name, tensor in expected.weights.items():
        assert (found.weights[name].float() - tensor.float()).square().mean().sqrt().item() <= 1e-5, name


def test_nothing_that_could_learn_is_told() -> None:
    recipe = adapting("routers", **{"model.layout": "dense", "model.task_embedding": False})
    with pytest.raises(UserError, match=r"adapt.train routers: the network has no routers and no task embeddings"):
        trainable_entries(build_network(recipe), recipe)


@pytest.mark.dist
def test_bf16_keeps_frozen_bytes(tmp_path: Path) -> None:
    recipe = adapting("experts", **{"parallel.ep_size": 2, "deepspeed_config": config_file(tmp_path, 2, bf16=True)})
    found = run_ranks(2, lives, [recipe])[0][0]
    before = build_network(recipe).state_dict()
    frozen = [i for i in range(4) if i not in ONE[3]]
    name = "backbone.blocks.1.mlp.experts.fc1_weight"
    assert torch.equal(found.weights[name][frozen], before[name][frozen])
    assert torch.equal(found.weights["backbone.norm.weight"], before["backbone.norm.weight"])
    assert not torch.equal(found.weights[name][3], before[name][3])


# ---------------------------------------------------------------- lives: routers first, checkpoints


def widening(rank: int, world: int, recipe: Recipe, save_at: int) -> tuple[list[list[float]], Chosen, dict[str, Tensor]]:
    """All steps from the newest checkpoint on, as train() takes them."""
    ranks = launch.start()
    trainer = build_trainer(recipe, ranks, *progress_of(find(recipe, ranks)))
    values = []
    for step in range(resume(trainer), STEPS):
        values.append(one_digit_step(trainer, step))
        if step + 1 == recipe.adapt.router_steps:
            trainer = widened(trainer, step + 1)
        if step + 1 == save_at:
            save(trainer, step + 1)
    return values, trainer.chosen, gather_network(trainer.network, {})


def one_digit_step(trainer: Trainer, step: int) -> list[float]:
    report, _ = train_step(trainer, iter([batch_of(step, trainer.ranks.rank, trainer.ranks.world)]), step)
    return [*report.task_T.tolist(), float(trainer.engine.get_global_grad_norm())]


@pytest.mark.dist
@pytest.mark.parametrize("train", ["experts", "all"])
def test_routers_first_then_more_and_a_resumed_run_goes_on(tmp_path: Path, train: str) -> None:
    changes = {"adapt.router_steps": 2, "deepspeed_config": config_file(tmp_path, 2), "train.steps": STEPS}
    two = adapting(train, run=str(tmp_path / "run"), **changes, **{"parallel.ep_size": 2})
    (values, chosen, weights), _ = run_ranks(2, widening, two, 2)
    assert len(values) == STEPS and len(chosen) == (4 if train == "experts" else 0)
    resumed, again, after = run_ranks(2, widening, two, 0)[0]
    assert resumed == values[2:] and again == chosen, "saved as it was widened, bit for bit"
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    one = adapting(train, run=str(tmp_path / "run"), **changes)
    for a, b in zip(run_ranks(1, widening, one, 0)[0][0], values[2:], strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=2e-5), "another topology"


@pytest.mark.dist
def test_resumed_before_the_routers_are_done(tmp_path: Path) -> None:
    changes = {"adapt.router_steps": 2, "deepspeed_config": config_file(tmp_path, 2), "train.steps": STEPS}
    recipe = adapting("experts", run=str(tmp_path / "run"), **changes)
    values, chosen, _ = run_ranks(1, widening, recipe, 1)[0]
    resumed, again, _ = run_ranks(1, widening, recipe, 0)[0]
    assert resumed == values[1:] and again == chosen
