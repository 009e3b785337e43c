"""Many small jobs at once, each of three ranks in lockstep, one of which goes wrong: the program behind test_watchdog.py.

    python tests/watched.py FOLDER HOW:CULPRIT:TIMEOUT ...

It imports torch once and forks all ranks. FOLDER/HOW.CULPRIT.RANK holds what a rank wrote to stderr, FOLDER/codes.json the exit
codes, and the seconds from the moment at which the culprit went wrong to the end of each rank.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from modsquad_ds import cli
from modsquad_ds.errors import UserError
from modsquad_ds.parallel import watchdog
from modsquad_ds.parallel.ranks import Ranks
from ranks import free_port

WORLD, STEP, LAST = 3, 5, 8
PAUSE = 9.0
"""Longer than the limit of the job that is suspended."""


def loop(how: str, culprit: int, timeout: float, mark: Path) -> None:
    """A rank's life."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    watchdog.start(Ranks(rank, WORLD, rank), timeout)
    for step in range(1, LAST + 1):
        watchdog.tell(step, "loading data")
        if step == STEP:
            if rank == culprit and how != "all":
                time.sleep(2 * watchdog.BEAT)  # so that a beat says where it was
                mark.write_text(str(time.monotonic()))
            go_wrong(how, rank == culprit)
        watchdog.tell(step, "computing")
        dist.all_reduce(torch.ones(2))
        time.sleep(0.1)
    dist.barrier()
    watchdog.stop()


def go_wrong(how: str, culprit: bool) -> None:
    """What happens in step STEP."""
    if how == "all":
        raise UserError("a mistake that all ranks meet")
    if how == "paused":
        time.sleep(2.0)  # in which `pause` comes
    if not culprit:
        return
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "loops":
        forever()
    if how == "refuses":
        raise UserError("this sample is damaged")
    if how == "fails":
        raise ZeroDivisionError
    if how == "leaves":
        sys.exit()


def forever() -> NoReturn:
    """The endless loop; it leaves the processor to the other jobs."""
    while True:
        time.sleep(0.01)


def start(folder: Path, case: str) -> dict[int, str]:
    """Fork the ranks of a case; their names by process id. In the ranks it does not return before they end."""
    how, culprit, timeout = case.split(":")
    port, pids = free_port(), {}
    for rank in range(WORLD):
        name = f"{how}.{culprit}.{rank}"
        pid = os.fork()
        if pid:
            pids[pid] = name
            continue
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), 2)
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"})
        os.environ.update({"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "SLURMD_NODENAME": f"node{rank}"})
        cli.app = lambda: loop(how, int(culprit), float(timeout), folder / f"{how}.{culprit}")  # type: ignore[assignment]
        cli.main()
        sys.exit()
    return pids


def pause(marks: list[Path], running: dict[int, str], since: dict[Path, float]) -> None:
    """Suspend jobs whose mark is there, all ranks at once, and let them go on after PAUSE seconds."""
    for mark in marks:
        ranks = [pid for pid, name in running.items() if name.rsplit(".", 1)[0] == mark.name]
        if mark.exists() and mark not in since:
            since[mark] = time.monotonic()
            for pid in ranks:
                os.kill(pid, signal.SIGSTOP)
        elif 0 < since.get(mark, 0.0) < time.monotonic() - PAUSE:
            since[mark] = 0.0
            for pid in ranks:
                os.kill(pid, signal.SIGCONT)


def main(folder: Path, cases: list[str]) -> None:
    """Run all cases; a rank that still stands is killed once the others of its job have ended."""
    running: dict[int, str] = {}
    for case in cases:
        running |= start(folder, case)
    codes: dict[str, tuple[int, float]] = {}
    paused = [folder / case.rsplit(":", 1)[0].replace(":", ".") for case in cases if case.startswith("paused")]
    since: dict[Path, float] = {}
    while running:
        pause(paused, running, since)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.02)
            continue
        name = running.pop(pid)
        mark = folder / name.rsplit(".", 1)[0]
        seconds = time.monotonic() - float(mark.read_text()) if mark.exists() else 0.0
        codes[name] = os.waitstatus_to_exitcode(status), seconds
        left = [pid for pid, other in running.items() if other.rsplit(".", 1)[0] == mark.name]
        if len(left) == 1 and mark.name.startswith("stopped"):
            os.kill(left[0], signal.SIGKILL)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
