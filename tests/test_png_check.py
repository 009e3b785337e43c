"""Damaged PNG and .npy files are told by a reason, before a decoder that would end the process sees them."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from modsquad_ds.data.decode import decode_mask, decode_rgb
from modsquad_ds.data.png_check import SIGNATURE, check_png
from modsquad_ds.data.samples import BadSampleError, examine
from modsquad_ds.data.target_files import decode_target_npy, decode_target_png, mask_png, npy_bytes, read_npy
from modsquad_ds.targets import Stored
from taskonomy_files import broken_crc, file_bytes, npy, truncated

RANDOM = np.random.default_rng(3)
GREY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
GREY16 = RANDOM.integers(0, 65536, (5, 7), dtype=np.uint16)
COLOUR = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(rows: bytes, width: int = 7, height: int = 5, interlace: int = 0, colour: int = 0) -> bytes:
    """A PNG of 8 bits whose checksums are right, whatever its image data hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, interlace)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def filtered(pixels: NDArray[np.uint8]) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


ROWS = filtered(GREY)


def interlaced() -> bytes:
    """Adam7: pass p holds the pixels of its lattice (PNG specification, section 8.2)."""
    lattices = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    passes = [GREY[top::down, left::right] for top, down, left, right in lattices]
    return png(zlib.compress(b"".join(filtered(one) for one in passes if one.size)), interlace=1)


@pytest.mark.parametrize(
    ("data", "stored", "expected"),
    [
        (file_bytes(GREY), "grey8", GREY[None]),
        (png(zlib.compress(ROWS)), "grey8", GREY[None]),
        (interlaced(), "grey8", GREY[None]),
        (file_bytes(GREY16), "grey16", GREY16[None]),
        (file_bytes(COLOUR), "rgb8", COLOUR.transpose(2, 0, 1)),
        (file_bytes(COLOUR), "grey8_or_rgb8", COLOUR.transpose(2, 0, 1)),
        (file_bytes(GREY), "grey8_or_rgb8", np.repeat(GREY[None], 3, 0)),
    ],
)
def test_maps_keep_their_values(data: bytes, stored: Stored, expected: NDArray[np.uint16]) -> None:
    for deep in (False, True):
        found = decode_target_png(data, stored, deep)
        assert found.dtype == (torch.int32 if stored == "grey16" else torch.uint8)
        assert np.array_equal(found.numpy(), expected)


def test_a_palette_gives_its_places() -> None:
    image = Image.fromarray(GREY, "L").convert("P")
    image.putpalette(bytes(reversed(range(256))) * 3)
    file = io.BytesIO()
    image.save(file, "PNG")
    assert file.getvalue()[25] == 3 and np.array_equal(np.array(image), GREY)
    assert np.array_equal(decode_target_png(file.getvalue(), "grey8")[0].numpy(), GREY)


@pytest.mark.parametrize(
    ("data", "stored", "reason"),
    [
        (file_bytes(GREY), "grey16", "PNG of 8-bit grey, expected 16-bit grey"),
        (file_bytes(GREY16), "grey8", "PNG of 16-bit grey, expected 8-bit grey or 8-bit palette"),
        (file_bytes(GREY), "rgb8", "PNG of 8-bit grey, expected 8-bit RGB"),
        (file_bytes(COLOUR), "grey8", "PNG of 8-bit RGB, expected 8-bit grey or 8-bit palette"),
        (file_bytes(np.dstack([COLOUR, GREY])), "rgb8", "PNG of bit depth 8, colour type 6, expected 8-bit RGB"),
        (png(zlib.compress(ROWS), colour=3), "grey8", "does not decode: Internal error."),  # a palette's places without it
        (b"", "grey8", r"empty \(0 bytes\)"),
        (b"GIF89a" + bytes(60), "grey8", "not a PNG file"),
    ],
)
def test_other_formats_are_refused(data: bytes, stored: Stored, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        decode_target_png(data, stored)


DAMAGED = {
    "one bit": (broken_crc(file_bytes(np.tile(COLOUR, (9, 9, 1)))), r"damaged \(chunk 'IDAT' at byte 33 differs from its CRC\)"),
    "cut": (truncated(file_bytes(COLOUR)), r"truncated \(ends after \d+ bytes, inside chunk 'IDAT' that needs \d+\)"),
    "no end": (file_bytes(COLOUR)[:-12], r"truncated \(ends after \d+ bytes, without PNG's last chunk\)"),
}
DAMAGED_DEEP = {
    "no zlib": (png(b"abcdefgh"), r"damaged \(its image data cannot be inflated: .*incorrect header check\)"),
    "sum": (png(zlib.compress(ROWS)[:-1] + b"?"), r"damaged \(its image data cannot be inflated: .*incorrect data check\)"),
    "cut": (png(zlib.compress(ROWS)[:-6]), r"damaged \(its image data are not the 40 bytes of 7x5 pixels\)"),
    "short": (png(zlib.compress(ROWS[:-1])), r"damaged \(its image data are not the 40 bytes of 7x5 pixels\)"),
    "long": (png(zlib.compress(ROWS + b"?")), r"damaged \(its image data are not the 40 bytes of 7x5 pixels\)"),
    "filter": (png(zlib.compress(ROWS[:32] + b"\5" + ROWS[33:])), r"damaged \(a row .* has a filter that does not exist\)"),
    "no pixels": (png(zlib.compress(b""), width=0), "PNG of 0x5 pixels, .* which the format does not have"),
    "colour": (png(zlib.compress(ROWS), colour=5), "PNG of 7x5 pixels, .*colour type 5, which the format does not have"),
    "huge": (png(zlib.compress(ROWS), 2**31 - 1, 2**31 - 1), "damaged .*"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_found_before_the_decoder_sees_it(case: str) -> None:
    # torchvision 0.29 ends the process with a segmentation fault for the first: this test would not come back.
    data, reason = DAMAGED[case]
    for decode in (decode_rgb, lambda png: decode_target_png(png, "rgb8")):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            decode(data)
    with pytest.raises(BadSampleError, match=reason):
        examine(data, "a.png")


def test_damaged_masks_of_single_tasks_are_found_too() -> None:
    with pytest.raises(ValueError, match="differs from its CRC"):
        decode_mask(broken_crc(file_bytes(np.tile(GREY, (9, 9)))))


@pytest.mark.parametrize("case", DAMAGED_DEEP)
def test_conversion_also_looks_at_the_image_data(case: str) -> None:
    data, reason = DAMAGED_DEEP[case]
    assert check_png(data).depth == 8
    with pytest.raises(ValueError, match=f"^{reason}$"):
        check_png(data, deep=True)
    with pytest.raises(BadSampleError, match=reason):
        examine(data, "a.png")


def test_a_damaged_comment_does_not_matter() -> None:
    data = file_bytes(GREY)
    comment = chunk(b"tEXt", b"Comment\0hello")[:-1] + b"?"
    assert np.array_equal(decode_target_png(data[:33] + comment + data[33:], "grey8")[0].numpy(), GREY)


# ---------------------------------------------------------------- .npy


def test_vectors_come_back_as_they_were_stored() -> None:
    vector = torch.rand(11)
    assert torch.equal(decode_target_npy(npy_bytes(vector.double()), 11), vector)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.zeros(4, np.float32)), r"\.npy of float32 with shape \(4,\), expected float32 with shape \(5,\)"),
        (npy(np.zeros(5)), r"\.npy of float64 with shape \(5,\), expected .*"),
        (npy(np.zeros((1, 5), np.float32)), r"\.npy of float32 with shape \(1, 5\), expected .*"),
        (npy(np.full(5, np.inf, np.float32)), "holds numbers that are not finite"),
        (npy(np.array([{}] * 5), allow_pickle=True), r"\.npy of pickled objects, expected numbers"),
        (npy(np.array(["a"] * 5)), r"\.npy of <U1, expected numbers"),
        (npy(np.zeros(5, np.float32))[:-2], r"\.npy of 18 bytes after its header, expected 20 for shape \(5,\)"),
        (npy(np.zeros(5, np.float32)) + b"?", r"\.npy of 21 bytes after its header, expected 20 for shape \(5,\)"),
        (npy(np.zeros(5, np.float32))[:40], r"not a \.npy file \(EOF: .*"),
        (npy(np.zeros(5, np.float32)).replace(b"}", b"("), r"not a \.npy file \(.*EOF in multi-line statement.*\)"),
        (b"\x93NUMPY\1\0" + struct.pack("<H", 9900) + b"-" * 9900, r"not a \.npy file \(.*\)"),
        (b"\x93NUMPY\3\0" + bytes(20), r"not a \.npy file \(version \(3, 0\)\)"),
        (b"", r"empty \(0 bytes\)"),
    ],
)
def test_other_vectors_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        decode_target_npy(data, 5)


def test_a_header_that_lies_takes_no_memory() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000000,), }".ljust(117) + b"\n"
    with pytest.raises(ValueError, match="expected 16000000000000 for shape"):
        read_npy(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    with pytest.raises(ValueError, match="pickled objects"):
        read_npy(npy(np.array([Trap()], dtype=object), allow_pickle=True))
    assert not (tmp_path / "sprung").exists()


def test_a_mask_is_stored_as_255_and_0() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    assert np.array_equal(np.array(Image.open(io.BytesIO(mask_png(mask)))), [[255, 0], [0, 255]])
