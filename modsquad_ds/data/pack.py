"""One tar of a conversion: its samples checked, encoded and written, in this process or in several at once.

    convert.plan -> [Task: one per tar] -> write -> [Written: its index entry and its bad samples]

`convert.py` has all tars of a split written, `parts.py` one part's.
"""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from modsquad_ds.data.layouts import encode
from modsquad_ds.data.samples import BadSample, BadSampleError, Labels, Sample
from modsquad_ds.data.shards import ShardEntry, index_file
from modsquad_ds.errors import UserError
from modsquad_ds.files import sha256_of, sync


class Task(NamedTuple):
    """One tar to write."""

    path: Path
    root: Path
    labels: Labels
    samples: Sequence[Sample]


class Written(NamedTuple):
    """What became of a task. `entry.samples` is 0, and no file is left, where none of the samples was good."""

    entry: ShardEntry
    bad: list[BadSample]
    """Samples that were left out."""
    bad_labels: list[BadSample]
    """Labels that were left out of samples which have others."""
    fields: Counter[str]
    """Field -> number of samples that have it."""


class _Stopped(Exception):  # noqa: N818 - no error: the parent asked for it
    """A worker's way out of a shard that nobody wants any more."""


def write(tasks: Sequence[Task], workers: int, advance: Callable[[int], None]) -> list[Written]:
    """Write the tars with so many processes, this one alone if `workers` is 1; `advance` gets the number of samples done.

    UserError if a process dies; OSError if a file cannot be written.
    """
    return _write_here(tasks, advance) if workers == 1 else _write_parallel(tasks, workers, advance)


# ---------------------------------------------------------------- writing one tar


def _write_shard(task: Task, advance: Callable[[], None]) -> Written:
    """Encode a task's samples into its tar and the tar's own index. A tar without a good sample is not left on disk."""
    bad: list[BadSample] = []
    bad_labels: list[BadSample] = []
    rows: list[dict[str, Any]] = []
    with open(task.path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for sample in task.samples:
                try:
                    members, faults = encode(sample, task.root, task.labels)
                except BadSampleError as error:
                    bad.append(error.bad)
                else:
                    places = {field: _add(tar, file, f"{sample.key}.{field}", data) for field, data in members.items()}
                    rows.append({"key": sample.key, "fields": places})
                    bad_labels += faults
                advance()
        file.flush()
        os.fsync(file.fileno())
    if not rows:
        task.path.unlink()
        return Written(ShardEntry(file=task.path.name, samples=0, bytes=0, sha256="", index_sha256=""), bad, [], Counter())
    places_json = json.dumps(rows, separators=(",", ":")).encode()
    write_file(task.path.with_name(index_file(task.path.name)), places_json)
    entry = ShardEntry(
        file=task.path.name,
        samples=len(rows),
        bytes=task.path.stat().st_size,
        sha256=sha256_of(task.path),
        index_sha256=hashlib.sha256(places_json).hexdigest(),
    )
    return Written(entry, bad, bad_labels, Counter(field for row in rows for field in row["fields"]))


def _add(tar: tarfile.TarFile, file: io.BufferedWriter, name: str, data: bytes) -> list[int]:
    """Append a member; return offset and size of its bytes. Owner and time stay 0: equal content gives equal tars."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return [file.tell() - padded, len(data)]


def write_file(path: Path, data: bytes) -> None:
    """Write a file of a folder that is not published yet, flushed to disk."""
    path.write_bytes(data)
    sync(path)


# ---------------------------------------------------------------- running the tasks


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; yields a function that sets the number done."""
    left = TextColumn("left")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=console.quiet) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def _write_here(tasks: Sequence[Task], advance: Callable[[int], None]) -> list[Written]:
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        advance(done)

    return [_write_shard(task, one_more) for task in tasks]


def _write_parallel(tasks: Sequence[Task], workers: int, advance: Callable[[int], None]) -> list[Written]:
    """Run the tasks in fresh processes. UserError if one dies; on any error the others stop at their next sample."""
    # Not fork: the parent may hold threads. A fork server imports torchvision once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    done, stop = context.Value("Q", 0), context.Event()
    pool = ProcessPoolExecutor(min(workers, len(tasks) or 1), context, _init_worker, (done, stop))
    try:
        futures = [pool.submit(_write_in_worker, task) for task in tasks]
        _follow(futures, lambda: advance(done.value))
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise UserError("a worker process died while packing (out of memory?): try fewer --workers") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _follow(futures: list[Future[Written]], report: Callable[[], None]) -> None:
    """Wait for all futures, reporting a few times a second; raises the first error met."""
    pending: set[Future[Written]] = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        report()
        for future in finished:
            future.result()


_shared: tuple["Synchronized[int]", Event] | None = None
"""In a worker process: the count of samples done by all workers, and the parent's signal to stop."""


def _init_worker(done: "Synchronized[int]", stop: Event) -> None:
    global _shared
    _shared = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent must not leave workers behind that go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_in_worker(task: Task) -> Written:
    assert _shared is not None, "workers start with _init_worker"
    done, stop = _shared

    def one_more() -> None:
        with done.get_lock():
            done.value += 1
        if stop.is_set():
            raise _Stopped

    return _write_shard(task, one_more)
