"""The test cluster itself: it starts in both modes, loses and regains a node, and leaves nothing behind, even when killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import MARK, Cluster, no_namespaces

pytestmark = pytest.mark.slurm


def processes(folder: Path) -> list[str]:
    """Command lines of all processes that belong to the cluster in a folder; empty ones are zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return [line for line in found if line]


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


@pytest.mark.parametrize("mode", ["netns", "host"])
def test_a_cluster_runs_a_job_on_all_nodes_and_leaves_nothing(mode: str, tmp_path: Path) -> None:
    if mode == "netns" and (reason := no_namespaces()):
        pytest.skip(reason)
    before = links(), Path("/proc/mounts").read_text()
    with Cluster(tmp_path, nodes=2, gpus=1, mode="netns" if mode == "netns" else "host") as cluster:
        show = 'echo "$SLURMD_NODENAME $(hostname) $CUDA_VISIBLE_DEVICES"'
        lines = cluster.run("srun", "--nodes=2", "--gpus-per-node=1", "bash", "-c", show).stdout.splitlines()
        names = [line.split()[:2] for line in sorted(lines)]
        if mode == "netns":
            assert names == [["node1", "node1"], ["node2", "node2"]]
        else:
            assert [node for node, _ in names] == ["node1", "node2"]
        assert {line.split()[2] for line in lines} == {"0"}
        cluster.submit("--nodes=2", "--output=/dev/null", "--wrap=srun sleep 600")
        assert processes(tmp_path)
    assert (links(), Path("/proc/mounts").read_text()) == before
    assert not processes(tmp_path)


@pytest.mark.parametrize("mode", ["netns", "host"])
def test_nothing_is_left_when_the_test_is_killed(mode: str, tmp_path: Path) -> None:
    if mode == "netns" and (reason := no_namespaces()):
        pytest.skip(reason)
    program = f"""
import os, pathlib, signal, cluster
c = cluster.Cluster(pathlib.Path({str(tmp_path)!r}), nodes=1, gpus=0, mode={mode!r})
c.wait(c.submit("--output=/dev/null", "--wrap=srun sleep 600"), "RUNNING")
print("running", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-9, "running\n"), done.stderr
    deadline = time.monotonic() + 10
    while processes(tmp_path):
        assert time.monotonic() < deadline, processes(tmp_path)
        time.sleep(0.1)
