"""Taskonomy's layout in miniature, with real photographs, and what may be wrong with its files, for the tests of the reader.

buildings: ackley (train, 3 views), bolton (train, 2), corozal (val, 2), rough (train; one that is never read)
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from modsquad_ds.data.taskonomy import DOMAINS
from modsquad_ds.targets import TARGETS, TASKONOMY

HEIGHT, WIDTH = 32, 40
VIEWS = {"ackley": 3, "bolton": 2, "corozal": 2, "rough": 1}
SPLIT_OF = {"ackley": "train", "bolton": "train", "corozal": "val", "rough": "train"}
ALL = tuple(row.name for row in TASKONOMY)
HOLE = (slice(0, 5), slice(10, 20))
"""Where depth has none."""


def split_csv(rows: dict[str, str] = SPLIT_OF, ending: str = "\r") -> bytes:
    """A list of buildings as it is published: lines end in CR."""
    flags = [f"{building},{','.join(str(int(of == name)) for name in ('train', 'val', 'test'))}" for building, of in rows.items()]
    return "".join(line + ending for line in ("id,train,val,test", *flags)).encode()


def place(task: str, building: str, view: int, below: str = "taskonomy/") -> str:
    """Path of a file below the source: view `i` is view i of point 10 - i, so that no two listings are in one order by chance."""
    extension = "npy" if task in TARGETS and TARGETS[task].stored == "npy" else "png"
    return f"{task}/{below}{building}/point_{10 - view}_view_{view}_domain_{DOMAINS.get(task, task)}.{extension}"


def key(building: str, view: int) -> str:
    return f"{building}/point_{10 - view}_view_{view}"


def photo(seed: int) -> NDArray[np.uint8]:
    """A piece of a photograph, `[HEIGHT, WIDTH, 3]`."""
    top, left = np.random.default_rng(seed).integers(0, 200, 2)
    picture: NDArray[np.uint8] = data.astronaut()[top : top + 4 * HEIGHT : 4, left : left + 4 * WIDTH : 4]
    return picture


def values(task: str, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> NDArray[Any]:
    """What a task's file holds: noise of its type, all 16 bits of it; depth with a hole; scores that sum to 1."""
    random, row = np.random.default_rng([seed, *task.encode()]), TARGETS[task]
    if row.stored == "npy":
        scores = random.exponential(size=row.channels)
        return (scores / scores.sum()).astype(np.float32)
    if row.kind == "semantic":
        return random.integers(0, row.channels + 1, size, dtype=np.uint8)
    if row.stored == "grey16":
        map16 = random.integers(0, 65535, size, dtype=np.uint16)
        if row.metres is not None:
            map16[HOLE] = 65535
        return map16
    return random.integers(0, 256, size if row.stored == "grey8" else (*size, 3), dtype=np.uint8)


def file_bytes(content: NDArray[Any], **options: Any) -> bytes:
    """A vector as .npy, a map as PNG."""
    file = io.BytesIO()
    if content.ndim == 1 and content.dtype != np.uint8:
        np.save(file, content, allow_pickle=False)
    else:
        Image.fromarray(content).save(file, "PNG", **options)
    return file.getvalue()


def taskonomy(src: Path, tasks: tuple[str, ...] = ALL, below: str = "taskonomy/", ending: str = "\r") -> Path:
    """The layout, without fault: every view has every task."""
    for number, (building, count) in enumerate(VIEWS.items()):
        for view in range(count):
            seed = 10 * number + view
            for task in ("rgb", *tasks):
                path = src / place(task, building, view, below)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file_bytes(photo(seed) if task == "rgb" else values(task, seed)))
    write_list(src, split_csv(ending=ending))
    return src


def write_list(src: Path, content: bytes, name: str = "tiny") -> Path:
    path = src / f"splits_taskonomy/train_val_test_{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------- defects of one file


def broken_crc(content: bytes) -> bytes:
    """One bit of the image data flipped, as a bad disk does."""
    middle = content.index(b"IDAT") + 20
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def truncated(content: bytes) -> bytes:
    return content[: 2 * len(content) // 3]


def grey8(content: bytes) -> bytes:
    """8 bits where 16 are due."""
    return file_bytes((np.array(Image.open(io.BytesIO(content))) // 256).astype(np.uint8))


def one_channel(content: bytes) -> bytes:
    return file_bytes(np.array(Image.open(io.BytesIO(content)).convert("L")))


def half_size(content: bytes) -> bytes:
    return file_bytes(np.ascontiguousarray(np.array(Image.open(io.BytesIO(content)))[::2, ::2]))


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=allow_pickle)
    return file.getvalue()
