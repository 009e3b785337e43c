"""MATLAB files: what scipy writes and reads is read alike; whatever is damaged is refused, and nothing else happens."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import eye_array

import pascal_files
from modsquad_ds.data.mat_file import read_mat


def stored(compressed: bool = True, **content: Any) -> bytes:
    """A MATLAB file of these variables."""
    file = io.BytesIO()
    savemat(file, content, do_compression=compressed)
    return file.getvalue()


def same(ours: Any, theirs: Any) -> bool:
    """Whether a value equals scipy's, which keeps a text in an array, and structs and cells in arrays of objects."""
    if isinstance(ours, str):
        return ours == (str(theirs.item()) if theirs.size else "")
    if isinstance(ours, list):
        flat = theirs.ravel(order="F")
        names = theirs.dtype.names or ()
        pairs = list(zip(ours, flat, strict=True))
        if not names:
            return all(same(one, other) for one, other in pairs)
        return all(set(one) == set(names) and all(same(one[key], other[key]) for key in names) for one, other in pairs)
    return ours.dtype == theirs.dtype and np.array_equal(ours, theirs) and ours.shape == theirs.shape


def various() -> dict[str, Any]:
    """One variable of every kind that is read."""
    random = np.random.default_rng(0)
    cells = np.empty((2, 3), dtype=object)
    for place in range(6):
        cells[place % 2, place // 2] = ["été", np.arange(place), "", 3.5, np.zeros((0, 0)), "word"][place]
    names = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
    numbers = {f"n_{name}": random.integers(0, 100, (3, place + 1)).astype(name) for place, name in enumerate(names)}
    return {**numbers, "cube": random.random((2, 3, 4)), "text": "LabelMap", "cells": cells, **pascal_files.two_people((12, 16))}


@pytest.mark.parametrize("compressed", [False, True])
def test_every_kind_is_read_as_scipy_reads_it(compressed: bool) -> None:
    data = stored(compressed, **various())
    theirs = loadmat(io.BytesIO(data))
    for name in various():
        assert same(read_mat(data, name), theirs[name]), name


def test_structs_are_lists_of_dicts() -> None:
    anno = read_mat(stored(**pascal_files.two_people((12, 16))), "anno")
    assert [one["imname"] for one in anno] == ["image"]
    things = anno[0]["objects"]
    assert [int(thing["class_ind"].item()) for thing in things] == [15, 12, 15]
    names = [[part["part_name"] for part in thing["parts"]] for thing in things]
    assert names == [["luarm", "torso"], ["head"], ["head", "rfoot"]]
    assert things[0]["parts"][0]["mask"].sum() == 16  # rows 4..7, columns 2..5


def element(kind: int, data: bytes, order: str) -> bytes:
    """A head and data filled up to 8 bytes, or both in 8 bytes where the data are short."""
    if len(data) <= 4:
        return struct.pack(f"{order}I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)


def by_hand(order: str, flags: int = 6, numbers: bytes | None = None, name: bytes = b"x") -> bytes:
    """A file that holds the doubles [[1, 3], [2, 200]] as x, stored in one byte each, as MATLAB does with whole numbers."""
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x0100) + (b"IM" if order == "<" else b"MI")
    parts = [(6, struct.pack(f"{order}II", flags, 0)), (5, struct.pack(f"{order}ii", 2, 2)), (1, name)]
    content = b"".join(element(*part, order) for part in [*parts, (2, numbers or bytes([1, 2, 3, 200]))])
    return head + struct.pack(f"{order}II", 14, len(content)) + content


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_file_made_by_hand_in_either_byte_order(order: str) -> None:
    value = read_mat(by_hand(order), "x")
    assert value.tolist() == [[1.0, 3.0], [2.0, 200.0]]  # column by column
    assert value.dtype == np.float64 and value.dtype.isnative


REFUSED = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "no mat": (b"PNG" * 100, "is no MATLAB file of version 5 to 7"),
    "version 4": (struct.pack("<5i", 0, 1, 1, 0, 2) + b"x\0" + bytes(200), "is no MATLAB file of version 5 to 7"),
    "version 7.3": (b"MATLAB 7.3".ljust(124) + b"\x00\x02IM", "version 7.3: store it with save's option -v7"),
    "sparse": (stored(x=eye_array(3, format="csc")), "holds a sparse matrix"),
    "complex": (stored(x=np.array([1j])), "holds complex numbers"),
    "function": (by_hand("<", flags=16), "holds a function"),
    "lines": (stored(x=np.array(["ab", "cd"])), "text of 2x2 letters"),
    "other name": (stored(y=1, z=2), "has no variable 'x', only 'y', 'z'"),
    "no variable": (stored(), "has no variable 'x', only none"),
    "too few": (by_hand("<", numbers=b"123"), "3 bytes of uint8 for 2x2 numbers of float64"),
    "fraction": (by_hand("<", flags=9).replace(b"\x02\x00\x04\x00\x01\x02", b"\x07\x00\x04\x00\x01\x02"), "4 bytes of float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        read_mat(data, "x")


def test_deep_nesting_is_refused() -> None:
    value: Any = 1.0
    for _ in range(30):
        value = {"inner": value}
    with pytest.raises(ValueError, match="nested more than 16 levels"):
        read_mat(stored(False, x=value), "x")


def test_a_compressed_variable_has_to_be_as_long_as_it_says() -> None:
    plain = by_hand("<")
    for changed in (plain[128:] + bytes(8), plain[128:-8]):
        packed = zlib.compress(changed)
        with pytest.raises(ValueError, match=r"is not the \d+ bytes that it says"):
            read_mat(plain[:128] + struct.pack("<II", 15, len(packed)) + packed, "x")


@pytest.mark.parametrize("compressed", [False, True])
def test_damage_anywhere_is_a_value_error_or_another_value(compressed: bool) -> None:
    """Where numbers themselves are changed, nothing can tell; all else must end in ValueError, never in another way."""
    data = stored(compressed, **pascal_files.two_people((12, 16)))
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        broken = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            broken[place] = random.integers(0, 256)
        try:
            read_mat(bytes(broken), "anno")
        except ValueError:
            refused += 1
    assert 100 < refused <= 600
    for end in range(0, len(data), max(1, len(data) // 200)):
        with pytest.raises(ValueError):
            read_mat(data[:end], "anno")
