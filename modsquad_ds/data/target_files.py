"""Label files of an image set -> tensors: PNG maps and .npy vectors, as they lie in shards and, checked, in the datasets.

The converter checks files with these functions before it stores their bytes; training decodes what was stored with the same.
Errors are ValueError with a reason; who calls knows the file.
"""

import io
import math
import tokenize
import warnings

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, encode_png

from modsquad_ds.data.png_check import GREY, PALETTE, RGB, Header, check_png
from modsquad_ds.targets import Stored

_FORMATS: dict[Stored, tuple[tuple[int, int], ...]] = {
    "grey8": ((8, GREY), (8, PALETTE)),
    "grey16": ((16, GREY),),
    "rgb8": ((8, RGB),),
    "grey8_or_rgb8": ((8, GREY), (8, RGB)),
}
"""How a map may be stored -> (bit depth, colour type) of its PNG. A palette's indices are the values."""
# What numpy, and Python's parser behind it, raise for the text of a header, which is 10,000 bytes at most.
_NO_HEADER = (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError, tokenize.TokenError)
_NAMES = {(8, GREY): "8-bit grey", (8, PALETTE): "8-bit palette", (16, GREY): "16-bit grey", (8, RGB): "8-bit RGB"}
# Like data.decode, which this module must not import: torchvision announces a move of its decoders once per process.
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")


def decode_target_png(data: bytes, stored: Stored, deep: bool = False) -> Tensor:
    """A map `[C, H, W]` with its values as they are: uint8, or int32 for 16 bits.

    `grey8_or_rgb8` gives three equal channels for grey. ValueError for a damaged file and for another format than `stored`,
    such as 8 bits where 16 are due; `deep` also finds damage that the checksums do not show.
    """
    header = check_png(data, deep)
    if (header.depth, header.colour) not in _FORMATS[stored]:
        expected = " or ".join(_NAMES[one] for one in _FORMATS[stored])
        raise ValueError(f"PNG of {_named(header)}, expected {expected}")
    try:
        pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    except RuntimeError as error:
        said = str(error).partition("\n")[0].rpartition(".cpp:")[2].partition(", ")[2]  # without the place in C++
        raise ValueError(f"does not decode: {said or error}") from error
    if stored == "grey8_or_rgb8" and len(pixels) == 1:
        return pixels.expand(3, -1, -1).contiguous()
    return pixels.to(torch.int32) if pixels.dtype == torch.uint16 else pixels


def _named(header: Header) -> str:
    return _NAMES.get((header.depth, header.colour), str(header))


def decode_target_npy(data: bytes, length: int) -> Tensor:
    """A stored vector, float32 `[length]`. ValueError for another dtype, shape or length, and for numbers that are not finite."""
    vector = read_npy(data)
    if vector.dtype != np.float32 or vector.shape != (length,):
        raise ValueError(f".npy of {vector.dtype} with shape {vector.shape}, expected float32 with shape ({length},)")
    tensor = torch.from_numpy(vector)
    if not tensor.isfinite().all():
        raise ValueError("holds numbers that are not finite")
    return tensor


def read_npy(data: bytes) -> np.ndarray:
    """An array of numbers. ValueError for anything else; nothing is unpickled, and no memory is taken for what is not there."""
    content = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(content)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(content)
    except _NO_HEADER as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"not a .npy file ({reason:.80})" if data else "empty (0 bytes)") from error
    if dtype.hasobject or dtype.kind not in "fiu":
        raise ValueError(f".npy of {'pickled objects' if dtype.hasobject else dtype}, expected numbers")
    needed, found = math.prod(shape) * dtype.itemsize, len(data) - content.tell()
    if needed != found:
        raise ValueError(f".npy of {found} bytes after its header, expected {needed} for shape {shape}")
    content.seek(0)
    array: np.ndarray = np.load(content, allow_pickle=False)
    return array


def npy_bytes(vector: Tensor) -> bytes:
    """A float32 vector as a .npy file."""
    content = io.BytesIO()
    np.save(content, vector.to(torch.float32).numpy(), allow_pickle=False)
    return content.getvalue()


def mask_png(mask: Tensor) -> bytes:
    """A bool map `[H, W]` as an 8-bit grey PNG of 255 and 0."""
    return bytes(encode_png(mask.to(torch.uint8)[None] * 255).numpy())
