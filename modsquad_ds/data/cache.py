"""Fetched files on a disk of the node, found by their checksum and shared by all its processes. Between fetch.py and the shards.

    FOLDER/<sha256>.data      a whole, verified file; its modification time is when it was last opened
    FOLDER/<sha256>.partial   one that is being fetched, as long from the start as it will be
    FOLDER/<sha256>.lock      held by the process that fetches it
    FOLDER/room.lock          held while room is made

Content is the key: what changes at a URL is another file, and what two URLs share is one. The kernel frees a lock when its
process ends, however it ends, so whoever comes next clears the remains and fetches anew. A reader holds a shared lock on the
file that it has open, which says that it is in use; should it be removed all the same, its descriptor stays good.
"""

import fcntl
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from modsquad_ds.config import CacheSpec
from modsquad_ds.data.fetch import Wanted, fetch
from modsquad_ds.errors import UserError
from modsquad_ds.files import make_folder, sync

SCRATCH = "MODSQUAD_SCRATCH"
"""Environment variable with a folder on the node's own disk."""
WAY_OUT = "lower cache.gigabytes, or give a folder on another disk (cache.folder)"

SHARE_OF_DISK = 0.95
"""Of what the cache and nobody occupy, it takes no more, whatever its bound: others need the disk too."""
WAIT_FOR_ROOM = 0.05
"""Seconds between two looks."""
_OWN = re.compile(r"[0-9a-f]{64}\.(data|partial|lock)")


class NoRoomError(Exception):
    """The files that nobody may remove now leave no room for one that is fetched ahead."""


class _Kept(NamedTuple):
    path: Path
    size: int
    used: float
    """When it was last opened, in seconds since 1970."""


def cache_folder(spec: CacheSpec) -> Path:
    """The folder that the recipe names, else one in the node's scratch folder, else one of this user's among temporary ones."""
    if spec.folder is not None:
        return spec.folder
    scratch = os.environ.get(SCRATCH)
    return Path(scratch) / "shard-cache" if scratch else Path(tempfile.gettempdir()) / f"modsquad-shards-{os.getuid()}"


class FileCache:
    """A bounded folder of fetched files. Any number of threads and processes of a node use it at a time."""

    def __init__(self, spec: CacheSpec) -> None:
        """UserError if the folder cannot be made or written to, or belongs to another user."""
        self.spec, self.folder, self.bound = spec, cache_folder(spec), int(spec.gigabytes * 1e9)
        if not self.folder.exists():
            make_folder(self.folder.parent, "cache.folder")
            with suppress(FileExistsError):  # another process was faster
                self.folder.mkdir(mode=0o700)
        make_folder(self.folder, "cache.folder")
        if self.folder.stat().st_uid != os.getuid():
            raise UserError(f"cache.folder {self.folder}: belongs to another user; give a folder of your own (cache.folder=...)")

    def open(self, wanted: Wanted) -> int:
        """A descriptor, to read from, of the whole file, fetched if it is not here. The caller closes it.

        UserError if it cannot be had, or does not fit the bound.
        """
        assert wanted.sha256 is not None
        while True:
            descriptor = self._open_whole(wanted)
            if descriptor is not None:
                return descriptor
            with self._turn(wanted.sha256, wait=True):
                if not self._path(wanted.sha256).exists():
                    return self._fetch(wanted, force=True)

    def bring(self, wanted: Wanted, spare: Collection[str]) -> None:
        """Fetch a file that will be needed, unless it is here or somebody is fetching it.

        No file that a reader has open is removed for it, nor one with a checksum among `spare`; NoRoomError where that leaves
        no room. UserError as in `open`.
        """
        assert wanted.sha256 is not None
        descriptor = self._open_whole(wanted)
        if descriptor is None:
            with self._turn(wanted.sha256, wait=False) as mine:
                if mine and not self._path(wanted.sha256).exists():
                    descriptor = self._fetch(wanted, force=False, spare=spare)
        if descriptor is not None:
            os.close(descriptor)

    def check_fits(self, wanted: Wanted) -> None:
        """UserError for a file that is larger than the whole cache may be."""
        if wanted.size is not None and wanted.size > self.bound:
            raise UserError(
                f"cache.gigabytes: {self.spec.gigabytes:g} GB hold no file of {wanted.size / 1e9:.3g} GB, which {wanted.url} is; "
                "raise it, or make smaller shards (--samples-per-shard)"
            )

    # ------------------------------------------------------------ files

    def _path(self, sha256: str, ending: str = "data") -> Path:
        return self.folder / f"{sha256}.{ending}"

    def _open_whole(self, wanted: Wanted) -> int | None:
        """The file, marked as used now and in use; None if it is not here."""
        assert wanted.sha256 is not None
        path = self._path(wanted.sha256)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        if wanted.size is not None and os.fstat(descriptor).st_size != wanted.size:
            os.close(descriptor)
            path.unlink(missing_ok=True)  # cut off by something else than us
            return None
        os.utime(descriptor)
        return descriptor

    def _fetch(self, wanted: Wanted, force: bool, spare: Collection[str] = ()) -> int:
        """Fetch a file in this process's turn; a descriptor of it."""
        sha256 = wanted.sha256
        assert sha256 is not None
        partial = self._path(sha256, "partial")
        self.check_fits(wanted)
        content = None
        if wanted.size is None:  # an index; its size has to be known for there to be room
            content = io.BytesIO()
            fetch(wanted, content, self.spec)
            wanted = wanted._replace(size=len(content.getbuffer()))
        try:
            with partial.open("wb") as file:
                self._make_room(wanted, file.fileno(), force, spare)
                if content is None:
                    fetch(wanted, file, self.spec)
                else:
                    file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            # Opened before it has its name, so nobody can remove it first.
            descriptor = os.open(partial, os.O_RDONLY)
            with self._room():
                os.replace(partial, self._path(sha256))
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            sync(self.folder)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._unusable(error) from error
            raise
        return descriptor

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"cache.folder {self.folder}: {error.strerror}; {WAY_OUT}")

    # ------------------------------------------------------------ locks

    @contextmanager
    def _turn(self, sha256: str, wait: bool) -> Iterator[bool]:
        """This process's turn to fetch a file, after that of others; False where it would have to wait and shall not."""
        path = self._path(sha256, "lock")
        descriptor = self._lock(path, wait)
        if descriptor is None:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            # A copy of the descriptor that a forked process holds would keep the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _lock(self, path: Path, wait: bool) -> int | None:
        """Make and lock a file; None if another holds it and `wait` is False."""
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_at(descriptor, path):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                raise self._unusable(error) from error
            os.close(descriptor)  # its holder has removed it meanwhile

    # ------------------------------------------------------------ room

    def _make_room(self, wanted: Wanted, partial: int, force: bool, spare: Collection[str]) -> None:
        """Remove what was opened longest ago until the file fits, then give the partial file its length, which counts as taken.

        Files that nobody has open go first; with `force` then others too, whose readers keep their descriptors, and where that
        is not enough, files that are being fetched are waited for.
        """
        assert wanted.size is not None
        while True:
            with self._room():
                kept, taken, on_disk = self._look_around()
                # Whatever else fills the disk, there is no more than this.
                bound = min(self.bound, int((on_disk + shutil.disk_usage(self.folder).free) * SHARE_OF_DISK))
                for in_use in (False, True) if force else (False,):
                    for file in sorted(kept, key=lambda file: file.used):
                        if taken + wanted.size > bound and file.path.stem not in spare and _remove(file.path, in_use):
                            taken -= file.size
                if taken + wanted.size <= bound:
                    os.ftruncate(partial, wanted.size)
                    return
            if not force:
                raise NoRoomError
            if not taken:
                raise UserError(
                    f"cache.folder {self.folder}: no room for {wanted.size / 1e9:.3g} GB ({wanted.url}): the disk has "
                    f"{bound / 1e9:.3g} GB for it; make room, or give a folder on another disk (cache.folder)"
                )
            time.sleep(WAIT_FOR_ROOM)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Nobody else makes room or adds a whole file meanwhile."""
        descriptor = self._lock(self.folder / "room.lock", wait=True)
        assert descriptor is not None
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _look_around(self) -> tuple[list[_Kept], int, int]:
        """The whole files; the bytes of these and of those being fetched, now on disk and in the end.

        Remains of killed processes are cleared. Files of other names are not the cache's.
        """
        kept, taken, on_disk = [], 0, 0
        for path in [path for path in self.folder.iterdir() if _OWN.fullmatch(path.name)]:
            if path.suffix != ".data" and self._cleared(path.stem):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # given up by its process, or cleared with its lock
                continue
            taken += status.st_size
            on_disk += 512 * status.st_blocks
            if path.suffix == ".data":
                kept.append(_Kept(path, status.st_size, status.st_mtime))
        return kept, taken, on_disk

    def _cleared(self, sha256: str) -> bool:
        """Whether nobody is fetching a file; what was left of the last time is gone then."""
        with self._turn(sha256, wait=False) as mine:
            if mine:
                self._path(sha256, "partial").unlink(missing_ok=True)
            return mine


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove(path: Path, in_use: bool) -> bool:
    """Remove a file, with `in_use` False only if no reader has it open. Whether it is gone by this."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if not in_use:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
