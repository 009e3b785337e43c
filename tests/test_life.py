"""Whole lives on the quickstart's own data, through the deepspeed launcher: killed and resumed, evaluated, predicted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modsquad_ds.data.quickstart import build

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("life") / "data"
    build(out)
    return out / "shards"


def command(run: Path, data: Path, *changes: str) -> list[str]:
    port = subprocess.run(
        [sys.executable, "-m", "modsquad_ds", "free-port"], env=environment(), capture_output=True, text=True, check=True
    ).stdout.strip()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, "--module"]
    small = ["tasks.digits.batch_size=8", "tasks.scenes.batch_size=4", "tasks.textures.batch_size=4"]
    settings = [f"run={run}", f"data_root={data}", f"train.steps={STEPS}", "train.log_every=1", "train.checkpoint_every=2"]
    return [*launcher, "modsquad_ds", "train", "quickstart", *settings, *small, "train.workers=1", *changes]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def curve(run: Path) -> list[tuple[int, dict[str, Any]]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "loss/digits", "loss/scenes", "loss/textures", "information/0", "lr", "grad_norm")
    return [(r["step"], {k: r[k] for k in keys}) for r in records]


@pytest.fixture(scope="module")
def through(data: Path) -> Path:
    """A run in one life."""
    run = data.parent / "through"
    subprocess.run(command(run, data), env=environment(), check=True, timeout=280, capture_output=True)
    return run


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_killed_in_the_middle_and_resumed_gives_the_same_losses(data: Path, through: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    job = subprocess.Popen(
        command(killed, data), env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    metrics = killed / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= STEPS // 2 + 1):
        assert job.poll() is None and time.monotonic() < deadline, "the job ended or stalled before it could be killed"
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not (killed / "model.safetensors").exists()

    again = subprocess.run(command(killed, data), env=environment(), check=True, timeout=280, capture_output=True, text=True)
    assert "going on from" in again.stdout
    assert [step for step, _ in curve(killed)] == list(range(1, STEPS + 1))
    assert curve(killed) == curve(through)


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_evaluation_is_the_same_on_any_number_of_ranks(data: Path, through: Path) -> None:
    """360, 300 and 200 held-out images on 3 ranks: none of the numbers of a rank's batches is even."""
    module = ["-m", "modsquad_ds", "evaluate", str(through), "--no-pictures"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "--standalone"]
    results = []
    for prefix in ([sys.executable], launcher):
        subprocess.run([*prefix, *module], env=environment(), check=True, timeout=200, capture_output=True)
        results.append(json.loads((through / "evaluation.json").read_text()))
    assert results[0] == results[1]
    assert set(results[0]) == {"digits", "scenes", "textures", "untrained"}
    assert set(results[0]["untrained"]) == {"digits", "scenes", "textures"}
    assert results[0]["textures"]["aAcc"] > 0


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_a_rank_that_meets_a_damaged_shard_ends_the_job_with_its_name(data: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "shards"
    shutil.copytree(data, copy)
    tar = sorted((copy / "scenes" / "train").glob("*.tar"))[1]
    size = tar.stat().st_size
    os.truncate(tar, size // 2)
    job = command(tmp_path / "run", copy)
    found = subprocess.run(job, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert found.returncode != 0
    assert tar.name in found.stdout + found.stderr and "error: " in found.stdout + found.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()
