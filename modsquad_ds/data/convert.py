"""Dataset on disk -> finished shard folder: list the source, check and pack every sample in parallel, index, publish.

    read_source -> fixed shuffle -> [one task per tar, in worker processes: encode, write] -> index.json -> rename

The result is a pure function of the source: the same bytes on every run and with any number of workers.
"""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import zip_longest
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import modsquad_ds
from modsquad_ds.data.samples import BadSample, BadSampleError, Labels, Sample, encode
from modsquad_ds.data.shards import FORMAT, INDEX_NAME, Index, ShardEntry, Skipped, index_file, load_index
from modsquad_ds.data.sources import Source, read_source
from modsquad_ds.data.staging import staged_folder
from modsquad_ds.errors import UserError
from modsquad_ds.files import sha256_of, sync

REPORTED = 20
"""Bad samples that an error message lists; the rest are counted."""


class _Task(NamedTuple):
    """One tar to write."""

    path: Path
    root: Path
    labels: Labels
    samples: Sequence[Sample]


class _Written(NamedTuple):
    entry: ShardEntry
    bad: list[BadSample]


class _Stopped(Exception):  # noqa: N818 - no error: the parent asked for it
    """A worker's way out of a shard that nobody wants any more."""


def convert(
    layout: str,
    src: Path,
    out: Path,
    split: str,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Index:
    """Write `split` of the dataset at `src`, laid out as `layout`, to `out/<split>`; return its index.

    Without `skip_bad` any bad sample refuses the whole conversion, after all of them were found; with it they are left
    out and counted. `progress` shows a bar and a summary. Nothing appears as `out/<split>` unless all went well.
    UserError for bad input, an existing `out/<split>` (unless `overwrite` and it holds shards) and write errors.
    """
    src, out = Path(src), Path(out)
    _check_numbers(samples_per_shard, workers)
    final = _target(out, split, overwrite)
    source = read_source(layout, src, split)
    _check_siblings(out, source)
    console = Console(quiet=not progress)
    try:
        with staged_folder(final) as stage:
            tasks = _tasks(source, stage, samples_per_shard)
            with _progress(console, f"{layout} {split}", len(source.samples)) as advance:
                written = _write_here(tasks, advance) if workers == 1 else _write_parallel(tasks, workers, advance)
            bad = sorted({*source.bad, *(bad for result in written for bad in result.bad)})
            kept = _renumber(stage, [result.entry for result in written if result.entry.samples])
            _refuse(source, bad, skip_bad, sum(entry.samples for entry in kept))
            _refuse_twin(out, source, kept)
            index = _index(source, kept, bad)
            _write_file(stage / INDEX_NAME, index.model_dump_json(indent=1).encode())
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror} ({error.filename or 'no file name'})") from error
    console.print(summary(index, final), highlight=False, markup=False, soft_wrap=True)
    return index


def summary(index: Index, folder: Path) -> str:
    """What a conversion made, for the terminal."""
    megabytes = sum(entry.bytes for entry in index.shards) / 1e6
    text = f"{folder}: {index.num_samples} samples of {len(index.classes)} classes"
    text += f" in {len(index.shards)} shards, {megabytes:.1f} MB"
    if index.skipped:
        rows = [str(BadSample(bad.file, bad.reason)) for bad in index.skipped_samples]
        text += "\n" + _listing(f"skipped {index.skipped} bad samples", rows)
    return text


# ---------------------------------------------------------------- what is refused


def _check_numbers(samples_per_shard: int, workers: int) -> None:
    for name, value in (("samples per shard", samples_per_shard), ("workers", workers)):
        if value < 1:
            raise UserError(f"{name}: {value}, expected 1 or more")


def _target(out: Path, split: str, overwrite: bool) -> Path:
    """`out/<split>`, after checking that it may be written."""
    if not split or split.startswith(".") or Path(split).name != split:
        raise UserError(f"split {split!r} cannot name a folder: expected a plain name such as train or val")
    final = out / split
    if (final / INDEX_NAME).is_file():
        if not overwrite:
            raise UserError(f"{final} already holds finished shards: choose another OUT or give --overwrite")
    elif final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists and holds no shards, so it is left alone: choose another OUT")
    return final


def _check_siblings(out: Path, source: Source) -> None:
    """The splits of one OUT must agree on kind and classes, or the labels of one would mean other things in another."""
    for path in sorted(out.glob(f"[!.]*/{INDEX_NAME}")):
        folder = path.parent
        if folder.name == source.split:
            continue
        other = load_index(folder)
        if other.kind != source.kind:
            raise UserError(f"{folder} holds {other.kind} shards, these would be {source.kind}: choose another OUT")
        if other.classes != source.classes:
            pairs = enumerate(zip_longest(other.classes, source.classes))
            label, (theirs, ours) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
            counts = (
                f"{len(other.classes)} classes there, {len(source.classes)} here, first difference at label {label}"
            )
            raise UserError(
                f"split {source.split!r} has other classes than {folder} ({counts}: {theirs!r} / {ours!r}): "
                "give every split the same classes, or choose another OUT"
            )


def _refuse_twin(out: Path, source: Source, kept: list[ShardEntry]) -> None:
    """A folder without splits looks the same whatever split is asked for; held-out data must not be the training data."""
    if source.details["source_split"]:
        return
    for path in sorted(out.glob(f"[!.]*/{INDEX_NAME}")):
        if path.parent.name != source.split and [e.sha256 for e in load_index(path.parent).shards] == [e.sha256 for e in kept]:
            raise UserError(
                f"{source.root} has no folder {source.split!r}, so its class folders themselves were read, and {path.parent} "
                "holds the same samples: give the folder above the splits, or the split's own"
            )


def _refuse(source: Source, bad: list[BadSample], skip_bad: bool, good: int) -> None:
    total = f"{len(bad)} bad and {good} good samples in {source.root} ({source.layout}, split {source.split})"
    if bad and not skip_bad:
        raise UserError(_listing(total, [str(one) for one in bad]) + "\nmend them, or leave them out with --skip-bad")
    if good == 0:
        raise UserError(_listing(f"no usable sample: {total}", [str(one) for one in bad]))


def _listing(title: str, rows: list[str]) -> str:
    """Title, the first rows, and how many more there are."""
    if len(rows) > REPORTED:
        rows = [*rows[:REPORTED], f"... and {len(rows) - REPORTED} more"]
    return "\n  ".join([f"{title}:" if rows else title, *rows])


# ---------------------------------------------------------------- the plan


def _tasks(source: Source, stage: Path, samples_per_shard: int) -> list[_Task]:
    """Cut the samples, in an order fixed by their keys' hashes, into tars.

    Shuffled because class-sorted shards would hold one class each, which no shuffling inside a window of shards can
    mend. A hash instead of a seeded shuffle: the order does not hang on any library's generator.
    """
    samples = sorted(source.samples, key=lambda sample: hashlib.blake2b(sample.key.encode(), digest_size=8).digest())
    starts = range(0, len(samples), samples_per_shard)
    return [
        _Task(stage / f"shard-{number:05d}.tar", source.root, source.labels, samples[start : start + samples_per_shard])
        for number, start in enumerate(starts)
    ]


def _renumber(stage: Path, entries: list[ShardEntry]) -> list[ShardEntry]:
    """Close the gaps that shards without any good sample left in the numbering."""
    renamed = []
    for number, entry in enumerate(entries):
        name = f"shard-{number:05d}.tar"
        if name != entry.file:
            (stage / entry.file).rename(stage / name)
            (stage / index_file(entry.file)).rename(stage / index_file(name))
        renamed.append(entry.model_copy(update={"file": name}))
    return renamed


def _index(source: Source, entries: list[ShardEntry], bad: list[BadSample]) -> Index:
    return Index(
        format=FORMAT,
        tool=f"modsquad_ds {modsquad_ds.__version__}",
        kind=source.kind,
        layout=source.layout,
        source=source.root.resolve().name,
        split=source.split,
        classes=source.classes,
        details=source.details,
        num_samples=sum(entry.samples for entry in entries),
        skipped=len(bad),
        skipped_samples=tuple(Skipped(file=_storable(one.file), reason=_storable(one.reason)) for one in bad),
        shards=tuple(entries),
    )


def _storable(text: str) -> str:
    """Text that JSON in UTF-8 can hold: bytes of a file name that are not UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---------------------------------------------------------------- writing one tar


def _write_shard(task: _Task, advance: Callable[[], None]) -> _Written:
    """Encode a task's samples into its tar and the tar's own index. A tar without a good sample is not left on disk."""
    bad: list[BadSample] = []
    rows: list[dict[str, Any]] = []
    with open(task.path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for sample in task.samples:
                try:
                    fields = encode(sample, task.root, task.labels)
                except BadSampleError as error:
                    bad.append(error.bad)
                else:
                    places = {field: _add(tar, file, f"{sample.key}.{field}", data) for field, data in fields.items()}
                    rows.append({"key": sample.key, "fields": places})
                advance()
        file.flush()
        os.fsync(file.fileno())
    if not rows:
        task.path.unlink()
        return _Written(ShardEntry(file=task.path.name, samples=0, bytes=0, sha256="", index_sha256=""), bad)
    members = json.dumps(rows, separators=(",", ":")).encode()
    _write_file(task.path.with_name(index_file(task.path.name)), members)
    entry = ShardEntry(
        file=task.path.name,
        samples=len(rows),
        bytes=task.path.stat().st_size,
        sha256=sha256_of(task.path),
        index_sha256=hashlib.sha256(members).hexdigest(),
    )
    return _Written(entry, bad)


def _add(tar: tarfile.TarFile, file: io.BufferedWriter, name: str, data: bytes) -> list[int]:
    """Append a member; return offset and size of its bytes. Owner and time stay 0: equal content gives equal tars."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return [file.tell() - padded, len(data)]


def _write_file(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


# ---------------------------------------------------------------- running the tasks


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; yields a function that sets the number of samples done."""
    left = TextColumn("left")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=console.quiet) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def _write_here(tasks: list[_Task], advance: Callable[[int], None]) -> list[_Written]:
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        advance(done)

    return [_write_shard(task, one_more) for task in tasks]


def _write_parallel(tasks: list[_Task], workers: int, advance: Callable[[int], None]) -> list[_Written]:
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


def _follow(futures: list[Future[_Written]], report: Callable[[], None]) -> None:
    """Wait for all futures, reporting a few times a second; raises the first error met."""
    pending: set[Future[_Written]] = set(futures)
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


def _write_in_worker(task: _Task) -> _Written:
    assert _shared is not None, "workers start with _init_worker"
    done, stop = _shared

    def one_more() -> None:
        with done.get_lock():
            done.value += 1
        if stop.is_set():
            raise _Stopped

    return _write_shard(task, one_more)
