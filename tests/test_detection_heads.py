"""The two detectors: assignment against loops, losses by hand and against torchvision, what they learn and predict."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead as TorchvisionHead
from torchvision.ops import box_iou

from modsquad_ds.model.heads import Head, build_head
from modsquad_ds.model.heads.anchor_free import CENTRE_RADIUS, Cells, assign, cells
from modsquad_ds.model.heads.detection import CANDIDATES_PER_LEVEL, detections, flatten_levels, pad_truth
from modsquad_ds.model.heads.retinanet import anchor_generator, match
from modsquad_ds.tasks import AnchorFreeHead, DetectionTask, RetinaNetHead

LN2 = math.log(2.0)


def built(head: str, dim: int = 16, classes: int = 2, **spec: Any) -> Head:
    """A seeded detector on maps of patches of 8 pixels."""
    tree = {"kind": "detection", "data": "unused", "num_classes": classes, "batch_size": 1}
    task = DetectionTask.model_validate(tree | {"head": {"type": head, "channels": 16, "convs": 1} | spec})
    torch.manual_seed(0)
    return build_head(task, dim, 8)


def targets(*images: tuple[list[list[float]], list[int]], ignore: list[list[float]] | None = None) -> dict[str, Any]:
    """Boxes and labels of each image; `ignore` are the crowd boxes of each."""
    return {
        "boxes": [torch.tensor(boxes).reshape(-1, 4) for boxes, _ in images],
        "labels": [torch.tensor(labels, dtype=torch.int64) for _, labels in images],
        "ignore": [torch.tensor(ignore or []).reshape(-1, 4) for _ in images],
    }


def meta(size: tuple[int, int], content: tuple[int, int] | None = None) -> dict[str, Any]:
    return {"valid": True, "size": size, "content": content or size}


# ---------------------------------------------------------------- anchor-free: assignment


def slow_assign(places: Cells, strides: list[int], boxes: Tensor, ignore: Tensor) -> list[tuple[int, bool]]:
    """For every cell the index of its box (-1: none) and whether it counts; the rules one by one."""
    out = []
    for (x, y), stride in zip(places.centres_M2.tolist(), places.strides_M.tolist(), strict=True):
        level = strides.index(int(stride))
        low = 0 if level == 0 else 8 * strides[level - 1]
        high = math.inf if level == len(strides) - 1 else 8 * stride
        best, best_area, in_real = -1, math.inf, False
        for index, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            if not (x1 < x < x2 and y1 < y < y2):
                continue
            in_real = True
            near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < CENTRE_RADIUS * stride
            if near and low < max(x - x1, y - y1, x2 - x, y2 - y) <= high and (x2 - x1) * (y2 - y1) < best_area:
                best, best_area = index, (x2 - x1) * (y2 - y1)
        in_crowd = any(x1 < x < x2 and y1 < y < y2 for x1, y1, x2, y2 in ignore.tolist())
        out.append((best, in_real or not in_crowd))
    return out


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """Boxes with quarter-pixel corners on a canvas of 96 x 160, exact in float32."""
    corner = torch.randint(0, 4 * 90, (count, 2), generator=generator) / 4
    sides = torch.randint(4, 4 * 80, (count, 2), generator=generator) / 4
    return torch.cat([corner, corner + sides], dim=1)


@pytest.mark.parametrize("strides", [[4], [4, 8, 16], [8, 32]])
def test_assignment_equals_the_rules_in_a_loop(strides: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(strides))
    counts, crowds = (0, 1, 12, 40), (1, 2, 0, 1)
    batch = {
        "boxes": [random_boxes(n, generator) for n in counts],
        "labels": [torch.zeros(n, dtype=torch.int64) for n in counts],
        "ignore": [random_boxes(n, generator) for n in crowds],
    }
    places = cells([(-(-96 // s), -(-160 // s)) for s in strides], strides, torch.device("cpu"))
    found = assign(places, pad_truth(batch, torch.device("cpu")))
    seen = set()
    for image, (boxes, ignore) in enumerate(zip(batch["boxes"], batch["ignore"], strict=True)):
        expected = slow_assign(places, strides, boxes, ignore)
        box = torch.where(found.positive_BM[image], found.box_BM[image], -1)
        assert list(zip(box.tolist(), found.counted_BM[image].tolist(), strict=True)) == expected
        seen |= {(index >= 0, counted) for index, counted in expected}
    assert seen == {(True, True), (False, True), (False, False)}


def test_cells_are_centred_and_levels_share_out_the_sizes() -> None:
    places = cells([(1, 2), (1, 1)], [8, 16], torch.device("cpu"))
    assert places.centres_M2.tolist() == [[4, 4], [12, 4], [8, 8]]
    assert places.strides_M.tolist() == [8, 8, 16]
    assert places.reach_M2.tolist() == [[0, 64], [0, 64], [64, math.inf]]


# ---------------------------------------------------------------- anchor-free: losses


def two_cells(logits: Tensor, exponents: Tensor) -> dict[str, Any]:
    """Outputs of one level of stride 4 on a canvas of 4 x 8 pixels: cells around (2, 2) and (6, 2)."""
    return {"logits": [logits.reshape(1, 2, 1, 2)], "exponents": [exponents.reshape(1, 4, 1, 2)]}


def test_focal_and_giou_by_hand() -> None:
    head = built("anchor_free", strides=[4])
    batch = targets(([[0.0, 0.0, 4.0, 4.0]], [1]))
    # The left cell predicts the box (-2, 1, 3, 3): 4, 1, 1 and 1 pixels from its centre.
    exponents = torch.zeros(4, 2)
    exponents[1:, 0] = math.log(0.25)
    terms = head.losses(two_cells(torch.zeros(2, 2), exponents), batch)
    # Scores 1/2: the positive entry weighs 1/4, three negative ones 3/4 each, all times (1/2)^2 ln 2.
    assert terms["focal"].sum.item() == pytest.approx(2.5 * 0.25 * LN2, rel=1e-6)
    # Intersection 6, union 10 + 16 - 6 = 20, hull 24: GIoU = 6/20 - 4/24.
    assert terms["giou"].sum.item() == pytest.approx(1 - (6 / 20 - 4 / 24), rel=1e-5)
    assert terms["focal"].count.item() == terms["giou"].count.item() == 1
    assert (terms["focal"].weight, terms["giou"].weight) == (1.0, 1.0)
    assert built("anchor_free", strides=[4], box_weight=2.0).losses(
        two_cells(torch.zeros(2, 2), exponents), batch
    )["giou"].weight == 2.0  # fmt: skip


def test_focal_of_confident_scores_by_hand() -> None:
    head = built("anchor_free", strides=[4])
    logits = torch.full((2, 2), -30.0)  # every score about 0
    logits[1, 0] = math.log(3.0)  # but the left cell's second class 3/4
    terms = head.losses(two_cells(logits, torch.zeros(4, 2)), targets(([[0.0, 0.0, 4.0, 4.0]], [1])))
    assert terms["focal"].sum.item() == pytest.approx(0.25 * (1 / 4) ** 2 * math.log(4 / 3), rel=1e-5)
    wrong = head.losses(two_cells(logits, torch.zeros(4, 2)), targets(([[0.0, 0.0, 4.0, 4.0]], [0])))
    # Class 0 is missed with a loss of 30 / 4, class 1 claimed: 3/4 (3/4)^2 ln 4.
    assert wrong["focal"].sum.item() == pytest.approx(30 / 4 + 0.75 * 0.75**2 * math.log(4), rel=1e-5)


def test_a_cell_in_a_crowd_and_in_no_box_is_left_out() -> None:
    head = built("anchor_free", strides=[4])
    outputs = two_cells(torch.zeros(2, 2), torch.zeros(4, 2))
    batch = targets(([[0.0, 0.0, 4.0, 4.0]], [1]), ignore=[[0.0, 0.0, 8.0, 4.0]])
    terms = head.losses(outputs, batch)
    # Only the left cell counts, as it lies in a real box: one positive, one negative entry.
    assert terms["focal"].sum.item() == pytest.approx(1.0 * 0.25 * LN2, rel=1e-6)
    assert terms["focal"].count.item() == 1


def test_absurd_exponents_stay_finite() -> None:
    head = built("anchor_free", strides=[4])
    exponents = torch.full((4, 2), 1e4, requires_grad=True)
    terms = head.losses(two_cells(torch.zeros(2, 2), exponents), targets(([[0.0, 0.0, 4.0, 4.0]], [1])))
    terms["giou"].sum.backward()
    assert terms["giou"].sum.isfinite() and exponents.grad is not None and exponents.grad.isfinite().all()


def test_scores_start_at_the_prior() -> None:
    for name in ("anchor_free", "retinanet"):
        logits = flatten_levels(built(name, strides=[8])(torch.zeros(1, 16, 4, 4))["logits"], 2)
        torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.01), rtol=0.05, atol=0)


def test_anchor_free_head_learns_boxes_and_finds_them_again() -> None:
    head = built("anchor_free", dim=32, classes=3, channels=32, strides=[4])
    maps = torch.randn(3, 32, 6, 6, generator=torch.Generator().manual_seed(3))
    truth = targets(
        ([[4.0, 6.0, 22.0, 24.0], [26.0, 20.0, 46.0, 44.0]], [0, 2]), ([[10.0, 12.0, 30.0, 40.0]], [1]), ([], [])
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    history = []
    for _ in range(120):
        terms = head.losses(head(maps), truth)
        loss = torch.stack([t.weight * t.sum / t.count.clamp(min=1) for t in terms.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.1 * history[0]
    head.eval()
    for image, found in enumerate(head.predict(head(maps), [meta((48, 48))] * 3)):
        sure = found["scores"] > 0.5
        assert sure.sum() == len(truth["boxes"][image])
        if sure.any():
            best = box_iou(truth["boxes"][image], found["boxes"][sure]).max(dim=1)
            assert (best.values > 0.8).all()
            assert torch.equal(found["labels"][sure][best.indices], truth["labels"][image])


# ---------------------------------------------------------------- predictions of both


def test_boxes_come_back_in_original_pixels_clipped_to_the_image() -> None:
    head = built("anchor_free", strides=[4])
    logits = torch.full((2, 2, 4), -20.0)
    logits[1, 0, 1] = math.log(3.0)
    outputs = {"logits": [logits[None]], "exponents": [torch.zeros(1, 4, 2, 4)]}  # canvas 8 x 16
    # On the canvas the box is (2, -2, 10, 6). The image is 6 x 8 pixels of it and was 12 x 32.
    found = head.predict(outputs, [meta((12, 32), content=(6, 8))])[0]
    assert found["boxes"].tolist() == [[8.0, 0.0, 32.0, 12.0]]
    assert found["labels"].tolist() == [1]
    assert found["scores"].tolist() == pytest.approx([0.75])


def test_suppression_is_per_class_and_keeps_the_best() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [40, 40, 60, 60]])
    scores = torch.tensor([[0.9, 0.2], [0.8, 0.7], [0.6, 0.01], [0.5, 0.01]])
    logits = scores.logit()
    spec = AnchorFreeHead(nms_threshold=0.5, score_threshold=0.05, max_detections=3)
    # The last box lies in the padding: nothing of it is left.
    found = detections(logits[None], boxes[None], [3, 1], [meta((35, 35))], spec)[0]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert found["labels"].tolist() == [0, 1, 0]
    assert found["boxes"].tolist() == boxes[[0, 1, 2]].tolist()
    fewer = detections(
        logits[None], boxes[None], [3, 1], [meta((35, 35))], spec.model_copy(update={"max_detections": 1})
    )
    assert fewer[0]["scores"].tolist() == pytest.approx([0.9])


def test_no_detection_is_an_empty_one() -> None:
    for name in ("anchor_free", "retinanet"):
        head = built(name, strides=[8, 16]).eval()
        found = head.predict(head(torch.zeros(2, 16, 4, 4)), [meta((32, 32))] * 2)
        assert [(f["boxes"].shape, f["scores"].shape, f["labels"].dtype) for f in found] == [
            ((0, 4), (0,), torch.int64)
        ] * 2


def test_each_level_hands_on_its_best_candidates_only() -> None:
    many = CANDIDATES_PER_LEVEL + 50
    corner = torch.arange(2 * many, dtype=torch.float32) * 3
    boxes = torch.stack([corner, corner * 0, corner + 2, corner * 0 + 2], dim=1)
    logits = torch.linspace(1, 2, many).repeat(2)[:, None]
    spec = AnchorFreeHead(max_detections=10_000)
    found = detections(logits[None], boxes[None], [many, many], [meta((4, 10_000))], spec)[0]
    assert len(found["scores"]) == 2 * CANDIDATES_PER_LEVEL
    assert found["scores"].min() == logits[50].sigmoid()


# ---------------------------------------------------------------- RetinaNet


def torchvision_model(classes: int, channels: int, spec: RetinaNetHead) -> TorchvisionRetinaNet:
    """torchvision's RetinaNet without a backbone, to compare with."""
    backbone = nn.Identity()
    backbone.out_channels = channels  # type: ignore[assignment]
    return TorchvisionRetinaNet(
        backbone,
        classes,
        anchor_generator=anchor_generator(spec),
        head=TorchvisionHead(channels, 9, classes),
        score_thresh=spec.score_threshold,
        nms_thresh=spec.nms_threshold,
        detections_per_img=spec.max_detections,
    )


def test_anchors_are_nine_sizes_around_every_cell() -> None:
    head = built("retinanet", strides=[8, 16])
    small, large = head._anchors(head(torch.zeros(1, 16, 4, 6)))
    assert small.shape == (4 * 6 * 9, 4) and large.shape == (2 * 3 * 9, 4)
    # Ratio 1, scale 1 is the fourth of a cell: 4 strides wide. The second cell lies one stride to the right.
    assert small[3].tolist() == [-16, -16, 16, 16]
    assert small[9 + 3].tolist() == [-8, -16, 24, 16]
    assert large[3].tolist() == [-32, -32, 32, 32]
    # Ratio 1/2 is wide, ratio 2 high.
    assert small[0].tolist() == [-23, -11, 23, 11]
    assert small[6].tolist() == [-11, -23, 11, 23]


def test_forward_and_loss_equal_torchvisions() -> None:
    head = built("retinanet", classes=3, convs=4, strides=[8, 16])
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)  # the initial weights hardly let the input through
    twin = torchvision_model(3, 16, head.spec)
    ours, theirs = head.state_dict(), twin.head.state_dict()
    for part, tower, last in (
        ("classification_head", "class_tower", "class_logits"),
        ("regression_head", "box_tower", "box_deltas"),
    ):
        name = {"class_logits": "cls_logits", "box_deltas": "bbox_reg"}[last]
        for kind in ("weight", "bias"):
            for layer in range(4):
                theirs[f"{part}.conv.{layer}.0.{kind}"] = ours[f"{tower}.{2 * layer}.{kind}"]
            theirs[f"{part}.{name}.{kind}"] = ours[f"{last}.{kind}"]
    twin.head.load_state_dict(theirs)
    maps = torch.randn(1, 16, 8, 12)
    outputs = head(maps)
    expected = twin.head(head.pyramid(maps))
    assert expected["cls_logits"].std() > 0.1 and expected["bbox_regression"].std() > 0.1
    torch.testing.assert_close(flatten_levels(outputs["logits"], 3), expected["cls_logits"])
    torch.testing.assert_close(flatten_levels(outputs["deltas"], 4), expected["bbox_regression"])

    # One image: torchvision averages over images of per-image means, so only here do the normalisers agree.
    truth = targets(([[5.0, 8.0, 40.0, 50.0], [50.0, 10.0, 90.0, 30.0], [10.0, 10.0, 22.0, 20.0]], [0, 2, 1]))
    anchors = head._anchors(outputs)
    image = {"boxes": truth["boxes"][0], "labels": truth["labels"][0]}
    reference = twin.compute_loss([image], expected, [torch.cat(anchors)])
    terms = head.losses(outputs, truth)
    assert terms["focal"].count.item() > 3
    torch.testing.assert_close(terms["focal"].sum / terms["focal"].count, reference["classification"])
    torch.testing.assert_close(terms["l1"].sum / terms["l1"].count, reference["bbox_regression"])


def test_predictions_equal_torchvisions() -> None:
    head = built("retinanet", classes=3, strides=[8, 16], max_detections=10_000)
    twin = torchvision_model(3, 16, head.spec)
    generator = torch.Generator().manual_seed(5)
    sizes = [(8, 12), (4, 6)]
    outputs = {
        "logits": [torch.randn(2, 27, *size, generator=generator) * 2 - 4 for size in sizes],
        "deltas": [torch.randn(2, 36, *size, generator=generator) * 0.3 for size in sizes],
    }
    anchors = head._anchors(outputs)
    rows = [len(level) for level in anchors]
    split = {
        "cls_logits": list(flatten_levels(outputs["logits"], 3).split(rows, dim=1)),
        "bbox_regression": list(flatten_levels(outputs["deltas"], 4).split(rows, dim=1)),
    }
    wanted = twin.postprocess_detections(split, [anchors] * 2, [(64, 96)] * 2)
    for found, expected in zip(head.predict(outputs, [meta((64, 96))] * 2), wanted, strict=True):
        # torchvision also returns what is left of boxes outside the image: rectangles without an area.
        real = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(dim=1)
        assert 100 < len(found["scores"]) < len(real)
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(found[name], expected[name][real])


def test_losses_are_counted_by_the_positives_of_all_images() -> None:
    head = built("retinanet", strides=[8])
    truth = targets(([[0.0, 0.0, 32.0, 32.0]], [0]), ([], []))
    maps = torch.randn(2, 16, 4, 4)
    terms = head.losses(head(maps), truth)
    positives = (match(head._anchors(head(maps))[0], truth["boxes"][0], truth["ignore"][0]) >= 0).sum()
    assert terms["focal"].count.item() == terms["l1"].count.item() == positives.item() > 0


def test_an_anchor_on_a_crowd_is_left_out_unless_it_has_a_box() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60], [0, 0, 10, 4]])
    box, crowd, none = (
        torch.tensor([[0.0, 0, 10, 10]]),
        torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]),
        torch.zeros(0, 4),
    )
    assert match(anchors, none, none).tolist() == [-1, -1, -1, -1]
    assert match(anchors, box, none).tolist() == [0, 0, -1, -2]  # IoU 1, 0.91, 0, 0.4
    assert match(anchors, none, crowd).tolist() == [-2, -2, -2, -1]
    assert match(anchors, box, crowd).tolist() == [0, 0, -2, -2]


def test_a_box_without_any_anchor_makes_no_anchor_positive() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    far = torch.tensor([[100.0, 100, 110, 110]])
    assert match(anchors, far, torch.zeros(0, 4)).tolist() == [-1, -1]
    both = torch.tensor(
        [[100.0, 100, 110, 110], [20.0, 0, 24, 10]]
    )  # the second overlaps by 0.4 only, but nothing better does
    assert match(anchors, both, torch.zeros(0, 4)).tolist() == [-1, 1]


def test_l1_by_hand() -> None:
    head = built("retinanet", classes=1, strides=[8])
    outputs = head(torch.zeros(1, 16, 1, 1))
    anchors = torch.cat(head._anchors(outputs))
    # The box is the square anchor (-16, -16, 16, 16) moved right by 4: deltas 4 / 32, 0, 0, 0. Others match it as well.
    truth = targets(([[-12.0, -16.0, 20.0, 16.0]], [0]))
    positive = match(anchors, truth["boxes"][0], truth["ignore"][0]) >= 0
    assert positive.tolist()[3]
    outputs["deltas"] = [torch.zeros(1, 36, 1, 1)]
    expected = 0.0
    for (x1, y1, x2, y2), is_positive in zip(anchors.tolist(), positive.tolist(), strict=True):
        if is_positive:
            width, height = x2 - x1, y2 - y1
            centre = 4 / width
            expected += centre + abs(math.log(32 / width)) + abs(math.log(32 / height))
    term = head.losses(outputs, truth)["l1"]
    assert term.sum.item() == pytest.approx(expected, rel=1e-5)
    assert term.count.item() == positive.sum().item()
