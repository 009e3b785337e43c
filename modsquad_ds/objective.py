"""From a forward pass to one number to minimise: sums of this rank, sums of all ranks, weights. Between network and engine.

A step's value is computed from sums over all ranks, reduced together in one all-reduce; gradients flow through this rank's
sums alone (`losses.localized`). So any number of ranks minimises the same loss as one, and every rank knows the same values.

Axes: T tasks, E experts, L sparse layers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modsquad_ds import losses
from modsquad_ds.config import LossSpec, Recipe
from modsquad_ds.model.heads.base import LossTerm
from modsquad_ds.model.router import RoutingStats

Terms = Mapping[str, Mapping[str, LossTerm]]
"""Task -> name of the term -> term."""


class Usage(NamedTuple):
    """Who uses which expert of one sparse layer: a moving average over steps, kept by the trainer and saved with the model."""

    prob_TE: Tensor
    """Mean softmax probability P(expert | task); zeros for a task not seen yet."""
    share_TE: Tensor
    """Share of the task's top-k choices that fell on the expert; rows sum to 1, or 0 if not seen."""


class Report(NamedTuple):
    """Values of one step over all ranks; scalars or small vectors, detached."""

    total: Tensor
    task_T: Tensor
    """Each task's loss before its weight; 0 for a task absent from the step."""
    present_T: Tensor
    """1 for the step's tasks, 0 for absent ones."""
    information_L: Tensor
    """Mutual information of task and expert per sparse layer, nats."""
    balance_L: Tensor
    """Load-balance loss per sparse layer; 1 is balanced."""
    dropped_T: Tensor
    """Share of each task's top-k choices, over all sparse layers, that found no place in their expert; 0 without a capacity."""


def no_usage(stats: Sequence[RoutingStats]) -> tuple[Usage, ...]:
    """Nothing seen yet."""
    return tuple(Usage(torch.zeros_like(s.prob_TE.detach()), torch.zeros_like(s.count_TE)) for s in stats)


def updated_usage(usage: Sequence[Usage], stats: Sequence[RoutingStats], decay: float) -> tuple[Usage, ...]:
    """The moving average after one more step; a task's first step sets its row, absent tasks keep theirs."""
    return tuple(_updated(old, new, decay) for old, new in zip(usage, stats, strict=True))


def drop_rate(stats: Sequence[RoutingStats], present_T: Tensor) -> Tensor:
    """Dropped / chosen slots of each task over all layers, `[T]`; 0 for absent tasks and without layers."""
    if not stats:
        return torch.zeros_like(present_T)
    dropped_T = torch.stack([s.dropped_T for s in stats]).sum(0)
    chosen_T = torch.stack([s.count_TE.sum(1) for s in stats]).sum(0)
    return (dropped_T / chosen_T.clamp(min=1)).detach()


def flatten(terms: Terms, stats: Sequence[RoutingStats]) -> list[Tensor]:
    """All sums of a step in a fixed order, for one reduction over ranks."""
    flat = [x for of_task in terms.values() for term in of_task.values() for x in (term.sum, term.count, term.part)]
    return [x for x in flat if x is not None] + [x for s in stats for x in s]


def unflatten(flat: Sequence[Tensor], terms: Terms, stats: Sequence[RoutingStats]) -> tuple[Terms, tuple[RoutingStats, ...]]:
    """The inverse of `flatten`; `terms` and `stats` give the structure and the weights."""
    rest = iter(flat)
    rebuilt = {
        task: {
            name: LossTerm(next(rest), next(rest), term.weight, None if term.part is None else next(rest))
            for name, term in of_task.items()
        }
        for task, of_task in terms.items()
    }
    return rebuilt, tuple(RoutingStats(*(next(rest) for _ in s)) for s in stats)


class Objective:
    """The recipe's loss, for a number of ranks. Holds no state besides its settings."""

    def __init__(self, recipe: Recipe, world: int) -> None:
        self.spec: LossSpec = recipe.loss
        self.concentrate = recipe.adapt.concentrate
        self.tasks = recipe.active
        self.world = world

    def __call__(
        self,
        local: tuple[Terms, Sequence[RoutingStats]],
        total: tuple[Terms, Sequence[RoutingStats]],
        usage: Sequence[Usage],
        scale_T: Tensor | None,
    ) -> tuple[Tensor, Report]:
        """Loss to backpropagate on this rank, and the step's values.

        Args:
            local: this rank's sums, with gradient.
            total: the same sums over all ranks.
            usage: what absent tasks are remembered by.
            scale_T: the learned scales of `weighting: uncertainty`.
        """
        task_T, present_T = self._task_losses(local[0], total[0])
        weight_T = _sent([spec.loss_weight for spec in self.tasks.values()], task_T)
        if scale_T is None:
            loss = (task_T * weight_T).sum()
        else:
            loss = losses.uncertainty_weighted(task_T * weight_T, scale_T.float(), present_T)
        routing, information_L, balance_L = self._routing_losses(local[1], total[1], usage)
        loss = loss + routing
        dropped_T = drop_rate(total[1], present_T)
        return loss, Report(loss.detach(), task_T.detach(), present_T, information_L, balance_L, dropped_T)

    def _task_losses(self, local: Terms, total: Terms) -> tuple[Tensor, Tensor]:
        """Loss of every task of the recipe (0 where absent) and which are present, both `[T]`."""
        any_term = next(iter(next(iter(local.values())).values())).sum
        values, present = [], []
        for task in self.tasks:
            mine, all_ranks = local.get(task, {}), total.get(task, {})
            sums = [losses.localized(all_ranks[n].sum, mine[n].sum, self.world) for n in mine]
            counts = [all_ranks[n].count for n in mine]
            weights, parts = [term.weight for term in mine.values()], [all_ranks[n].part for n in mine]
            values.append(losses.weighted_mean_terms(sums, counts, weights, parts) if mine else any_term.new_zeros(()))
            present.append(1.0 if mine else 0.0)
        return torch.stack(values), _sent(present, any_term)

    def _routing_losses(
        self, local: Sequence[RoutingStats], total: Sequence[RoutingStats], usage: Sequence[Usage]
    ) -> tuple[Tensor | float, Tensor, Tensor]:
        """Weighted sum of the losses on routing, and per layer the mutual information and the balance."""
        loss: Tensor | float = 0.0
        information, balance = [], []
        for mine, all_ranks, remembered in zip(local, total, usage, strict=True):
            prob_TE = losses.localized(all_ranks.prob_TE, mine.prob_TE, self.world)
            joint_TE = losses.task_expert_joint(prob_TE, all_ranks.token_T, remembered.prob_TE)
            information.append(losses.mutual_information(joint_TE))
            balance.append(losses.load_balance(prob_TE, all_ranks.count_TE))
            lse2_T = losses.localized(all_ranks.lse2_T, mine.lse2_T, self.world)
            z = losses.router_z(lse2_T, all_ranks.token_T)
            concentration = losses.concentration(prob_TE, all_ranks.token_T, remembered.prob_TE) if self.concentrate else 0.0
            for weight, value in (
                (-self.spec.mutual_information, information[-1]),
                (self.spec.load_balance, balance[-1]),
                (self.spec.z_loss, z),
                (self.concentrate, concentration),
            ):
                loss = loss + weight * value if weight else loss
        return loss, _vector(information), _vector(balance)


def _sent(numbers: list[float], like: Tensor) -> Tensor:
    """fp32 vector on the device of `like`; `new_tensor` would wait until the device has done all that was asked of it."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)


def _vector(scalars: list[Tensor]) -> Tensor:
    return torch.stack(scalars).detach() if scalars else torch.zeros(0)


def _updated(old: Usage, stats: RoutingStats, decay: float) -> Usage:
    seen_T1 = (stats.token_T > 0).unsqueeze(1)
    prob_TE = stats.prob_TE / stats.token_T.clamp(min=1).unsqueeze(1)
    share_TE = stats.count_TE / stats.count_TE.sum(1, keepdim=True).clamp(min=1)
    new_T1 = old.prob_TE.sum(1, keepdim=True) == 0
    keep_T1 = torch.where(new_T1, 0.0, decay)
    pairs = ((old.prob_TE, prob_TE), (old.share_TE, share_TE))
    return Usage(*(torch.where(seen_T1, keep_T1 * a + (1 - keep_T1) * b, a) for a, b in pairs))
