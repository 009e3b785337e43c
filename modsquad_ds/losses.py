"""Losses on the routing, and the weighting of task losses: pure functions of tensors. Called by objective.py.

Axes: T tasks, E experts, L sparse layers.

Granularity: every statistic is a sum over the whole step, over all ranks. No autograd through a collective is needed: the
value comes from the all-reduced sums and the gradient from this rank's part (`localized`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def localized(total: Tensor, local: Tensor, world: int) -> Tensor:
    """Value of `total` (summed over ranks), gradient of this rank's share times the number of ranks.

    The engine averages gradients over `world` ranks, so the factor makes that average the exact gradient of a loss on `total`.
    """
    share = world * local
    return total.detach() + (share - share.detach())


def task_expert_joint(prob_TE: Tensor, token_T: Tensor, memory_TE: Tensor | None = None) -> Tensor:
    """Joint P(t, e) `[T', E]` over the tasks that are known, each with P(t) = 1/T', whatever its number of tokens.

    Args:
        prob_TE: sums over tokens of the routers' softmax.
        token_T: tokens of each task; 0 for a task absent from the step.
        memory_TE: remembered P(e | t), standing in for absent tasks (arXiv 2306.17165); rows of zeros are unknown. Without
            it absent tasks are left out.
    """
    conditional_TE = prob_TE / token_T.clamp(min=1).unsqueeze(1)
    if memory_TE is not None:
        conditional_TE = torch.where((token_T > 0).unsqueeze(1), conditional_TE, memory_TE)
    known_T1 = (conditional_TE.detach().sum(1, keepdim=True) > 0).to(conditional_TE.dtype)
    return conditional_TE * known_T1 / known_T1.sum().clamp(min=1)


def mutual_information(joint_TE: Tensor) -> Tensor:
    """I(T; E) in nats: sum of P(t,e) log(P(t,e) / (P(t) P(e))), with 0 log 0 = 0. Mod-Squad (arXiv 2212.08066), MI loss.

    0 for routing that ignores the task, log T where every task has experts of its own.
    """
    independent_TE = joint_TE.sum(1, keepdim=True) * joint_TE.sum(0, keepdim=True)
    return torch.special.xlogy(joint_TE, _safe(joint_TE)).sum() - torch.special.xlogy(joint_TE, _safe(independent_TE)).sum()


def concentration(prob_TE: Tensor, token_T: Tensor, memory_TE: Tensor) -> Tensor:
    """Cross entropy, nats, of each present task's routing P(e | t) with what it is remembered by, mean over these tasks.

    Small where a task keeps to few experts: the remembered share of an expert draws more of the routing to it. Gradients reach
    the present routing alone. The fine-tuning term of arXiv 2306.17165, without its constants.

    Args:
        prob_TE: sums over tokens of the routers' softmax.
        token_T: tokens of each task; 0 for a task absent from the step.
        memory_TE: remembered P(e | t); a row of zeros is unknown, and the present routing stands for it.
    """
    present_T1 = (token_T > 0).unsqueeze(1)
    conditional_TE = prob_TE / token_T.clamp(min=1).unsqueeze(1)
    known_T1 = memory_TE.sum(1, keepdim=True) > 0
    drawn_to_TE = torch.where(known_T1, memory_TE, conditional_TE.detach())
    entropy_T = -(conditional_TE * (drawn_to_TE + 1e-4).log()).sum(1, keepdim=True)
    return torch.where(present_T1, entropy_T, 0.0).sum() / present_T1.sum().clamp(min=1)


def load_balance(prob_TE: Tensor, count_TE: Tensor) -> Tensor:
    """E * sum_e f_e P_e over all tasks' tokens: 1 when balanced. Switch Transformer (arXiv 2101.03961), equation 4."""
    share_E = count_TE.sum(0) / count_TE.sum().clamp(min=1)
    prob_E = prob_TE.sum(0) / prob_TE.detach().sum().clamp(min=1e-9)
    return prob_TE.shape[1] * (share_E.detach() * prob_E).sum()


def router_z(lse2_T: Tensor, token_T: Tensor) -> Tensor:
    """Mean squared logsumexp of the router's logits. ST-MoE (arXiv 2202.08906), equation 5."""
    return lse2_T.sum() / token_T.sum().clamp(min=1)


def uncertainty_weighted(loss_T: Tensor, scale_T: Tensor, present_T: Tensor) -> Tensor:
    """Sum over present tasks of loss / (2 s^2) + log(1 + s^2), s learned. Mod-Squad's; Liebel and Koerner (arXiv 1805.06334)."""
    square_T = scale_T.square()
    return (present_T * (0.5 * loss_T / square_T + torch.log1p(square_T))).sum()


def weighted_mean_terms(
    sums: Sequence[Tensor], counts: Sequence[Tensor], weights: Sequence[float], parts: Sequence[Tensor | None]
) -> Tensor:
    """Sum of weight * sum / count * (part / count, if any): one task's loss from its terms; a count of 0 divides by 1."""
    terms = []
    for s, count, weight, part in zip(sums, counts, weights, parts, strict=True):
        mean = weight * s / count.clamp(min=1)
        terms.append(mean if part is None else mean * (part / count.clamp(min=1)))
    return torch.stack(terms).sum()


def _safe(x: Tensor) -> Tensor:
    """Keeps log finite where the factor before it is exactly 0; changes nothing else."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)
