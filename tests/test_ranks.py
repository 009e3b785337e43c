"""The helper behind the distributed tests: results, failures, deaths and hangs of ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ranks import RankError, run_ranks

pytestmark = pytest.mark.dist


def _facts(rank: int, world: int, offset: int) -> tuple[Any, dict[str, Any]]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    return total, {"rank": rank, "world": world, "threads": torch.get_num_threads(), "local": os.environ["LOCAL_RANK"]}


def _fail_on_1(rank: int, world: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()


def _die_on_0(rank: int, world: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _hang(rank: int, world: int, folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / f"{rank}").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_back_in_order_of_rank() -> None:
    results = run_ranks(2, _facts, 10)
    assert [facts for _, facts in results] == [
        {"rank": rank, "world": 2, "threads": 1, "local": str(rank)} for rank in range(2)
    ]
    assert [total.item() for total, _ in results] == [21.0, 21.0]


def test_failure_of_one_rank_ends_all_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*_fail_on_1.*ValueError: the cause"):
        run_ranks(2, _fail_on_1, timeout=60)
    assert time.monotonic() - start < 50


def test_death_of_one_rank_ends_all() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 of 2 failed:\ndied without a result, exit code -9"):
        run_ranks(2, _die_on_0, timeout=50)
    assert time.monotonic() - start < 40


def test_hang_ends_at_the_timeout_and_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="no result in time from rank 0, 1"):
        run_ranks(2, _hang, tmp_path, timeout=6)
    pids = [int(pid) for file in tmp_path.iterdir() for pid in file.read_text().split()]
    assert len(pids) == 4
    time.sleep(0.2)
    assert not [pid for pid in pids if _running(pid)]
