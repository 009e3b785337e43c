"""The shard format and its reader: plain tars with an index, in a folder or below a URL, read sample by sample with `pread`.

    OUT/<split>/shard-00000.tar         <key>.jpg and <key>.cls, .json or .seg.png, as `webdataset.WebDataset` reads it; of an
                                        image set <key>.png and those of <key>.normal.png, <key>.class_object.npy, ... there are
    OUT/<split>/shard-00000.index.json  [{"key": ..., "fields": {"jpg": [offset in the tar, size], ...}}, ...]
    OUT/<split>/index.json              `Index`: written last, so a folder that has it is complete

`convert.py` writes it, the task streams read it. From a URL the index is fetched once by each process, and tars and their
indices go through the node's cache.
"""

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modsquad_ds.config import CacheSpec
from modsquad_ds.data.ahead import FetchAhead
from modsquad_ds.data.cache import FileCache
from modsquad_ds.data.decode import IMAGE_FIELDS
from modsquad_ds.data.fetch import Wanted, fetch
from modsquad_ds.data.types import RawSample
from modsquad_ds.errors import UserError
from modsquad_ds.files import sha256_of
from modsquad_ds.location import Location, Url
from modsquad_ds.targets import TARGETS
from modsquad_ds.tasks import KINDS, SHARD_KINDS

FORMAT = 1
"""Version of the layout described above; raised whenever an older reader would go wrong."""
INDEX_NAME = "index.json"
MAKE_HINT = "python -m modsquad_ds shards {imagenet|coco|ade20k|taskonomy|pascal_context} SRC OUT --split SPLIT"
REMAKE = f"make the shards again: {MAKE_HINT} --overwrite"

DEFAULT_CACHE = CacheSpec()
# An index that was fetched from somewhere leads to no other folder, and says nothing to a shell.
_PLAIN_TAR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
Fields = dict[str, tuple[int, int]]
"""Field -> (offset, size) of its bytes inside the tar."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Record):
    """One tar of the index."""

    file: str
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str
    index_sha256: str
    """Of the tar's own index file."""


class Skipped(_Record):
    """A sample that --skip-bad left out."""

    file: str
    reason: str


class Index(_Record):
    """Content of `index.json`."""

    format: int
    tool: str
    """Program and version that wrote it."""
    kind: str
    layout: str
    source: str
    """Name of the source folder, without the path to it."""
    split: str
    classes: tuple[str, ...]
    """Name of each 0-based label."""
    details: dict[str, Any]
    """By layout: `source_split` (name of the split on disk), coco's `category_ids` by label, `reduce_zero_label`, `split_list`.
    Image sets: `targets` (name -> number of samples that have it), `skipped_targets` (file and reason of those left out)."""
    num_samples: int
    skipped: int
    skipped_samples: tuple[Skipped, ...]
    shards: tuple[ShardEntry, ...]


def index_file(shard: str) -> str:
    """Name of a tar's own index: `shard-00000.tar` -> `shard-00000.index.json`."""
    return shard.removesuffix(".tar") + ".index.json"


def load_index(folder: Path) -> Index:
    """Read and check `folder/index.json`. UserError if it is missing, of another format version or malformed."""
    path = folder / INDEX_NAME
    if not path.is_file():
        what = "has no index.json (no finished shards)" if folder.is_dir() else "does not exist"
        raise UserError(f"shard folder {folder} {what}: make it with {MAKE_HINT}")
    return _parse_index(path.read_bytes(), str(path))


def _parse_index(data: bytes, path: str) -> Index:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): {REMAKE}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: shard format {found!r}, this program reads format {FORMAT}: {REMAKE}")
    try:
        index = Index.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}: {REMAKE}") from error
    if index.kind not in SHARD_KINDS:
        raise UserError(f"{path}: kind {index.kind!r}, expected one of {', '.join(SHARD_KINDS)}: {REMAKE}")
    for entry in index.shards:
        if not _PLAIN_TAR.fullmatch(entry.file):
            raise UserError(f"{path}: shards: {entry.file!r} is not the plain name of a .tar file: {REMAKE}")
        if not (_SHA256.fullmatch(entry.sha256) and _SHA256.fullmatch(entry.index_sha256)):
            raise UserError(f"{path}: shards: {entry.file} has no sha256 of 64 digits: {REMAKE}")
    return index


class _Member(NamedTuple):
    key: str
    fields: Fields


Members = Callable[[ShardEntry], list[_Member]]
"""Entry of a tar -> what it holds; the last ones are kept."""


def _parse_members(data: bytes, path: str, entry: ShardEntry) -> list[_Member]:
    """The samples of one tar, in its order. UserError if this is not the tar's index that was written."""
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise UserError(f"{path}: is not the file that {INDEX_NAME} describes (sha256 differs): {REMAKE}")
    try:
        return [
            _Member(row["key"], {field: (offset, size) for field, (offset, size) in row["fields"].items()})
            for row in json.loads(data)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no index of a shard ({type(error).__name__}: {error}): {REMAKE}") from error


class _OpenShard:
    """An open tar and its members. It closes with its last reference, so eviction never cuts a reader off."""

    def __init__(self, path: str, members: list[_Member], descriptor: int) -> None:
        self.path, self.members, self.descriptor = path, members, descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Folder:
    """Files in a folder. Errors are UserError with the file's path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def index(self) -> Index:
        return load_index(self._folder)

    def check(self, entry: ShardEntry) -> None:
        """Whether the tar is there and as long as it should be."""
        path = self._folder / entry.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard {path}: {error.strerror}; {INDEX_NAME} lists it: {REMAKE}") from error
        if size < entry.bytes:
            members = self.members(entry)
            lost = next((key for key, fields in members if any(sum(place) > size for place in fields.values())), None)
            first = f"first key lost is {lost!r}" if lost is not None else "no sample is lost, but its end is"
            raise UserError(f"shard {path}: truncated to {size} of {entry.bytes} bytes, {first}: {REMAKE}")
        if size > entry.bytes:
            raise UserError(f"shard {path}: has {size} bytes, {INDEX_NAME} says {entry.bytes}: another file: {REMAKE}")

    def open(self, entry: ShardEntry, members: Members) -> _OpenShard:
        path = self._folder / entry.file
        try:
            return _OpenShard(str(path), members(entry), os.open(path, os.O_RDONLY))
        except OSError as error:
            raise UserError(f"shard {path}: cannot be opened ({error.strerror}): {REMAKE}") from error

    def members(self, entry: ShardEntry) -> list[_Member]:
        path = self._folder / index_file(entry.file)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): {REMAKE}") from error
        return _parse_members(data, str(path), entry)


@functools.cache
def _fetched_index(url: Url, cache: CacheSpec) -> Index:
    """Once per process: what it has checked at the start is what it reads all the time."""
    content = io.BytesIO()
    wanted = Wanted(url.file(INDEX_NAME))
    fetch(wanted, content, cache)
    return _parse_index(content.getvalue(), wanted.url)


class _Fetched:
    """Files below a URL, through the node's cache. Errors are UserError with the file's URL."""

    def __init__(self, url: Url, spec: CacheSpec) -> None:
        self._url, self._spec, self._cache = url, spec, FileCache(spec)

    def index(self) -> Index:
        return _fetched_index(self._url, self._spec)

    def check(self, entry: ShardEntry) -> None:
        """Whether the cache can hold the tar; the source is not asked."""
        self._cache.check_fits(self._tar(entry))

    def open(self, entry: ShardEntry, members: Members) -> _OpenShard:
        tar, samples = self._tar(entry), members(entry)
        return _OpenShard(tar.url, samples, self._cache.open(tar))

    def members(self, entry: ShardEntry) -> list[_Member]:
        """What the tar holds; the tar itself is not fetched."""
        wanted = self._index_of(entry)
        with open(self._cache.open(wanted), "rb") as file:
            return _parse_members(file.read(), wanted.url, entry)

    def bring(self, shards: Sequence[ShardEntry], shard: int, spare: Sequence[int]) -> None:
        """Have a tar and its index fetched, at no cost for those of `spare`."""
        spared = {sha256 for other in spare for sha256 in (shards[other].sha256, shards[other].index_sha256)}
        for wanted in (self._tar(shards[shard]), self._index_of(shards[shard])):
            self._cache.bring(wanted, spared)

    def _tar(self, entry: ShardEntry) -> Wanted:
        return Wanted(self._url.file(entry.file), entry.bytes, entry.sha256)

    def _index_of(self, entry: ShardEntry) -> Wanted:
        return Wanted(self._url.file(index_file(entry.file)), None, entry.index_sha256)


class ShardSet:
    """The samples of one split, by (shard, sample). Checked when opened; files are opened when first read.

    It pickles as its place and may be used from any process, forked or spawned, and from any thread. `open_shards` tars
    and their indices stay open at a time.
    """

    def __init__(
        self,
        folder: Location,
        open_shards: int = 16,
        cache: CacheSpec = DEFAULT_CACHE,
        index: Index | None = None,
        labels: frozenset[str] | None = None,
    ) -> None:
        """UserError for a missing folder, a wrong format, a missing shard or one whose size is not the index's.

        Args:
            cache: how files below a URL are kept.
            index: what a URL's index.json says, where another process has read it already.
            labels: fields that `read` brings besides the image, where a sample has them; None: all.
        """
        self.folder, self.open_shards, self.cache, self.labels = folder, open_shards, cache, labels
        files = _Fetched(folder, cache) if isinstance(folder, Url) else _Folder(Path(folder))
        self.index = files.index() if index is None else index
        self.kind, self.classes, self.details = self.index.kind, self.index.classes, self.index.details
        self.shard_sizes = [entry.samples for entry in self.index.shards]
        for entry in self.index.shards:
            files.check(entry)
        of_sets = {row.field for row in TARGETS.values()}
        self._label_fields = {KINDS[self.kind].label_field} if self.kind in KINDS else of_sets
        self._members = functools.lru_cache(maxsize=open_shards)(files.members)
        self._open = functools.lru_cache(maxsize=open_shards)(functools.partial(files.open, members=self._members))
        self._ahead = None
        if isinstance(files, _Fetched) and cache.ahead > 0:
            self._ahead = FetchAhead(functools.partial(files.bring, self.index.shards))

    def __reduce__(self) -> tuple[type["ShardSet"], tuple[Any, ...]]:
        index = self.index if isinstance(self.folder, Url) else None
        return ShardSet, (self.folder, self.open_shards, self.cache, index, self.labels)

    def __len__(self) -> int:
        return self.index.num_samples

    def read(self, shard: int, sample: int) -> RawSample:
        """The sample at place `sample` of shard number `shard`, complete but for labels that are not read.

        UserError naming shard and key unless it has a label and exactly one image; IndexError for a place that does not exist.
        """
        opened = self._open(self.index.shards[shard])
        key, places = opened.members[sample]
        self._check_fields(opened.path, key, places)
        wanted = places.keys() if self.labels is None else [f for f in places if f in self.labels or f in IMAGE_FIELDS]
        return RawSample(key, {field: _pread(opened, key, field, *places[field]) for field in wanted}, opened.path)

    def fields(self, shard: int, sample: int) -> frozenset[str]:
        """Names of a sample's members, for which only the tar's index is read."""
        return frozenset(self._members(self.index.shards[shard])[sample].fields)

    def announce(self, shards: Sequence[int]) -> None:
        """These are read next: what has to be fetched for that is fetched from now on, in this order, besides other work."""
        if self._ahead is not None:
            self._ahead.announce(shards)

    def verify(self, shard: int) -> None:
        """Read a whole tar and compare it with the checksum of the index. UserError if it differs."""
        entry = self.index.shards[shard]
        opened = self._open(entry)
        found = sha256_of(Path(f"/proc/self/fd/{opened.descriptor}"))
        if found != entry.sha256:
            sums = f"sha256 {found[:12]}..., expected {entry.sha256[:12]}..."
            raise UserError(f"shard {opened.path}: content differs from its checksum ({sums}): {REMAKE}")

    @property
    def fingerprint(self) -> str:
        """A hash of what the shards hold, wherever they lie."""
        known = self.index.model_dump(mode="json", include={"kind", "classes", "shards"})
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def _check_fields(self, path: str, key: str, fields: Collection[str]) -> None:
        place = f"shard {path}, key {key!r}"
        if self._label_fields.isdisjoint(fields):
            label = f"label {min(self._label_fields)!r}" if self.kind in KINDS else "target"
            raise UserError(f"{place}: has no {label}, only {sorted(fields)}: {REMAKE}")
        images = [field for field in fields if field in IMAGE_FIELDS]
        if len(images) != 1:
            expected = f"expected exactly one of {', '.join(IMAGE_FIELDS)}"
            raise UserError(f"{place}: has {images or 'no image'} among {sorted(fields)}, {expected}: {REMAKE}")


def _pread(shard: _OpenShard, key: str, field: str, offset: int, size: int) -> bytes:
    where = f"shard {shard.path}, key {key!r}, field {field!r}"
    try:
        data = os.pread(shard.descriptor, size, offset)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    if len(data) != size:
        raise UserError(f"{where}: cut off after {len(data)} of {size} bytes at offset {offset}: {REMAKE}")
    return data
