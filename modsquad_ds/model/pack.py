"""TokenPack: images of several tasks and sizes as one ragged row of tokens. What the backbone's blocks pass along.

Axes: S tokens in the pack, D width, B images, N tokens of an image, H W height and width of an image in tokens.

A task's tokens are contiguous, so "per task" is a slice and never a gather. Norms, dense MLPs, routers and experts work on
`tokens_SD` as it is; only attention, patch and position embedding and the heads look at segments.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from modsquad_ds.data.types import Rows


class Segment(NamedTuple):
    """Images of one task and one size, side by side in a pack."""

    task: int
    """Index of the task in the recipe."""
    batch: int
    height: int
    """In tokens, as is the width."""
    width: int
    counted: int | None = None
    """Images, from the first on, whose routing counts in the statistics; None: all. The others fill up (`data.types.Rows`)."""

    @property
    def counted_length(self) -> int:
        """Tokens of the images that count."""
        return self.tokens * (self.batch if self.counted is None else self.counted)

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.height * self.width

    @property
    def length(self) -> int:
        """Tokens of all its images."""
        return self.batch * self.tokens


class TokenPack(NamedTuple):
    """Tokens of all segments, one after the other."""

    tokens_SD: Tensor
    segments: tuple[Segment, ...]


class Shared(NamedTuple):
    """Images that several tasks read: their patches are embedded once, their tokens enter the pack once per task."""

    images_BCHW: Tensor
    readers: dict[int, Rows]
    """Index of the task -> the images that it reads."""


def lengths(segments: tuple[Segment, ...]) -> list[int]:
    """Tokens of each segment, for `Tensor.split`."""
    return [segment.length for segment in segments]


def slices(x_SD: Tensor, segments: tuple[Segment, ...]) -> Iterator[tuple[Segment, Tensor]]:
    """Each segment with its own rows of `x_SD` (views)."""
    return zip(segments, x_SD.split(lengths(segments)), strict=True)
