"""Jobs of a benchmark: the same program on a number of local ranks, through the deepspeed launcher, and the rows it measured.

The parent writes what to do as JSON, the first rank writes its rows as JSON; nothing else passes between them.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modsquad_ds.bench.measure import Row
from modsquad_ds.errors import UserError
from modsquad_ds.files import write_json

TAIL = 12
"""Last lines of a failed job's output that are told."""
LOOPBACK = "lo"
"""Linux's name of the interface that reaches this machine alone."""
NATIVE_FRAME = re.compile(r"\s*(frame #\d+:|<omitting python frames>)")
"""Lines of a native stack trace, which would push what went wrong out of the last lines."""


class JobError(UserError):
    """A job that ended without rows; the message ends with its last lines."""


def run_job(worker: str, arguments: Mapping[str, Any], ranks: int, timeout: float) -> list[Row]:
    """Rows that `worker` (a name that cli_bench._worker knows) measured with `arguments` on `ranks` processes of this machine.

    Raises JobError if the job fails or takes longer than `timeout` seconds; whatever it started has ended then.
    """
    with tempfile.TemporaryDirectory(prefix="modsquad-bench-") as name:
        folder = Path(name)
        write_json(folder / "arguments.json", dict(arguments))
        command = [*_launcher(ranks), "bench", "worker", worker, str(folder / "arguments.json"), str(folder / "rows.json")]
        with (folder / "output").open("w+") as output:
            code = _run(command, output, timeout)
            output.seek(0)
            last = last_lines(output.read())
        rows = folder / "rows.json"
        if code != 0 or not rows.is_file():
            what = f"took longer than {timeout:.0f} s" if code is None else f"ended with exit code {code}"
            raise JobError("\n  ".join([f"bench {worker} on {ranks} rank(s) {what}; its last lines:", *last]))
        return json.loads(rows.read_text())


def last_lines(output: str) -> list[str]:
    """The end of a job's output, without the frames of native stack traces."""
    return [line for line in output.splitlines() if line.strip() and not NATIVE_FRAME.match(line)][-TAIL:]


def _launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "modsquad_ds"]
    port = subprocess.run(
        [sys.executable, "-m", "modsquad_ds", "free-port"], capture_output=True, text=True, check=True
    ).stdout.strip()
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
    return [*runner, "--module", "modsquad_ds"]


def _run(command: list[str], output: Any, timeout: float) -> int | None:
    """Exit code, or None after `timeout` seconds. The job is a process group of its own, which ends with this call."""
    # All ranks are on this machine: without the name gloo looks up the machine's own, which not every network answers well.
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK, **os.environ}
    # The job's ranks are the launcher's to name, even where this program itself is a step of Slurm.
    for name in list(environment):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") or name.startswith("SLURM_"):
            del environment[name]
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: "subprocess.Popen[Any]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
