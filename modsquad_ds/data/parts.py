"""A conversion in parts, so that several jobs share the work: each part writes its share of the tars, then one merges them.

    OUT/.SPLIT.parts/part-3-of-8/shard-00003.tar, shard-00003.index.json, shard-00011.tar, ...
    OUT/.SPLIT.parts/part-3-of-8/part.json      `PartRecord`: what was written, and from which listing
    -> merge -> OUT/SPLIT: byte for byte what `convert.py` makes in one piece

Tar n of `convert.plan` belongs to part n mod N, so parts need not know of each other. A folder part-I-of-N appears whole,
by a rename. No result hangs on locks, which some file systems of clusters lack: a merge links the tars, after reading all
of them once more, into a folder of its own and publishes that by a rename, which only one of several merges can do.
"""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from modsquad_ds.data import convert
from modsquad_ds.data.convert import TOOL
from modsquad_ds.data.pack import progress_bar, write, write_file
from modsquad_ds.data.part_job import RECORD_NAME, Job, Part, PartRecord, faults, open_job, read_record
from modsquad_ds.data.shards import INDEX_NAME, Index, ShardEntry, index_file, load_index
from modsquad_ds.data.sources import NO_OPTIONS, Options
from modsquad_ds.data.staging import BusyError, staged_folder
from modsquad_ds.errors import UserError
from modsquad_ds.files import sync

WAIT_SECONDS = 1.0
"""Between two looks at a part that another process is writing."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
"""What link answers on file systems without hard links, or with none between two folders."""


def convert_part(
    layout: str,
    src: Path,
    out: Path,
    split: str,
    part: Part,
    *,
    merge: bool = False,
    options: Options = NO_OPTIONS,
    samples_per_shard: int = 1000,
    workers: int = 1,
    skip_bad: bool = False,
    progress: bool = True,
) -> Index | None:
    """Write one part's share of `convert`'s tars; with `merge` also merge, if that was the last part. Index if merged.

    A part that was finished before is read and compared with its record, and not written again, nor are shards that were
    already merged from the same listing. A part that another process is writing is waited for. A part that was killed
    starts anew. Without `skip_bad` a part with bad samples is a UserError that lists them, and is written anew next time.
    Other UserErrors are those of `convert`.
    """
    if not 0 <= part.number < part.total:
        raise UserError(f"part {part}: expected I/N with I from 0 to N-1")
    job = open_job(
        layout, src, out, split, part.total,
        options=options, samples_per_shard=samples_per_shard, workers=workers, skip_bad=skip_bad, progress=progress,
    )  # fmt: skip
    try:
        record = _finished_or_written(job, part)
    except OSError as error:
        if not job.is_published():  # by another process, which has removed the parts under our hands
            raise UserError(f"cannot write {job.folder(part.number)}: {_what(error)}") from error
        record = None
    if record is None or (merge and job.is_published()):
        return _already(job)
    bad = record.outcome.every_bad
    if bad and not skip_bad:
        again = f"mend them and run this part again ({job.command(part.number)}), or give --skip-bad"
        good = sum(entry.samples for entry in record.shards)
        title = f"{len(bad)} bad and {good} good samples in part {part} of {job.source.root} ({layout}, split {split})"
        raise UserError(f"{convert.listing(title, [str(one) for one in bad])}\n{again}")
    if not merge:
        return None
    # A merge by the last part must not meet what an earlier array left behind and this one is about to write anew.
    waiting = [number for number, record in enumerate(job.records()) if not job.is_settled(record)]
    if not waiting:
        return _merge(job)
    if job.is_published():  # by another part that looked at the same moment
        return _already(job)
    job.say(f"parts still to come: {', '.join(map(str, waiting))} of {part.total}; the last one merges")
    return None


def merge_parts(
    layout: str,
    src: Path,
    out: Path,
    split: str,
    parts: int,
    *,
    options: Options = NO_OPTIONS,
    samples_per_shard: int = 1000,
    workers: int = 1,
    skip_bad: bool = False,
    progress: bool = True,
) -> Index:
    """Make `out/<split>` of its finished parts and remove those; return its index.

    UserError that names every part that is missing, damaged or made in another way, with the command that makes it; that
    lists the bad samples of all parts, unless `skip_bad`; and for what `convert` refuses. Then the parts stay as they are.
    """
    job = open_job(
        layout, src, out, split, parts,
        options=options, samples_per_shard=samples_per_shard, workers=workers, skip_bad=skip_bad, progress=progress,
    )  # fmt: skip
    return _already(job) if job.is_published() else _merge(job)


def _already(job: Job) -> Index:
    """The shards that an earlier merge has published; it may have been killed before it removed the parts."""
    shutil.rmtree(job.root, ignore_errors=True)
    job.say(f"{job.final} holds these shards already")
    return load_index(job.final)


def _what(error: OSError) -> str:
    return f"{error.strerror} ({error.filename or 'no file name'})"


# ---------------------------------------------------------------- one part


class _Finished(Exception):  # noqa: N818 - no error: another process was faster
    """A way out of the folder that is about to be filled."""


def _finished_or_written(job: Job, part: Part) -> PartRecord | None:
    """The part's record; None if all parts are merged already."""
    folder, told = job.folder(part.number), False
    while not job.is_published():
        if record := _finished(job, part):
            job.say(f"part {part}: finished already, {_size(record)} in {folder}")
            return record
        try:
            with staged_folder(folder) as stage:
                if job.is_published() or _finished(job, part):  # between our look and our lock
                    raise _Finished
                record = _write(job, part, stage)
            job.say(f"part {part}: {_size(record)} in {folder}")
            return record
        except _Finished:
            continue
        except BusyError:
            if not told:
                job.say(f"part {part}: another process is writing it, waiting")
            told = True
            time.sleep(WAIT_SECONDS)
    return None


def _size(record: PartRecord) -> str:
    kept = [entry for entry in record.shards if entry.samples]
    return f"{sum(entry.samples for entry in kept)} samples in {len(kept)} shards"


def _finished(job: Job, part: Part) -> PartRecord | None:
    """The part's record if it needs no further run and its files are those that were written."""
    record = read_record(job.folder(part.number))
    if record is None or job.mismatch(part.number, record) or not job.is_settled(record):
        return None
    return None if faults(job, {part.number: record}, f"part {part}, reading") else record


def _write(job: Job, part: Part, stage: Path) -> PartRecord:
    tasks = [task._replace(path=stage / task.path.name) for task in job.tasks[part.number :: part.total]]
    with progress_bar(job.console, f"part {part}", sum(len(task.samples) for task in tasks)) as advance:
        written = write(tasks, job.workers, advance)
    listed = job.source.bad if part.number == 0 else ()
    outcome = convert.outcome_of(listed, written)
    record = PartRecord(
        tool=TOOL,
        samples_per_shard=job.samples_per_shard,
        listing=job.listing,
        skip_bad=job.skip_bad,
        bad=convert.stored(outcome.bad),
        bad_labels=convert.stored(outcome.bad_labels),
        fields=dict(outcome.fields),
        shards=tuple(result.entry for result in written),
    )
    write_file(stage / RECORD_NAME, record.model_dump_json(indent=1).encode())
    return record


# ---------------------------------------------------------------- merging


def _merge(job: Job) -> Index:
    stage = job.root / f"merge-{uuid.uuid4().hex}"
    try:
        records = _checked_records(job)
        index = _checked_index(job, records)
        _publish(job, records, index, stage)
    except (UserError, OSError) as error:
        shutil.rmtree(stage, ignore_errors=True)
        if job.is_published():  # by another process, which has removed the parts under our hands
            return _already(job)
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot write {job.final}: {_what(error)}") from error
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    shutil.rmtree(job.root, ignore_errors=True)
    job.say(convert.summary(index, job.final))
    return index


def _checked_index(job: Job, records: Sequence[PartRecord]) -> Index:
    """The index of all parts. UserError for what `convert` refuses in the whole."""
    outcomes = [record.outcome for record in records]
    outcome = convert.Outcome(
        sorted({one for part in outcomes for one in part.bad}),
        sorted({one for part in outcomes for one in part.bad_labels}),
        convert.sum_of(part.fields for part in outcomes),
    )
    kept = [entry for _, entry in convert.renumbered(_in_order(records))]
    again = [job.command(number) for number, record in enumerate(records) if record.outcome.every_bad]
    hint = convert.listing("leave them out with --skip-bad, or mend them and run their parts again", again)
    convert.refuse_bad(outcome.every_bad, job.skip_bad, sum(entry.samples for entry in kept), job.source, hint)
    convert.refuse_twin(job.out, job.source, kept)
    return convert.index_of(job.source, kept, outcome)


def _in_order(records: Sequence[PartRecord]) -> list[ShardEntry]:
    """The tars of all parts in the order of `convert.plan`: number n is one of part n mod N."""
    count = sum(len(record.shards) for record in records)
    return [records[number % len(records)].shards[number // len(records)] for number in range(count)]


def _checked_records(job: Job) -> list[PartRecord]:
    """The records of all parts. UserError that names what is missing, made in another way or damaged, and the way out."""
    records: dict[int, PartRecord] = {}
    wrong: dict[int, str] = {}
    for number in range(job.parts):
        record = read_record(job.folder(number))
        if record is None:
            wrong[number] = "has no readable part.json" if job.folder(number).exists() else "is missing"
        elif fault := job.mismatch(number, record):
            wrong[number] = fault
        else:
            records[number] = record
    wrong |= faults(job, records, f"reading {job.parts} parts")
    if wrong:
        rows = [f"part {number}/{job.parts} {fault}: {job.command(number)}" for number, fault in sorted(wrong.items())]
        title = f"{len(wrong)} of {job.parts} parts of {job.final} have to be run (again)"
        if others := {folder.name.rpartition("-")[2] for folder in job.root.glob("part-*-of-*")} - {str(job.parts)}:
            title += f"; there are some of a cut into {' or '.join(sorted(others))} parts"
        raise UserError(convert.listing(title, rows))
    return list(records.values())


def _publish(job: Job, records: Sequence[PartRecord], index: Index, stage: Path) -> None:
    """Make the split's folder under another name, then rename it."""
    stage.mkdir()
    places = {entry.file: job.folder(number) for number, record in enumerate(records) for entry in record.shards}
    for name, entry in convert.renumbered(_in_order(records)):
        _link(places[name] / name, stage / entry.file)
        _link(places[name] / index_file(name), stage / index_file(entry.file))
    write_file(stage / INDEX_NAME, convert.index_bytes(index))
    sync(stage)
    stage.rename(job.final)  # fails if another process has published its folder
    sync(job.out)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy of it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
        sync(target)
