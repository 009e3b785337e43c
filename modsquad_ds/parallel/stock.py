"""DeepSpeed's own sparse layer, with a routing of our choice: the peer of `model/sparse.py` in `bench layer`."""

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate, topkgating
from deepspeed.utils import groups
from torch import Tensor, nn


class SteeredGate(TopKGate):
    """DeepSpeed's top-k gate, whose logits are moved so that it chooses what it is told to."""

    offset_SE: Tensor
    """Added to the logits; set before each forward pass (`offset_towards`)."""

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, sparse_routes: bool = False, use_tutel: bool = False
    ) -> Any:
        """What the parent does for k > 2, plus the offset."""
        logits_SE = F.linear(input.float(), self.wg.weight.float()) + self.offset_SE
        return topkgating(
            logits_SE, self.k, self.capacity_factor, self.min_capacity, self.drop_tokens, self.ep_group,
            sparse_routes=sparse_routes,
        )  # fmt: skip


class StockLayer(nn.Module):
    """`deepspeed.moe.layer.MoE` of two-layer MLPs on one rank. The process group must exist."""

    def __init__(self, width: int, hidden: int, num_experts: int, top_k: int, capacity_factor: float | None) -> None:
        """`capacity_factor` None: no token is dropped (`drop_tokens=False`)."""
        super().__init__()
        expert = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.moe = MoE(width, expert, num_experts, k=top_k, drop_tokens=capacity_factor is not None,
                       capacity_factor=capacity_factor or 1.0)  # fmt: skip
        self.gate = SteeredGate(width, num_experts, top_k, capacity_factor or 1.0, drop_tokens=capacity_factor is not None)
        self.moe.deepspeed_moe.gate = self.gate
        name = self.moe.expert_group_name
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(1)
        self.moe.deepspeed_moe._set_ep_group(groups._get_expert_parallel_group(name))

    def forward(self, x_SD: Tensor) -> Tensor:
        """`[S, D]` -> `[S, D]`."""
        return self.moe(x_SD)[0]


def offset_towards(expert_SK: Tensor, num_experts: int) -> Tensor:
    """Offset `[S, E]` of logits that makes these experts the most probable."""
    return torch.zeros(expert_SK.shape[0], num_experts, device=expert_SK.device).scatter_(1, expert_SK, 30.0)
