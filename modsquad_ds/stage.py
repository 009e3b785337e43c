"""Training data copied to a disk of the node before the ranks start: `modsquad-ds stage`, called by slurm/train.sbatch.

    TO/<data>/train/   as DATA_ROOT/<data>/train, for every task that learns; then train with data_root=TO

A copy appears whole or not at all and is used again as long as its index is that of the source, so a requeued job finds it.
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modsquad_ds.config import Recipe
from modsquad_ds.data.loader_plan import TRAIN, VAL
from modsquad_ds.data.shards import INDEX_NAME, Index, index_file, load_index
from modsquad_ds.data.staging import staged_folder
from modsquad_ds.errors import UserError
from modsquad_ds.location import Url
from modsquad_ds.tasks import section_of


def stage(recipe: Recipe, to: Path) -> Path:
    """Copy the shards that training opens under the folder `to`, which may be shared by jobs; returns it.

    A second process that stages the same data waits for the first. UserError for data outside of data_root or by URL, a missing
    index, a file that is not as large as the index says, and a disk without room.
    """
    root, folders = recipe.data_root, set[Path]()
    for name, spec in recipe.adapted.items():
        where = f"stage: {section_of(name, spec)}.data"
        if isinstance(root, Url) or isinstance(spec.data, Url):
            by_url = f"{where} {root / spec.data}"
            raise UserError(f"{by_url}: shards that come by URL are kept on each node anyway (cache); train without a copy")
        if spec.data.is_absolute():
            raise UserError(f"{where} {spec.data}: give it relative to data_root, else its copy is not found")
        folders |= {spec.data / split for split in (TRAIN, VAL)}
    assert isinstance(root, Path)  # there is at least one task
    indices = {folder: load_index(root / folder) for folder in sorted(folders)}
    copied = 0
    for folder, index in indices.items():
        with _alone(to / folder):
            if not _is_copy(root / folder, to / folder):
                _check_room(to, index)
                _copy(root / folder, to / folder, index)
                copied += 1
    print(f"{socket.gethostname()}: {to} has {len(folders)} folders of shards, {copied} of them new", flush=True)
    return to


def _copy(source: Path, final: Path, index: Index) -> None:
    with staged_folder(final) as folder:
        for entry in index.shards:
            for name in (entry.file, index_file(entry.file)):
                try:
                    shutil.copyfile(source / name, folder / name)
                except OSError as error:
                    raise UserError(f"stage: {source / name} to {final}: {error.strerror}") from None
            size = (folder / entry.file).stat().st_size
            if size != entry.bytes:
                raise UserError(f"stage: {source / entry.file}: {size} bytes, {entry.bytes} in its index; make the shards again")
        shutil.copyfile(source / INDEX_NAME, folder / INDEX_NAME)


def _is_copy(source: Path, copy: Path) -> bool:
    """Whether the copy has the source's index; its checksums of all shards stand there."""
    return (copy / INDEX_NAME).is_file() and (copy / INDEX_NAME).read_bytes() == (source / INDEX_NAME).read_bytes()


def _check_room(to: Path, index: Index) -> None:
    needed, free = sum(entry.bytes for entry in index.shards), shutil.disk_usage(to).free
    if needed > free:
        raise UserError(
            f"stage: {to} has {free / 2**30:.1f} GiB free, the {index.split} shards of {index.source} take {needed / 2**30:.1f}; "
            "give a larger disk (MODSQUAD_SCRATCH), or train without a copy"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process of this node fills the folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.with_name(f".{folder.name}.wait"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"stage: {folder.parent} cannot be written to ({error.strerror}); give another folder") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"stage: {folder.parent} cannot be locked ({error.strerror}); give a disk of the node") from None
        yield
    finally:
        os.close(descriptor)
