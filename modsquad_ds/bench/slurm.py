"""Sizes of a benchmark under Slurm: one batch job per number of nodes, waited for, its rows read from files. Used by scaling.py.

A job runs its sizes one after the other and leaves a row file and a log of each. What it was given and its number stay in
the folder, so that a sweep that was interrupted, or whose jobs still run, is taken up again by the same command.
"""

import itertools
import json
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from modsquad_ds.errors import UserError
from modsquad_ds.files import write_json

ROOT = Path(__file__).parents[2]
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
GONE = "Invalid job id"
"""What scontrol says of a job that it has forgotten."""


class Cluster(NamedTuple):
    """What slurm/cluster.env says."""

    options: tuple[str, ...]
    """Of sbatch, for one node."""
    ranks: int
    """Of one node."""


class Job(NamedTuple):
    """A batch job and the arguments files of its sizes."""

    number: str
    nodes: int
    files: tuple[Path, ...]


def read_cluster() -> Cluster:
    """Resources of a node. UserError without a checkout of the project or without a number of tasks."""
    if not (ROOT / "slurm/cluster.env").is_file():
        raise UserError(f"bench scaling --nodes: no slurm/cluster.env under {ROOT}; run it from a checkout of the project")
    script = '. "${MODSQUAD_CLUSTER_ENV:-slurm/cluster.env}" && printf %s "$MODSQUAD_SBATCH"'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{ROOT / 'slurm/cluster.env'}: {done.stderr.strip() or 'sets no MODSQUAD_SBATCH'}")
    return cluster_of(done.stdout)


def cluster_of(options: str) -> Cluster:
    """Options of sbatch, and the tasks per node among them."""
    words = shlex.split(options)
    given = [word for option in words for word in option.split("=", 1)]
    tasks = dict(itertools.pairwise(given)).get("--ntasks-per-node", "")
    if not tasks.isdigit() or int(tasks) == 0:
        raise UserError("slurm/cluster.env: MODSQUAD_SBATCH has no --ntasks-per-node=N; add it, one task per GPU")
    return Cluster(tuple(words), int(tasks))


def submit(cluster: Cluster, nodes: int, files: Sequence[Path]) -> Job:
    """Submit the sizes of a number of nodes, or find the job that was submitted for them and has not ended."""
    folder = files[0].parent
    note = folder / f"nodes-{nodes}.job.json"
    names = [path.name for path in files]
    if note.is_file():
        earlier = json.loads(note.read_text())
        if set(names) <= set(earlier["files"]) and state_of(earlier["job"]) not in ENDED:
            return Job(earlier["job"], nodes, tuple(files))
    log = folder / f"nodes-{nodes}-%j.log"
    command = ["sbatch", "--parsable", *cluster.options, f"--nodes={nodes}", f"--output={log}", "slurm/bench.sbatch", "scaling"]
    done = _call([*command, *map(str, files)])
    if done.returncode != 0:
        raise UserError(f"sbatch with {nodes} node(s): {' '.join(done.stderr.split())}")
    number = done.stdout.strip().partition(";")[0]
    write_json(note, {"job": number, "files": names})
    return Job(number, nodes, tuple(files))


def state_of(number: str) -> str:
    """State of a job as Slurm names it; COMPLETED where Slurm has forgotten it, UNKNOWN where Slurm does not answer."""
    done = _call(["scontrol", "--oneliner", "show", "job", number])
    if done.returncode != 0:
        return "COMPLETED" if GONE in done.stderr else "UNKNOWN"
    fields = dict(word.partition("=")[::2] for word in done.stdout.split())
    return fields.get("JobState", "UNKNOWN")


def wait(
    jobs: Sequence[Job], arrived: Callable[[Path, str | None], None], tell: Callable[[str], None],
    every: float = 5.0, patience: float = 30.0,
) -> None:  # fmt: skip
    """Call `arrived` with the arguments file of each size as soon as it has rows, or with the reason why it has none.

    Args:
        every: seconds between looks.
        patience: seconds after a job's end until a file that a shared file system has not shown yet counts as missing.
    """
    open_files = {path: job for job in jobs for path in job.files}
    states, ends = dict.fromkeys((job.number for job in jobs), ""), dict[str, float]()
    while open_files:
        for job in {job.number: job for job in open_files.values()}.values():
            # Asked before the files are looked for: rows that come between are seen in the next round.
            state = state_of(job.number)
            if state != states[job.number]:
                tell(f"job {job.number}, {job.nodes} node(s): {state.lower()}")
                states[job.number] = state
            if state in ENDED:
                ends.setdefault(job.number, time.monotonic())
            else:
                ends.pop(job.number, None)  # Slurm started it again
        for path, job in list(open_files.items()):
            if rows_file(path).is_file():
                arrived(path, None)
            elif job.number in ends and time.monotonic() - ends[job.number] >= patience:
                arrived(path, _why(path, job, states))
            else:
                continue
            del open_files[path]
        if open_files:
            time.sleep(every)


def rows_file(arguments: Path) -> Path:
    """File of a size's rows beside that of its arguments, as slurm/bench.sbatch names it."""
    return arguments.with_name(arguments.name.replace(".arguments.json", ".rows.json"))


def log_file(arguments: Path) -> Path:
    """File of what a size printed."""
    return arguments.with_name(arguments.name.replace(".arguments.json", ".log"))


def _why(arguments: Path, job: Job, states: Mapping[str, str]) -> str:
    """What a job that left no rows ended as, where its log lies, and the log's last lines."""
    logs = [log_file(arguments), arguments.with_name(f"nodes-{job.nodes}-{job.number}.log")]
    log = next((path for path in logs if path.is_file() and path.stat().st_size), logs[-1])
    last = log.read_text(errors="replace").splitlines()[-12:] if log.is_file() else []
    return "\n".join([f"job {job.number} {states[job.number].lower()} without rows, log {log}:", *last])


def _call(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"bench scaling --nodes: no {command[0]} on this machine; run it where Slurm's commands are") from None
