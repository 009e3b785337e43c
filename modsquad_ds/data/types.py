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


class SubBatch(NamedTuple):
    """The images of one task in one step on one rank, ready for the model."""

    images_BCHW: Tensor
    """float32, normalised, all of one canvas whose sides are multiples of the patch size."""
    targets: dict[str, Any]
    """By kind.
    classification: `labels` int64 `[B]`, or with Mixup/CutMix `probabilities` float32 `[B, num_classes]`.
    detection: `boxes` list of B `[n, 4]`, `labels` list of B int64 `[n]` (0-based), `ignore` list of B `[m, 4]` crowd boxes.
    segmentation: `labels` int64 `[B, H, W]`, 255 = ignored.
    """
    keys: tuple[str, ...]
    """Keys of the samples, for error messages and predictions."""
    meta: tuple[dict[str, Any], ...]
    """Per image, evaluation only (empty dicts in training).
    all kinds: `valid` False for an image that only fills up the last batch, `size` (height, width) of the original.
    detection, segmentation: `canvas` (height, width) that the image has without larger neighbours in the batch.
    detection: `content` (height, width) of the image inside the canvas, `annotations` (the shard's json, decoded).
    segmentation: `label` uint8 tensor `[h, w]` at the original size, `content` (height, width) of the image inside the canvas.
    """


Batch = dict[str, SubBatch]
"""Task name -> its sub-batch; the tasks of a step are the same on every rank."""
