"""Routers that see part of a layer's experts, and layers that differ in number of experts: as if the others were not there."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modsquad_ds.errors import UserError
from modsquad_ds.model.experts import MLPExperts
from modsquad_ds.model.network import build_network
from modsquad_ds.model.pack import Segment
from modsquad_ds.model.router import Router
from modsquad_ds.model.sparse import SparseMLP
from modsquad_ds.model_file import cut_experts, expert_parameters, stack_experts
from modsquad_ds.model_spec import RouterSpec
from small import small_recipe

EXPERTS, TOP_K, WIDTH = 7, 2, 16
SEEN = {"the first": (0, 1, 2), "any": (1, 4, 6), "as many as are chosen": (2, 5)}
SEGMENTS = (Segment(0, 2, 3, 3), Segment(1, 1, 2, 5))


def layer(experts: int, spec: RouterSpec) -> SparseMLP:
    bank = MLPExperts(experts, WIDTH, 24)
    bank.init_weights(0, 0)
    return SparseMLP(Router(spec, WIDTH, 2, experts, TOP_K), bank)


def pair(seen: tuple[int, ...], spec: RouterSpec) -> tuple[SparseMLP, SparseMLP]:
    """A layer whose task 0 sees some experts, and a layer that has only these."""
    torch.manual_seed(1)
    whole, part = layer(EXPERTS, spec), layer(len(seen), spec)
    whole.router.restrict(0, seen)
    state = whole.state_dict()
    for name, axis in whole.expert_axes().items():
        state[name] = state[name].index_select(axis, torch.tensor(seen))
    state["router.visible"][:] = True
    part.load_state_dict(state)
    return whole, part


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("spec", [RouterSpec(), RouterSpec(type="mlp", renormalize=True)], ids=["linear", "mlp"])
def test_task_computes_as_if_the_others_were_not_there(seen: tuple[int, ...], spec: RouterSpec) -> None:
    whole, part = pair(seen, spec)
    results: list[tuple[Tensor, ...]] = []
    for one in (whole, part):
        x_SD = torch.randn(18, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y_SD, stats = one(x_SD, SEGMENTS[:1])
        (y_SD.square().sum() + stats.prob_TE.square().sum() + stats.lse2_T.sum()).backward()
        results.append((y_SD, x_SD.grad if x_SD.grad is not None else y_SD, stats.count_TE, stats.prob_TE, stats.lse2_T))
    (y_SD, gradient_SD, count_TE, prob_TE, lse2_T), other = results
    assert torch.equal(y_SD, other[0]) and torch.equal(count_TE[:, list(seen)], other[2]), "bit for bit"
    # Sums over tokens and gradients are of tensors with other numbers of columns, which are summed in another order.
    assert_close((gradient_SD, prob_TE[:, list(seen)], lse2_T), (other[1], *other[3:]), rtol=1e-5, atol=1e-7)
    hidden = [e for e in range(EXPERTS) if e not in seen]
    assert results[0][2][:, hidden].sum() == 0 and results[0][3][:, hidden].abs().sum() == 0
    for name, axis in whole.expert_axes().items():
        if name == "router.visible":
            continue
        gradient, alone = whole.get_parameter(name).grad, part.get_parameter(name).grad
        assert gradient is not None and alone is not None
        assert_close(gradient.index_select(axis, torch.tensor(seen)), alone, rtol=1e-4, atol=1e-5)
        assert gradient.index_select(axis, torch.tensor(hidden)).abs().sum() == 0, name


def test_other_tasks_see_all_and_the_same_pack_holds_both() -> None:
    whole, _ = pair(SEEN["any"], RouterSpec())
    x_SD = torch.randn(28, WIDTH)
    routing = whole.router(x_SD, SEGMENTS)
    assert set(routing.expert_SK[:18].unique().tolist()) <= set(SEEN["any"])
    free = whole.router(x_SD[18:], SEGMENTS[1:])
    assert torch.equal(routing.expert_SK[18:], free.expert_SK) and torch.equal(routing.weight_SK[18:], free.weight_SK)
    assert whole.router.seen_by(0) == (1, 4, 6) and whole.router.seen_by(1) == tuple(range(EXPERTS))


def test_hidden_experts_are_not_chosen_where_the_others_have_no_probability_left() -> None:
    router = Router(RouterSpec(), WIDTH, 1, 4, 2)
    router.restrict(0, [2, 3])
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 3] = 1e4
    routing = router(torch.ones(5, WIDTH), (Segment(0, 1, 1, 5),))
    assert routing.expert_SK.tolist() == [[3, 2]] * 5 and routing.weight_SK.tolist() == [[1.0, 0.0]] * 5


def test_visibility_travels_with_the_state() -> None:
    whole, _ = pair(SEEN["any"], RouterSpec())
    other = layer(EXPERTS, RouterSpec())
    other.load_state_dict(whole.state_dict())
    assert other.router.seen_by(0) == (1, 4, 6)
    other.to(torch.bfloat16)
    assert other.router.visible.dtype == torch.bool


@pytest.mark.parametrize("experts", [(1,), (1, 1), (3, 7), (-1, 2)])
def test_a_task_needs_enough_experts_that_exist(experts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a task needs 2 or more of experts 0 to 6"):
        layer(EXPERTS, RouterSpec()).router.restrict(0, experts)


def test_layers_differ_in_number_of_experts() -> None:
    recipe = small_recipe(**{"model.mlp.per_layer": [2, 5], "model.attention.per_layer": [3, 4]})
    network = build_network(recipe)
    counts = [layer.experts.num_experts for layer in network.backbone.sparse_layers().values()]
    assert counts == [3, 2, 4, 5]
    output = network({"digits": torch.randn(2, 3, 32, 32)})
    assert [stats.prob_TE.shape[1] for stats in output.stats] == counts
    state, stacked = network.state_dict(), expert_parameters(recipe)
    assert stacked["backbone.blocks.1.mlp.experts.fc1_weight"] == 5
    back = stack_experts(cut_experts(state, stacked), stacked)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.mlp.per_layer": [4]}, "mlp.per_layer has 1 numbers, the layout 2 sparse layers of this kind"),
        ({"model.attention.per_layer": [4, 1]}, "top_k 2 is larger than the least number in per_layer, 1"),
        ({"model.mlp.per_layer": [4, 3], "parallel.ep_size": 2}, "parallel.ep_size 2 does not divide the 3 experts of a layer"),
    ],
)
def test_numbers_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_recipe(**changes)
