"""Dispatch with a capacity against loops that drop by hand, against dropless dispatch, and over ranks against one process."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close

from modsquad_ds.config import Recipe
from modsquad_ds.model.capacity import CapacityDispatcher, with_dropped
from modsquad_ds.model.dispatch import Groups, LocalDispatcher
from modsquad_ds.model.network import build_network
from modsquad_ds.model.pack import Segment
from modsquad_ds.model.router import Routing, RoutingStats
from modsquad_ds.model.sparse import SparseLayer
from modsquad_ds.objective import Objective, drop_rate, flatten, no_usage, unflatten
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.dispatch import AllToAllDispatcher
from modsquad_ds.parallel.experts import with_capacity
from modsquad_ds.trainer import build_trainer, record_of, train_step
from ranks import run_ranks
from small import small_batch, small_images, small_recipe
from test_objective import sums_of
from test_sparse import SEGMENTS, TOKENS, TWINS, WIDTH, Choice, choose_all, compare, make
from test_vit import backbone_of, image

TASKS = 3


def limited(kind: str, num_experts: int, top_k: int, factor: float) -> SparseLayer:
    """A layer of tests/test_sparse.py, in training mode, whose experts have a capacity."""
    layer = make(kind, num_experts, top_k)
    layer.training_dispatcher = with_capacity(layer, factor)
    return layer


def routing_of(expert: Sequence[Sequence[int]], weight: Sequence[Sequence[float]], num_experts: int) -> Routing:
    """All of one task, which only counts see."""
    expert_SK = torch.tensor(expert)
    count_TE = torch.bincount(expert_SK.flatten(), minlength=num_experts).float().unsqueeze(0)
    stats = RoutingStats(count_TE, count_TE, torch.tensor([float(len(expert))]), torch.zeros(1), torch.zeros(1))
    return Routing(expert_SK, torch.tensor(weight), stats)


# ---------------------------------------------------------------- by hand


class Seen:
    """A bank that multiplies by ten and keeps the rows it got."""

    rows: Tensor

    def __call__(self, x: Tensor, groups: Groups, weight_SK: Tensor | None = None) -> Tensor:
        assert len(x) == sum(groups.rows) and weight_SK is None
        self.rows = x
        return x * 10


def test_capacity_is_rounded_up_and_at_least_one() -> None:
    assert [CapacityDispatcher(4, 1.25).capacity(slots) for slots in (1, 16, 17, 32)] == [1, 5, 6, 10]
    assert CapacityDispatcher(8, 0.01).capacity(8) == 1
    assert CapacityDispatcher(10, 1.1).capacity(100) == 11, "as written, not as binary numbers have it"


def test_which_slots_are_dropped_by_hand() -> None:
    """Two places each. Expert 0 is wanted by slots 0 (0.6), 2 (0.7), 5 (0.4), expert 1 by 1 (0.4), 3 (0.3), 4 (0.6)."""
    routing = routing_of([[0, 1], [0, 1], [1, 0]], [[0.6, 0.4], [0.7, 0.3], [0.6, 0.4]], 2)
    dispatcher = CapacityDispatcher(2, 0.6)
    plan = dispatcher.plan(routing)
    assert plan.groups.rows == (2, 2)
    assert plan.order_R.tolist() == [2, 0, 4, 1]
    assert plan.inverse_R.tolist() == [1, 3, 0, -1, 2, -1]
    seen = Seen()
    slots = dispatcher.run(seen, torch.tensor([[1.0], [2.0], [3.0]]), plan)
    assert seen.rows.flatten().tolist() == [2, 1, 3, 1]
    assert slots.flatten().tolist() == [10, 10, 20, 0, 30, 0]
    summed = dispatcher.run(seen, torch.tensor([[1.0], [2.0], [3.0]]), plan, routing.weight_SK)
    assert summed.flatten().tolist() == pytest.approx([10, 14, 18])
    # Task 1 has the first two tokens, task 0 the third: one of four choices and one of two.
    stats = routing.stats._replace(dropped_T=torch.zeros(3), count_TE=torch.tensor([[1.0, 1], [2, 2], [0, 0]]))
    dropped = with_dropped(routing._replace(stats=stats), plan, (Segment(1, 1, 2, 1), Segment(0, 1, 1, 1)))
    assert dropped.dropped_T.tolist() == [1, 1, 0]
    other = stats._replace(count_TE=2 * stats.count_TE)  # a second layer without drops and with twice the choices
    assert drop_rate((dropped, other), torch.ones(3)).tolist() == pytest.approx([1 / 6, 1 / 12, 0])
    assert drop_rate((), torch.ones(3)).tolist() == [0, 0, 0]


def test_of_equal_weights_the_first_slots_stay_and_empty_places_are_zero() -> None:
    dispatcher = CapacityDispatcher(3, 1.5)
    plan = dispatcher.plan(routing_of([[2], [2], [2], [0]], [[0.5], [0.5], [0.5], [0.1]], 3))
    assert plan.order_R.tolist() == [3, -1, -1, -1, 0, 1] and plan.inverse_R.tolist() == [4, 5, -1, 0]
    seen = Seen()
    dispatcher.run(seen, torch.full((4, 1), float("nan")), plan)
    assert seen.rows[1:4].flatten().tolist() == [0, 0, 0], "whatever lies in the rows that stand in"


def test_slots_of_rows_that_only_fill_up_are_dropped_first() -> None:
    """Two places of one expert: the token that counts keeps its own, though the three that fill up have larger weights."""
    routing = routing_of([[0], [0], [0], [0]], [[0.5], [0.9], [0.2], [0.8]], 1)
    assert CapacityDispatcher(1, 0.5).plan(routing).order_R.tolist() == [1, 3]
    routing = routing._replace(filling_S=torch.tensor([False, True, True, True]))
    plan = CapacityDispatcher(1, 0.5).plan(routing)
    assert plan.order_R.tolist() == [0, 1] and plan.inverse_R.tolist() == [0, 1, -1, -1]


# ---------------------------------------------------------------- the dumbest loop


def kept(capacity: int, layer: SparseLayer, x_SD: Tensor) -> Choice:
    """What is left when every expert that is over its capacity gives up its lowest gate weight, again and again."""
    chosen = choose_all(layer, x_SD)
    for expert in range(layer.router.num_experts):
        wanting = [(gate.item(), -s) for s, choice in enumerate(chosen) for e, gate in choice if e == expert]
        while len(wanting) > capacity:
            lowest = min(wanting)
            wanting.remove(lowest)
            chosen[-lowest[1]] = [(e, gate) for e, gate in chosen[-lowest[1]] if e != expert]
    return chosen


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (4, 1), (3, 3), (40, 4)])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_layer_equals_loop(kind: str, num_experts: int, top_k: int, factor: float) -> None:
    layer = limited(kind, num_experts, top_k, factor)
    capacity = math.ceil(factor * TOKENS * top_k / num_experts)
    compare(layer, partial(TWINS[kind], chosen=partial(kept, capacity)), torch.float32, 1e-5)
    torch.manual_seed(2)
    x = torch.randn(TOKENS, WIDTH)  # the input of `compare`
    left = [len(choice) for choice in kept(capacity, layer, x)]
    ends = torch.tensor([s.length for s in SEGMENTS]).cumsum(0).tolist()
    lost = {s.task: s.length * top_k - sum(left[end - s.length : end]) for s, end in zip(SEGMENTS, ends, strict=True)}
    assert layer(x, SEGMENTS)[1].dropped_T.tolist() == [lost[task] for task in range(TASKS)]
    assert sum(lost.values()) > 0 or (top_k, factor) == (num_experts, 1.0)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_layer_equals_loop_in_bf16(kind: str) -> None:
    layer = limited(kind, 5, 2, 0.75).to(torch.bfloat16)
    compare(layer, partial(TWINS[kind], chosen=partial(kept, 8)), torch.bfloat16, 2e-2)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_all_tokens_to_one_expert(kind: str) -> None:
    layer = limited(kind, 6, 1, 1.0)
    with torch.no_grad():
        layer.router.weight.zero_()
    compare(layer, partial(TWINS[kind], chosen=partial(kept, 5)), torch.float32, 1e-5)
    y, stats = layer(torch.randn(TOKENS, WIDTH), SEGMENTS)
    assert y[:5].abs().sum(1).all() and not y[5:].any(), "25 tokens, 5 places: the others pass by on the residual"
    assert stats.dropped_T.tolist() == [7, 12, 1]


# ---------------------------------------------------------------- against dropless


def gradients(layer: SparseLayer, x: Tensor) -> dict[str, Tensor]:
    a = x.clone().requires_grad_()
    y, stats = layer(a, SEGMENTS)
    loss = (y * torch.cos(torch.arange(y.numel()).view_as(y))).sum() + stats.prob_TE.square().sum()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    return {"output": y.detach(), **dict(zip(("input", *names), torch.autograd.grad(loss, (a, *parameters)), strict=True))}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=0.1).item()
        assert_close(found[name], tensor, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_with_room_for_all_it_is_dropless(kind: str) -> None:
    layer, x = limited(kind, 5, 2, 5 / 2), torch.randn(TOKENS, WIDTH)
    assert layer(x, SEGMENTS)[1].dropped_T.tolist() == [0, 0, 0]
    roomy = gradients(layer, x)
    layer.training_dispatcher = None
    assert_equal(roomy, gradients(layer, x), 1e-6)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_evaluation_drops_nothing(kind: str) -> None:
    layer, x = limited(kind, 5, 2, 0.5), torch.randn(TOKENS, WIDTH)
    training = layer(x, SEGMENTS)[0]
    evaluated, stats = layer.eval()(x, SEGMENTS)
    layer.training_dispatcher = None
    assert torch.equal(evaluated, layer(x, SEGMENTS)[0]) and stats.dropped_T.sum() == 0
    assert (training - evaluated).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_the_host_never_waits(kind: str) -> None:
    """Fake tensors have shapes but no values: whoever asks for one fails."""
    layer = limited(kind, 5, 2, 1.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(TOKENS, WIDTH)
        assert gradients(layer, x)["input"].shape == (TOKENS, WIDTH)
        layer.training_dispatcher = None
        with pytest.raises(DataDependentOutputException):
            layer(x, SEGMENTS)


def test_activation_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        backbone = backbone_of(layout="every_block", spread=2.0, activation_checkpointing=checkpointing).train()
        for layer in backbone.sparse_layers().values():
            layer.training_dispatcher = with_capacity(layer, 0.75)
        maps, stats = backbone({1: image(2, 16, 16), 0: image(3, 8, 12)})
        sum(m.square().sum() for m in maps.values()).backward()
        results.append([*maps.values(), *(x for s in stats for x in s), *(p.grad for p in backbone.parameters())])
        assert all(s.dropped_T[:2].sum() > 0 and s.dropped_T[2] == 0 for s in stats)
    for plain, saving in zip(*results, strict=True):
        assert (plain is None and saving is None) or torch.equal(plain, saving)


# ---------------------------------------------------------------- any routing


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_places_of_any_routing(data: st.DataObject) -> None:
    tokens, num_experts = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, num_experts))
    factor = data.draw(st.sampled_from([0.01, 0.3, 1.0, 1.25, 9.0]))
    skew, levels = data.draw(st.sampled_from([0.0, 1.0, 30.0])), data.draw(st.sampled_from([2, 1000]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    logits = torch.randn(tokens, num_experts, generator=g) - skew * torch.arange(num_experts) / num_experts
    expert_SK = logits.argsort(1, descending=True)[:, :top_k]
    weight_SK = torch.randint(levels, (tokens, top_k), generator=g) / levels  # few levels: many ties
    dispatcher = CapacityDispatcher(num_experts, factor)
    routing = routing_of(expert_SK.tolist(), weight_SK.tolist(), num_experts)
    plan, capacity = dispatcher.plan(routing), dispatcher.capacity(tokens * top_k)
    assert plan.groups.rows == (capacity,) * num_experts and plan.dropped_R is not None
    # Places and slots are each other's inverse, and a place is its slot's expert's.
    held = {slot: place for place, slot in enumerate(plan.order_R.tolist()) if slot >= 0}
    assert held == {slot: place for slot, place in enumerate(plan.inverse_R.tolist()) if place >= 0}
    assert all(place // capacity == expert_SK.flatten()[slot] for slot, place in held.items())
    assert plan.dropped_R.tolist() == [slot not in held for slot in range(tokens * top_k)]
    for expert in range(num_experts):
        ranked = [(w, -s) for s, (e, w) in enumerate(zip(expert_SK.flatten(), weight_SK.flatten().tolist(), strict=True))
                  if e == expert]  # fmt: skip
        stay = [key for key in ranked if -key[1] in held]
        assert len(stay) == min(capacity, len(ranked))
        assert not stay or all(key < min(stay) for key in ranked if key not in stay)


# ---------------------------------------------------------------- over ranks

LAYER_FACTOR, FACTOR = 0.75, 0.9
EXPERTS = 8  # so that ranks of the group and experts per rank differ, both more than one
COLLECTIVES = (
    "all_to_all_single", "all_to_all", "all_reduce", "reduce", "reduce_scatter_tensor", "broadcast", "all_gather",
    "all_gather_into_tensor", "gather", "scatter", "send", "recv", "barrier",
)  # fmt: skip


class OnRank(NamedTuple):
    """What one rank sees."""

    layers: dict[str, dict[str, Tensor]]
    """Kind of layer -> output and gradients of this rank's part of the tokens."""
    calls: dict[str, list[str]]
    """Kind of layer -> collectives of its forward and backward pass."""
    values: dict[str, Tensor]
    """A training step's report, and the gradient norm."""
    record: dict[str, Any]


def tokens_of(rank: int) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(rank))


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Every collective that runs meanwhile; `uneven` where more than output, input and group is given: the splits."""
    calls: list[str] = []

    def noted(name: str, real: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        calls.append(name if len(args) == 2 and settings.keys() <= {"group"} else f"{name} uneven")
        return real(*args, **settings)

    replaced = {name: partial(noted, name, getattr(dist, name)) for name in COLLECTIVES}
    with mock.patch.multiple(dist, **replaced):
        yield calls


def on_rank(rank: int, world: int, recipe: Recipe) -> OnRank:
    ranks = launch.start()
    layers, calls = {}, {}
    for kind in TWINS:
        layer = make(kind, EXPERTS, 2)
        layer.experts.keep(first=rank * EXPERTS // world, local=EXPERTS // world)
        layer.dispatcher = AllToAllDispatcher(EXPERTS, world)
        layer.training_dispatcher = with_capacity(layer, LAYER_FACTOR)
        with recorded() as calls[kind]:
            layers[kind] = gradients(layer, tokens_of(rank))
    trainer = build_trainer(recipe, ranks)
    batch = small_batch(0, rank, world)
    images = small_images(batch)
    evaluated, alone = (network.eval()(images) for network in (trainer.network, build_network(recipe)))
    assert_close(evaluated.outputs, alone.outputs, atol=1e-5, rtol=1e-5)
    assert not any(s.dropped_T.any() for s in evaluated.stats)
    trainer.engine.train()
    report, work = train_step(trainer, iter([batch]), 0)
    norm = torch.as_tensor(trainer.engine.get_global_grad_norm())
    return OnRank(layers, calls, {**report._asdict(), "norm": norm}, record_of(trainer, report, work, 1, 1.0))


def step_of_one_process(recipe: Recipe, world: int) -> dict[str, Tensor]:
    """The report of `world` ranks' parts, each with its own capacity, one after the other in this process."""
    network = build_network(recipe)
    for layer in network.backbone.sparse_layers().values():
        layer.training_dispatcher = with_capacity(layer, FACTOR)
    local = [sums_of(network, small_batch(0, rank, world)) for rank in range(world)]
    added = [torch.stack(x).sum(0).detach() for x in zip(*(flatten(*sums) for sums in local), strict=True)]
    total = unflatten(added, *local[0])
    for sums in local:
        loss, report = Objective(recipe, world)(sums, total, no_usage(total[1]), network.task_scale)
        (loss / world).backward()
    norm = torch.stack([p.grad.square().sum() for p in network.parameters() if p.grad is not None]).sum().sqrt()
    return {**report._asdict(), "norm": norm}


@pytest.mark.dist
@pytest.mark.parametrize(("world", "ep", "attention_ep"), [(2, 2, 1), (4, 4, 2)])
def test_ranks_are_one_process_with_each_ranks_capacity(world: int, ep: int, attention_ep: int) -> None:
    changes = {"parallel.ep_size": ep, "parallel.attention_ep_size": attention_ep, "parallel.capacity_factor": FACTOR}
    recipe = small_recipe(**changes, **{"train.optimizer.clip": 100.0})
    found = run_ranks(world, on_rank, recipe, timeout=200)
    for kind, transfers in (("mlp", 2), ("attention", 4)):
        layer = limited(kind, EXPERTS, 2, LAYER_FACTOR)
        parts = [gradients(layer, tokens_of(rank)) for rank in range(world)]
        for name in parts[0]:
            on_ranks, expected = ([part[name] for part in side] for side in ([x.layers[kind] for x in found], parts))
            if name in ("output", "input"):
                assert_equal({name: torch.cat(on_ranks)}, {name: torch.cat(expected)}, 1e-5)
            else:
                # Experts' gradients are whole where they lie; the others' parts are added up by the engine.
                whole = torch.cat(on_ranks) if name.startswith("experts.") else torch.stack(on_ranks).sum(0)
                assert_equal({name: whole}, {name: torch.stack(expected).sum(0)}, 1e-5)
        assert all(x.calls[kind] == ["all_to_all_single"] * 2 * transfers for x in found), "there and back, no counts"
    expected = step_of_one_process(recipe, world)
    for x in found:
        for name, value in expected.items():
            assert_close(x.values[name].float(), value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    rates = expected["dropped_T"].tolist()
    assert min(rates) > 0.05
    logged = [found[0].record[f"dropped/{task}"] for task in recipe.active]
    assert logged == pytest.approx(rates, abs=1e-6)


def test_a_recipe_without_the_key_stays_dropless() -> None:
    assert small_recipe().parallel.capacity_factor is None
    layer = make("mlp", EXPERTS, 2)
    assert layer.training_dispatcher is None and isinstance(layer.dispatcher_of_pass(), LocalDispatcher)
