"""A variable of a MATLAB file -> numpy arrays, text and lists; read by `pascal_context.py`, whose labels come so.

The format of versions 5 to 7 (MathWorks, "MAT-File Format", level 5), as far as matrices, text, cells and structs go.
Not scipy's reader: that one ends the process with a segmentation fault where a file is damaged.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Numbers of the format: types of stored elements, and classes of variables.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
# Some writers give sizes as unsigned numbers, and names as UTF-8.
_FLAGS, _SIZES, _NAMES, _MATRIX, _COMPRESSED = (6,), (5, 6), (1, 16), 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMERIC = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_REFUSED = {3: "an object", 5: "a sparse matrix", 16: "a function", 17: "an object"}
_COMPLEX = 0x0800
_HEADER, _DEEPEST = 128, 16

Value = NDArray[Any] | str | list[Any]
"""A matrix of numbers (also an empty one, MATLAB's `[]`), a text, the cells of a cell array, or the elements of a struct
array, each a dict: field -> Value. Arrays of cells and structs come column by column."""


class _Element(NamedTuple):
    type: int
    data: memoryview


class _Matrix(NamedTuple):
    """A variable, or a part of one, with its head read."""

    kind: int
    complex: bool
    shape: tuple[int, ...]
    name: str
    rest: Iterator[_Element]


def read_mat(data: bytes, name: str) -> Value:
    """The variable `name` of a MATLAB file's bytes. ValueError if it is not there, or is damaged, or not of these kinds."""
    orders = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
    if data[124:126] in (b"\x00\x02", b"\x02\x00") and data[126:128] in (b"IM", b"MI"):
        raise ValueError("is a MATLAB file of version 7.3: store it with save's option -v7")
    if data[124:_HEADER] not in orders:
        raise ValueError("is no MATLAB file of version 5 to 7" if data else "is empty (0 bytes)")
    order, names = orders[data[124:_HEADER]], []
    for element in _elements(memoryview(data)[_HEADER:], order):
        if element.type == _COMPRESSED:
            element = next(_elements(memoryview(_inflated(element.data, order)), order))
        if element.type != _MATRIX:
            raise ValueError(f"is damaged (element of type {element.type} where a variable is due)")
        matrix = _head(element, order)
        if matrix.name == name:
            return _value(matrix, order, 0)
        names.append(matrix.name)
    raise ValueError(f"has no variable {name!r}, only {', '.join(map(repr, names)) or 'none'}")


def _elements(data: memoryview, order: str) -> Iterator[_Element]:
    """The elements that lie one after the other; all but compressed ones are filled up to 8 bytes."""
    place = 0
    while place < len(data):
        if len(data) - place < 8:
            raise ValueError("is damaged (an element's head is cut off)")
        kind, size = struct.unpack_from(f"{order}II", data, place)
        start = place + 8
        if kind >> 16:  # up to 4 bytes lie in the head itself
            kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
            if size > 4:
                raise ValueError("is damaged (a small element of more than 4 bytes)")
        if start + size > len(data):
            raise ValueError(f"is damaged or truncated (an element of {size} bytes, {len(data) - start} are left)")
        yield _Element(kind, data[start : start + size])
        place = start + size if kind == _COMPRESSED else place + 8 if start == place + 4 else start + -(-size // 8) * 8


def _inflated(data: memoryview, order: str) -> bytes:
    """One element, head included. ValueError unless it is whole and its checksum agrees."""
    inflater = zlib.decompressobj()
    try:
        head = inflater.decompress(data, 8)
        if len(head) < 8:
            raise ValueError("is damaged (a compressed variable is cut off)")
        size: int = struct.unpack(f"{order}II", head)[1]
        # One byte more than there should be: it is not there, but looking for it reads the checksum at the end.
        content = inflater.decompress(inflater.unconsumed_tail, size + 1)
    except zlib.error as error:
        raise ValueError(f"is damaged (a compressed variable does not inflate: {error})") from error
    if len(content) != size or not inflater.eof:
        raise ValueError(f"is damaged (a compressed variable is not the {size} bytes that it says)")
    return head + content


def _head(element: _Element, order: str) -> _Matrix:
    rest = _elements(element.data, order)
    flags, shape, name = _next(rest, _FLAGS, "flags"), _next(rest, _SIZES, "size"), _next(rest, _NAMES, "name")
    if len(flags) != 8 or len(shape) < 8 or len(shape) % 4:
        raise ValueError("is damaged (flags or size of a variable)")
    (bits,) = struct.unpack_from(f"{order}I", flags)
    sizes = struct.unpack(f"{order}{len(shape) // 4}i", shape)
    if min(sizes) < 0:
        raise ValueError(f"is damaged (a variable of size {sizes})")
    return _Matrix(bits & 0xFF, bool(bits & _COMPLEX), sizes, bytes(name).decode("latin-1"), rest)


def _next(elements: Iterator[_Element], kinds: tuple[int, ...], what: str) -> memoryview:
    element = next(elements, None)
    if element is None or element.type not in kinds:
        raise ValueError(f"is damaged (a variable's {what} is missing)")
    return element.data


def _value(matrix: _Matrix, order: str, depth: int) -> Value:
    if matrix.kind in _NUMERIC:
        return _numbers(matrix, order)
    if matrix.kind == _CHAR:
        return _text(matrix, order)
    if matrix.kind not in (_CELL, _STRUCT):
        raise ValueError(f"holds {_REFUSED.get(matrix.kind, f'a variable of class {matrix.kind}')}, which is not read")
    if depth == _DEEPEST:
        raise ValueError(f"is nested more than {_DEEPEST} levels deep")
    fields = _fields(matrix, order) if matrix.kind == _STRUCT else [""]
    count = math.prod(matrix.shape) * len(fields)
    parts = []
    for element in matrix.rest:
        if element.type != _MATRIX:
            raise ValueError(f"is damaged (element of type {element.type} where a part of {matrix.name!r} is due)")
        empty = not element.data  # how MATLAB stores what was never set
        parts.append(np.zeros((0, 0)) if empty else _value(_head(element, order), order, depth + 1))
    if len(parts) != count:
        raise ValueError(f"is damaged ({len(parts)} parts where {count} are due)")
    if matrix.kind == _CELL:
        return parts
    return [dict(zip(fields, parts[i : i + len(fields)], strict=True)) for i in range(0, count, len(fields) or 1)]


def _numbers(matrix: _Matrix, order: str) -> NDArray[Any]:
    """A matrix, whose numbers may be stored in a smaller type than its own."""
    if matrix.complex:
        raise ValueError("holds complex numbers, which are not read")
    element, dtype = next(matrix.rest, None), np.dtype(_NUMERIC[matrix.kind])
    if element is None or element.type not in _NUMBERS:
        raise ValueError(f"is damaged (the numbers of {matrix.name!r} are missing)")
    stored = np.dtype(order + _NUMBERS[element.type])
    if len(element.data) != math.prod(matrix.shape) * stored.itemsize or (stored.kind == "f") > (dtype.kind == "f"):
        size = "x".join(map(str, matrix.shape))
        raise ValueError(f"is damaged ({len(element.data)} bytes of {stored} for {size} numbers of {dtype})")
    return np.frombuffer(element.data, stored).astype(dtype).reshape(matrix.shape, order="F")


def _text(matrix: _Matrix, order: str) -> str:
    element = next(matrix.rest, None)
    if math.prod(matrix.shape) == 0:
        return ""
    if element is None or element.type not in _TEXTS or matrix.shape[0] != 1:
        raise ValueError(f"is damaged or of a kind that is not read (text of {'x'.join(map(str, matrix.shape))} letters)")
    coding = _TEXTS[element.type]
    if coding in ("utf-16", "utf-32"):
        coding += "-le" if order == "<" else "-be"
    try:
        return bytes(element.data).decode(coding)
    except UnicodeDecodeError as error:
        raise ValueError(f"is damaged (text that is not {coding})") from error


def _fields(matrix: _Matrix, order: str) -> list[str]:
    """Names of a struct's fields, which lie in places of one length, filled up with zeros."""
    stated = _next(matrix.rest, _SIZES, "length of field names")
    length = int.from_bytes(stated, "little" if order == "<" else "big")
    names = bytes(_next(matrix.rest, _NAMES, "field names"))
    if length < 1 or len(names) % length:
        raise ValueError("is damaged (names of a struct's fields)")
    return [names[i : i + length].split(b"\0")[0].decode("latin-1") for i in range(0, len(names), length)]
