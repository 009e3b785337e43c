"""The objective by hand: task and routing losses, absent tasks, remembered usage, and ranks that together are one process."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modsquad_ds.data.types import Batch
from modsquad_ds.model.heads.base import LossTerm
from modsquad_ds.model.network import MultiTaskNetwork, build_network
from modsquad_ds.model.router import RoutingStats
from modsquad_ds.objective import Objective, Report, Terms, Usage, flatten, no_usage, unflatten, updated_usage
from modsquad_ds.trainer import mean_report
from small import small_batch, small_images, small_recipe

OFF = {"loss.mutual_information": 0.0, "loss.load_balance": 0.0, "loss.z_loss": 0.0}
WEIGHTS = {"tasks.scenes.loss_weight": 2.0, "tasks.textures.loss_weight": 0.5}
PAIR = {"only": ["digits", "textures"]}


def term(total: float, count: float, weight: float = 1.0) -> LossTerm:
    return LossTerm(torch.tensor(total, requires_grad=True), torch.tensor(count), weight)


TERMS: Terms = {
    "digits": {"ce": term(6.0, 3.0)},  # 2
    "scenes": {"focal": term(10.0, 4.0), "giou": term(3.0, 0.0, 2.0)},  # 2.5 + 2 * 3 / max(1, 0) = 8.5
    "textures": {"ce": term(9.0, 6.0), "aux_ce": term(5.0, 10.0, 0.4)},  # 1.5 + 0.4 * 0.5 = 1.7
}


def stats_of(prob: Sequence[Any], count: Sequence[Any], token: Sequence[float], lse2: Sequence[float]) -> RoutingStats:
    prob_TE, lse2_T = torch.tensor(prob, requires_grad=True), torch.tensor(lse2, requires_grad=True)
    return RoutingStats(prob_TE, torch.tensor(count), torch.tensor(token), lse2_T, torch.zeros(len(token)))


def two_tasks() -> RoutingStats:
    """Two tasks, two experts; 4 and 100 tokens."""
    return stats_of([[3.0, 1.0], [25.0, 75.0]], [[4.0, 0.0], [50.0, 50.0]], [4.0, 100.0], [16.0, 192.0])


INFORMATION = 0.75 * math.log(1.5) - 0.25 * math.log(2)  # tests/test_losses.py
BALANCE = 2 * (54 * 28 + 50 * 76) / 104**2  # shares 54, 50 and probabilities 28, 76 of 104
Z = 208 / 104


def alone(recipe_changes: dict[str, Any], terms: Terms, stats: Sequence[RoutingStats], **inputs: Any) -> tuple[Tensor, Report]:
    """The objective of one process: the sums over all ranks are its own."""
    usage = inputs.get("usage", no_usage(stats))
    everything = (terms, stats)
    return Objective(small_recipe(**recipe_changes), 1)(everything, detached(everything), usage, inputs.get("scale_T"))


def detached(sums: tuple[Terms, Sequence[RoutingStats]]) -> tuple[Terms, Sequence[RoutingStats]]:
    return unflatten([x.detach() for x in flatten(*sums)], *sums)


# ---------------------------------------------------------------- values


def test_task_losses_by_hand() -> None:
    loss, report = alone({**OFF, **WEIGHTS}, TERMS, ())
    assert loss.item() == pytest.approx(2.0 + 2 * 8.5 + 0.5 * 1.7)
    assert_close(report.task_T, torch.tensor([2.0, 8.5, 1.7]))
    assert report.present_T.tolist() == [1, 1, 1]
    assert report.total.item() == loss.item()
    assert not any(x.requires_grad for x in report) and loss.requires_grad


def test_learned_scales_by_hand() -> None:
    scale = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
    loss, report = alone({**OFF, **WEIGHTS}, TERMS, (), scale_T=scale)
    by_hand = [2 / 2 + math.log(2), 17 / 8 + math.log(5), 0.85 / 0.5 + math.log(1.25)]
    assert loss.item() == pytest.approx(sum(by_hand))
    assert_close(report.task_T, torch.tensor([2.0, 8.5, 1.7]))  # reported before any weight
    loss.backward()
    # d/ds of L / (2 s^2) + log(1 + s^2) is -L / s^3 + 2 s / (1 + s^2).
    assert scale.grad is not None
    assert_close(scale.grad, torch.tensor([-2 + 1, -17 / 8 + 0.8, -0.85 * 8 + 0.8]))


def test_routing_losses_by_hand() -> None:
    terms = {"digits": TERMS["digits"], "textures": TERMS["textures"]}
    weights = {"loss.mutual_information": 0.5, "loss.load_balance": 0.01, "loss.z_loss": 0.001}
    uniform = stats_of([[2.0, 2.0], [50.0, 50.0]], [[2.0, 2.0], [50.0, 50.0]], [4.0, 100.0], [0.0, 0.0])
    loss, report = alone({**PAIR, **WEIGHTS, **weights}, terms, (two_tasks(), uniform))
    assert_close(report.information_L, torch.tensor([INFORMATION, 0.0]), atol=1e-6, rtol=1e-5)
    assert_close(report.balance_L, torch.tensor([BALANCE, 1.0]))
    routing = -0.5 * INFORMATION + 0.01 * (BALANCE + 1) + 0.001 * Z
    assert loss.item() == pytest.approx(2.0 + 0.85 + routing, rel=1e-6)


@pytest.mark.parametrize("name", list(OFF))
def test_each_routing_weight_turns_on_its_own_loss(name: str) -> None:
    terms = {"digits": TERMS["digits"]}
    stats = two_tasks()
    loss, _ = alone({**PAIR, **OFF, name: 3.0}, terms, (stats,))
    value = {"loss.mutual_information": -INFORMATION, "loss.load_balance": BALANCE, "loss.z_loss": Z}[name]
    assert loss.item() == pytest.approx(2.0 + 3 * value, rel=1e-6)
    grads = torch.autograd.grad(loss, (stats.prob_TE, stats.lse2_T), allow_unused=True)
    assert [g is not None for g in grads] == ([False, True] if name == "loss.z_loss" else [True, False])


def test_weights_of_zero_add_nothing() -> None:
    stats = two_tasks()
    loss, report = alone({**PAIR, **OFF}, {"digits": TERMS["digits"]}, (stats,))
    assert loss.item() == 2.0
    assert torch.autograd.grad(loss, (stats.prob_TE, stats.lse2_T), allow_unused=True) == (None, None)
    assert report.information_L.item() == pytest.approx(INFORMATION, rel=1e-5), "still reported"


# ---------------------------------------------------------------- absent tasks


def test_absent_tasks_contribute_nothing() -> None:
    scale = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
    loss, report = alone({**OFF, **WEIGHTS}, {"scenes": TERMS["scenes"]}, (), scale_T=scale)
    assert loss.item() == pytest.approx(17 / 8 + math.log(5))
    assert report.task_T.tolist() == [0, 8.5, 0] and report.present_T.tolist() == [0, 1, 0]
    loss.backward()
    assert scale.grad is not None and scale.grad[0] == scale.grad[2] == 0 and scale.grad[1] != 0
    assert alone({**OFF, **WEIGHTS}, {"scenes": TERMS["scenes"]}, ())[0].item() == pytest.approx(17)


def test_a_tasks_loss_is_the_mean_over_the_micro_batches_that_have_it() -> None:
    """8.5 in one of three micro-batches, the others without the task: 8.5, not a third of it; never there: 0."""
    one = alone({**OFF, **WEIGHTS}, {"scenes": TERMS["scenes"]}, ())[1]
    other = alone({**OFF, **WEIGHTS}, {"digits": TERMS["digits"]}, ())[1]
    found = mean_report([one, other, other])
    assert found.task_T.tolist() == pytest.approx([2.0, 8.5, 0])
    assert found.present_T.tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert found.total.item() == pytest.approx((one.total.item() + 2 * other.total.item()) / 3), "what is minimised"
    assert mean_report([one]).task_T.tolist() == one.task_T.tolist()


def test_information_takes_absent_tasks_from_memory() -> None:
    stats = stats_of([[3.0, 1.0], [0.0, 0.0]], [[4.0, 4.0], [0.0, 0.0]], [4.0, 0.0], [0.0, 0.0])
    memory = Usage(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.zeros(2, 2))
    weight = {**PAIR, **OFF, "loss.mutual_information": 1.0}
    loss, report = alone(weight, {"digits": TERMS["digits"]}, (stats,), usage=(memory,))
    # The present task by its own tokens, the absent one as remembered: the table of `two_tasks`.
    assert report.information_L.item() == pytest.approx(INFORMATION, rel=1e-5)
    assert loss.item() == pytest.approx(2 - INFORMATION, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, stats.prob_TE)
    assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0
    unknown = alone(weight, {"digits": TERMS["digits"]}, (stats,))[1]
    assert unknown.information_L.item() == pytest.approx(0, abs=1e-6), "one known task tells nothing"


# ---------------------------------------------------------------- sums


def test_flatten_and_unflatten_are_inverse() -> None:
    stats = (two_tasks(), two_tasks())
    flat = flatten(TERMS, stats)
    assert len(flat) == 2 * 5 + 2 * 5
    numbered = [torch.full_like(x.detach(), i) for i, x in enumerate(flat)]
    terms, again = unflatten(numbered, TERMS, stats)
    assert [(task, list(named)) for task, named in terms.items()] == [(task, list(named)) for task, named in TERMS.items()]
    assert terms["textures"]["aux_ce"].weight == 0.4
    assert (terms["digits"]["ce"].sum, terms["digits"]["ce"].count) == (0, 1)
    assert again[1].token_T.tolist() == [17, 17] and again[0].prob_TE.shape == (2, 2)
    assert all(torch.equal(a, b) for a, b in zip(flatten(terms, again), numbered, strict=True))


def test_no_usage_is_zero_of_the_right_shape() -> None:
    (usage,) = no_usage((two_tasks(),))
    assert usage.prob_TE.shape == usage.share_TE.shape == (2, 2)
    assert not usage.prob_TE.any() and not usage.share_TE.any() and not usage.prob_TE.requires_grad


def test_usage_by_hand() -> None:
    def stats(prob: list[list[float]], count: list[list[float]], token: list[float]) -> list[RoutingStats]:
        return [RoutingStats(torch.tensor(prob), torch.tensor(count), torch.tensor(token), torch.zeros(2), torch.zeros(2))]

    first = stats([[3.0, 1.0], [0.0, 0.0]], [[6.0, 2.0], [0.0, 0.0]], [4.0, 0.0])
    usage = updated_usage(no_usage(first), first, decay=0.9)
    assert_close(usage[0].prob_TE, torch.tensor([[0.75, 0.25], [0.0, 0.0]]))  # first sight: as it is
    assert_close(usage[0].share_TE, torch.tensor([[0.75, 0.25], [0.0, 0.0]]))
    second = stats([[0.0, 0.0], [2.0, 8.0]], [[0.0, 0.0], [5.0, 15.0]], [0.0, 10.0])
    usage = updated_usage(usage, second, decay=0.9)
    assert_close(usage[0].prob_TE, torch.tensor([[0.75, 0.25], [0.2, 0.8]]))  # absent: as it was
    assert_close(usage[0].share_TE, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    third = stats([[1.0, 3.0], [0.0, 0.0]], [[0.0, 8.0], [0.0, 0.0]], [4.0, 0.0])
    usage = updated_usage(usage, third, decay=0.9)
    assert_close(usage[0].prob_TE, torch.tensor([[0.9 * 0.75 + 0.1 * 0.25, 0.9 * 0.25 + 0.1 * 0.75], [0.2, 0.8]]))
    assert_close(usage[0].share_TE, torch.tensor([[0.9 * 0.75, 0.9 * 0.25 + 0.1], [0.25, 0.75]]))
    assert updated_usage((), (), 0.9) == ()


# ---------------------------------------------------------------- ranks


def sums_of(network: MultiTaskNetwork, batch: Batch) -> tuple[Terms, Sequence[RoutingStats]]:
    output = network(small_images(batch))
    terms = {task: network.head(task).losses(output.outputs[task], sub.targets) for task, sub in batch.items()}
    return terms, output.stats


def gradients_of(changes: dict[str, Any], world: int, tasks: Sequence[str]) -> tuple[Report, dict[str, Tensor]]:
    """What `world` ranks, one after the other in this process, average to; every rank must report the same."""
    recipe = small_recipe(**changes)
    network = build_network(recipe)
    with torch.no_grad():
        for parameter in network.backbone.parameters():
            parameter.mul_(4.0)  # away from near-uniform routing
    parts = [{t: sub for t, sub in small_batch(0, rank, world).items() if t in tasks} for rank in range(world)]
    local = [sums_of(network, part) for part in parts]
    added = [torch.stack(x).sum(0).detach() for x in zip(*(flatten(*sums) for sums in local), strict=True)]
    total = unflatten(added, *local[0])
    remembered = [torch.rand(s.prob_TE.shape, generator=torch.Generator().manual_seed(1)).softmax(1) for s in total[1]]
    usage = [Usage(prob_TE, prob_TE) for prob_TE in remembered]
    reports = []
    for sums in local:
        loss, report = Objective(recipe, world)(sums, total, usage, network.task_scale)
        (loss / world).backward()
        reports.append(report)
    for report in reports[1:]:
        assert all(torch.equal(a, b) for a, b in zip(report, reports[0], strict=True))
    return reports[0], {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("tasks", "changes"),
    [
        (("digits", "scenes", "textures"), {"loss.load_balance": 0.3, "loss.z_loss": 0.1, "loss.mutual_information": 2.0}),
        (("scenes",), {"loss.load_balance": 0.3, "loss.mutual_information": 2.0}),
        (("digits", "scenes", "textures"), {"loss.weighting": "uncertainty"}),
        (("digits", "scenes", "textures"), {"model.layout": "dense"}),
    ],
)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_average_to_the_gradient_of_one_process(tasks: Sequence[str], changes: dict[str, Any], world: int) -> None:
    expected_report, expected = gradients_of(changes, 1, tasks)
    report, found = gradients_of(changes, world, tasks)
    for name, a, b in zip(Report._fields, report, expected_report, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert (found[name] - gradient).abs().max().item() <= 2e-5 * scale + 1e-7, name
    assert sum(g.abs().sum() > 0 for g in expected.values()) > 10


def test_dense_and_sparse_networks_report_their_layers() -> None:
    tasks = ("digits", "scenes", "textures")
    dense, _ = gradients_of({"model.layout": "dense"}, 1, tasks)
    sparse, _ = gradients_of({}, 1, tasks)
    assert dense.information_L.shape == dense.balance_L.shape == (0,)
    assert sparse.information_L.shape == sparse.balance_L.shape == (4,)
    assert dense.total == pytest.approx(dense.task_T.sum().item())
