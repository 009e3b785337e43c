"""Whether a PNG file is whole, told before any decoder sees it. Asked by the converter and by every decoding of a PNG.

torchvision's decoder (0.29) does not raise for image data that are damaged: the process ends with a segmentation fault.
"""

import struct
import zlib
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
_CHUNK_OVERHEAD = 12
_LAST_FILTER = 4
# Adam7: first column and row of each pass, and the steps between its columns and rows.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class Header(NamedTuple):
    """What a PNG says about its pixels (its first chunk, IHDR)."""

    width: int
    height: int
    depth: int
    """Bits per channel."""
    colour: int
    """0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha."""
    interlaced: bool

    def __str__(self) -> str:
        return f"bit depth {self.depth}, colour type {self.colour}"


def header_of(data: bytes) -> Header:
    """ValueError for what is no PNG. Only the first 33 bytes are looked at."""
    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 33:
        raise ValueError("not a PNG file" if data else "empty (0 bytes)")
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    return Header(width, height, depth, colour, interlace != 0)


def check_png(data: bytes, deep: bool = False) -> Header:
    """ValueError for a file that is no PNG, is truncated, or whose chunks differ from their checksums (CRC-32).

    Chunks that decoders may do without, such as comments, may be damaged. `deep` also inflates the image data,
    so that a file whose checksums agree but whose rows do not add up is found too.
    """
    header, place, image, ended = header_of(data), len(SIGNATURE), [], False
    while not ended:
        if place + _CHUNK_OVERHEAD > len(data):
            raise ValueError(f"truncated (ends after {len(data)} bytes, without PNG's last chunk)")
        (size,), name = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        shown, end = name.decode("ascii", "replace"), place + _CHUNK_OVERHEAD + size
        if end > len(data):
            raise ValueError(f"truncated (ends after {len(data)} bytes, inside chunk {shown!r} that needs {end})")
        content = memoryview(data)[place + 4 : end - 4]
        if name.isupper() and zlib.crc32(content) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError(f"damaged (chunk {shown!r} at byte {place} differs from its CRC)")
        if name == b"IDAT":
            image.append(content[4:])
        ended, place = name == b"IEND", end
    if deep:
        _check_rows(header, image)
    return header


def _check_rows(header: Header, image: list[memoryview]) -> None:
    """Inflate the image data: every row has to be there, with a filter that exists."""
    if header.colour not in _CHANNELS or not header.width * header.height:
        raise ValueError(f"PNG of {header.width}x{header.height} pixels, {header}, which the format does not have")
    rows = _rows(header)
    expected = sum(count * (1 + size) for count, size in rows)
    inflater = zlib.decompressobj()
    try:
        pixels = inflater.decompress(b"".join(image), expected + 1)
        pixels += inflater.decompress(inflater.unconsumed_tail, 1)  # makes it read the checksum at the end
    except zlib.error as error:
        raise ValueError(f"damaged (its image data cannot be inflated: {error})") from error
    if len(pixels) != expected or not inflater.eof:
        raise ValueError(f"damaged (its image data are not the {expected} bytes of {header.width}x{header.height} pixels)")
    place = 0
    for count, size in rows:
        end = place + count * (1 + size)
        if max(pixels[place : end : 1 + size], default=0) > _LAST_FILTER:
            raise ValueError("damaged (a row of its image data has a filter that does not exist)")
        place = end


def _rows(header: Header) -> list[tuple[int, int]]:
    """Number of rows and bytes per row, without the filter's, of each pass."""
    bits = header.depth * _CHANNELS[header.colour]
    if not header.interlaced:
        return [(header.height, -(-header.width * bits // 8))]
    sizes = [(-(-(header.height - y) // dy), -(-(header.width - x) // dx)) for x, y, dx, dy in _PASSES]
    return [(rows, -(-columns * bits // 8)) for rows, columns in sizes if rows > 0 and columns > 0]
