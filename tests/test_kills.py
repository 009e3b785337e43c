"""Killed at any moment, also while a checkpoint is written: the run goes on and ends with the same curve and weights."""

import json
import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modsquad_ds.checkpoint import complete_checkpoints
from modsquad_ds.config import Recipe, load_recipe
from modsquad_ds.data.quickstart import build
from ranks import environment, free_port, rank_context

KILLS, EVERY = 20, 4
RANKS = 2


def life(settings: dict[str, str], output: str, recipe: Recipe) -> None:
    """A rank's whole life, as the command line would have it: its own process group, its words in a file."""
    os.setpgid(0, 0)
    os.environ.update(settings)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from modsquad_ds.train import train

    train(recipe)


class Job:
    """One start of a run on all its ranks."""

    def __init__(self, recipe: Recipe, log: Path) -> None:
        context, port = rank_context(), free_port()
        self.ranks: list[BaseProcess] = []
        for rank in range(RANKS):
            task = (environment(rank, RANKS, port), f"{log}.{rank}", recipe)
            self.ranks.append(context.Process(target=life, args=task))  # type: ignore[attr-defined]
            self.ranks[-1].start()

    def running(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def end(self, seconds: float) -> list[int | None]:
        """Exit codes, waited for."""
        deadline = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        self.kill()
        return codes


def recipe_of(run: Path, data: Path, steps: int, **changes: Any) -> Recipe:
    settings = {
        "run": run, "data_root": data, "train.steps": steps, "train.log_every": 1, "train.checkpoint_every": EVERY,
        "train.ema": 0.9, "model.router.noise": 0.5, "model.drop_path": 0.1, "log.wandb": "disabled",
        # No step's learning rate hangs on their number, which is not known before the kills.
        "train.schedule.warmup": 0, "train.schedule.final": 1.0,
        "tasks.digits.batch_size": 4, "tasks.scenes.batch_size": 2, "tasks.textures.batch_size": 2, **changes,
    }  # fmt: skip
    return load_recipe("quickstart", [f"{key}={value}" for key, value in settings.items()])


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in curve(run)]


def curve(run: Path) -> list[dict[str, Any]]:
    """Whole records, without what a clock measured."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    clocked = ("seconds", "data_seconds", "images_per_s", "tokens_per_s", "checkpoint_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in clocked} for line in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kills") / "data"
    build(out)
    return out / "shards"


def wait_for_moment(job: Job, run: Path, before: int, in_saving: bool, draw: random.Random) -> None:
    """Return at a random moment of the job's life; with `in_saving`, while a checkpoint is on its way to disk."""
    deadline = time.monotonic() + 120
    while not (steps := steps_of(run)) or steps[-1] <= before:
        assert job.running() and time.monotonic() < deadline, "the job ended or stalled before it could be killed"
        time.sleep(0.01)
    if not in_saving:
        time.sleep(draw.uniform(0, 0.6))
        return
    checkpoints = run / "checkpoints"
    while not any(checkpoints.glob(".partial-step*")):
        assert job.running() and time.monotonic() < deadline, "no checkpoint was written before the job ended"
    time.sleep(draw.uniform(0, 0.03))


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_twenty_kills_lose_nothing(data: Path, tmp_path: Path) -> None:
    """Odd kills wait until a checkpoint is being written. No kill costs more than the steps since the last checkpoint was
    begun and those before it that were waiting for it: less than two intervals.
    """
    draw, steps = random.Random(1), 400
    through, killed = tmp_path / "through", tmp_path / "killed"
    caught_saving, done = 0, 0
    for kill in range(KILLS):
        job = Job(recipe_of(killed, data, steps), tmp_path / f"life-{kill}")
        wait_for_moment(job, killed, done, in_saving=kill % 2 == 1, draw=draw)
        job.kill()
        caught_saving += any((killed / "checkpoints").glob(".partial-step*"))
        whole = [int(path.name[5:]) for path in complete_checkpoints(killed)]
        reached = steps_of(killed)[-1]
        assert reached - max(whole, default=0) < 2 * EVERY, f"kill {kill}: at step {reached}, checkpoints {whole}"
        assert not (killed / "model.safetensors").exists()
        done = reached
    print(f"{caught_saving} of {KILLS} kills came while a checkpoint was written; {done} steps by then")
    assert caught_saving >= KILLS // 2

    last = done + EVERY
    for run in (killed, through):
        assert Job(recipe_of(run, data, last), tmp_path / run.name).end(200) == [0] * RANKS, (tmp_path / run.name).read_text()
    assert curve(killed) == curve(through) and steps_of(killed) == list(range(1, last + 1))
    ours, theirs = (load_file(run / "model.safetensors") for run in (killed, through))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "bit for bit"
