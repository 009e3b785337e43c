"""The shard format and its reader: a folder of plain tars with an index, read sample by sample with `pread`.

    OUT/<split>/shard-00000.tar         <key>.jpg and <key>.cls, .json or .seg.png, as `webdataset.WebDataset` reads it
    OUT/<split>/shard-00000.index.json  [{"key": ..., "fields": {"jpg": [offset in the tar, size], ...}}, ...]
    OUT/<split>/index.json              `Index`: written last, so a folder that has it is complete

`convert.py` writes it, the task streams read it.
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from modsquad_ds.data.decode import IMAGE_FIELDS
from modsquad_ds.data.types import RawSample
from modsquad_ds.errors import UserError
from modsquad_ds.files import sha256_of
from modsquad_ds.tasks import KINDS

FORMAT = 1
"""Version of the layout described above; raised whenever an older reader would go wrong."""
INDEX_NAME = "index.json"
MAKE_HINT = "python -m modsquad_ds shards {imagenet|coco|ade20k} SRC OUT --split SPLIT"
REMAKE = f"make the shards again: {MAKE_HINT} --overwrite"

Fields = dict[str, tuple[int, int]]
"""Field -> (offset, size) of its bytes inside the tar."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Record):
    """One tar of the index."""

    file: str
    samples: int
    bytes: int
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
    """By layout: `source_split` (name of the split on disk), coco's `category_ids` by label, `reduce_zero_label`."""
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
    try:
        content = json.loads(path.read_bytes())
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
    if index.kind not in KINDS:
        raise UserError(f"{path}: kind {index.kind!r}, expected one of {', '.join(KINDS)}: {REMAKE}")
    return index


class _Member(NamedTuple):
    key: str
    fields: Fields


def _load_members(folder: Path, entry: ShardEntry) -> list[_Member]:
    """The samples of one tar, in its order. UserError if the tar's index is missing or not the one that was written."""
    path = folder / index_file(entry.file)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {REMAKE}") from error
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise UserError(f"{path}: is not the file that {INDEX_NAME} describes (sha256 differs): {REMAKE}")
    return [
        _Member(row["key"], {field: (offset, size) for field, (offset, size) in row["fields"].items()})
        for row in json.loads(data)
    ]


class _OpenShard:
    """An open tar and its members. It closes with its last reference, so eviction never cuts a reader off."""

    def __init__(self, path: Path, members: list[_Member]) -> None:
        self.path, self.members = path, members
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _open_shard(folder: Path, entry: ShardEntry) -> _OpenShard:
    try:
        return _OpenShard(folder / entry.file, _load_members(folder, entry))
    except OSError as error:
        raise UserError(f"shard {folder / entry.file}: cannot be opened ({error.strerror}): {REMAKE}") from error


class ShardSet:
    """The samples of one split, by (shard, sample). Checked when opened; files are opened when first read.

    It pickles as its path and may be used from any process, forked or spawned, and from any thread. `open_shards` tars
    and their indices stay open at a time.
    """

    def __init__(self, folder: Path, open_shards: int = 16) -> None:
        """UserError for a missing folder, a wrong format, a missing shard or one whose size is not the index's."""
        self.folder, self.open_shards = Path(folder), open_shards
        self.index = load_index(self.folder)
        self.kind, self.classes = self.index.kind, self.index.classes
        self.shard_sizes = [entry.samples for entry in self.index.shards]
        for entry in self.index.shards:
            _check_size(self.folder, entry)
        self._label_field = KINDS[self.kind].label_field
        opener = functools.partial(_open_shard, self.folder)
        self._open = functools.lru_cache(maxsize=open_shards)(opener)

    def __reduce__(self) -> tuple[type["ShardSet"], tuple[Path, int]]:
        return ShardSet, (self.folder, self.open_shards)

    def __len__(self) -> int:
        return self.index.num_samples

    def read(self, shard: int, sample: int) -> RawSample:
        """The sample at place `sample` of shard number `shard`, complete, with its label and exactly one image.

        UserError naming shard and key otherwise; IndexError for a place that does not exist.
        """
        opened = self._open(self.index.shards[shard])
        key, places = opened.members[sample]
        fields = {field: _pread(opened, key, field, *place) for field, place in places.items()}
        self._check_fields(opened.path, key, fields)
        return RawSample(key, fields, str(opened.path))

    def verify(self, shard: int) -> None:
        """Read a whole tar and compare it with the checksum of the index. UserError if it differs."""
        entry = self.index.shards[shard]
        path = self.folder / entry.file
        found = sha256_of(path)
        if found != entry.sha256:
            sums = f"sha256 {found[:12]}..., expected {entry.sha256[:12]}..."
            raise UserError(f"shard {path}: content differs from its checksum ({sums}): {REMAKE}")

    def _check_fields(self, path: Path, key: str, fields: dict[str, bytes]) -> None:
        place = f"shard {path}, key {key!r}"
        if self._label_field not in fields:
            raise UserError(f"{place}: has no label {self._label_field!r}, only {sorted(fields)}: {REMAKE}")
        images = [field for field in fields if field in IMAGE_FIELDS]
        if len(images) != 1:
            expected = f"expected exactly one of {', '.join(IMAGE_FIELDS)}"
            raise UserError(f"{place}: has {images or 'no image'} among {sorted(fields)}, {expected}: {REMAKE}")


def _check_size(folder: Path, entry: ShardEntry) -> None:
    path = folder / entry.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"shard {path}: {error.strerror}; {INDEX_NAME} lists it: {REMAKE}") from error
    if size < entry.bytes:
        members = _load_members(folder, entry)
        lost = next((key for key, fields in members if any(sum(place) > size for place in fields.values())), None)
        first = f"first key lost is {lost!r}" if lost is not None else "no sample is lost, but its end is"
        raise UserError(f"shard {path}: truncated to {size} of {entry.bytes} bytes, {first}: {REMAKE}")
    if size > entry.bytes:
        raise UserError(f"shard {path}: has {size} bytes, {INDEX_NAME} says {entry.bytes}: another file: {REMAKE}")


def _pread(shard: _OpenShard, key: str, field: str, offset: int, size: int) -> bytes:
    where = f"shard {shard.path}, key {key!r}, field {field!r}"
    try:
        data = os.pread(shard.descriptor, size, offset)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    if len(data) != size:
        raise UserError(f"{where}: cut off after {len(data)} of {size} bytes at offset {offset}: {REMAKE}")
    return data
