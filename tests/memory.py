"""Three small tasks whose samples are made up in memory, and a plan to load them: for tests of the loader."""

import io
import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modsquad_ds.data.loader_plan import LoaderPlan
from modsquad_ds.data.types import Finish, RawSample, SubBatch
from modsquad_ds.tasks import ClassificationTask, DetectionTask, SegmentationTask, TaskSpec

SIZES = {"digits": [7, 0, 5, 9], "scenes": [4, 3], "textures": [5, 1]}
KIND_OF = {"digits": "classification", "scenes": "detection", "textures": "segmentation"}


class MemoryStore:
    """The samples of one split, made up from (task, shard, sample); stands in for `ShardSet`."""

    def __init__(self, folder: Path) -> None:
        self.task, self.split = folder.parts[-2:]
        self.kind = KIND_OF[self.task]
        self.classes = ["a", "b", "c"]
        self.shard_sizes = SIZES[self.task]
        self.details: dict[str, Any] = {}

    def fields(self, shard: int, sample: int) -> set[str]:
        return set(self.read(shard, sample).fields)

    def read(self, shard: int, sample: int) -> RawSample:
        rng = np.random.default_rng([shard, sample])
        height, width = rng.integers(24, 40, size=2).tolist()
        image = png(rng.integers(256, size=(height, width, 3), dtype=np.uint8))
        label = {
            "classification": ("cls", b"%d" % (sample % 3)),
            "detection": ("json", boxes_json(height, width)),
            "segmentation": ("seg.png", png(rng.integers(3, size=(height, width), dtype=np.uint8))),
        }[self.kind]
        return RawSample(f"{shard}-{sample}", {"png": image, label[0]: label[1]}, f"{self.split}/shard-{shard}.tar")


class BadLabelStore(MemoryStore):
    """One sample of the digits has a class that the task does not have."""

    def read(self, shard: int, sample: int) -> RawSample:
        raw = super().read(shard, sample)
        if self.kind == "classification" and (shard, sample) == (3, 4):
            return raw._replace(fields=raw.fields | {"cls": b"17"})
        return raw


class EmptyStore(MemoryStore):
    """A split whose shards hold nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.shard_sizes = [0, 0]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def boxes_json(height: int, width: int) -> bytes:
    label = {"image_id": 1, "height": height, "width": width, "boxes": [[2, 3, 15, 12], [0, 0, 9, 9]]}
    return json.dumps(label | {"labels": [2, 0], "iscrowd": [0, 1], "area": [180, 81], "ids": [1, 2]}).encode()


def classification(**changes: Any) -> ClassificationTask:
    transform = {"image_size": 32, "rand_augment_ops": 2, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
    values = {"data": "digits", "num_classes": 3, "batch_size": 8, "transform": transform} | changes
    return ClassificationTask(kind="classification", **values)


def detection(**changes: Any) -> DetectionTask:
    transform = {"canvases": ((32, 48), (48, 32), (40, 40)), "eval_canvas": (48, 48)}
    values = {"data": "scenes", "num_classes": 3, "batch_size": 4, "transform": transform} | changes
    return DetectionTask(kind="detection", **values)


def segmentation(**changes: Any) -> SegmentationTask:
    values = {"data": "textures", "num_classes": 3, "batch_size_per_rank": 2} | changes
    values.setdefault("transform", {"crop": (32, 40), "resize": (40, 64)})
    return SegmentationTask(kind="segmentation", **values)


def tasks() -> dict[str, TaskSpec]:
    return {
        "digits": classification(),
        "scenes": detection(),
        "textures": segmentation(batch_size=4, batch_size_per_rank=None),
    }


def plan(**changes: Any) -> LoaderPlan:
    values: dict[str, Any] = {
        "tasks": tasks(),
        "root": Path("memory"),
        "seed": 3,
        "sampling": "packed",
        "shuffle_window": 2,
        "patch_size": 8,
        "mean": (123.0, 117.0, 104.0),
        "std": (58.0, 57.0, 57.0),
        "open_store": MemoryStore,
    }
    return LoaderPlan(**(values | changes))


def assert_equal(first: Any, second: Any) -> None:
    """Equal to the bit, through every container."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for name in first:
            assert_equal(first[name], second[name])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


def joined(parts: list[SubBatch]) -> SubBatch:
    """The batches of all ranks, one after the other."""
    targets: dict[str, Any] = {}
    for name, value in parts[0].targets.items():
        values = [part.targets[name] for part in parts]
        targets[name] = [*chain.from_iterable(values)] if isinstance(value, list) else torch.cat(values)
    images = torch.cat([part.images_BCHW for part in parts])
    keys, meta = sum((part.keys for part in parts), ()), sum((part.meta for part in parts), ())
    constants, tensors = parts[0].finish[:2], zip(*(part.finish[2:] for part in parts), strict=True)
    finish = Finish(*constants, *(None if each[0] is None else torch.cat(each) for each in tensors))
    return SubBatch(images, targets, keys, meta, finish)
