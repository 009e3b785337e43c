"""The DeepSpeed engine around a network: its JSON, its optimizer, and what may not be combined. Built once by train.py."""

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from modsquad_ds.config import Recipe
from modsquad_ds.errors import UserError
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.parallel.experts import spread_experts
from modsquad_ds.parallel.frozen import freeze
from modsquad_ds.parallel.lamb import Lamb, attach_zero
from modsquad_ds.parallel.launch import group_timeout, limit_group
from modsquad_ds.parallel.optimizer import build_optimizer
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.trainable import Trainable

CONFIGS = Path(__file__).parents[1] / "ds_configs"
OWNED = {
    "train_batch_size": "tasks.*.batch_size",
    "train_micro_batch_size_per_gpu": "tasks.*.batch_size_per_rank",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.optimizer.clip",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
}
"""DeepSpeed keys that the recipe decides -> the recipe's key."""


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """A shipped name (zero1, zero2_bf16, ...) or a path to a DeepSpeed JSON. Raises UserError on what cannot work here."""
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.json")))
        raise UserError(f"deepspeed_config {name}: no such file {path}; give a .json path or one of: {shipped}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed_config {path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed_config {path}: expected a JSON object of DeepSpeed keys, found {type(config).__name__}")
    for key in OWNED.keys() & config.keys():
        raise UserError(f"deepspeed_config {path}: {key} is set by the recipe ({OWNED[key]}); remove it from the JSON")
    if config.get("fp16", {}).get("enabled"):
        raise UserError(f"deepspeed_config {path}: fp16 is not supported (routers and losses need its range); use bf16")
    if zero_stage(config) > 2:
        raise UserError(f"deepspeed_config {path}: ZeRO stage 3 does not work with expert parallelism in DeepSpeed; use 1 or 2")
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed config."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def in_bf16(config: dict[str, Any]) -> bool:
    """Whether a DeepSpeed config trains in bf16."""
    return bool(config.get("bf16", {}).get("enabled"))


def complete_config(config: dict[str, Any], recipe: Recipe, world: int) -> dict[str, Any]:
    """The config with the recipe's batch size and clipping filled in.

    DeepSpeed's batch sizes only feed its own log and its division by the accumulation steps; one is a whole pack.
    """
    accumulation, clip = recipe.train.accumulation, recipe.train.optimizer.clip
    stage, bf16 = zero_stage(config), in_bf16(config)
    if stage == 0 and (clip or bf16):
        what = "gradient clipping (train.optimizer.clip)" if clip else "bf16"
        raise UserError(
            f"deepspeed_config {recipe.deepspeed_config}: ZeRO stage 0 gets {what} wrong for experts; use zero1 or zero2"
        )
    zero = config.get("zero_optimization", {})
    if stage == 1 and zero.get("overlap_comm") and accumulation > 1:
        raise UserError(
            f"deepspeed_config {recipe.deepspeed_config}: with stage 1, overlap_comm and train.accumulation {accumulation} "
            "DeepSpeed leaves gradients of parameters unused in the last micro-batch unreduced; set overlap_comm to false"
        )
    return {
        **config,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": world * accumulation,
        "gradient_clipping": clip,
        "steps_per_print": 2**62,
    }


def limit_groups(timeout: timedelta) -> None:
    """Give the groups that DeepSpeed made the job's time limit; it makes them with torch's defaults of 10 to 30 minutes."""
    made = (groups._get_expert_parallel_group_dict(), groups._get_expert_data_parallel_group_dict())
    for group in (groups._WORLD_GROUP, *(group for by_name in made for group in by_name.values())):
        if group is not None:
            limit_group(group, timeout)


def build_engine(
    network: MultiTaskNetwork, recipe: Recipe, ranks: Ranks, trainable: Trainable | None = None
) -> deepspeed.DeepSpeedEngine:
    """Spread the experts, freeze what does not learn, build the optimizer and wrap all.

    `network` is changed in place and is `engine.module` afterwards. `trainable`: what learns; None: everything.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = complete_config(read_deepspeed_config(recipe.deepspeed_config), recipe, ranks.world)
    whole = network.state_dict()
    spread_experts(network.backbone, recipe.parallel, ranks, learn=trainable is None)
    if trainable is not None:
        freeze(network, trainable, whole, torch.bfloat16 if in_bf16(config) else torch.float32)
    optimizer = build_optimizer(network, recipe.train.optimizer)
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=optimizer, config=config, dist_init_required=False
    )
    limit_groups(group_timeout(recipe.parallel.collective_timeout))
    if zero_stage(config) and not isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        raise UserError(
            f"deepspeed_config {recipe.deepspeed_config}: DeepSpeed chose {type(engine.optimizer).__name__}, which cannot be "
            "checkpointed here; remove the keys that differ from the shipped configs"
        )
    if isinstance(optimizer, Lamb) and zero_stage(config):
        attach_zero(optimizer, engine.optimizer)
    return engine
