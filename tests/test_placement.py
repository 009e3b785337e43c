"""Placement of experts: even loads against all layouts, the same network in another order, and a life that changes the order."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lives import resume, save
from modsquad_ds.config import Recipe
from modsquad_ds.model.network import MultiTaskNetwork, build_network
from modsquad_ds.objective import Usage
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.state import gather_network
from modsquad_ds.placement import (
    Order,
    balanced_order,
    expert_load,
    expert_moves,
    imbalance,
    permute_experts,
    permute_usage,
)
from modsquad_ds.plan import loader_plan, step_tokens
from modsquad_ds.trainer import build_trainer
from ranks import run_ranks
from small import small_batch, small_images, small_recipe
from test_checkpoint import recipe_of
from test_topology import Curve, assert_same, config_file, one_step

# ---------------------------------------------------------------- loads and orders


def placed(load_E: Tensor, ranks: int) -> float:
    """Busiest rank / mean after balancing; the order is checked on the way."""
    order = balanced_order(load_E, ranks)
    assert sorted(order) == list(range(len(load_E)))
    size = len(order) // ranks
    assert all(list(order[i : i + size]) == sorted(order[i : i + size]) for i in range(0, len(order), size))
    return imbalance(load_E[list(order)], ranks)


def test_load_by_hand() -> None:
    share_TE = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75], [0.0, 0.0, 0.0]])
    load_E = expert_load(share_TE, (100, 40, 1000), top_k=2)
    assert load_E.tolist() == [100, 100 + 20, 60]
    assert imbalance(load_E, 3) == pytest.approx(120 / (280 / 3))
    assert imbalance(load_E, 1) == 1 and imbalance(torch.zeros(4), 2) == 1


@pytest.mark.parametrize(
    ("experts", "ranks", "before", "after"),
    [
        # Three tasks with 70, 20 and 10 % of the rows on 4 experts each, 4 experts idle: one expert of each sort on every rank.
        ((4, 4, 4), 4, 70 / 25, 1.0),
        ((4, 4, 4), 2, 90 / 50, 1.0),
        # On 5, 5 and 6 experts, with 14, 4 and 5/3 % each. Of 4 ranks one has two of the 14s, at best with two of the 5/3s.
        ((5, 5, 6), 4, 56 / 25, (28 + 10 / 3) / 25),
        # Of 2 ranks one has three of the 14s, at best with five of the 5/3s.
        ((5, 5, 6), 2, 82 / 50, (42 + 25 / 3) / 50),
    ],
)
def test_specialised_routers_by_hand(experts: tuple[int, ...], ranks: int, before: float, after: float) -> None:
    share_TE = torch.zeros(3, 16)
    start = 0
    for task, count in enumerate(experts):
        share_TE[task, start : start + count] = 1 / count
        start += count
    load_E = expert_load(share_TE, (700, 200, 100), top_k=4)
    assert load_E.sum().item() == pytest.approx(4000)
    assert imbalance(load_E, ranks) == pytest.approx(before)
    assert placed(load_E, ranks) == pytest.approx(after)


def test_orders_by_hand() -> None:
    assert balanced_order(torch.tensor([4.0, 3.0, 2.0, 1.0]), 2) == (0, 3, 1, 2)
    assert balanced_order(torch.tensor([1.0, 4.0, 2.0, 3.0]), 2) == (0, 1, 2, 3), "as even as can be"
    assert balanced_order(torch.tensor([4.0, 1.0, 3.0, 0.0]), 1) == (0, 1, 2, 3)
    assert balanced_order(torch.tensor([9.0, 0.0, 1.0, 5.0]), 4) == (0, 1, 2, 3), "one expert a rank: no order is better"
    assert balanced_order(torch.zeros(4), 2) == (0, 1, 2, 3)
    for load_E, ranks in ((torch.ones(3), 2), (torch.tensor([1.0, -1.0]), 2), (torch.tensor([1.0, torch.nan]), 1)):
        with pytest.raises(ValueError, match=r"do not divide|finite"):
            balanced_order(load_E, ranks)


def layouts(experts: tuple[int, ...], size: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to part the experts into groups of a size."""
    if not experts:
        yield ()
        return
    for others in itertools.combinations(experts[1:], size - 1):
        group = (experts[0], *others)
        for rest in layouts(tuple(e for e in experts if e not in group), size):
            yield (group, *rest)


def optimum(load: list[float], ranks: int) -> float:
    """The least that the busiest rank can have."""
    parted = layouts(tuple(range(len(load))), len(load) // ranks)
    return min(max(sum(load[e] for e in group) for group in layout) for layout in parted)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)]).flatmap(
        lambda size: st.tuples(
            st.just(size[1]),
            st.lists(st.one_of(st.integers(0, 9), st.floats(0, 1e6)), min_size=size[0], max_size=size[0]),
        )
    )
)
def test_any_loads_against_all_layouts(drawn: tuple[int, list[float]]) -> None:
    ranks, load = drawn
    load_E = torch.tensor(load, dtype=torch.float64)
    mean, best = sum(load) / ranks, optimum(load, ranks)
    busiest = placed(load_E, ranks) * mean
    assert busiest <= imbalance(load_E, ranks) * mean * (1 + 1e-8)
    assert best * (1 - 1e-8) <= busiest <= (mean + (1 - 1 / ranks) * max(load)) * (1 + 1e-8)
    again = load_E[list(balanced_order(load_E, ranks))]
    assert balanced_order(again, ranks) == tuple(range(len(load))), "what is balanced stays"


def test_typical_loads_are_within_5_percent_of_the_best_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for experts, ranks in itertools.product((8, 12), (2, 4)):
        for _ in range(15):
            load_E = -torch.rand(experts, generator=generator, dtype=torch.float64).log()
            load = load_E.tolist()
            ratios.append(placed(load_E, ranks) * sum(load) / ranks / optimum(load, ranks))
    assert max(ratios) < 1.05
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) > 0.75 * len(ratios)


def test_tokens_of_a_step_by_hand() -> None:
    """Patch 8: digits 32 px are 16 tokens; canvases of 4 x 6 and 8 x 8 tokens are 44 in the mean; crops of 4 x 4."""
    changes: dict[str, Any] = {
        "tasks.scenes.transform.canvases": [[32, 48], [64, 64]],
        "tasks.textures.batch_size": None, "tasks.textures.batch_size_per_rank": 3, "train.accumulation": 2,
        "tasks.digits.sampling_weight": 15, "tasks.scenes.sampling_weight": 10, "tasks.textures.sampling_weight": 5,
    }  # fmt: skip
    packed = (8 * 16, 4 * 44, 3 * 2 * 2 * 16)
    assert step_tokens(loader_plan(small_recipe(**changes), Ranks(1, 2))) == packed
    weighted = step_tokens(loader_plan(small_recipe(**changes, **{"train.sampling": "weighted"}), Ranks(1, 2)))
    assert weighted == pytest.approx((packed[0] / 2, packed[1] / 3, packed[2] / 6))


# ---------------------------------------------------------------- the same network


def run(network: MultiTaskNetwork) -> tuple[list[Tensor], list[Usage], float, dict[str, Tensor]]:
    """Head outputs, statistics, a loss that reads all of both, and its gradients."""
    network.zero_grad()
    output = network(small_images(small_batch(0, 0, 1)))
    flat = [x for of_task in output.outputs.values() for value in of_task.values() for x in tensors(value)]
    loss = sum(((x * torch.linspace(-1, 2, x.numel()).view_as(x)).sin().mean() for x in flat), torch.zeros(()))
    loss = loss + sum(s.prob_TE.square().mean() + s.lse2_T.mean() for s in output.stats) / 100
    loss.backward()
    usage = [Usage(s.prob_TE.detach(), s.count_TE) for s in output.stats]
    grads = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return [x.detach() for x in flat], usage, loss.item(), grads


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [x for item in value for x in tensors(item)]


@pytest.mark.parametrize("router", [{"type": "linear"}, {"type": "mlp"}, {"type": "mlp", "per_task": False}], ids=str)
def test_permuted_network_computes_the_same(router: dict[str, Any]) -> None:
    network = build_network(small_recipe(**{"model.router": router}))
    torch.manual_seed(0)
    for parameter in network.backbone.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # biases too, which begin as equal zeros
    orders = [(2, 0, 3, 1), (0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 2, 3)]
    moves = expert_moves(network, orders)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    outputs, usage, loss, grads = run(network)
    network.load_state_dict(permute_experts(before, moves))
    outputs_then, usage_then, loss_then, grads_then = run(network)

    assert_close(outputs_then, outputs, rtol=1e-5, atol=1e-6)
    assert loss_then == pytest.approx(loss, rel=1e-6)
    for found, expected in zip(usage_then, permute_usage(usage, orders), strict=True):
        assert torch.equal(found.share_TE, expected.share_TE)
        assert_close(found.prob_TE, expected.prob_TE, rtol=1e-5, atol=1e-5)
    expected_grads = permute_experts(grads, moves)
    assert grads_then.keys() == grads.keys() == dict(network.named_parameters()).keys()
    for name, grad in grads_then.items():
        assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert name not in moves or not torch.equal(grads[name], expected_grads[name]), f"{name}: nothing was moved"


def test_moves_are_of_experts_and_routers_alone() -> None:
    network = build_network(small_recipe(**{"model.router.type": "mlp"}))
    moves = expert_moves(network, [(0, 1, 2, 3), (3, 2, 1, 0), (0, 1, 2, 3), (0, 1, 2, 3)])
    bank = {f"experts.{name}": 0 for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")}
    axes = bank | {"router.weight": 1, "router.bias": 1, "router.visible": 1}
    assert {name: move.axis for name, move in moves.items()} == {f"backbone.blocks.0.mlp.{n}": a for n, a in axes.items()}
    state = network.state_dict()
    assert all(tensor is state[name] for name, tensor in permute_experts(state, moves).items() if name not in moves)
    with pytest.raises(ValueError, match="zip"):
        expert_moves(network, [(0, 1, 2, 3)])
    wrong = expert_moves(network, [(1, 0)] * 4)
    with pytest.raises(ValueError, match="an order of 2 experts for axis"):
        permute_experts(state, wrong)


# ---------------------------------------------------------------- a life

SPLIT, STEPS = 3, 6

# Tokens of a step: 128 digits, 96 scenes, 64 textures. Each task on its own expert, one expert idle, two rows a token; the
# most even pairs are 96 + 64 and 128 + 0.
FIRST = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]  # loads 2 x (128, 96, 0, 64)
SECOND = [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]  # loads 2 x (64, 0, 128, 96)
EVEN = [[0.5, 0.0, 0.5, 0.0], [0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]]
SHARES = [FIRST, SECOND, EVEN, SECOND]
BALANCED: list[Order] = [(0, 2, 1, 3), (0, 3, 1, 2), (0, 1, 2, 3), (0, 3, 1, 2)]
"""By layer: attention and MLP of block 0, of block 1."""
MLP_ONLY: list[Order] = [(0, 1, 2, 3), (0, 3, 1, 2), (0, 1, 2, 3), (0, 3, 1, 2)]


def usage_by_hand() -> tuple[Usage, ...]:
    return tuple(Usage(torch.tensor(share) + 0.1 * torch.arange(4.0), torch.tensor(share)) for share in SHARES)


class Life(NamedTuple):
    """What is left of a resumed run, whole networks."""

    curve: Curve
    average: dict[str, Tensor]
    usage: tuple[Usage, ...]
    """Right after resuming."""
    last_usage: tuple[Usage, ...]


def lives(rank: int, world: int, recipes: list[Recipe]) -> list[Life]:
    """The first recipe trains and saves with usage made up by hand; then each goes on from there."""
    ranks = launch.start()
    trainer = build_trainer(recipes[0], ranks)
    for step in range(SPLIT):
        one_step(trainer, step)
    trainer.usage = usage_by_hand()
    save(trainer, SPLIT)
    return [resumed(recipe, ranks) for recipe in recipes]


def resumed(recipe: Recipe, ranks: Ranks) -> Life:
    trainer = build_trainer(recipe, ranks)
    start, usage = resume(trainer), trainer.usage
    values = [one_step(trainer, step) for step in range(start, STEPS)]
    weights, average = (gather_network(trainer.network, replaced) for replaced in ({}, trainer.average))
    return Life(Curve(values, weights), average, usage, trainer.usage)


@pytest.mark.dist
def test_resumed_with_balanced_experts_the_curve_goes_on(tmp_path: Path) -> None:
    """Weights after more steps show that moments moved too. Resumed at the topology that saved, and at two others."""
    configs = {stage: config_file(tmp_path, stage) for stage in (1, 2)}
    extra = {"train.ema": 0.5, "parallel.placement": "balanced"}
    run = str(tmp_path / "run")
    kept = recipe_of(run, 2, configs[2], **{**extra, "parallel.placement": "fixed"})
    same = recipe_of(run, 2, configs[2], **extra)
    mlp = recipe_of(run, 2, configs[1], **extra, **{"parallel.attention_ep_size": 1})
    whole = recipe_of(run, 1, configs[2], **extra)
    fixed, *others = run_ranks(2, lives, [kept, same, mlp, whole], timeout=240)[0]
    assert same_usage(fixed.usage, usage_by_hand())
    identity: list[Order] = [(0, 1, 2, 3)] * 4
    network = build_network(kept)
    for found, orders in zip(others, (BALANCED, MLP_ONLY, identity), strict=True):
        assert same_usage(found.usage, permute_usage(usage_by_hand(), orders)), "this order and no other"
        back = [tuple(torch.tensor(order).argsort().tolist()) for order in orders]
        undo = expert_moves(network, back)
        weights, average = (permute_experts(state, undo) for state in (found.curve.weights, found.average))
        assert_same(Curve(found.curve.values, weights), fixed.curve, 1e-5)
        assert_same(Curve([], average), Curve([], fixed.average), 1e-5)
        for a, b in zip(permute_usage(found.last_usage, back), fixed.last_usage, strict=True):
            assert_close(tuple(a), tuple(b), rtol=1e-5, atol=1e-6)
    moved = expert_moves(network, BALANCED)
    parameters = dict(network.named_parameters())
    apart = [
        (others[0].curve.weights[name] - fixed.curve.weights[name]).abs().max().item() for name in moved if name in parameters
    ]
    assert min(apart) > 1e-3, "it lies in another order"


def same_usage(found: tuple[Usage, ...], expected: tuple[Usage, ...]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
