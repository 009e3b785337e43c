"""Folders that appear whole or not at all: everything the data tools write goes through here.

Work happens in a hidden sibling of the final folder, which is renamed at the end: whatever kills the program, no
half-made folder ever bears the final name, and the next run clears the remains.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modsquad_ds.errors import UserError
from modsquad_ds.files import sync

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What flock answers on file systems without locks (some cluster mounts)."""


class BusyError(UserError):
    """Another process is filling the same folder."""


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it replaces `final`, when it raises it is removed.

    Remains of killed runs are cleared first. BusyError if another process is filling the same folder at this moment,
    UserError if the folder cannot be made. Folders above `final` that were made for it go again on failure.
    """
    stage, replaced = _sibling(final, "partial"), _sibling(final, "replaced")
    missing = [parent for parent in final.parents if not parent.exists()]
    try:
        stage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {stage}: {error.strerror}") from error
    lock = _lock(stage, final)
    try:
        _clear(stage, keep="lock")
        shutil.rmtree(replaced, ignore_errors=True)
        yield stage
        (stage / "lock").unlink()
        sync(stage)
        if final.exists():
            final.rename(replaced)
        stage.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        _remove_empty(missing)
        raise
    finally:
        os.close(lock)


def _sibling(final: Path, purpose: str) -> Path:
    return final.with_name(f".{final.name}.{purpose}")


def _lock(stage: Path, final: Path) -> int:
    """Open and lock the stage's lock file; the kernel frees it when the process ends, however it ends."""
    busy = f"another process is writing {final} now: wait for it or choose another folder"
    try:
        descriptor = os.open(stage / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError as error:  # the holder before us has just renamed or removed the folder
        raise BusyError(busy) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us may have removed the file, or renamed its folder, between our two calls.
        if not (stage / "lock").exists() or not os.path.samestat(os.fstat(descriptor), os.stat(stage / "lock")):
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(descriptor)
        raise BusyError(busy) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # Without locks only the guard against two simultaneous writers is lost.
    return descriptor


def _clear(folder: Path, keep: str) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != keep:
            entry.unlink()


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to the first that is in use."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
