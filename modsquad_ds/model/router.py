"""Routers: which experts each token uses. The first of a sparse layer's four verbs; its result carries all that losses need.

Axes: S tokens in the pack, D width, T tasks, E experts, K top-k, R hidden width of a two-layer router.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modsquad_ds.config import RouterSpec
from modsquad_ds.model.pack import Segment, slices


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


class Router(nn.Module):
    """One router per task in stacked parameters (or one for all), softmax over all experts in fp32, then top-k.

    Stacked, because per-task modules that see different tasks on different ranks break ZeRO. Gate weights are not
    renormalised by default, as in Mod-Squad (arXiv 2212.08066) and its heterogeneous follow-up (arXiv 2306.17165).
    """

    def __init__(self, spec: RouterSpec, width: int, tasks: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.spec, self.tasks, self.num_experts, self.top_k = spec, tasks, num_experts, top_k
        self.per_expert: tuple[str, ...] = ("weight", "bias") if spec.type == "mlp" else ("weight",)
        """Parameters whose axis 1 counts experts."""
        rows = tasks if spec.per_task else 1
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
        logits_SE = torch.cat([self._logits(x_ND, segment.task) for segment, x_ND in slices(x_SD, segments)])
        if self.training and self.spec.noise:
            logits_SE = logits_SE + torch.randn_like(logits_SE) * (self.spec.noise / self.num_experts)
        prob_SE = logits_SE.softmax(-1)
        expert_SK = self.choose(prob_SE.detach())
        weight_SK = prob_SE.gather(1, expert_SK)
        if self.spec.renormalize:
            weight_SK = weight_SK / weight_SK.sum(-1, keepdim=True)
        return Routing(expert_SK, weight_SK, self._stats(logits_SE, prob_SE, expert_SK, segments))

    def choose(self, prob_SE: Tensor) -> Tensor:
        """The chosen experts `[S, K]`: the most probable, best first. Benchmarks put another choice in its place."""
        return _top_k(prob_SE, self.top_k)

    def _logits(self, x_ND: Tensor, task: int) -> Tensor:
        """fp32 logits `[N, E]` of one segment, whatever the model's precision."""
        row = task if self.spec.per_task else 0
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.float()
            if self.spec.type == "mlp":
                x_ND = F.gelu(F.linear(x_ND, self.reduce[row].float(), self.reduce_bias[row].float()))
                return F.linear(x_ND, self.weight[row].float(), self.bias[row].float())
            return F.linear(x_ND, self.weight[row].float())

    def _stats(
        self, logits_SE: Tensor, prob_SE: Tensor, expert_SK: Tensor, segments: tuple[Segment, ...]
    ) -> RoutingStats:
        zeros_E = prob_SE.new_zeros(self.num_experts)
        prob, count, token = [zeros_E] * self.tasks, [zeros_E] * self.tasks, [0] * self.tasks
        lse2 = [zeros_E[0]] * self.tasks
        ones = prob_SE.new_ones(1)
        start = 0
        for segment in segments:
            here, t = slice(start, start + segment.length), segment.task
            chosen = expert_SK[here].flatten()
            prob[t] = prob[t] + prob_SE[here].sum(0)
            count[t] = count[t].scatter_add(0, chosen, ones.expand(chosen.numel()))
            lse2[t] = lse2[t] + logits_SE[here].logsumexp(-1).square().sum()
            token[t] += segment.length
            start = here.stop
        token_T = torch.tensor(token, dtype=torch.float32).to(prob_SE.device, non_blocking=True)
        dropped_T = torch.zeros_like(token_T)  # known only when places are given out
        return RoutingStats(torch.stack(prob), torch.stack(count), token_T, torch.stack(lse2), dropped_T)


def _top_k(prob_SE: Tensor, k: int) -> Tensor:
    """The k most probable experts `[S, k]`; ties go to the lower number on every device, which `topk` does not promise."""
    return prob_SE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
