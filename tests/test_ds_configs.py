"""The shipped DeepSpeed configurations: DeepSpeed accepts them, each key has its reason, they train as torch does."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ranks import run_ranks

FOLDER = Path(__file__).parents[1] / "ds_configs"
CONFIGS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
FROM_RECIPE = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "steps_per_print",
}
RATE, STEPS, MICRO_BATCHES, WORLD = 0.5, 4, 2, 2


def leaves(config: dict[str, Any], path: str = "") -> set[str]:
    """Dotted paths of all values."""
    found: set[str] = set()
    for key, value in config.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}"}
    return found


def test_the_four_configurations_are_there() -> None:
    assert set(CONFIGS) == {"zero1", "zero1_bf16", "zero2", "zero2_bf16"}


@pytest.mark.parametrize("name", CONFIGS)
def test_file_holds_no_key_of_the_recipe(name: str) -> None:
    assert not FROM_RECIPE & CONFIGS[name].keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_deepspeed_reads_what_the_name_says(name: str) -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig

    known = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization", "bf16"}
    assert not CONFIGS[name].keys() - known
    # DeepSpeed itself refuses unknown keys inside zero_optimization and bf16.
    parsed = DeepSpeedConfig({**copy.deepcopy(CONFIGS[name]), "train_batch_size": 1})
    assert int(parsed.zero_optimization_stage) == int(name[4])
    assert parsed.bfloat16_config.enabled == name.endswith("_bf16")
    assert not parsed.float16_config.enabled
    assert parsed.zero_config.contiguous_gradients
    assert parsed.zero_config.reduce_scatter
    assert parsed.communication_data_type == (torch.float32 if name.endswith("_bf16") else None)


def test_every_key_has_its_reason_and_every_reason_its_key() -> None:
    table = (FOLDER / "README.md").read_text().split("## Keys and reasons")[1]
    documented = set(re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE))
    used = {key.removeprefix("zero_optimization.") for config in CONFIGS.values() for key in leaves(config)}
    assert documented == used


class TwoHeads(nn.Module):
    """A shared layer and two heads, of which each call uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(2))

    def forward(self, images: torch.Tensor, head: int) -> torch.Tensor:
        """Mean squared output of the head `head` for images `[B, 6]`."""
        return self.heads[head](torch.tanh(self.trunk(images))).float().square().mean()


def batch(step: int, micro: int, rank: int) -> torch.Tensor:
    """Images `[4, 6]` of one micro-batch of one rank."""
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))


def train_plainly() -> dict[str, torch.Tensor]:
    """Weights after training in one process: the mean loss over ranks and micro-batches, plain SGD."""
    network = TwoHeads()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO_BATCHES):
            for rank in range(WORLD):
                (network(batch(step, micro, rank), micro) / (MICRO_BATCHES * WORLD)).backward()
        optimizer.step()
    return network.state_dict()


def train_with_deepspeed(rank: int, world: int, configs: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after the same training under each config: head 0 in a step's first micro-batch, head 1 in its last."""
    import deepspeed

    from modsquad_ds.parallel import launch

    launch.start()
    trained = {}
    for name, config in configs.items():
        network = TwoHeads()
        batches = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_BATCHES}
        engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=RATE),
            config={**config, **batches},
            dist_init_required=False,
        )
        dtype = next(network.parameters()).dtype
        for step in range(STEPS):
            for micro in range(MICRO_BATCHES):
                engine.backward(engine(batch(step, micro, rank).to(dtype), micro))
                engine.step()
        trained[name] = {key: value.float().clone() for key, value in network.state_dict().items()}
    return trained


@pytest.mark.dist
def test_training_is_what_torch_does_on_one_process() -> None:
    unsafe = copy.deepcopy(CONFIGS["zero1"])
    unsafe["zero_optimization"]["overlap_comm"] = True
    expected, start = train_plainly(), TwoHeads().state_dict()
    ranks = run_ranks(WORLD, train_with_deepspeed, {**CONFIGS, "unsafe": unsafe})
    for name in CONFIGS:
        tolerance = 1e-2 if name.endswith("_bf16") else 1e-6
        for key, value in expected.items():
            assert (value - start[key]).abs().max() > 5e-2, "the training moves too little to tell anything"
            for trained in ranks:
                torch.testing.assert_close(trained[name][key], value, atol=tolerance, rtol=0, msg=f"{name} {key}")
    # Why overlap_comm is false in stage 1: the head of the first micro-batch follows one rank's gradient, not the mean.
    head = "heads.0.weight"
    assert (ranks[0]["unsafe"][head] - expected[head]).abs().max() > 1e-2
