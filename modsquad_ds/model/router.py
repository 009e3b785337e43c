"""Routers: which experts each token uses. The first of a sparse layer's four verbs; its result carries all that losses need.

Axes: S tokens in the pack, D width, T tasks, E experts, K top-k, R hidden width of a two-layer router.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modsquad_ds.model.pack import Segment, slices
from modsquad_ds.model_spec import RouterSpec


class RoutingStats(NamedTuple):
    """Sums over one pack, per task. Returned by every sparse layer, never stored; sums over ranks are sums of these."""

    prob_TE: Tensor
    """fp32, differentiable: sum over the task's tokens of the softmax over all experts."""
    count_TE: Tensor
    """fp32: how often each expert was chosen. Exact up to 2^24 choices per task and pack."""
    token_T: Tensor
    """fp32: tokens of each task."""
    lse2_T: Tensor
    """fp32, differentiable: sum of the squared logsumexp of the logits (router z-loss)."""
    dropped_T: Tensor
    """fp32: choices of each task that found no place in their expert; zeros without a capacity (`capacity.py`)."""


class Routing(NamedTuple):
    """The choice for each token of a pack."""

    expert_SK: Tensor
    """int64: chosen experts, best first; of equals the lower number first."""
    weight_SK: Tensor
    """fp32: gate weights."""
    stats: RoutingStats
    filling_S: Tensor | None = None
    """bool: tokens of rows that only fill up, which the statistics leave out; None: there are no such rows."""

    @property
    def rows_per_expert(self) -> Tensor:
        """fp32 `[E]`: rows that each expert gets."""
        counted_E = self.stats.count_TE.detach().sum(0)
        if self.filling_S is None:
            return counted_E
        chosen_R = self.expert_SK.flatten()
        return torch.zeros_like(counted_E).scatter_add(0, chosen_R, counted_E.new_ones(1).expand(chosen_R.numel()))


class Router(nn.Module):
    """One router per task in stacked parameters (or one for all), softmax over all experts in fp32, then top-k.

    Stacked, because per-task modules that see different tasks on different ranks break ZeRO. Gate weights are not
    renormalised by default, as in Mod-Squad (arXiv 2212.08066) and its heterogeneous follow-up (arXiv 2306.17165).
    """

    def __init__(self, spec: RouterSpec, width: int, tasks: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.visible: Tensor
        """bool `[rows, E]`: experts that a row may choose; all, unless experts were added for other tasks or taken away."""
        self.spec, self.tasks, self.num_experts, self.top_k = spec, tasks, num_experts, top_k
        self.per_expert: tuple[str, ...] = ("weight", "bias") if spec.type == "mlp" else ("weight",)
        """Parameters whose axis 1 counts experts."""
        rows = tasks if spec.per_task else 1
        self.register_buffer("visible", torch.ones(rows, num_experts, dtype=torch.bool))
        self._columns: list[tuple[int, ...] | None] = [None] * rows
        # What the host needs to know of `visible` is read when it changes: reading it in `forward` would wait for the device.
        self.register_load_state_dict_post_hook(lambda module, _: module._read_visible())
        if spec.type == "mlp":
            hidden = max(1, width // 4)
            self.reduce = nn.Parameter(torch.empty(rows, hidden, width))
            self.reduce_bias = nn.Parameter(torch.zeros(rows, hidden))
            self.weight = nn.Parameter(torch.empty(rows, num_experts, hidden))
            self.bias = nn.Parameter(torch.zeros(rows, num_experts))
            nn.init.trunc_normal_(self.reduce, std=0.02)
        else:
            self.weight = nn.Parameter(torch.empty(rows, num_experts, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x_SD: Tensor, segments: tuple[Segment, ...]) -> Routing:
        """Routing of `x_SD`. Noise acts in training mode only and is drawn from torch's generator of the device."""
        logits = [self._logits(x_ND, segment.task) for segment, x_ND in slices(x_SD, segments)]
        logits_SE, prob_SE, rank_SE = self._over_experts(logits, segments)
        expert_SK = self.choose(rank_SE)
        weight_SK = prob_SE.gather(1, expert_SK)
        if self.spec.renormalize:
            weight_SK = weight_SK / weight_SK.sum(-1, keepdim=True)
        stats = self._stats(logits_SE, prob_SE, expert_SK, segments)
        return Routing(expert_SK, weight_SK, stats, _filling(segments, x_SD.device))

    def choose(self, prob_SE: Tensor) -> Tensor:
        """The chosen experts `[S, K]`: the most probable, best first. Benchmarks put another choice in its place."""
        return _top_k(prob_SE, self.top_k)

    def restrict(self, task: int, experts: Sequence[int]) -> None:
        """Let a task choose among these experts alone. Raises ValueError where they are fewer than top-k or not the layer's."""
        chosen = sorted(set(experts))
        if len(chosen) < self.top_k or not set(chosen) <= set(range(self.num_experts)):
            raise ValueError(f"a task needs {self.top_k} or more of experts 0 to {self.num_experts - 1}, given {chosen}")
        self.visible[self._row(task)] = False
        self.visible[self._row(task), chosen] = True
        self._read_visible()

    def seen_by(self, task: int) -> tuple[int, ...]:
        """Experts that a task may choose."""
        return self._columns[self._row(task)] or tuple(range(self.num_experts))

    def _over_experts(self, logits: list[Tensor], segments: tuple[Segment, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 `[S, E]`: logits, probabilities, and what experts are chosen by. Each task's softmax is over those it sees.

        The operations are those of a layer that has no other experts, so the bits are too.
        """
        if not any(self._columns):
            logits_SE = torch.cat(logits)
            prob_SE = logits_SE.softmax(-1)
            return logits_SE, prob_SE, prob_SE.detach()
        rows = [self._row(segment.task) for segment in segments]

        def whole(parts: list[Tensor], hidden: float) -> Tensor:
            return torch.cat([self._spread(part, row, hidden) for part, row in zip(parts, rows, strict=True)])

        prob = [part.softmax(-1) for part in logits]
        return whole(logits, -torch.inf), whole(prob, 0.0), whole([part.detach() for part in prob], -1.0)

    def _row(self, task: int) -> int:
        return task if self.spec.per_task else 0

    def _read_visible(self) -> None:
        if not self.visible.is_meta:
            rows = self.visible.tolist()
            self._columns = [None if all(row) else tuple(e for e, sees in enumerate(row) if sees) for row in rows]

    def _spread(self, value_NV: Tensor, row: int, hidden: float) -> Tensor:
        """`[N, V]` of the row's visible experts -> `[N, E]`, with `hidden` for the others."""
        columns = self._columns[row]
        if columns is None:
            return value_NV
        if columns == tuple(range(len(columns))):
            return F.pad(value_NV, (0, self.num_experts - len(columns)), value=hidden)
        whole_NE = value_NV.new_full((value_NV.shape[0], self.num_experts), hidden)
        return whole_NE.index_copy(1, self.visible[row].nonzero_static(size=len(columns)).squeeze(1), value_NV)

    def _of_row(self, parameter: Tensor, row: int) -> Tensor:
        """A row's entries of the experts it sees, fp32: of a parameter with an axis of experts."""
        columns = self._columns[row]
        if columns is None:
            return parameter[row].float()
        if columns == tuple(range(len(columns))):
            return parameter[row, : len(columns)].float()
        chosen = self.visible[row].nonzero_static(size=len(columns)).squeeze(1)
        return parameter[row].index_select(0, chosen).float()

    def _logits(self, x_ND: Tensor, task: int) -> Tensor:
        """fp32 logits `[N, V]` of one segment for the experts that its task sees, whatever the model's precision."""
        row = self._row(task)
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.float()
            if self.spec.type == "mlp":
                x_ND = F.gelu(F.linear(x_ND, self.reduce[row].float(), self.reduce_bias[row].float()))
                logits_NV = F.linear(x_ND, self._of_row(self.weight, row), self._of_row(self.bias, row))
            else:
                logits_NV = F.linear(x_ND, self._of_row(self.weight, row))
        if self.training and self.spec.noise:
            logits_NV = logits_NV + torch.randn_like(logits_NV) * (self.spec.noise / self.num_experts)
        return logits_NV

    def _stats(
        self, logits_SE: Tensor, prob_SE: Tensor, expert_SK: Tensor, segments: tuple[Segment, ...]
    ) -> RoutingStats:
        zeros_E = prob_SE.new_zeros(self.num_experts)
        prob, count, token = [zeros_E] * self.tasks, [zeros_E] * self.tasks, [0] * self.tasks
        lse2 = [zeros_E[0]] * self.tasks
        ones = prob_SE.new_ones(1)
        start = 0
        for segment in segments:
            here, t = slice(start, start + segment.counted_length), segment.task
            chosen = expert_SK[here].flatten()
            prob[t] = prob[t] + prob_SE[here].sum(0)
            count[t] = count[t].scatter_add(0, chosen, ones.expand(chosen.numel()))
            lse2[t] = lse2[t] + logits_SE[here].logsumexp(-1).square().sum()
            token[t] += segment.counted_length
            start += segment.length
        token_T = torch.tensor(token, dtype=torch.float32).to(prob_SE.device, non_blocking=True)
        dropped_T = torch.zeros_like(token_T)  # known only when places are given out
        return RoutingStats(torch.stack(prob), torch.stack(count), token_T, torch.stack(lse2), dropped_T)


def _filling(segments: tuple[Segment, ...], device: torch.device) -> Tensor | None:
    """`Routing.filling_S` of a pack."""
    if all(segment.counted_length == segment.length for segment in segments):
        return None
    filling_S = torch.zeros(sum(segment.length for segment in segments), dtype=torch.bool, device=device)
    for segment, of_segment in slices(filling_S, segments):
        of_segment[segment.counted_length :] = True
    return filling_S


def _top_k(prob_SE: Tensor, k: int) -> Tensor:
    """The k most probable experts `[S, k]`; ties go to the lower number on every device, which `topk` does not promise."""
    return prob_SE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
