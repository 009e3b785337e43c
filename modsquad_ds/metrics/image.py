"""Metrics of tasks whose images carry one kind of label: top-1 and top-5, COCO's AP, mIoU. Chosen in build.py."""

import contextlib
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from modsquad_ds.metrics.base import Evaluated, Metric, State
from modsquad_ds.mmseg_compat import iou_metric
from modsquad_ds.tasks import CLASSIFICATION, DETECTION, IGNORE_INDEX, KINDS, SEGMENTATION


class KindMetric(Metric):
    """A metric of a kind of task, told how many classes the task has."""

    kind: str

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes


class Classification(KindMetric):
    """Top-1 and top-5 accuracy; with fewer than five classes, top-k for all of them."""

    kind = CLASSIFICATION

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.images, self.top1, self.top5 = 0, 0, 0

    def add(self, prediction: Mapping[str, Any], sub_batch: Evaluated, index: int) -> None:
        """Count in an image."""
        label = int(sub_batch.targets["labels"][index])
        # A stable order: of equal probabilities the lower class comes first, in top-1 as in top-5.
        best = prediction["probabilities"].argsort(descending=True, stable=True)[:5].tolist()
        self.images += 1
        self.top1 += label == best[0]
        self.top5 += label in best

    def state(self) -> State:
        """Three counts."""
        return {"images": self.images, "top1": self.top1, "top5": self.top5}

    def merge(self, states: Sequence[State]) -> None:
        """Sums of the counts."""
        self.images, self.top1, self.top5 = (sum(s[name] for s in states) for name in ("images", "top1", "top5"))

    def compute(self) -> dict[str, float]:
        """Shares of the images."""
        images = self.images or math.nan
        return {"top1": self.top1 / images, "top5": self.top5 / images}


class Segmentation(KindMetric):
    """Mean IoU and accuracy over classes, and pixel accuracy, by mmsegmentation's IoUMetric.

    Its two static functions do the counting and the division; its `compute_metrics`, which rounds to hundredths of a
    percent, is not used. A class that neither labels nor predictions hold is left out of the mean.
    """

    kind = SEGMENTATION
    _AREAS = ("intersection", "union", "predicted", "labelled")

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.areas = torch.zeros(len(self._AREAS), num_classes, dtype=torch.int64)

    def add(self, prediction: Mapping[str, Any], sub_batch: Evaluated, index: int) -> None:
        """Count in an image."""
        self.areas += areas(prediction["mask"], sub_batch.meta[index]["label"], self.num_classes)

    def state(self) -> State:
        """Pixels per class."""
        return dict(zip(self._AREAS, self.areas.tolist(), strict=True))

    def merge(self, states: Sequence[State]) -> None:
        """Sums of the pixels."""
        self.areas = torch.tensor([[s[name] for name in self._AREAS] for s in states]).sum(dim=0)

    def compute(self) -> dict[str, float]:
        """Means over the classes that occur."""
        values = iou_metric().total_area_to_metrics(*self.areas.double(), ["mIoU"])
        means = {name: torch.as_tensor(values[name]).nanmean().item() for name in ("IoU", "Acc")}
        return {"mIoU": means["IoU"], "mAcc": means["Acc"], "aAcc": float(values["aAcc"])}


def areas(mask: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Pixels per class, int64 `[4, num_classes]`: right, in either, predicted, labelled; by mmsegmentation's IoUMetric.

    Args:
        mask: uint8 `[h, w]`, predicted classes.
        label: uint8 `[h, w]`; pixels of 255 do not count.
    """
    count = iou_metric().intersect_and_union
    parts = [torch.stack(count(*band, num_classes, IGNORE_INDEX)).long() for band in _bands(mask, label)]
    return torch.stack(parts).sum(dim=0)


def _bands(mask: Tensor, label: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Mask and label in bands of rows small enough to be counted in float32, as IoUMetric does, without an error."""
    rows = max(1, 2**24 // mask.shape[1])
    return zip(mask.split(rows), label.split(rows), strict=True)


class Detection(KindMetric):
    """Average precision of boxes over IoU 0.5 to 0.95, at 0.5, at 0.75, and by size, by pycocotools.

    As on COCO: at most 100 detections per image and class count, crowd regions forgive detections inside them, sizes go
    by the annotations' `area` (small below 32 x 32 pixels, large above 96 x 96).
    """

    kind = DETECTION

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.images: list[dict[str, Any]] = []

    def add(self, prediction: Mapping[str, Any], sub_batch: Evaluated, index: int) -> None:
        """Count in an image."""
        annotations = sub_batch.meta[index]["annotations"]
        corners = prediction["boxes"].double()
        sides = corners[:, 2:] - corners[:, :2]
        found = {
            "boxes": torch.cat([corners[:, :2], sides], dim=1).tolist(),
            "labels": prediction["labels"].tolist(),
            "score": prediction["scores"].tolist(),
            "iscrowd": [0] * len(corners),
            "area": sides.prod(dim=1).tolist(),
        }
        truth = {name: annotations[name] for name in ("boxes", "labels", "iscrowd", "area")}
        self.images.append({"key": sub_batch.keys[index], "found": found, "truth": truth})

    def state(self) -> State:
        """Detections and annotations of every image; boxes as x, y, width, height in original pixels."""
        return {"images": self.images}

    def merge(self, states: Sequence[State]) -> None:
        """All images of all ranks."""
        self.images = [image for s in states for image in s["images"]]

    def compute(self) -> dict[str, float]:
        """pycocotools' first six figures. NaN where there is no annotation, e.g. none of that size.

        Raises ValueError if an image was evaluated twice.
        """
        images = sorted(self.images, key=lambda image: image["key"])
        for first, second in itertools.pairwise(images):
            if first["key"] == second["key"]:
                raise ValueError(f"image {first['key']!r} was evaluated twice")
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._coco(images, "truth"), self._coco(images, "found"), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        names = KINDS[DETECTION].metrics
        values = [float(value) for value in evaluation.stats[: len(names)]]
        return {name: math.nan if value < 0 else value for name, value in zip(names, values, strict=True)}

    def _coco(self, images: list[dict[str, Any]], source: str) -> COCO:
        """Annotations or detections, filled in by hand because pycocotools' `loadRes` fails where there are none."""
        rows: list[dict[str, Any]] = []
        for number, image in enumerate(images):
            columns = image[source]
            for index, (box, label) in enumerate(zip(columns["boxes"], columns["labels"], strict=True)):
                row = {name: columns[name][index] for name in columns if name not in ("boxes", "labels")}
                # pycocotools marks "no match" with 0, so the numbers of boxes start at 1.
                row |= {"id": len(rows) + 1, "image_id": number, "category_id": label, "bbox": box}
                rows.append(row)
        coco = COCO()
        numbers, classes = range(len(images)), range(self.num_classes)
        coco.dataset = {"images": _ids(numbers), "annotations": rows, "categories": _ids(classes)}
        coco.createIndex()
        return coco


def _ids(numbers: Iterable[int]) -> list[dict[str, int]]:
    return [{"id": number} for number in numbers]


METRICS: dict[str, type[KindMetric]] = {metric.kind: metric for metric in (Classification, Detection, Segmentation)}
"""Kind of task -> its accumulator, built as `(num_classes)`."""
