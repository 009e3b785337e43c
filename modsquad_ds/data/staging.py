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
    stage, replaced, lock = (_sibling(final, purpose) for purpose in ("partial", "replaced", "lock"))
    missing = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(lock, final)
    except OSError as error:
        place = error.filename if error.filename != str(lock) else stage
        raise UserError(f"cannot make the folder {place}: {error.strerror}") from error
    try:
        for remains in (stage, replaced):
            shutil.rmtree(remains, ignore_errors=True)
        stage.mkdir()
        yield stage
        sync(stage)
        if final.exists():
            final.rename(replaced)
        stage.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        lock.unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        lock.unlink(missing_ok=True)
        _remove_empty(missing)
        raise
    finally:
        os.close(descriptor)


def _sibling(final: Path, purpose: str) -> Path:
    return final.with_name(f".{final.name}.{purpose}")


def _lock(path: Path, final: Path) -> int:
    """Open and lock the lock file; the kernel frees it when the process ends, however it ends.

    It lies beside the folder that is filled, not in it: its holder removes it last of all, so whoever makes it anew finds
    nobody at work.
    """
    busy = BusyError(f"another process is writing {final} now: wait for it or choose another folder")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError as error:  # a holder before us has just removed the folder above, which it had made
        raise busy from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us may have removed the file between our two calls.
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(descriptor)
        raise busy from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        # Without locks only the guard against two simultaneous writers is lost.
    return descriptor


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to the first that is in use."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
