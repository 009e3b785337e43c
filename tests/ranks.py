"""Run one function on several ranks, each its own process, and collect the results. The base of every `dist` test."""

import faulthandler
import os
import pickle
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver, get_context, parent_process, reduction
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


class RankError(AssertionError):
    """A rank raised, died or did not finish in time."""


class Report(NamedTuple):
    """The one message of a rank: its result, or its traceback."""

    failed: bool
    value: Any
    moment: float
    """time.monotonic() of the rank, one clock for all processes of the machine."""


class Output:
    """One of the test's own outputs, for a rank: the server that ranks are forked from has those of its own first test."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.descriptor)

    def __setstate__(self, state: Any) -> None:
        self.descriptor = state.detach()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` ranks and return their results, in order of rank.

    `function` is a module-level function; it, `args` and the results must pickle (tensors do). Each rank is a fresh
    process with one thread, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set; joining the process
    group is left to `function`, leaving it is done here. The first rank that fails ends all: RankError carries its
    traceback. So does a rank that dies, and after `timeout` seconds every rank is killed, its stack written to stderr.
    """
    context, port, deadline = rank_context(), free_port(), time.monotonic() + timeout
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            settings = {**os.environ, **environment(rank, world_size, port)}
            task = (sender, timeout, (settings, Output(1), Output(2)), function, (rank, world_size, *args))
            process = context.Process(target=_child, args=task)  # type: ignore[attr-defined]
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        values = _collect(processes, pipes, deadline)
        _join(processes, deadline)
        return values
    finally:
        for process in processes:
            _kill(process)
        for pipe in pipes:
            pipe.close()


def rank_context() -> BaseContext:
    """How ranks start: forked from a server that has imported the program once, which saves seconds for each of them.

    On a GPU every rank is an interpreter of its own: a CUDA context that the imports have asked for does not outlive a fork.
    """
    if os.environ.get("MODSQUAD_TEST_GPU") == "1":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    # The server finds modules by its environment alone, and says nothing of those that it does not find.
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(filter(None, places))}):
        forkserver.ensure_running()
    return context


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        # Else gloo asks for the address of the machine's own name, which not every machine can resolve.
        "GLOO_SOCKET_IFNAME": "lo",
    }


def free_port() -> int:
    """A port that nothing listens on, below the range from which the kernel hands out ports to other programs."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _collect(processes: list[BaseProcess], pipes: list[Connection], deadline: float) -> list[Any]:
    """Results by rank; raises RankError at the first failure, death, or at the deadline."""
    values: list[Any] = [None] * len(processes)
    pending: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while pending:
        ready = connection.wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = ", ".join(map(str, pending.values()))
            raise RankError(f"no result in time from rank {missing}; stacks are on stderr")
        failures = []
        for pipe in ready:
            rank = pending.pop(pipe)
            report = _receive(pipe, processes[rank])
            values[rank] = report.value
            if report.failed:
                failures.append((report.moment, rank, report.value))
        if failures:
            _, rank, text = min(failures)
            raise RankError(f"rank {rank} of {len(processes)} failed:\n{text}")
    return values


def _receive(pipe: Any, process: BaseProcess) -> Report:
    try:
        return Report(*pickle.loads(pipe.recv_bytes()))
    except EOFError:
        process.join(10)
        # A death is often another rank's doing (a broken connection), so any traceback received with it comes first.
        return Report(True, f"died without a result, exit code {process.exitcode}", float("inf"))


def _join(processes: list[BaseProcess], deadline: float) -> None:
    for rank, process in enumerate(processes):
        process.join(max(1.0, deadline - time.monotonic()))
        if process.exitcode != 0:
            raise RankError(f"rank {rank} returned a result, then its process ended with exit code {process.exitcode}")


def _kill(process: BaseProcess) -> None:
    """Kill a rank and whatever it started, in case they still run."""
    if process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()


def _child(
    sender: Connection,
    timeout: float,
    surroundings: tuple[dict[str, str], "Output", "Output"],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Body of a rank's process: call, report, leave the process group."""
    os.setpgid(0, 0)
    settings, out, err = surroundings
    os.environ.clear()
    os.environ.update(settings)
    os.dup2(out.descriptor, 1)
    os.dup2(err.descriptor, 2)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    faulthandler.dump_traceback_later(0.9 * timeout)
    try:
        value = function(*args)
        _leave_group()
        report = Report(False, value, time.monotonic())
    except BaseException:
        report = Report(True, traceback.format_exc(), time.monotonic())
    # Plain pickle: the pickler of multiprocessing would send tensors as handles, which end with this process.
    sender.send_bytes(pickle.dumps(tuple(report)))
    faulthandler.cancel_dump_traceback_later()
    if report.failed:
        # The group is broken; the parent kills every rank.
        threading.Event().wait()


def _leave_group() -> None:
    # A function without torch starts in a fraction of the time; do not import it for nothing.
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
