"""Routing losses against numbers worked by hand, their limits, and their gradient over ranks."""

import math

import pytest
import torch
from torch.testing import assert_close

from modsquad_ds import losses


def test_mutual_information_of_uniform_routing_is_zero() -> None:
    joint = losses.task_expert_joint(torch.full((3, 8), 10 / 8), torch.full((3,), 10.0))
    assert_close(losses.mutual_information(joint), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_mutual_information_of_private_experts_is_log_tasks() -> None:
    joint = losses.task_expert_joint(torch.eye(3) * 5, torch.full((3,), 5.0))
    assert losses.mutual_information(joint).item() == pytest.approx(math.log(3), rel=1e-6)


def test_mutual_information_by_hand() -> None:
    # Two tasks, two experts: P(e|1) = (3/4, 1/4), P(e|2) = (1/4, 3/4); the joint is half of that, both marginals 1/2.
    # I = 2 * [3/8 log(3/8 / 1/4) + 1/8 log(1/8 / 1/4)] = 3/4 log 3/2 - 1/4 log 2
    prob, tokens = torch.tensor([[3.0, 1.0], [25.0, 75.0]]), torch.tensor([4.0, 100.0])
    value = losses.mutual_information(losses.task_expert_joint(prob, tokens))
    assert value.item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), rel=1e-6)


def test_mutual_information_has_finite_gradient_at_sharp_routing() -> None:
    prob = (torch.eye(3) * 5).requires_grad_()
    losses.mutual_information(losses.task_expert_joint(prob, torch.full((3,), 5.0))).backward()
    assert prob.grad is not None and prob.grad.isfinite().all()


def test_absent_task_comes_from_memory_without_gradient() -> None:
    prob = torch.tensor([[3.0, 1.0], [0.0, 0.0]], requires_grad=True)
    memory = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    joint = losses.task_expert_joint(prob, torch.tensor([4.0, 0.0]), memory)
    assert_close(joint, torch.tensor([[0.375, 0.125], [0.125, 0.375]]))
    losses.mutual_information(joint).backward()
    assert prob.grad is not None
    assert prob.grad[0].abs().sum() > 0 and prob.grad[1].abs().sum() == 0


def test_unknown_task_is_left_out() -> None:
    joint = losses.task_expert_joint(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([4.0, 0.0]))
    assert_close(joint, torch.tensor([[0.75, 0.25], [0.0, 0.0]]))


def test_mutual_information_over_ranks_has_the_gradient_of_one_process() -> None:
    torch.manual_seed(0)
    world, tasks, experts = 4, 3, 5
    logits = torch.randn(world, tasks, experts, requires_grad=True)
    tokens = torch.tensor([[3.0, 7.0, 1.0], [2.0, 0.0, 5.0], [1.0, 1.0, 1.0], [4.0, 9.0, 2.0]])
    per_rank = logits.softmax(-1) * tokens.unsqueeze(-1)
    whole = losses.mutual_information(losses.task_expert_joint(per_rank.sum(0), tokens.sum(0)))
    (expected,) = torch.autograd.grad(whole, logits)

    gradients = []
    for rank in range(world):
        own = (logits[rank].softmax(-1) * tokens[rank].unsqueeze(-1)).clone()
        total = losses.localized(per_rank.sum(0), own, world)
        value = losses.mutual_information(losses.task_expert_joint(total, tokens.sum(0)))
        assert_close(value, whole)
        gradients.append(torch.autograd.grad(value, logits)[0] / world)
    assert_close(sum(gradients), expected)


def test_concentration_by_hand() -> None:
    """Task 0 routes evenly and is remembered as (3/4, 1/4); task 1 is absent; task 2 is not remembered: its own entropy."""
    prob = torch.tensor([[5.0, 5.0], [0.0, 0.0], [1.0, 3.0]], requires_grad=True)
    memory = torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]])
    value = losses.concentration(prob, torch.tensor([10.0, 0.0, 4.0]), memory)
    first = -0.5 * (math.log(0.75) + math.log(0.25))
    third = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert value.item() == pytest.approx((first + third) / 2, abs=5e-4)
    value.backward()
    assert prob.grad is not None
    # d/d prob[0] = -log(memory) / (10 tokens * 2 tasks): going down, more of the routing goes to the remembered expert.
    assert prob.grad[0].tolist() == pytest.approx([-math.log(0.75) / 20, -math.log(0.25) / 20], abs=1e-4)
    assert prob.grad[1].tolist() == [0, 0]
    assert prob.grad[2].tolist() == pytest.approx([-math.log(0.25) / 8, -math.log(0.75) / 8], abs=1e-4)


def test_load_balance_by_hand() -> None:
    # f = (3/4, 1/4), P = (0.6, 0.4): 2 * (0.45 + 0.1) = 1.1
    value = losses.load_balance(torch.tensor([[6.0, 4.0]]), torch.tensor([[3.0, 1.0]]))
    assert value.item() == pytest.approx(1.1)
    balanced = losses.load_balance(torch.full((2, 4), 5.0), torch.full((2, 4), 3.0))
    assert balanced.item() == pytest.approx(1.0)


def test_router_z_by_hand() -> None:
    # squared logsumexps 4 + 16 of 2 + 3 tokens: 20 / 5
    assert losses.router_z(torch.tensor([4.0, 16.0]), torch.tensor([2.0, 3.0])).item() == pytest.approx(4.0)


def test_uncertainty_weighting_by_hand() -> None:
    # task 1: 3 / (2 * 4) + log 5; task 2 is absent
    value = losses.uncertainty_weighted(
        torch.tensor([3.0, 100.0]), torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])
    )
    assert value.item() == pytest.approx(3 / 8 + math.log(5))


def test_weighted_mean_terms_by_hand() -> None:
    # 2 * 6/3 + 0.5 * 4/max(1, 0) = 6
    sums, counts = [torch.tensor(6.0), torch.tensor(4.0)], [torch.tensor(3.0), torch.tensor(0.0)]
    assert losses.weighted_mean_terms(sums, counts, [2.0, 0.5], [None, None]).item() == pytest.approx(6.0)
