"""What the parts of a conversion share: the cut of the tars, the record of a part, and what may be wrong with either.

`parts.py` writes and merges them.
"""

import functools
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from modsquad_ds.data import convert
from modsquad_ds.data.convert import TOOL
from modsquad_ds.data.layouts import read_source
from modsquad_ds.data.pack import Task, progress_bar
from modsquad_ds.data.samples import BadSample
from modsquad_ds.data.shards import INDEX_NAME, Index, ShardEntry, Skipped, index_file, load_index
from modsquad_ds.data.sources import Options, Source
from modsquad_ds.errors import UserError
from modsquad_ds.files import sha256_of

RECORD_NAME = "part.json"


class Part(NamedTuple):
    """Part `number` of `total`, counted from 0."""

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


class PartRecord(BaseModel):
    """Content of `part.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tool: str
    """Program and version that wrote it."""
    samples_per_shard: int
    listing: str
    """`fingerprint` of the source."""
    skip_bad: bool
    bad: tuple[Skipped, ...]
    """Bad samples among this part's; part 0 also has those that the listing alone ruled out."""
    bad_labels: tuple[Skipped, ...]
    """Bad labels of samples that stay."""
    fields: dict[str, int]
    """Field -> number of samples that have it."""
    shards: tuple[ShardEntry, ...]
    """Under the names of `convert.plan`; a tar without a good sample has 0 samples and no file."""

    @property
    def outcome(self) -> convert.Outcome:
        """As `convert` knows it."""
        bad, labels = ([BadSample(one.file, one.reason) for one in rows] for rows in (self.bad, self.bad_labels))
        return convert.Outcome(bad, labels, Counter(self.fields))


def parse_part(text: str) -> Part:
    """`3/8` -> Part(3, 8). UserError for anything else, also for 8/8: parts are counted from 0."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and int(number) < int(total)):
        raise UserError(f"--part {text}: expected I/N with I from 0 to N-1, such as 0/8")
    return Part(int(number), int(total))


def fingerprint(source: Source) -> str:
    """Checksum of a listing: two listings that agree on it give the same tars, as long as the files keep their content."""
    head = [source.kind, source.layout, source.root.resolve().name, source.split, source.classes, source.details]
    head += [source.targets] if source.targets else []
    digest = hashlib.sha256()
    for row in (head, *source.samples, *source.bad):
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class Job:
    """A conversion that is cut into parts."""

    source: Source
    options: Options
    out: Path
    parts: int
    samples_per_shard: int
    workers: int
    skip_bad: bool
    console: Console

    @property
    def final(self) -> Path:
        return self.out / self.source.split

    @property
    def root(self) -> Path:
        """Folder of the parts. Its name begins with a dot: it is nobody's split."""
        return self.out / f".{self.source.split}.parts"

    def folder(self, number: int) -> Path:
        return self.root / f"part-{number}-of-{self.parts}"

    @functools.cached_property
    def listing(self) -> str:
        return fingerprint(self.source)

    @functools.cached_property
    def tasks(self) -> list[Task]:
        """All tars of the conversion."""
        return convert.plan(self.source, self.final, self.samples_per_shard)

    def command(self, number: int) -> str:
        """What a user types to have the part written (again)."""
        words = ["python", "-m", "modsquad_ds", "shards", self.source.layout, str(self.source.root), str(self.out)]
        words += ["--split", self.source.split, "--samples-per-shard", str(self.samples_per_shard)]
        words += ["--split-list", self.options.split_list] if self.options.split_list else []
        words += ["--targets", ",".join(self.options.targets)] if self.options.targets else []
        words += ["--skip-bad"] if self.skip_bad else []
        return shlex.join([*words, "--part", f"{number}/{self.parts}"])

    def records(self) -> list[PartRecord | None]:
        """Record of every part; None for one that is missing, cannot be read or was made in another way.

        Each is opened by its name: a folder's listing may come from a network file system's cache.
        """
        found = enumerate([read_record(self.folder(number)) for number in range(self.parts)])
        return [record if record and self.mismatch(number, record) is None else None for number, record in found]

    def mismatch(self, number: int, record: PartRecord) -> str | None:
        """What keeps the record of part `number` from being one of this conversion's; None if nothing does."""
        if record.tool != TOOL:
            return f"was written by {record.tool}, this is {TOOL}"
        if record.samples_per_shard != self.samples_per_shard:
            return f"was written with {record.samples_per_shard} samples per shard, expected {self.samples_per_shard}"
        if record.listing != self.listing:
            return f"was written from another listing of {self.source.root} (files came, went or changed their class since)"
        share = self.tasks[number :: self.parts]
        if [entry.file for entry in record.shards] != [task.path.name for task in share]:
            return f"lists other tars than the {len(share)} of its share"
        listed = {convert.storable(bad) for bad in self.source.bad} if number == 0 else set()
        found = sum(entry.samples for entry in record.shards)
        found += len({(one.file, one.reason) for one in record.bad} - listed)
        planned = sum(len(task.samples) for task in share)
        return None if found == planned else f"accounts for {found} of its {planned} samples"

    def is_settled(self, record: PartRecord | None) -> bool:
        """Whether a part needs no further run. With bad samples it does, in case they were mended, unless they are skipped."""
        return record is not None and (not record.outcome.every_bad or (record.skip_bad and self.skip_bad))

    def is_published(self) -> bool:
        """Whether `OUT/SPLIT` holds exactly what these parts make, as far as names tell. UserError for other shards."""
        if not (self.final / INDEX_NAME).is_file():
            return False
        index = load_index(self.final)
        expected = convert.index_of(self.source, index.shards, convert.outcome_in(index))
        if index != expected or not self._has_its_keys(index):
            raise UserError(
                f"{self.final} already holds finished shards, which are not of this listing and these settings: choose another "
                "OUT or remove them (--overwrite does not go with parts)"
            )
        return True

    def _has_its_keys(self, index: Index) -> bool:
        """Whether the tars hold the keys that are planned for them, but for as many as were skipped."""
        found = [_keys(self.final, entry) for entry in index.shards]
        every = {key for keys in found for key in keys}
        kept = [[sample.key for sample in task.samples if sample.key in every] for task in self.tasks]
        lost = len(self.source.samples) - len(every) + len({convert.storable(bad) for bad in self.source.bad})
        return [keys for keys in kept if keys] == found and lost == index.skipped

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def open_job(
    layout: str,
    src: Path,
    out: Path,
    split: str,
    parts: int,
    *,
    options: Options,
    samples_per_shard: int,
    workers: int,
    skip_bad: bool,
    progress: bool,
) -> Job:
    """List the source. UserError for what `convert` refuses before it writes."""
    convert.check_numbers(samples_per_shard, workers)
    if parts < 1:
        raise UserError(f"parts: {parts}, expected 1 or more")
    convert.target(Path(out), split, overwrite=True)  # finished shards are looked at later
    source = read_source(layout, Path(src), split, options)
    convert.check_siblings(Path(out), source)
    return Job(source, options, Path(out), parts, samples_per_shard, workers, skip_bad, Console(quiet=not progress))


def read_record(folder: Path) -> PartRecord | None:
    """A part's record; None if it is missing or is none."""
    try:
        return PartRecord.model_validate_json((folder / RECORD_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _keys(folder: Path, entry: ShardEntry) -> list[str]:
    path = folder / index_file(entry.file)
    try:
        return [row["key"] for row in json.loads(path.read_bytes())]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): remove {folder} and make the shards again") from error


# ---------------------------------------------------------------- what may be wrong with a part


def faults(job: Job, records: dict[int, PartRecord], title: str) -> dict[int, str]:
    """Part -> what is wrong with its first damaged file. Reads all files."""
    files = [(number, entry) for number, record in records.items() for entry in record.shards if entry.samples]
    found: dict[int, str] = {}
    if not files:
        return found
    with progress_bar(job.console, title, len(files)) as advance, ThreadPoolExecutor(job.workers) as threads:
        results: Iterable[str | None] = threads.map(lambda file: _fault(job.folder(file[0]), file[1]), files)
        for done, ((number, _), fault) in enumerate(zip(files, results, strict=True), start=1):
            if fault:
                found.setdefault(number, fault)
            advance(done)
    return found


def _fault(folder: Path, entry: ShardEntry) -> str | None:
    try:
        size = (folder / entry.file).stat().st_size
        if size != entry.bytes:
            return f"is damaged ({entry.file} has {size} bytes, {entry.bytes} were written)"
        for name, expected in ((entry.file, entry.sha256), (index_file(entry.file), entry.index_sha256)):
            if sha256_of(folder / name) != expected:
                return f"is damaged ({name} differs from its checksum)"
    except OSError as error:
        return f"is damaged ({Path(error.filename or folder).name}: {error.strerror})"
    return None
