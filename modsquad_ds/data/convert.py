"""Dataset on disk -> finished shard folder: list the source, check and pack every sample in parallel, index, publish.

    read_source -> plan: fixed shuffle, one task per tar -> pack.write, in worker processes -> index.json -> rename

The result is a pure function of the source: the same bytes on every run, with any number of workers, and in any number
of parts (`parts.py`, where several jobs share the tars).
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import modsquad_ds
from modsquad_ds.data.layouts import read_source
from modsquad_ds.data.pack import Task, Written, progress_bar, write, write_file
from modsquad_ds.data.samples import BadSample
from modsquad_ds.data.shards import FORMAT, INDEX_NAME, Index, ShardEntry, Skipped, index_file, load_index
from modsquad_ds.data.sources import NO_OPTIONS, Options, Source
from modsquad_ds.data.staging import staged_folder
from modsquad_ds.errors import UserError
from modsquad_ds.targets import TARGETS
from modsquad_ds.tasks import MULTILABEL

REPORTED = 20
"""Bad samples that an error message lists; the rest are counted."""
TOOL = f"modsquad_ds {modsquad_ds.__version__}"
"""Program and version, as the index names them."""


def convert(
    layout: str,
    src: Path,
    out: Path,
    split: str,
    *,
    options: Options = NO_OPTIONS,
    samples_per_shard: int = 1000,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Index:
    """Write `split` of the dataset at `src`, laid out as `layout`, to `out/<split>`; return its index.

    Without `skip_bad` any bad sample refuses the whole conversion, after all of them were found; with it they are left
    out and counted; of an image set, a target's bad file is left out and its image stays with its other targets. `progress`
    shows a bar and a summary. Nothing appears as `out/<split>` unless all went well.
    UserError for bad input, an existing `out/<split>` (unless `overwrite` and it holds shards) and write errors.
    """
    src, out = Path(src), Path(out)
    check_numbers(samples_per_shard, workers)
    final = target(out, split, overwrite)
    source = read_source(layout, src, split, options)
    check_siblings(out, source)
    console = Console(quiet=not progress)
    try:
        with staged_folder(final) as stage:
            tasks = plan(source, stage, samples_per_shard)
            with progress_bar(console, f"{layout} {split}", len(source.samples)) as advance:
                written = write(tasks, workers, advance)
            outcome = outcome_of(source.bad, written)
            kept = _renumber(stage, [result.entry for result in written])
            refuse_bad(outcome.every_bad, skip_bad, sum(entry.samples for entry in kept), source)
            refuse_twin(out, source, kept)
            index = index_of(source, kept, outcome)
            write_file(stage / INDEX_NAME, index_bytes(index))
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror} ({error.filename or 'no file name'})") from error
    console.print(summary(index, final), highlight=False, markup=False, soft_wrap=True)
    return index


def summary(index: Index, folder: Path) -> str:
    """What a conversion made, for the terminal."""
    megabytes = sum(entry.bytes for entry in index.shards) / 1e6
    what = "with several labels" if index.kind == MULTILABEL else f"of {len(index.classes)} classes"
    texts = [f"{folder}: {index.num_samples} samples {what} in {len(index.shards)} shards, {megabytes:.1f} MB"]
    if targets := index.details.get("targets"):
        texts.append("samples by target: " + ", ".join(f"{name} {count}" for name, count in targets.items()))
    if left_out := index.details.get("left_out"):
        texts.append(listing("buildings left out", [f"{name}: {reason}" for name, reason in left_out.items()]))
    outcome = outcome_in(index)
    for title, bad in (("skipped {} bad samples", outcome.bad), ("left out {} bad labels", outcome.bad_labels)):
        if bad:
            texts.append(listing(title.format(len(bad)), [str(one) for one in bad]))
    return "\n".join(texts)


# ---------------------------------------------------------------- what is refused


def check_numbers(samples_per_shard: int, workers: int) -> None:
    """UserError for a number below 1."""
    for name, value in (("samples per shard", samples_per_shard), ("workers", workers)):
        if value < 1:
            raise UserError(f"{name}: {value}, expected 1 or more")


def target(out: Path, split: str, overwrite: bool) -> Path:
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


def check_siblings(out: Path, source: Source) -> None:
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
        if source.kind == MULTILABEL:
            _check_set_sibling(folder, other, source)


def _check_set_sibling(folder: Path, other: Index, source: Source) -> None:
    """Splits of an image set must agree on layout and targets, and no building may be in two of them."""
    if other.layout != source.layout:
        raise UserError(f"{folder} holds shards of {other.layout}, these would be of {source.layout}: choose another OUT")
    if set(other.details["targets"]) != set(source.targets):
        theirs, ours = ", ".join(sorted(other.details["targets"])), ", ".join(sorted(source.targets))
        raise UserError(
            f"split {source.split!r} has other targets than {folder} ({theirs} there, {ours} here): "
            "give every split the same targets, or choose another OUT"
        )
    both = sorted({*other.details.get("buildings", ())} & {*source.details.get("buildings", ())})
    if both:
        raise UserError(
            f"building {both[0]!r} is in split {source.split!r} of {source.details['split_list']} and in {folder}, made with "
            f"{other.details['split_list']}: use one split list for all splits, or choose another OUT"
        )


def refuse_twin(out: Path, source: Source, kept: list[ShardEntry]) -> None:
    """A folder without splits looks the same whatever split is asked for; held-out data must not be the training data."""
    if source.details["source_split"]:
        return
    for path in sorted(out.glob(f"[!.]*/{INDEX_NAME}")):
        if path.parent.name != source.split and [e.sha256 for e in load_index(path.parent).shards] == [e.sha256 for e in kept]:
            raise UserError(
                f"{source.root} has no folder {source.split!r}, so its class folders themselves were read, and {path.parent} "
                "holds the same samples: give the folder above the splits, or the split's own"
            )


MEND = "mend them, or leave them out with --skip-bad"


def refuse_bad(bad: list[BadSample], skip_bad: bool, good: int, source: Source, hint: str = MEND) -> None:
    """UserError that lists the bad samples and ends in `hint`, unless they may be skipped; and where none is good."""
    what = "bad files" if source.kind == MULTILABEL else "bad"
    total = f"{len(bad)} {what} and {good} good samples in {source.root} ({source.layout}, split {source.split})"
    if bad and not skip_bad:
        raise UserError(f"{listing(total, [str(one) for one in bad])}\n{hint}")
    if good == 0:
        raise UserError(listing(f"no usable sample: {total}", [str(one) for one in bad]))


def listing(title: str, rows: list[str]) -> str:
    """Title, the first rows, and how many more there are."""
    if len(rows) > REPORTED:
        rows = [*rows[:REPORTED], f"... and {len(rows) - REPORTED} more"]
    return "\n  ".join([f"{title}:" if rows else title, *rows])


# ---------------------------------------------------------------- the plan


def plan(source: Source, folder: Path, samples_per_shard: int) -> list[Task]:
    """Cut the samples, in an order fixed by their keys' hashes, into tars below `folder`.

    Shuffled because class-sorted shards would hold one class each, which no shuffling inside a window of shards can
    mend. A hash instead of a seeded shuffle: the order does not hang on any library's generator.
    """
    samples = sorted(source.samples, key=lambda sample: hashlib.blake2b(sample.key.encode(), digest_size=8).digest())
    starts = range(0, len(samples), samples_per_shard)
    return [
        Task(folder / _shard(number), source.root, source.labels, samples[start : start + samples_per_shard])
        for number, start in enumerate(starts)
    ]


def _shard(number: int) -> str:
    return f"shard-{number:05d}.tar"


def renumbered(entries: Iterable[ShardEntry]) -> list[tuple[str, ShardEntry]]:
    """The tars that hold samples, numbered without gaps: (name it was written under, entry with its name to be)."""
    kept = (entry for entry in entries if entry.samples)
    return [(entry.file, entry.model_copy(update={"file": _shard(number)})) for number, entry in enumerate(kept)]


def _renumber(stage: Path, entries: list[ShardEntry]) -> list[ShardEntry]:
    """Close the gaps that shards without any good sample left in the numbering."""
    pairs = renumbered(entries)
    for name, entry in pairs:
        if name != entry.file:
            (stage / name).rename(stage / entry.file)
            (stage / index_file(name)).rename(stage / index_file(entry.file))
    return [entry for _, entry in pairs]


class Outcome(NamedTuple):
    """What became of a source's samples, but for the tars."""

    bad: list[BadSample]
    """Samples that were left out; sorted, each once."""
    bad_labels: list[BadSample]
    """Labels that were left out of samples which stay."""
    fields: Counter[str]
    """Field -> number of samples that have it."""

    @property
    def every_bad(self) -> list[BadSample]:
        return sorted([*self.bad, *self.bad_labels])


def outcome_of(listed: Iterable[BadSample], written: Iterable[Written]) -> Outcome:
    """The outcome of writing tars; `listed` are the bad samples that were known before."""
    written = list(written)
    bad = sorted({*listed, *(one for result in written for one in result.bad)})
    return Outcome(bad, sorted({one for result in written for one in result.bad_labels}), sum_of(one.fields for one in written))


def sum_of(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The counts of several tars, or parts, together."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return total


def outcome_in(index: Index) -> Outcome:
    """What an index says of it."""
    targets = index.details.get("targets", {})
    bad, labels = ([BadSample(one.file, one.reason) for one in rows] for rows in (index.skipped_samples, skipped_targets(index)))
    return Outcome(bad, labels, Counter({TARGETS[name].field: count for name, count in targets.items()}))


def skipped_targets(index: Index) -> list[Skipped]:
    """Labels that --skip-bad left out of an image set's samples."""
    return [Skipped(**row) for row in index.details.get("skipped_targets", ())]


def index_of(source: Source, entries: Iterable[ShardEntry], outcome: Outcome) -> Index:
    """The index of a split that holds these tars, in this order."""
    entries = tuple(entries)
    skipped = stored(outcome.bad)
    details: dict[str, Any] = dict(source.details)
    if source.kind == MULTILABEL:
        details["targets"] = {name: outcome.fields[TARGETS[name].field] for name in source.targets}
        details["skipped_targets"] = [one.model_dump() for one in stored(outcome.bad_labels)]
    return Index(
        format=FORMAT,
        tool=TOOL,
        kind=source.kind,
        layout=source.layout,
        source=source.root.resolve().name,
        split=source.split,
        classes=source.classes,
        details=details,
        num_samples=sum(entry.samples for entry in entries),
        skipped=len(skipped),
        skipped_samples=skipped,
        shards=entries,
    )


def stored(bad: Iterable[BadSample]) -> tuple[Skipped, ...]:
    """As an index or a part's record holds them: sorted, each once."""
    return tuple(Skipped(file=one.file, reason=one.reason) for one in sorted({storable(one) for one in bad}))


def index_bytes(index: Index) -> bytes:
    """Content of `index.json`."""
    return index.model_dump_json(indent=1).encode()


def storable(bad: BadSample) -> BadSample:
    """Text that JSON in UTF-8 can hold: bytes of a file name that are not UTF-8 become escapes."""
    return BadSample(*(text.encode("utf-8", "backslashreplace").decode("utf-8") for text in bad))
