"""Metrics against numbers worked out by hand, and the same numbers however the images are spread over ranks."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from modsquad_ds.data.types import Finish, SubBatch
from modsquad_ds.metrics import METRICS, Metric
from modsquad_ds.mmseg_compat import iou_metric
from modsquad_ds.tasks import KINDS

NO_IMAGES, NO_FINISH = torch.zeros(0), Finish((0, 0, 0), (1, 1, 1))


def merged(kind: str, classes: int, states: Sequence[Any]) -> dict[str, float]:
    """What one rank computes from all ranks' states, after their journey as JSON."""
    metric = METRICS[kind](classes)
    metric.merge(json.loads(json.dumps(states)))
    return metric.compute()


def test_every_kind_has_its_metrics() -> None:
    assert set(METRICS) == set(KINDS)
    computed = {kind: tuple(metric(2).compute()) for kind, metric in METRICS.items()}
    assert computed == {kind: row.metrics for kind, row in KINDS.items()}


@pytest.mark.parametrize("kind", list(METRICS))
def test_without_images_there_is_nothing_to_measure(kind: str) -> None:
    assert all(math.isnan(value) for value in METRICS[kind](3).compute().values())


# ---------------------------------------------------------------- classification


def classified(metric: Metric, probabilities: Sequence[Sequence[float]], labels: list[int], valid: list[bool]) -> None:
    predictions = [{"probabilities": torch.tensor(row), "label": 0} for row in probabilities]
    keys = tuple(str(i) for i in range(len(labels)))
    targets, meta = {"labels": torch.tensor(labels)}, tuple({"valid": v} for v in valid)
    metric.update(predictions, SubBatch(NO_IMAGES, targets, keys, meta, NO_FINISH))


def test_accuracy_by_hand() -> None:
    metric = METRICS["classification"](7)
    falling = [0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]
    # Ranks of the labels: first, fifth, sixth; the fourth image only fills up the batch.
    classified(metric, [falling] * 4, [0, 4, 5, 0], [True, True, True, False])
    assert metric.compute() == {"top1": 1 / 3, "top5": 2 / 3}


def test_with_fewer_than_five_classes_top5_is_all_of_them() -> None:
    metric = METRICS["classification"](3)
    classified(metric, [[0.5, 0.3, 0.2]] * 2, [2, 0], [True, True])
    assert metric.compute() == {"top1": 0.5, "top5": 1.0}


def test_equal_probabilities_go_to_the_lower_class() -> None:
    metric = METRICS["classification"](6)
    classified(metric, [[1 / 6] * 6] * 3, [0, 4, 5], [True] * 3)
    assert metric.compute() == {"top1": 1 / 3, "top5": 2 / 3}


def test_accuracy_does_not_depend_on_the_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(30, 8, generator=generator).tolist()
    labels = torch.randint(8, (30,), generator=generator).tolist()
    whole = METRICS["classification"](8)
    classified(whole, probabilities, labels, [True] * 30)
    states = []
    for rank in range(3):
        part = METRICS["classification"](8)
        classified(part, probabilities[rank::3], labels[rank::3], [True] * 10)
        states.append(part.state())
    assert merged("classification", 8, states) == whole.compute()


# ---------------------------------------------------------------- segmentation


def segmented(metric: Metric, masks: Sequence[Tensor], labels: Sequence[Tensor], valid: bool = True) -> None:
    meta = tuple({"valid": valid, "label": label.to(torch.uint8)} for label in labels)
    predictions = [{"mask": mask.to(torch.uint8)} for mask in masks]
    metric.update(predictions, SubBatch(NO_IMAGES, {}, tuple("x" * len(meta)), meta, NO_FINISH))


def test_iou_by_hand() -> None:
    metric = METRICS["segmentation"](3)
    segmented(metric, [torch.tensor([[0, 1, 1, 1, 0]])], [torch.tensor([[0, 0, 1, 1, 255]])])
    segmented(metric, [torch.tensor([[2, 2]])], [torch.tensor([[0, 0]])], valid=False)
    # Class 0: 1 of 2 pixels; class 1: 2 of 3; class 2 occurs nowhere and is left out.
    values = metric.compute()
    assert values == pytest.approx({"mIoU": (1 / 2 + 2 / 3) / 2, "mAcc": (1 / 2 + 1) / 2, "aAcc": 3 / 4}, rel=1e-12)


def test_a_class_that_is_only_predicted_counts_as_zero_iou() -> None:
    metric = METRICS["segmentation"](3)
    segmented(metric, [torch.tensor([[0, 0, 0, 2]])], [torch.tensor([[0, 0, 0, 0]])])
    assert metric.compute() == pytest.approx({"mIoU": (3 / 4 + 0) / 2, "mAcc": 3 / 4, "aAcc": 3 / 4}, rel=1e-12)


def random_masks(count: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(6, (20, 30), generator=generator) for _ in range(count)]
    guesses = [torch.where(torch.rand(20, 30, generator=generator) < 0.6, label, (label + 1) % 6) for label in labels]
    for label in labels:
        label[:2] = 255
    return guesses, labels


def test_iou_equals_mmsegmentations_but_is_not_rounded() -> None:
    guesses, labels = random_masks(7)
    metric = METRICS["segmentation"](6)
    segmented(metric, guesses, labels)
    reference = iou_metric()()
    reference.dataset_meta = {"classes": tuple("abcdef")}
    reference.process({}, [
        {"pred_sem_seg": {"data": guess[None]}, "gt_sem_seg": {"data": label[None]}}
        for guess, label in zip(guesses, labels, strict=True)
    ])  # fmt: skip
    expected = reference.compute_metrics(reference.results)
    values = metric.compute()
    assert set(values) == set(expected)
    for name, value in values.items():
        assert value * 100 == pytest.approx(float(expected[name]), abs=0.00501)
        assert round(value * 100, 2) != value * 100


def test_iou_does_not_depend_on_the_ranks() -> None:
    guesses, labels = random_masks(7)
    whole = METRICS["segmentation"](6)
    segmented(whole, guesses, labels)
    states = []
    for rank in range(3):
        part = METRICS["segmentation"](6)
        segmented(part, guesses[rank::3], labels[rank::3])
        states.append(part.state())
    assert merged("segmentation", 6, states) == whole.compute()


def test_images_of_more_pixels_than_float32_can_count() -> None:
    side = 4099  # 4099^2 = 16,801,801 is odd and above 2^24
    metric = METRICS["segmentation"](2)
    segmented(metric, [torch.zeros(side, side, dtype=torch.uint8)], [torch.zeros(side, side, dtype=torch.uint8)])
    assert metric.state()["intersection"] == [side * side, 0]


# ---------------------------------------------------------------- detection

Box = list[float]


def detected(
    metric: Metric, key: str, found: list[tuple[Box, float, int]], truth: list[tuple[Box, int]], **more: Any
) -> None:
    """One image; boxes x1, y1, x2, y2. `crowd` are its crowd boxes, all of label 0."""
    crowd = more.get("crowd", [])
    boxes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in [box for box, _ in truth] + crowd]
    annotations = {
        "boxes": boxes,
        "labels": [label for _, label in truth] + [0] * len(crowd),
        "iscrowd": [0] * len(truth) + [1] * len(crowd),
        "area": [width * height for _, _, width, height in boxes],
    }
    prediction = {
        "boxes": torch.tensor([box for box, _, _ in found]).reshape(-1, 4),
        "scores": torch.tensor([score for _, score, _ in found]),
        "labels": torch.tensor([label for _, _, label in found], dtype=torch.int64),
    }
    meta = {"valid": more.get("valid", True), "annotations": annotations}
    metric.update([prediction], SubBatch(NO_IMAGES, {}, (key,), (meta,), NO_FINISH))


SMALL, OTHER = [10.0, 10.0, 20.0, 20.0], [100.0, 100.0, 110.0, 110.0]


def test_perfect_detections(capsys: pytest.CaptureFixture[str]) -> None:
    metric = METRICS["detection"](2)
    large = [0.0, 0.0, 200.0, 200.0]
    detected(metric, "a", [(SMALL, 0.9, 1)], [(SMALL, 1)])
    detected(metric, "b", [(large, 0.6, 0)], [(large, 0)])
    values = metric.compute()
    nan = values.pop("AP_medium")
    assert math.isnan(nan)  # there is no box of that size
    assert values == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1, "AP_small": 1, "AP_large": 1})
    assert capsys.readouterr().out == ""


def test_a_missed_box_by_hand() -> None:
    metric = METRICS["detection"](1)
    detected(metric, "a", [(SMALL, 0.9, 0)], [(SMALL, 0), (OTHER, 0)])
    # Precision 1 up to recall 1/2: 51 of COCO's 101 recall points.
    assert metric.compute()["AP"] == metric.compute()["AP50"] == pytest.approx(51 / 101)


def test_a_false_alarm_by_hand() -> None:
    metric = METRICS["detection"](1)
    detected(metric, "a", [(OTHER, 0.9, 0), (SMALL, 0.5, 0)], [(SMALL, 0)])
    # The better scored detection is wrong: precision 1/2 at every recall.
    assert metric.compute()["AP"] == pytest.approx(0.5)


def test_a_wrong_class_is_a_miss() -> None:
    metric = METRICS["detection"](3)
    detected(metric, "a", [(SMALL, 0.9, 1)], [(SMALL, 0)])
    assert metric.compute()["AP"] == 0
    # Class 2 has neither boxes nor detections and does not count.
    detected(metric, "b", [(SMALL, 0.9, 1)], [(SMALL, 1)])
    assert metric.compute()["AP"] == pytest.approx((0 + 0.5) / 2)


def test_a_loose_box_passes_the_low_thresholds_only() -> None:
    metric = METRICS["detection"](1)
    detected(metric, "a", [([10.0, 10.0, 20.0, 16.2], 0.9, 0)], [(SMALL, 0)])  # IoU 0.62: 0.5, 0.55 and 0.6
    values = metric.compute()
    assert (values["AP"], values["AP50"], values["AP75"]) == pytest.approx((0.3, 1.0, 0.0))


def test_detections_in_a_crowd_are_forgiven() -> None:
    metric, strict = METRICS["detection"](1), METRICS["detection"](1)
    inside = [102.0, 102.0, 108.0, 108.0]
    detected(metric, "a", [(SMALL, 0.5, 0), (inside, 0.9, 0)], [(SMALL, 0)], crowd=[OTHER])
    detected(strict, "a", [(SMALL, 0.5, 0), (inside, 0.9, 0)], [(SMALL, 0)])
    assert metric.compute()["AP"] == pytest.approx(1.0)
    assert strict.compute()["AP"] == pytest.approx(0.5)


def test_sizes_go_by_the_annotated_area() -> None:
    metric = METRICS["detection"](1)
    box = [0.0, 0.0, 50.0, 50.0]
    detected(metric, "a", [(box, 0.9, 0)], [(box, 0)])
    assert metric.compute()["AP_medium"] == pytest.approx(1.0)
    metric.images[0]["truth"]["area"] = [900.0]  # a thin object in the same box
    values = metric.compute()
    assert values["AP_small"] == pytest.approx(1.0)
    assert math.isnan(values["AP_medium"])


def test_no_detections_are_worth_nothing_and_no_annotations_are_unknown() -> None:
    metric = METRICS["detection"](2)
    detected(metric, "a", [], [(SMALL, 0)])
    values = metric.compute()
    assert values["AP"] == values["AP50"] == values["AP_small"] == 0.0
    assert math.isnan(values["AP_large"])
    empty = METRICS["detection"](2)
    detected(empty, "a", [(SMALL, 0.9, 0)], [])
    assert all(math.isnan(value) for value in empty.compute().values())


def test_images_that_fill_up_the_batch_are_left_out() -> None:
    metric = METRICS["detection"](1)
    detected(metric, "a", [(SMALL, 0.9, 0)], [(SMALL, 0)])
    detected(metric, "a", [], [(SMALL, 0)], valid=False)
    assert metric.compute()["AP"] == pytest.approx(1.0)


def test_an_image_evaluated_twice_is_an_error() -> None:
    metric = METRICS["detection"](1)
    for _ in range(2):
        detected(metric, "shard/a", [(SMALL, 0.9, 0)], [(SMALL, 0)])
    with pytest.raises(ValueError, match="'shard/a' was evaluated twice"):
        metric.compute()


def test_average_precision_does_not_depend_on_the_ranks() -> None:
    generator = torch.Generator().manual_seed(2)
    images = []
    for number in range(12):
        corner = torch.rand(5, 2, generator=generator) * 200
        boxes = torch.cat([corner, corner + 5 + torch.rand(5, 2, generator=generator) * 90], dim=1)
        labels = torch.randint(3, (5,), generator=generator).tolist()
        moved = (boxes + torch.randn(5, 4, generator=generator)).tolist()
        # Coarse scores: many ties, whose order decides.
        scores = (torch.randint(1, 4, (5,), generator=generator) / 4).tolist()
        found = list(zip(moved, scores, labels[::-1] if number % 4 == 0 else labels, strict=True))
        images.append((f"{number:02}", found, list(zip(boxes.tolist(), labels, strict=True))))
    whole = METRICS["detection"](3)
    for image in images:
        detected(whole, *image)
    expected = whole.compute()
    assert 0.1 < expected["AP"] < 0.9
    for order in (images[::-1], images[5:] + images[:5]):
        states = []
        for rank in range(3):
            part = METRICS["detection"](3)
            for image in order[rank::3]:
                detected(part, *image)
            states.append(part.state())
        assert merged("detection", 3, states) == expected
