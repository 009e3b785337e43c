"""One Slurm cluster for all tests of a file, or the reason why there is none; the tests in this folder are marked `slurm`."""

from collections.abc import Iterator

import pytest

from cluster import Cluster, unavailable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need Slurm where it cannot be started."""
    reason = unavailable()
    for item in items:
        if "slurm" in item.keywords and reason:
            item.add_marker(pytest.mark.skip(reason=f"no Slurm: {reason}"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, each with two GPUs that are none."""
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster with all nodes up and no job on it."""
    yield slurm
    slurm.heal()
