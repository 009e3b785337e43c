"""Parameter groups, learning-rate schedules and the choice of optimizer. Between the network and the DeepSpeed engine."""

import math
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from modsquad_ds.config import OptimizerSpec, ScheduleSpec
from modsquad_ds.model.experts import ExpertBank
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model.router import Router
from modsquad_ds.model.vit import Block
from modsquad_ds.parallel.lamb import Lamb

MATRICES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def learning_rate_factor(spec: ScheduleSpec, step: int, steps: int) -> float:
    """Learning rate of a step (from 0) as a share of the peak: a pure function, so a resumed run needs no state.

    `cosine`: linear warm-up, then half a cosine down to `final`. `onecycle`: torch's OneCycleLR with cosine annealing.
    """
    if spec.type == "cosine":
        if step < spec.warmup:
            return (step + 1) / spec.warmup
        done = (step - spec.warmup) / max(1, steps - spec.warmup)
        return spec.final + (1 - spec.final) * 0.5 * (1 + math.cos(math.pi * done))
    first, last, peak_at = 1 / spec.start_div, 1 / (spec.start_div * spec.final_div), spec.rise * steps - 1
    if step <= peak_at:
        return _anneal(first, 1.0, step / peak_at if peak_at > 0 else 1.0)
    return _anneal(1.0, last, (step - peak_at) / max(1e-9, steps - 1 - peak_at))


def parameter_groups(network: MultiTaskNetwork, spec: OptimizerSpec) -> list[dict[str, Any]]:
    """Groups with `name`, `weight_decay` and `lr_scale`, experts apart from the rest as DeepSpeed wants them.

    Layer decay: the heads have scale 1, the last block `layer_decay`, the one before its square, the embeddings the most.
    """
    scales, decayed = _layer_scales(network, spec.layer_decay), _decayed(network)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            groups.setdefault((scales.get(id(parameter), 1.0), id(parameter) in decayed), []).append(parameter)
    rows = [
        {
            "name": f"lr_scale_{scale}_decay_{decay}",
            "params": parameters,
            "lr_scale": scale,
            "weight_decay": spec.weight_decay if decay else 0.0,
        }
        for (scale, decay), parameters in groups.items()
    ]
    split = split_params_into_different_moe_groups_for_optimizer(rows)
    return [group for group in split if group["params"]]


def build_optimizer(network: MultiTaskNetwork, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """AdamW or LAMB over `parameter_groups`."""
    groups = parameter_groups(network, spec)
    if spec.type == "lamb":
        return Lamb(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of this step's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def _anneal(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))


def _decayed(network: nn.Module) -> set[int]:
    """Identities of the parameters under weight decay: matrices of linear maps, convolutions, experts and routers."""
    found = set()
    for module in network.modules():
        if isinstance(module, MATRICES):
            found.add(id(module.weight))
        elif isinstance(module, ExpertBank | Router):
            found.update(id(p) for p in module.parameters() if p.dim() == 3)
    return found


def _layer_scales(network: MultiTaskNetwork, decay: float) -> dict[int, float]:
    """Identity of each backbone parameter -> learning-rate factor; others are 1."""
    backbone = network.backbone
    blocks = [block for block in backbone.blocks if isinstance(block, Block)]
    scales = {id(p): decay ** (len(blocks) + 1) for p in (*backbone.patch_embed.parameters(), backbone.pos_embed)}
    for i, block in enumerate(blocks):
        scales.update({id(p): decay ** (len(blocks) - i) for p in block.parameters()})
    return scales
