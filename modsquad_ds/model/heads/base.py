"""What every head promises: features of one task -> outputs -> loss terms (training) or predictions (evaluation).

Axes: B images, D width, H W rows and columns of cells.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

Outputs = dict[str, Any]
"""Name -> tensor or list of tensors, in the model's own precision."""

Prediction = dict[str, Any]
"""What one image holds: CPU tensors and plain numbers. Keys by kind, see `Head.predict`."""


class LossTerm(NamedTuple):
    """One term of a task's loss, not yet normalised, so that it adds up over any split of the images.

    Over any set of ranks and micro-batches its value is `weight * total(sum) / max(1, total(count))`, times
    `total(part) / max(1, total(count))` where there is a part.
    """

    sum: Tensor
    """float32 scalar with gradient."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    """float32 scalar without gradient, on the same device: images, positives or pixels. Depends on the targets only."""
    weight: float
    part: Tensor | None = None
    """As `count`, of some of what is counted: for losses that weigh two classes by each other's share over all ranks."""


class Head(nn.Module, ABC):
    """Turns the feature map of one task into that task's outputs. `build_head` makes one from a recipe's task.

    Every parameter receives a gradient in every training step, zero where the batch holds nothing to learn from, so
    that all ranks always reduce the same set of gradients.
    """

    @abstractmethod
    def forward(self, map_BDHW: Tensor) -> Outputs:
        """Outputs for feature maps `[B, D, h, w]`; one cell is `patch_size` pixels of the canvas."""

    @abstractmethod
    def losses(self, outputs: Outputs, targets: dict[str, Any]) -> dict[str, LossTerm]:
        """Loss terms, computed in float32, of `forward`'s outputs against `SubBatch.targets` on the same device."""

    @abstractmethod
    def predict(self, outputs: Outputs, meta: Sequence[dict[str, Any]]) -> list[Prediction]:
        """One prediction per image, on the CPU and in the original image's pixels; `meta` is `SubBatch.meta`.

        classification: `probabilities` float32 `[C]`, `label` int.
        detection: `boxes` float32 `[n, 4]` (x1, y1, x2, y2), `scores` float32 `[n]` falling, `labels` int64 `[n]`.
        segmentation: `mask` uint8 `[h, w]`.
        Tasks of an image set, `[h, w]` the size of `meta`'s `label`, within its `window` of the canvas if there is one:
        soft_classification: as classification. semantic: `mask` uint8 `[h, w]`.
        regression: `values` float32 `[C, h, w]`, scaled as the targets. unit_vectors: `values` `[3, h, w]` of length 1.
        binary: `probability` float32 `[h, w]`.
        segments: `embedding` float32 `[D, h', w']` of the canvas's cells, whatever the window.
        """
