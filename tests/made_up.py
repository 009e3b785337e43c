"""Made-up samples of image sets, and geometries, for tests of their transforms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modsquad_ds.data.collate import Pixels
from modsquad_ds.data.set_decode import SetSample
from modsquad_ds.data.set_transforms import Geometry
from modsquad_ds.data.transforms import seeded
from modsquad_ds.targets import Target

PIXELS = Pixels((120.0, 110.0, 100.0), (60.0, 60.0, 60.0), 16)


def raw_map(row: Target, size: tuple[int, int]) -> Tensor:
    """Random numbers as `row` is stored."""
    if row.stored == "npy":
        return torch.rand(row.channels)
    if row.stored == "grey16":
        return torch.randint(1, 60000, (1, *size), dtype=torch.int32)
    channels = row.channels if row.kind == "regression" else 1 if row.stored == "grey8" else 3
    return torch.randint(row.channels if row.kind == "semantic" else 256, (channels, *size), dtype=torch.uint8)


def sample_of(rows: Sequence[Target], size: tuple[int, int] = (24, 32), valid: Tensor | None = None, seed: int = 0) -> SetSample:
    with seeded(seed):
        image = torch.randint(256, (3, *size), dtype=torch.uint8)
        return SetSample(image, {row.name: raw_map(row, size) for row in rows}, valid)


def whole(size: tuple[int, int], flip: bool = False, angle: float | None = None) -> Geometry:
    return Geometry(1.0, size, angle, flip, (0, 0, *size))


def holes(size: tuple[int, int], seed: int = 1) -> Tensor:
    """A mask with a large hole and single ones."""
    with seeded(seed):
        mask = torch.rand(size) > 0.2
    mask[size[0] // 3 : size[0] // 2, size[1] // 4 : size[1] // 2] = False
    return mask
