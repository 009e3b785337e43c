"""The records that travel from the shards to the heads: RawSample -> Target -> SubBatch -> Batch.

Boxes are float32 `[n, 4]` in pixels of the image that the model sees, as x1, y1, x2, y2.
"""

from typing import Any, NamedTuple

from torch import Tensor


class RawSample(NamedTuple):
    """One sample as it lies in a shard: undecoded bytes."""

    key: str
    fields: dict[str, bytes]
    """Member name after the key (`jpg`, `png`, `cls`, `json`, `seg.png`, ...) -> bytes."""
    shard: str
    """Path of the tar, for error messages."""


class Finish(NamedTuple):
    """What is left to do to a batch's images on the device, in the order of the fields; `data.finish` does it.

    Rectangles are int64 `[B, 4]`: top, left, bottom and right in pixels of the canvas, the last two exclusive. An empty
    rectangle leaves its image alone, and None leaves all of them alone.
    """

    mean: tuple[float, float, float]
    """RGB, scale 0..255: subtracted."""
    std: tuple[float, float, float]
    """Divided by."""
    area_B4: Tensor | None = None
    """What an image covers of its canvas; the rest becomes 0, the mean colour, which no byte could say exactly."""
    erased_B4: Tensor | None = None
    """RandomErasing: what `noise` covers."""
    noise: Tensor | None = None
    """float32 in normalised units: the pixels of `erased_B4`, image after image, each channel by channel and row by row."""
    mixed_B4: Tensor | None = None
    """Mixup and CutMix: where images 2i and 2i + 1 hold a part of each other."""
    kept_B: Tensor | None = None
    """float32: share of its own pixels that an image keeps inside `mixed_B4`, 0 for CutMix."""


class Rows(NamedTuple):
    """The images of a set that one of its tasks learns from in a step."""

    index_B: Tensor
    """int64: places among the set's images. What is beyond the first `counted` only fills up, so that all ranks have as many."""
    counted: int
    """Images whose labels, and whose routing, count."""


class SubBatch(NamedTuple):
    """The images of one task, or of one image set, in one step on one rank. `data.finish` makes the model's input of them."""


    images_BCHW: Tensor
    """uint8 RGB, all of one canvas whose sides are multiples of the patch size."""
    targets: dict[str, Any]
    """By kind.
    classification: `labels` int64 `[B]`, or with Mixup/CutMix `probabilities` float32 `[B, num_classes]`.
    detection: `boxes` list of B `[n, 4]`, `labels` list of B int64 `[n]` (0-based), `ignore` list of B `[m, 4]` crowd boxes.
    segmentation: `labels` int64 `[B, H, W]`, 255 = ignored.
    An image set has one such dict by task, with an entry per image of the task's `rows`; by kind:
    soft_classification: `probabilities` float32 `[B, C]`, `valid` bool `[B]`.
    semantic: `labels` int64 `[B, H, W]`, 255 = ignored. segments: `labels` int64 `[B, H, W]`, -1 = ignored.
    regression, unit_vectors: `values` float32 `[B, C, H, W]`, `valid` bool `[B, H, W]`.
    binary: `values` float32 `[B, H, W]` of 0 and 1, `valid` bool `[B, H, W]`.
    """
    keys: tuple[str, ...]
    """Keys of the samples, for error messages and predictions."""
    meta: tuple[dict[str, Any], ...]
    """Per image, evaluation only (empty dicts in training).
    all kinds: `valid` False for an image that only fills up the last batch, `size` (height, width) of the original.
    detection, segmentation: `canvas` (height, width) that the image has without larger neighbours in the batch.
    detection: `content` (height, width) of the image inside the canvas, `annotations` (the shard's json, decoded).
    segmentation: `label` uint8 tensor `[h, w]` at the original size, `content` (height, width) of the image inside the canvas.
    tasks of a set: `label` dict, the image's targets as above without the axis B, at the resolution that is scored; `window`
    (top, left, height, width) of the canvas that shows the whole image, or None where `label` lies on the canvas itself.
    """
    finish: Finish
    rows: dict[str, Rows] | None = None
    """Image sets: by task, in the recipe's order."""


Batch = dict[str, SubBatch]
"""Name of a task, or of an image set -> its sub-batch; those of a step are the same on every rank."""
