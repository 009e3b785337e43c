"""slurm/train.sbatch on a real Slurm: over two nodes, stopped and requeued, on a node that dies, and with wrong requests."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster
from modsquad_ds.data.quickstart import build
from ranks import free_port

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STEPS = 16
SMALL = ["tasks.digits.batch_size=8", "tasks.scenes.batch_size=4", "tasks.textures.batch_size=4", "train.workers=0"]
OFTEN = ["train.log_every=1", "train.checkpoint_every=2"]
SITE = """
MODSQUAD_SBATCH="--ntasks-per-node=1 --cpus-per-task=1 --time=15"
MODSQUAD_VENV={venv}
MODSQUAD_SCRATCH={scratch}
"""


class Jobs:
    """Training jobs of the quickstart, small, on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.run = folder / "run"
        self.site = folder / "cluster.env"
        self.site.write_text(SITE.format(venv=sys.prefix, scratch=cluster.scratch))

    def submit(self, *arguments: str, options: tuple[str, ...] = ("--nodes=2",), env: dict[str, str] | None = None) -> str:
        """sbatch as a user would; the job's number."""
        here = {"MODSQUAD_CLUSTER_ENV": str(self.site), "PYTHONPATH": str(ROOT), **(env or {})}
        words = ["--ntasks-per-node=1", *options, f"--output={self.folder}/job-%j.log", ROOT / "slurm/train.sbatch", *arguments]
        return self.cluster.submit(*words, cwd=ROOT, env=here)

    def train(self, *settings: str, options: tuple[str, ...] = ("--nodes=2",), env: dict[str, str] | None = None) -> str:
        """Submit a training in the test's folder."""
        where = [f"run={self.run}", f"data_root={self.data}", f"train.steps={STEPS}"]
        return self.submit("quickstart", *where, *SMALL, *OFTEN, *settings, options=options, env=env)

    def log(self, number: str) -> str:
        """What the job's log says."""
        path = self.folder / f"job-{number}.log"
        return path.read_text() if path.is_file() else ""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("job_data") / "data"
    build(out)
    return out / "shards"


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path, data: Path) -> Jobs:
    return Jobs(cluster, tmp_path, data)


@pytest.fixture(scope="module")
def alone(data: Path) -> Path:
    """The run of two ranks on this machine, in one life."""
    run = data.parent / "alone"
    port, processes = str(free_port()), []
    settings = [f"run={run}", f"data_root={data}", f"train.steps={STEPS}", *SMALL, *OFTEN]
    command = [sys.executable, "-m", "modsquad_ds", "train", "quickstart", *settings]
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **ranks}
        processes.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return run


def records(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step, but for what depends on the time."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    of_time = ("_per_s", "seconds")
    return [{key: value for key, value in json.loads(line).items() if not key.endswith(of_time)} for line in lines]


def wait_for_step(jobs: Jobs, number: str, step: int) -> None:
    """Wait until a running job has done a step."""
    deadline = time.monotonic() + 200
    while len(records(jobs.run)) < step:
        state = jobs.cluster.job(number)["JobState"]
        assert state in ("PENDING", "RUNNING", "COMPLETING") and time.monotonic() < deadline, (state, jobs.log(number))
        time.sleep(0.1)


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def test_two_nodes_give_the_same_losses_and_weights_as_two_local_ranks(jobs: Jobs, alone: Path) -> None:
    """From data that were copied to a folder of each node."""
    number = jobs.train(env={"MODSQUAD_STAGE": "1"})
    job = jobs.cluster.wait(number, timeout=200)
    log = jobs.log(number)
    assert job["JobState"] == "COMPLETED", log
    assert "quickstart on 2 node(s) (node[1-2]), 2 rank(s)," in log
    assert f"step {STEPS}/{STEPS}" in log
    if jobs.cluster.mode == "netns":
        for node in ("node1", "node2"):
            assert f"{node}: {jobs.cluster.scratch} has 6 folders of shards, 6 of them new" in log
    assert records(jobs.run) == records(alone)
    assert weights(jobs.run) == weights(alone)
    assert sorted(path.name for path in jobs.folder.glob("job-*.ranks/start-0/*")) == ["rank-0.log", "rank-1.log"]


def test_stopped_by_a_signal_and_by_preemption_gives_the_same_weights(jobs: Jobs, alone: Path) -> None:
    """First Slurm's warning before the time limit, then a job of a partition that goes first takes the nodes."""
    number = jobs.train(options=("--nodes=2", "--partition=low"))
    wait_for_step(jobs, number, 3)
    jobs.cluster.signal(number, "USR1")
    jobs.cluster.wait(number, "RUNNING", restarts=1)
    done = len(records(jobs.run))
    assert 3 <= done < STEPS, jobs.log(number)
    wait_for_step(jobs, number, done + 3)
    first = jobs.cluster.submit("--nodes=3", "--exclusive", "--partition=main", "--output=/dev/null", "--wrap=sleep 1")
    jobs.cluster.wait(first, "COMPLETED")
    job = jobs.cluster.wait(number, restarts=2, timeout=200)
    log = jobs.log(number)
    assert job["JobState"] == "COMPLETED", log
    assert [line.rpartition(" ")[2] for line in log.splitlines() if "train.sbatch: quickstart on" in line] == ["0", "1", "2"]
    assert log.count("going on from") == 2 and log.count("train.sbatch: requeueing") == 1
    assert records(jobs.run) == records(alone)
    assert weights(jobs.run) == weights(alone)


def test_killed_node_is_replaced_and_the_run_goes_on(jobs: Jobs, alone: Path) -> None:
    number = jobs.train()
    wait_for_step(jobs, number, 5)
    jobs.cluster.kill_node("node2")
    job = jobs.cluster.wait(number, restarts=1, timeout=200)
    log = jobs.log(number)
    assert (job["JobState"], job["NodeList"]) == ("COMPLETED", "node[1,3]"), log
    assert "going on from" in log
    assert records(jobs.run) == records(alone)
    assert weights(jobs.run) == weights(alone)


def test_run_goes_on_with_one_node_fewer(jobs: Jobs, alone: Path) -> None:
    """The node of the first rank and of the batch shell dies, and no other is free: `--nodes=1-2` takes what there is."""
    jobs.cluster.drain("node3")
    number = jobs.train("parallel.ep_size=1", options=("--nodes=1-2",))
    wait_for_step(jobs, number, 5)
    jobs.cluster.kill_node("node1")
    job = jobs.cluster.wait(number, restarts=1, timeout=200)
    log = jobs.log(number)
    assert (job["JobState"], job["NodeList"]) == ("COMPLETED", "node2"), log
    assert "2 rank(s)" in log and "on 1 node(s) (node2), 1 rank(s)" in log and "going on from" in log
    found, expected = records(jobs.run), records(alone)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        (("quickstrat",), (), "error: recipe quickstrat: no such file"),
        (("quickstart", "train.stepps=5"), (), "error: recipe quickstart: train.stepps: unknown key; did you mean steps?"),
        (("quickstart", "parallel.ep_size=3"), (), "error: recipe quickstart: parallel.ep_size 3 does not divide the 8 experts"),
        (("quickstart", "parallel.expect_world_size=4"), (), "error: 2 rank(s) started, parallel.expect_world_size is 4"),
        (("quickstart",), ("--nodes=1",), "error: parallel.ep_size 2 does not divide"),
        (("quickstart", "data_root=/nowhere"), (), "error: shard folder /nowhere/digits/train does not exist"),
        (("quickstart",), ("--gpus-per-node=1", "--ntasks-per-node=2"), "error: 2 task(s) per node but 1 GPU(s)"),
        ((), (), "error: which recipe?"),
    ],
)
def test_wrong_request_ends_with_the_reason_in_the_log(
    jobs: Jobs, arguments: tuple[str, ...], options: tuple[str, ...], reason: str
) -> None:
    words = (*arguments, f"run={jobs.run}") if arguments else ()
    number = jobs.submit(*words, options=options or ("--nodes=2",))
    job = jobs.cluster.wait(number, timeout=60)
    log = jobs.log(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), log
    assert sum(reason in line for line in log.splitlines()) == 1, log
    assert "Traceback" not in log and not jobs.run.exists()
