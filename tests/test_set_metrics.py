"""Metrics of image sets' tasks against numbers worked out by hand, and the same numbers however images are spread over ranks."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modsquad_ds.data.types import Finish, SubBatch
from modsquad_ds.metrics import MAP_METRICS, Metric, build_metric
from modsquad_ds.metrics.build import RowMetrics
from modsquad_ds.metrics.maps import raw_of
from modsquad_ds.metrics.saliency import F_THRESHOLDS, IOU_THRESHOLDS
from modsquad_ds.model.heads import build_head
from modsquad_ds.targets import LOSSES, METRICS, TARGETS, Scale, Target
from modsquad_ds.tasks import metrics_of
from set_tasks import CASES, Case, set_task

Fields = Mapping[str, Any]


def metric_of(target: str) -> Metric:
    return build_metric(set_task(target))


def shown(metric: Metric, prediction: Fields, label: Fields, valid: bool = True, **more: Any) -> None:
    """Count in one image."""
    meta = {"valid": valid, "label": label, "window": None, **more}
    metric.update([prediction], SubBatch(torch.zeros(0), {}, ("key",), (meta,), Finish((0, 0, 0), (1, 1, 1))))


def of_values(values: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """Prediction or label of a real-valued map `[C, h, w]`."""
    return {"values": values, "valid": torch.ones(values.shape[-2:], dtype=torch.bool) if valid is None else valid}


def of_mask(rows: list[list[int]], valid: list[list[int]] | None = None) -> dict[str, Tensor]:
    """Label of a binary map."""
    values = torch.tensor(rows, dtype=torch.float32)
    return {"values": values, "valid": torch.ones_like(values).bool() if valid is None else torch.tensor(valid).bool()}


# ---------------------------------------------------------------- all


def test_every_row_has_its_metrics() -> None:
    assert {kind for kind, _ in MAP_METRICS} == set(LOSSES)
    assert {name for _, name in MAP_METRICS} == set(METRICS)
    for name in TARGETS:
        spec = set_task(name)
        assert tuple(build_metric(spec).compute()) == metrics_of(spec) == spec.row.metrics


@pytest.mark.parametrize("target", list(TARGETS))
def test_without_images_there_is_nothing_to_measure(target: str) -> None:
    metric = metric_of(target)
    assert all(math.isnan(value) for value in metric.compute().values())
    metric.merge(json.loads(json.dumps([metric.state(), metric.state()])))
    assert all(math.isnan(value) for value in metric.compute().values())


def test_a_row_may_ask_for_any_metrics_of_its_kind_in_any_order() -> None:
    row = replace(TARGETS["sal"], metrics=("maxF", "odsF", "mIoU"))
    metric = RowMetrics(row)
    shown(metric, {"probability": torch.tensor([[0.95, 0.0]])}, of_mask([[1, 0]]))
    assert metric.compute() == {"maxF": pytest.approx(1), "odsF": 1, "mIoU": 1}
    assert list(metric.compute()) == ["maxF", "odsF", "mIoU"]


def drawn(target: str, seed: int, size: tuple[int, int] | None = None) -> tuple[Fields, Fields]:
    """Prediction and label of a random image, by default of a size of its own."""
    row, generator = TARGETS[target], torch.Generator().manual_seed(seed)
    size = size or (5 + seed % 3, 6)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    valid = draw(*size) < 0.8
    if row.kind == "soft_classification":
        return {"probabilities": draw(row.channels)}, {"probabilities": draw(row.channels), "valid": True}
    if row.kind == "binary":
        return {"probability": draw(*size)}, {"values": (draw(*size) < 0.3).float(), "valid": valid}
    if row.kind == "semantic":
        labels = (draw(*size) * row.channels).long()
        return {"mask": (draw(*size) * row.channels).to(torch.uint8)}, {"labels": labels.masked_fill(~valid, 255)}
    if row.kind == "segments":
        return {"embedding": draw(3, *size)}, {"labels": (draw(*size) * 3).long().masked_fill(~valid, -1)}
    return {"values": draw(row.channels, *size)}, of_values(draw(row.channels, *size), valid)


@pytest.mark.parametrize("target", ["class_scene", "depth_zbuffer", "normal", "principal_curvature", "segment_unsup2d",
                                    "human_parts", "sal", "edge"])  # fmt: skip
def test_metrics_do_not_depend_on_the_ranks(target: str) -> None:
    images = [drawn(target, seed) for seed in range(7)]
    whole = metric_of(target)
    for image in images:
        shown(whole, *image)
    shown(whole, *images[0], valid=False)  # an image that fills up the batch
    expected = whole.compute()
    assert not any(map(math.isnan, expected.values()))
    states = []
    for order in (images[4:], images[2::-1], [], images[3:4]):
        part = metric_of(target)
        for image in order:
            shown(part, *image)
        states.append(json.loads(json.dumps(part.state())))
    merged = metric_of(target)
    merged.merge(states)
    assert merged.compute() == expected


@pytest.mark.parametrize("case", [*CASES, Case("regression", "l1", "depth_zbuffer")], ids=str)
@pytest.mark.parametrize("window", [None, (0, 8, 32, 32)])
def test_metrics_read_what_heads_answer(case: Case, window: tuple[int, ...] | None) -> None:
    """On a canvas of 32 x 48, of which the window shows an image that is stored at half the size."""
    torch.manual_seed(0)
    head, metric = build_head(case.spec(), 8, 8).eval(), build_metric(case.spec())
    _, label = drawn(case.target, 1, (32, 48) if window is None else (16, 16))
    meta = {"valid": True, "size": (16, 16), "canvas": (32, 48), "window": window, "label": label}
    found = head.predict(head(torch.randn(1, 8, 4, 6)), [meta])
    metric.update(found, SubBatch(torch.zeros(0), {}, ("key",), (meta,), Finish((0, 0, 0), (1, 1, 1))))
    assert all(math.isfinite(value) for value in metric.compute().values())


def test_sums_do_not_depend_on_the_order_of_the_images() -> None:
    found = set()
    for order in ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)):  # whose sums differ in the last bit
        metric = metric_of("reshading")
        for error in order:
            values = torch.zeros(3, 1, 1, dtype=torch.float64)
            shown(metric, {"values": values + torch.tensor([error, 0, 0], dtype=torch.float64)[:, None, None]}, of_values(values))
        found.add(metric.compute()["L1"])
    assert len({0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1}) == 2 and len(found) == 1


# ---------------------------------------------------------------- classes


def test_agreement_of_two_class_vectors() -> None:
    metric = metric_of("class_scene")
    rows = [([0.1, 0.9], [0.4, 0.6], True), ([0.9, 0.1], [0.4, 0.6], True), ([0.5, 0.5], [0.6, 0.4], True),
            ([0.9, 0.1], [0.9, 0.1], False)]  # fmt: skip
    for predicted, label, valid in rows:  # right, wrong, right by the lower class, not labelled
        shown(metric, {"probabilities": torch.tensor(predicted)}, {"probabilities": torch.tensor(label), "valid": valid})
    assert metric.compute() == {"top1": 2 / 3}


def test_iou_over_all_classes_counts_those_that_never_occur_as_0() -> None:
    metric = metric_of("human_parts")
    shown(metric, {"mask": torch.tensor([[0, 1, 1, 1, 0]], dtype=torch.uint8)}, {"labels": torch.tensor([[0, 0, 1, 1, 255]])})
    # Class 0: 1 of 2 pixels; class 1: 2 of 3; the five other classes occur nowhere.
    assert metric.compute() == {"mIoU": pytest.approx((1 / 2 + 2 / 3) / 7, rel=1e-12)}


def test_a_map_without_a_labelled_pixel_says_nothing() -> None:
    metric = metric_of("semseg")
    shown(metric, {"mask": torch.zeros(2, 2, dtype=torch.uint8)}, {"labels": torch.full((2, 2), 255)})
    assert math.isnan(metric.compute()["mIoU"])


# ---------------------------------------------------------------- saliency


def test_saliency_by_hand() -> None:
    metric = metric_of("sal")
    shown(metric, {"probability": torch.tensor([[0.92, 0.6, 0.6, 0.1]])}, of_mask([[1, 1, 0, 0]]))
    shown(metric, {"probability": torch.tensor([[0.3, 0.0, 0.99]])}, of_mask([[0, 0, 1]], [[1, 1, 0]]))
    # Image 1: 2/3 below 0.6, then 1/2. Image 2, nothing salient where it counts: 0 below 0.3, then 1. Best together: 0.3.
    # Pooled counts of right, predicted and true: (2, 4, 2) up to 0.3, (2, 3, 2) up to 0.6, then (1, 1, 2) up to 0.9, then 0.
    best = max(1.3 * 2 / (4 + 0.3 * 2), 1.3 * 2 / (3 + 0.3 * 2), 1.3 * 1 / (1 + 0.3 * 2))
    assert metric.compute() == {"mIoU": pytest.approx((2 / 3 + 1) / 2), "maxF": pytest.approx(best)}


def test_a_probability_at_the_threshold_is_predicted_for_maxf_only() -> None:
    assert len(IOU_THRESHOLDS) == 15 and len(F_THRESHOLDS) == 19
    for value in (0.2, 0.7, 0.9):
        metric = metric_of("sal")
        shown(metric, {"probability": torch.tensor([[value, value]])}, of_mask([[1, 0]]))
        iou, f = (metric.parts[name] for name in ("SaliencyIoU", "SaliencyF"))  # type: ignore[attr-defined]
        assert iou.images == [[0.5 if t < value - 1e-6 else 0.0 for t in np.linspace(0.2, 0.9, 15)]]
        assert f.counts[1].tolist() == [2 if t < value + 1e-6 else 0 for t in np.arange(0.05, 0.99, 0.05)]


def test_nothing_salient_and_nothing_predicted_is_right() -> None:
    metric = metric_of("sal")
    shown(metric, {"probability": torch.zeros(2, 2)}, of_mask([[0, 0], [0, 0]]))
    values = metric.compute()
    assert values["mIoU"] == 1 and math.isnan(values["maxF"])
    shown(metric, {"probability": torch.ones(1, 2)}, of_mask([[1, 1]], [[0, 0]]))  # no valid pixel
    assert metric.compute()["mIoU"] == 1
    shown(metric, {"probability": torch.zeros(1, 1)}, of_mask([[1]]))
    assert metric.compute() == {"mIoU": 0.5, "maxF": 0.0}


def test_saliency_against_plain_loops() -> None:
    metric, images = metric_of("sal"), [drawn("sal", seed) for seed in range(5)]
    for image in images:
        shown(metric, *image)

    def pixels(image: tuple[Fields, Fields]) -> list[tuple[float, bool]]:
        prediction, label = image
        every = zip(*(t.flatten().tolist() for t in (prediction["probability"], label["values"], label["valid"])), strict=True)
        return [(p, g == 1) for p, g, valid in every if valid]

    def jaccard(image: tuple[Fields, Fields], t: float) -> float:
        both = sum(p > t and g for p, g in pixels(image))
        either = sum(p > t or g for p, g in pixels(image))
        return both / either if either else 1.0

    every = [pair for image in images for pair in pixels(image)]
    f = []
    for t in [i / 20 for i in range(1, 20)]:
        right, said = sum(p >= t and g for p, g in every), sum(p >= t for p, _ in every)
        precision, recall = right / said if said else 0.0, right / sum(g for _, g in every)
        f.append(1.3 * precision * recall / (0.3 * precision + recall) if right else 0.0)
    iou = max(sum(jaccard(image, t) for image in images) / 5 for t in np.linspace(0.2, 0.9, 15))
    assert metric.compute() == {"mIoU": pytest.approx(iou), "maxF": pytest.approx(max(f))}


# ---------------------------------------------------------------- directions


def test_angles_by_hand() -> None:
    metric = metric_of("normal")
    x, y, half = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5), 0.0]
    pairs = [(x, x, 1), (x, y, 1), (x, [-1.0, 0.0, 0.0], 1), (half, x, 1), ([0.0, 0.0, 0.0], x, 1), (x, y, 0)]
    predicted, true = (torch.tensor([pair[side] for pair in pairs]).T[:, None] for side in (0, 1))  # type: ignore[misc]
    shown(metric, {"values": predicted}, of_values(true, torch.tensor([[pair[2] == 1 for pair in pairs]])))
    # 0, 90, 180, 45, and 90 for no direction at all; the last pixel is not valid.
    assert metric.compute()["mErr"] == pytest.approx((0 + 90 + 180 + 45 + 90) / 5, abs=1e-6)
    shown(metric, {"values": predicted}, of_values(true, torch.zeros(1, 6, dtype=torch.bool)))
    shown(metric, {"values": predicted[:, :, 1:2]}, of_values(true[:, :, 1:2]))
    assert metric.compute()["mErr"] == pytest.approx((405 + 90) / 6, abs=1e-6)  # pixels are pooled, not images' means


def test_small_angles_keep_their_digits() -> None:
    metric, angle = metric_of("normals"), 1e-4
    predicted = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)[:, None, None]
    shown(metric, {"values": predicted}, of_values(torch.tensor([1.0, 0.0, 0.0])[:, None, None]))
    assert metric.compute()["mErr"] == pytest.approx(math.degrees(angle), rel=1e-6)


def test_only_the_direction_counts() -> None:
    metric = metric_of("normals")
    predicted, true = (torch.tensor(vector)[:, None, None] for vector in ([3.0, 0.0, 0.0], [0.5, 0.5, 0.0]))
    shown(metric, {"values": predicted}, of_values(true))
    assert metric.compute()["mErr"] == pytest.approx(45, abs=1e-6)


# ---------------------------------------------------------------- real-valued maps


def test_errors_of_scaled_maps_by_hand() -> None:
    metric = metric_of("principal_curvature")
    predicted, true = torch.tensor([[[1.0, 5.0]], [[0.0, 5.0]]]), torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]]])
    shown(metric, {"values": predicted}, of_values(true, torch.tensor([[True, False]])))
    assert metric.compute() == {"MSE": (1 + 9) / 2, "L1": (1 + 3) / 2}
    shown(metric, {"values": predicted}, of_values(true))
    assert metric.compute() == {"MSE": (1 + 9 + 1 + 9 + 25 + 25) / 6, "L1": (1 + 3 + 1 + 3 + 5 + 5) / 6}
    assert metric_of("reshading").compute().keys() == {"L1"}


def depth_map(*metres: float) -> Tensor:
    """Scaled as Taskonomy's code does: log(1 + raw) / log(2^16), raw in 1/512 m."""
    return torch.tensor([[[math.log(1 + 512 * m) / math.log(65536) for m in metres]]])


def test_depth_by_hand() -> None:
    metric = metric_of("depth_euclidean")
    predicted, true = depth_map(2.0, 3.0, 4.0, 9.0), depth_map(2.0, 2.0, 5.5, 1.0)
    shown(metric, {"values": predicted}, of_values(true, torch.tensor([[True, True, True, False]])))
    # Off by 0, 1 and 1.5 metres; by factors 1, 1.5 and 1.375.
    assert metric.compute() == {"rmse": pytest.approx(math.sqrt(3.25 / 3), rel=1e-5), "delta1": 1 / 3}
    shown(metric, {"values": depth_map(2.4)}, of_values(depth_map(2.0)))
    assert metric.compute() == {"rmse": pytest.approx(math.sqrt((3.25 + 0.16) / 4), rel=1e-5), "delta1": 2 / 4}


def test_depths_beyond_what_a_label_can_say_are_clamped() -> None:
    metric = metric_of("depth_zbuffer")
    shown(metric, {"values": torch.tensor([[[-3.0, 7.0]]])}, of_values(depth_map(1 / 512, 65534 / 512)))
    assert metric.compute() == {"rmse": pytest.approx(0, abs=1e-3), "delta1": 1}


@pytest.mark.parametrize("scale", [
    Scale((0.0,), (65535.0,), to=(0.0, 1.0), log=True), Scale((10.0, 20.0), (30.0, 60.0)), Scale((0.0,), (255.0,), (0.0, 2.0)),
])  # fmt: skip
def test_raw_numbers_come_back(scale: Scale) -> None:
    raw = torch.tensor([[5.0, 25.0, 70.0], [0.0, 40.0, 90.0]], dtype=torch.float64)
    low, high = (torch.tensor(end, dtype=torch.float64)[:, None] for end in (scale.low, scale.high))
    line: Callable[[Tensor], Tensor] = torch.log1p if scale.log else lambda x: x
    scaled = scale.to[0] + (line(raw) - line(low)) / (line(high) - line(low)) * (scale.to[1] - scale.to[0])
    torch.testing.assert_close(raw_of(scaled, scale), raw, rtol=1e-12, atol=1e-12)


def test_only_depths_have_metres() -> None:
    row = Target("x", "regression", 1, "grey8", "l1", ("rmse",), scale=Scale((0.0,), (255.0,)))
    with pytest.raises(ValueError, match="target x: rmse and delta1 are for depths"):
        RowMetrics(row)


# ---------------------------------------------------------------- segments


def test_pairs_by_hand() -> None:
    metric = metric_of("segment_unsup2d")
    embedding = torch.tensor([[[0.0, 1.0, 9.0, 9.5]]])
    shown(metric, {"embedding": embedding}, {"labels": torch.tensor([[4, 4, 7, 4]])})
    # In one segment: (0, 1) called so; (0, 3) and (1, 3) not. Others: (0, 2), (1, 2) called so; (2, 3) not.
    assert metric.compute() == {"pair_acc": pytest.approx((1 / 3 + 2 / 3) / 2)}
    shown(metric, {"embedding": embedding}, {"labels": torch.tensor([[4, 4, -1, -1]])})
    assert metric.compute() == {"pair_acc": pytest.approx((2 / 4 + 2 / 3) / 2)}  # pairs are pooled, not images' means


def test_pairs_of_one_kind_only_say_nothing() -> None:
    metric = metric_of("segment_unsup25d")
    shown(metric, {"embedding": torch.zeros(2, 2, 2)}, {"labels": torch.zeros(2, 2, dtype=torch.int64)})
    assert math.isnan(metric.compute()["pair_acc"])


def test_the_border_between_same_and_different() -> None:
    border = math.sqrt(math.log(3))  # 2 / (1 + exp(d^2)) = 1/2
    for distance, called in ((border - 1e-6, 1), (border + 1e-6, 0)):
        metric = metric_of("segment_unsup2d")
        embedding = torch.tensor([[[0.0, distance]]], dtype=torch.float64)
        shown(metric, {"embedding": embedding}, {"labels": torch.tensor([[3, 3]])})
        part = metric.parts["PairAccuracy"]  # type: ignore[attr-defined]
        assert part.counts.tolist() == [[1, called], [0, 0]]


def test_cells_meet_the_pixel_under_their_centre() -> None:
    """Cells of 4 pixels on a canvas of 8 x 16, of which the left 12 columns show an image stored at half that size."""
    metric = metric_of("segment_unsup2d")
    embedding = torch.tensor([[[0.0, 5.0, 0.0, 100.0], [5.0, 0.0, 5.0, 100.0]]])
    labels = torch.full((4, 6), -1)
    labels[1::2, 1::2] = torch.tensor([[0, 1, 0], [1, 0, 1]])  # centres 2, 6, 10 of the canvas are pixels 1, 3, 5
    shown(metric, {"embedding": embedding}, {"labels": labels}, canvas=(8, 16), window=(0, 0, 8, 12))
    assert metric.parts["PairAccuracy"].counts.tolist() == [[6, 6], [9, 9]]  # type: ignore[attr-defined]
    whole = metric_of("segment_unsup2d")  # without a window the label lies on the canvas, 2 x 4 cells of one pixel
    shown(whole, {"embedding": embedding}, {"labels": torch.tensor([[0, 1, 0, 2], [1, 0, 1, 2]])})
    assert whole.parts["PairAccuracy"].counts.tolist() == [[7, 7], [21, 21]]  # type: ignore[attr-defined]


def test_of_many_cells_300_evenly_spread_ones_count() -> None:
    metric = metric_of("segment_unsup2d")
    ids = torch.arange(900).reshape(30, 30)
    shown(metric, {"embedding": torch.zeros(1, 30, 30)}, {"labels": ids // 3})  # every third cell: all ids differ
    shown(metric, {"embedding": torch.zeros(1, 30, 30)}, {"labels": ids // 6})  # ids of two chosen cells each
    part = metric.parts["PairAccuracy"]  # type: ignore[attr-defined]
    assert part.counts.tolist() == [[150, 150], [2 * 300 * 299 // 2 - 150, 0]]
