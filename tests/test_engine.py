"""The DeepSpeed JSON: what is refused with which words, and what the recipe fills in; the time limit of its groups."""

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from modsquad_ds.config import ParallelSpec
from modsquad_ds.errors import UserError
from modsquad_ds.model.sparse import SparseMLP
from modsquad_ds.parallel import engine, experts, launch
from modsquad_ds.parallel.engine import complete_config, read_deepspeed_config
from modsquad_ds.parallel.experts import check_parallel
from modsquad_ds.trainer import build_trainer
from ranks import run_ranks
from small import small_recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object of DeepSpeed keys, found list"),
        ('{"train_batch_size": 8}', "train_batch_size is set by the recipe .tasks"),
        ('{"optimizer": {}}', "optimizer is set by the recipe"),
        ('{"gradient_clipping": 1.0}', "gradient_clipping is set by the recipe .train.optimizer.clip"),
        ('{"fp16": {"enabled": true}}', "fp16 is not supported .*use bf16"),
        ('{"zero_optimization": {"stage": 3}}', "ZeRO stage 3 does not work with expert parallelism"),
    ],
)
def test_what_cannot_work_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_deepspeed_config(str(path))


def test_unknown_names_list_the_shipped_ones() -> None:
    with pytest.raises(UserError, match="zero1, zero1_bf16, zero2, zero2_bf16"):
        read_deepspeed_config("zero9")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"train.optimizer.clip": 1.0}, "stage 0 gets gradient clipping"),
        ({"bf16": {"enabled": True}}, {}, "stage 0 gets bf16 wrong for experts"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, {"train.accumulation": 2}, "set overlap_comm to false"),
    ],
)
def test_combinations_that_are_silently_wrong_are_refused(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        complete_config(config, small_recipe(**changes), world=2)


def test_the_recipe_fills_in_batch_and_clipping() -> None:
    recipe = small_recipe(**{"train.accumulation": 3, "train.optimizer.clip": 0.5})
    config = complete_config(read_deepspeed_config("zero2"), recipe, world=4)
    assert config["train_batch_size"] == 12 and config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5
    assert json.loads(json.dumps(config))["zero_optimization"]["stage"] == 2


def test_group_sizes_divide_the_ranks() -> None:
    check_parallel(ParallelSpec(ep_size=2, attention_ep_size=4), world=4)
    with pytest.raises(UserError, match=r"ep_size 4 does not divide the 6 ranks .*divisor of 6"):
        check_parallel(ParallelSpec(ep_size=4), world=6)


def waiting(rank: int, world: int) -> list[float]:
    """Seconds until rank 0 gives up waiting for rank 1: among the experts' ranks, then among those that share gradients."""
    ranks = launch.start(collective_timeout=60)
    for module in (engine, experts):
        module.group_timeout = lambda seconds: timedelta(seconds=seconds)  # type: ignore[attr-defined]
    trainer = build_trainer(small_recipe(**{"parallel.ep_size": 2, "parallel.collective_timeout": 2}), ranks)
    (layer, *_) = [x for x in trainer.network.backbone.sparse_layers().values() if isinstance(x, SparseMLP)]
    waited = []
    for group in (layer.dispatcher.group, trainer.engine.optimizer.real_dp_process_group[0]):
        began = time.monotonic()
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
                dist.all_reduce(torch.ones(2), group=group)
        waited.append(time.monotonic() - began)
    dist.barrier()
    return waited


@pytest.mark.dist
def test_the_recipes_time_limit_holds_in_the_groups_that_deepspeed_makes() -> None:
    for seconds in run_ranks(2, waiting)[0]:
        assert 1.0 < seconds < 30.0
