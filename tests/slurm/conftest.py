"""One Slurm cluster for all tests of this folder, the quickstart's data, and a run to compare with.

Tests that need Slurm are marked `slurm`; they are skipped, with the reason, where it cannot be started.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, Mode, unavailable
from jobs import OFTEN, ROOT, SMALL, STEPS, Jobs
from modsquad_ds.data.quickstart import build
from ranks import free_port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need Slurm where it cannot be started."""
    reason = unavailable()
    for item in items:
        if "slurm" in item.keywords and reason:
            item.add_marker(pytest.mark.skip(reason=f"no Slurm: {reason}"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, each with two GPUs that are none. MODSQUAD_TEST_SLURM=host takes the mode without namespaces."""
    mode: Mode | None = "host" if os.environ.get("MODSQUAD_TEST_SLURM") == "host" else None
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3, mode=mode) as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster with all nodes up and no job on it."""
    yield slurm
    slurm.heal()


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path, data: Path) -> Jobs:
    """Jobs of the test."""
    return Jobs(cluster, tmp_path, data)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the quickstart."""
    out = tmp_path_factory.mktemp("quickstart") / "data"
    build(out)
    return out / "shards"


@pytest.fixture(scope="session")
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
