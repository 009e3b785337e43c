"""The other ways to use a cluster: evaluate.sbatch, scaling.sbatch and its jobs, and DeepSpeed's launcher in place of srun."""

import json
from pathlib import Path

import pytest

from cluster import Cluster
from jobs import ROOT, SMALL, Jobs, records

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_evaluation_over_two_nodes(jobs: Jobs, alone: Path) -> None:
    number = jobs.submit(str(alone), "--no-pictures", script="evaluate.sbatch")
    job = jobs.cluster.wait(number, timeout=200)
    log = jobs.log(number)
    assert job["JobState"] == "COMPLETED", log
    assert "evaluate.sbatch: " in log and "2 node(s), 2 rank(s)" in log
    assert {"digits", "scenes", "textures"} <= set(json.loads((alone / "evaluation.json").read_text()))
    assert "textures" in log  # the table


def test_scaling_over_one_and_two_nodes_writes_its_rows(jobs: Jobs) -> None:
    out = jobs.folder / "scaling"
    settings = [f"data_root={jobs.data}", *SMALL, "--nodes", "1,2", "--mode", "weak", "--steps", "2", "--out", str(out)]
    number = jobs.submit("quickstart", *settings, script="scaling.sbatch", options=())
    job = jobs.cluster.wait(number, timeout=400)
    log = jobs.log(number)
    assert job["JobState"] == "COMPLETED", log
    rows = json.loads((out / "scaling.json").read_text())
    assert sorted((row["nodes"], row["ranks"], row["routing"], row["error"]) for row in rows) == [
        (nodes, nodes, routing, None) for nodes in (1, 2) for routing in ("balanced", "learned")
    ]
    assert (out / "scaling.csv").is_file() and (out / "scaling.png").is_file()


LAUNCH = """#!/bin/bash
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" MASTER_PORT="$((20000 + SLURM_JOB_ID % 10000))"
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$SLURM_NTASKS_PER_NODE/" >"{folder}/hostfile"
cd "{root}"
{command} train quickstart run={folder}/run data_root={data} {settings}
"""
PER_NODE = """srun --ntasks-per-node=1 bash -c 'exec deepspeed --hostfile {folder}/hostfile --no_ssh --node_rank="$SLURM_NODEID" \
--master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --module modsquad_ds "$@"' --"""
FROM_THE_FIRST = '''deepspeed --no_ssh_check --hostfile {folder}/hostfile --master_addr="$MASTER_ADDR" --launcher slurm \
"$(command -v modsquad-ds)"'''
WITHOUT_HOSTFILE = "deepspeed --launcher slurm --module modsquad_ds"


def launch(cluster: Cluster, folder: Path, data: Path, command: str, *settings: str) -> tuple[dict[str, str], str]:
    """A job on two nodes, one rank each, that starts them so: what became of it, and its log."""
    text = LAUNCH.format(
        folder=folder, root=ROOT, data=data, command=command.format(folder=folder), settings=" ".join(settings)
    )  # fmt: skip
    (folder / "job.sh").write_text(text)
    log = folder / "job.log"
    number = cluster.submit("--nodes=2", "--ntasks-per-node=1", f"--output={log}", folder / "job.sh", cwd=ROOT)
    job = cluster.wait(number, timeout=200)
    return job, log.read_text()


def test_deepspeed_on_each_node_trains_over_both(jobs: Jobs, alone: Path) -> None:
    settings = [*SMALL, "train.steps=2", "train.log_every=1", "parallel.expect_world_size=2", "train.schedule.warmup=50"]
    job, log = launch(jobs.cluster, jobs.folder, jobs.data, PER_NODE, *settings)
    assert job["JobState"] == "COMPLETED", log
    assert [r["loss"] for r in records(jobs.run)][:1] == [r["loss"] for r in records(alone)][:1]


@pytest.mark.parametrize(
    ("command", "ranks"),
    [(FROM_THE_FIRST, 2), (WITHOUT_HOSTFILE, 1)],
    ids=["from the first node", "without a hostfile"],
)
def test_ranks_that_deepspeed_starts_are_counted(jobs: Jobs, command: str, ranks: int) -> None:
    """The last one starts a single rank in a job of two nodes, and says nothing; 3 are asked for, so all are told."""
    job, log = launch(jobs.cluster, jobs.folder, jobs.data, command, "parallel.expect_world_size=3")
    assert job["JobState"] == "FAILED", log
    assert f"error: {ranks} rank(s) started, parallel.expect_world_size is 3" in log
