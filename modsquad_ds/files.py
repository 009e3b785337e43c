"""Files written so that a reader sees the old content or the new, never half of it. Used wherever a result is saved."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modsquad_ds.errors import UserError


def make_folder(folder: Path, key: str) -> None:
    """Make a folder before work starts whose results go there. Raises UserError that names `key`, the user's word for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{key} {folder}: cannot be written to ({error.strerror}); give another folder ({key}=...)") from None


@contextmanager
def writing_to(path: Path) -> Iterator[Path]:
    """Inside, a disk that is full or refuses to be written ends in a UserError that names `path`, a file of the run folder."""
    try:
        yield path
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room or give another folder (run=...)") from None


def check_new_file(path: Path, option: str, overwrite: bool = False) -> None:
    """Refuse a file that could not be written, or is there already, before work starts. Raises UserError that names `option`."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give a file's name")
    if path.exists() and not overwrite:
        raise UserError(f"{option} {path}: exists already; give another name, or --overwrite to replace it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "cannot be written to" if folder.is_dir() else "is a file"
        raise UserError(f"{option} {path}: {folder} {what}; give another place")


def write_atomic(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk is not made fuller
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON; NaN is refused, since JSON has none: pass None."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def sync(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Checksum of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def say(text: str) -> None:
    """Print a line. Where standard output lies on a disk that is full nobody can be told, which is no reason to end."""
    with suppress(OSError):
        print(text, flush=True)
