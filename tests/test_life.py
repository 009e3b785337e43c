"""Whole lives on the quickstart's own data, through the deepspeed launcher: killed and resumed, evaluated, predicted."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modsquad_ds.config import load_recipe
from modsquad_ds.data.loader import StepDataset
from modsquad_ds.data.quickstart import build
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from ranks import free_port

STEPS = 8
SMALL = ["tasks.digits.batch_size=8", "tasks.scenes.batch_size=4", "tasks.textures.batch_size=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("life") / "data"
    build(out)
    return out / "shards"


def command(run: Path, data: Path) -> list[str]:
    port = subprocess.run(
        [sys.executable, "-m", "modsquad_ds", "free-port"], env=environment(), capture_output=True, text=True, check=True
    ).stdout.strip()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, "--module"]
    return [*launcher, "modsquad_ds", *arguments(run, data)]


def arguments(run: Path, data: Path) -> list[str]:
    settings = [f"run={run}", f"data_root={data}", f"train.steps={STEPS}", "train.log_every=1", "train.checkpoint_every=2"]
    return ["train", "quickstart", *settings, *SMALL, "train.workers=1"]


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


def spoil_a_sample_of_rank_1(data: Path, step: int) -> str:
    """Overwrite the beginning of an image that rank 1 of 2 alone meets, at that step; sizes stay. Returns the sample's key."""
    recipe = load_recipe("quickstart", [f"data_root={data}", *SMALL])
    met = [[StepDataset(loader_plan(recipe, Ranks(rank, 2)))[s]["scenes"].keys for s in range(STEPS)] for rank in (0, 1)]
    key = met[1][step][0]
    assert key not in itertools.chain(*met[0], *met[1][:step])
    for tar in (data / "scenes" / "train").glob("*.tar"):
        with tarfile.open(tar) as members:
            found = [m for m in members if m.name.startswith(f"{key}.") and not m.name.endswith(".json")]
        if found:
            with tar.open("r+b") as file:
                file.seek(found[0].offset_data)
                file.write(bytes(16))
    return key


@pytest.mark.dist
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", ["deepspeed", "srun"])
def test_one_rank_that_fails_ends_the_job(launcher: str, data: Path, tmp_path: Path) -> None:
    """Rank 0 waits for rank 1 in a collective. Under srun each process is on its own, so rank 1 has to end by itself."""
    copy, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(data, copy)
    key = spoil_a_sample_of_rank_1(copy, step=3)
    if launcher == "deepspeed":
        found = subprocess.run(command(run, copy), env=environment(), capture_output=True, text=True, timeout=200, check=False)
        code, text = found.returncode, found.stdout + found.stderr
    else:
        code, text = as_srun_would(arguments(run, copy))
    assert code != 0
    (line,) = (line for line in text.splitlines() if "error: " in line)
    assert line.startswith("rank 1: error: ") and key in line
    assert [step for step, _ in curve(run)] == [1, 2, 3] and not (run / "model.safetensors").exists()


def as_srun_would(arguments: list[str]) -> tuple[int, str]:
    """Two processes that know each other by Slurm's variables; exit code and errors of rank 1, which must end by itself."""
    with srun_jobs(arguments) as jobs:
        _, text = jobs[1].communicate(timeout=200)
    return jobs[1].returncode, text


@contextmanager
def srun_jobs(arguments: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks, each on a node of its own, as far as they know. What they say on stderr has to be read from them."""
    port = str(free_port())
    jobs = []
    for rank in ("0", "1"):
        slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": rank, "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
        settings = {**environment(), **slurm, "SLURMD_NODENAME": f"node{rank}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        program = [sys.executable, "-m", "modsquad_ds", *arguments]
        jobs.append(subprocess.Popen(program, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    try:
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.wait()
            assert job.stderr is not None
            job.stderr.close()


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_a_rank_that_is_killed_is_named_with_its_node_and_step(data: Path, tmp_path: Path) -> None:
    """Under srun without --kill-on-bad-exit nobody else ends the rest."""
    run = tmp_path / "run"
    with srun_jobs([*arguments(run, data), "train.steps=9999", "train.checkpoint_every=9999"]) as jobs:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").is_file() or len(curve(run)) < 3:
            assert jobs[0].poll() is None and time.monotonic() < deadline, "the job ended or stalled before it could be hurt"
            time.sleep(0.05)
        jobs[1].kill()
        _, text = jobs[0].communicate(timeout=60)
    last = curve(run)[-1][0]
    assert jobs[0].returncode == 1
    (line,) = (line for line in text.splitlines() if "error: " in line)
    named = r"rank 0: error: rank 1 on node1 \(step (\d+), \w+( data)?, at modsquad_ds\.\S+ \S+\): no sign of life"
    found = re.match(named, line)
    assert found and last - 5 <= int(found[1]) <= last + 1, (line, last)
    assert "Traceback" not in text


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_a_rank_that_meets_a_damaged_shard_ends_the_job_with_its_name(data: Path, tmp_path: Path) -> None:
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
