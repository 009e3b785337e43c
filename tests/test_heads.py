"""What all heads promise, and the classifier, the pyramid and the segmentation heads: values worked out by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from modsquad_ds.errors import UserError
from modsquad_ds.model.heads import HEADS, Head, LossTerm, build_head, check_norm
from modsquad_ds.model.heads.pyramid import SimpleFeaturePyramid, halvings, norm_groups
from modsquad_ds.model.heads.segmentation import pixel_loss
from modsquad_ds.tasks import TaskSpec
from set_tasks import Case, targets_of

DIM, PATCH, BATCH = 16, 8, 4
KIND = {"linear": "classification", "anchor_free": "detection", "retinanet": "detection"}
SMALL: dict[str, dict[str, Any]] = {
    "linear": {"label_smoothing": 0.1},
    "anchor_free": {"strides": [4, 8], "channels": 16, "convs": 1},
    "retinanet": {"strides": [8, 16], "channels": 16, "convs": 1},
    "upernet": {"strides": [4, 8, 16], "channels": 16, "pool_scales": [1, 2], "aux_channels": 8, "dropout": 0.0},
    "fcn": {"stride": 4, "channels": 16, "convs": 1, "aux_channels": 8, "dropout": 0.0},
    "pooled": {},
    "patch": {},
    "conv_map": {"stride": 4, "channels": 16, "convs": 2},
}
OF_SETS = {
    "pooled": Case("soft_classification", "cross_entropy", "class_scene"),
    "patch": Case("regression", "l1", "principal_curvature"),
    "conv_map": Case("binary", "balanced", "sal"),
}
ALL = pytest.mark.parametrize("kind_of_head", list(SMALL))


def task(head: str, classes: int = 3, **changes: Any) -> TaskSpec:
    """A task with a small head of that type; one of an image set has its target's classes."""
    if head in OF_SETS:
        return OF_SETS[head].spec(head={"type": head} | SMALL[head] | changes)
    tree = {"kind": KIND.get(head, "segmentation"), "data": "unused", "num_classes": classes, "batch_size": BATCH}
    return TypeAdapter(TaskSpec).validate_python(tree | {"head": {"type": head} | SMALL[head] | changes})


def built(head: str, classes: int = 3, **changes: Any) -> Head:
    """The head with seeded weights."""
    torch.manual_seed(0)
    return build_head(task(head, classes, **changes), DIM, PATCH)


def feature_map(batch: int = BATCH) -> Tensor:
    """Maps of a canvas of 32 x 48 pixels."""
    return torch.randn(batch, DIM, 4, 6, generator=torch.Generator().manual_seed(1))


def some_targets(head: str) -> dict[str, Any]:
    """Targets of BATCH images: unequal numbers of boxes, a crowd, ignored pixels."""
    if head == "linear":
        return {"labels": torch.tensor([0, 2, 1, 1])}
    if head in OF_SETS:
        return targets_of(OF_SETS[head], (32, 48), images=BATCH)
    if KIND.get(head) == "detection":
        boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0], [22.0, 4.0, 46.0, 30.0], [8.0, 8.0, 16.0, 16.0]])
        counts = (3, 0, 1, 2)
        ignore = [torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 24.0, 32.0]]), torch.zeros(0, 4), torch.zeros(0, 4)]
        return {"boxes": [boxes[:n] for n in counts], "labels": [torch.arange(3)[:n] for n in counts], "ignore": ignore}
    labels = torch.randint(3, (BATCH, 32, 48), generator=torch.Generator().manual_seed(2))
    labels[1, :, :10] = 255
    return {"labels": labels}


def nothing_to_learn(head: str) -> dict[str, Any]:
    """Targets without a box, in a crowd, or with every pixel ignored. An image with a task of its own always has a class."""
    if head == "linear":
        return some_targets(head)
    if head in OF_SETS:
        return targets_of(OF_SETS[head], (32, 48), nothing=True, images=BATCH)
    if KIND.get(head) == "detection":
        none = [torch.zeros(0, 4)] * BATCH
        everything = [torch.tensor([[-1.0, -1.0, 100.0, 100.0]])] * BATCH
        return {"boxes": none, "labels": [torch.zeros(0, dtype=torch.int64)] * BATCH, "ignore": everything}
    return {"labels": torch.full((BATCH, 32, 48), 255)}


def value(term: LossTerm) -> Tensor:
    """The term's value on one rank."""
    return term.weight * term.sum / term.count.clamp(min=1)


def part(targets: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: of_images[rows] for name, of_images in targets.items()}


def meta(canvas: tuple[int, int] = (32, 48)) -> dict[str, Any]:
    return {"valid": True, "size": canvas, "content": canvas, "window": None}


# ---------------------------------------------------------------- every head


def test_the_table_of_heads_is_complete() -> None:
    assert set(HEADS) == set(SMALL)


@ALL
def test_terms_add_up_over_any_split_of_the_images(kind_of_head: str) -> None:
    head, targets, maps = built(kind_of_head), some_targets(kind_of_head), feature_map()
    whole = head.losses(head(maps), targets)
    first, second = slice(0, 1), slice(1, BATCH)
    parts = [head.losses(head(maps[rows]), part(targets, rows)) for rows in (first, second)]
    assert whole
    for name, term in whole.items():
        assert term.count.item() > 0 and term.weight > 0
        assert (parts[0][name].count + parts[1][name].count).item() == term.count.item()
        torch.testing.assert_close(parts[0][name].sum + parts[1][name].sum, term.sum, rtol=1e-5, atol=1e-4)


@ALL
def test_every_parameter_gets_a_finite_gradient_even_from_nothing(kind_of_head: str) -> None:
    for targets in (some_targets(kind_of_head), nothing_to_learn(kind_of_head)):
        head = built(kind_of_head)
        terms = head.losses(head(feature_map()), targets)
        torch.stack([value(term) for term in terms.values()]).sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind_of_head", ["anchor_free", "upernet", "fcn", *OF_SETS])
def test_nothing_to_learn_is_worth_nothing(kind_of_head: str) -> None:
    head = built(kind_of_head)
    terms = head.losses(head(feature_map()), nothing_to_learn(kind_of_head))
    assert all(term.sum.item() == 0 and term.count.item() == 0 for term in terms.values())
    total = torch.stack([value(term) for term in terms.values()]).sum()
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, list(head.parameters())))


@ALL
def test_bf16_weights_give_float32_losses_close_to_float32_weights(kind_of_head: str) -> None:
    targets = some_targets(kind_of_head)
    exact = built(kind_of_head)
    expected = exact.losses(exact(feature_map()), targets)
    head = built(kind_of_head).bfloat16()
    outputs = head(feature_map().bfloat16())
    terms = head.losses(outputs, targets)
    for name, term in terms.items():
        assert term.sum.dtype == term.count.dtype == torch.float32
        assert term.count.item() == expected[name].count.item()
        torch.testing.assert_close(term.sum, expected[name].sum, rtol=0.03, atol=0.03)
    torch.stack([value(term) for term in terms.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    head.eval()
    assert len(head.predict(head(feature_map().bfloat16()), [meta()] * BATCH)) == BATCH


@ALL
def test_an_image_alone_gives_what_it_gives_in_a_batch(kind_of_head: str) -> None:
    head = built(kind_of_head)
    whole, alone = head(feature_map()), head(feature_map()[2:3])
    for name, outputs in whole.items():
        levels, of_one = (outputs, alone[name]) if isinstance(outputs, list) else ([outputs], [alone[name]])
        for together, single in zip(levels, of_one, strict=True):
            torch.testing.assert_close(together[2:3], single, rtol=1e-4, atol=1e-5)


@ALL
def test_heads_build_without_memory_and_no_name_confuses_deepspeed(kind_of_head: str) -> None:
    with torch.device("meta"):
        head = build_head(task(kind_of_head), DIM, PATCH)
    assert {p.device.type for p in head.parameters()} == {"meta"}
    # DeepSpeed takes every parameter with "expert" in its name for an expert's.
    assert not [name for name, _ in head.named_parameters() if "expert" in name]


@pytest.mark.gpu
@ALL
def test_cuda_gives_what_the_cpu_gives(kind_of_head: str) -> None:
    head, targets = built(kind_of_head), some_targets(kind_of_head)
    expected = head.losses(head(feature_map()), targets)
    head = head.cuda()
    moved = {
        name: [x.cuda() for x in of_images] if isinstance(of_images, list) else of_images.cuda()
        for name, of_images in targets.items()
    }
    for name, term in head.losses(head(feature_map().cuda()), moved).items():
        assert term.sum.is_cuda and term.count.is_cuda
        torch.testing.assert_close(term.sum.cpu(), expected[name].sum, rtol=1e-3, atol=1e-3)
    head.eval()
    for prediction in head.predict(head(feature_map().cuda()), [meta()] * BATCH):
        assert not any(isinstance(x, Tensor) and x.is_cuda for x in prediction.values())


# ---------------------------------------------------------------- classification


def test_cross_entropy_of_labels_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # probabilities 3/4, 1/4 and 1/2, 1/2
    plain = built("linear", 2, label_smoothing=0.0).losses({"logits": logits}, {"labels": torch.tensor([1, 0])})["ce"]
    assert plain.sum.item() == pytest.approx(math.log(4) + math.log(2), rel=1e-6)
    assert plain.count.item() == 2 and plain.weight == 1
    smooth = built("linear", 2, label_smoothing=0.2).losses({"logits": logits}, {"labels": torch.tensor([1, 0])})["ce"]
    # The label's share is 0.9, the other class's 0.1.
    by_hand = 0.9 * math.log(4) + 0.1 * math.log(4 / 3) + math.log(2)
    assert smooth.sum.item() == pytest.approx(by_hand, rel=1e-6)


def test_cross_entropy_of_mixed_labels_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]])
    targets = {"probabilities": torch.tensor([[0.3, 0.7]])}
    plain = built("linear", 2, label_smoothing=0.0).losses({"logits": logits}, targets)["ce"]
    assert plain.sum.item() == pytest.approx(0.3 * math.log(4 / 3) + 0.7 * math.log(4), rel=1e-6)
    smooth = built("linear", 2, label_smoothing=0.2).losses({"logits": logits}, targets)["ce"]
    assert smooth.sum.item() == pytest.approx(0.34 * math.log(4 / 3) + 0.66 * math.log(4), rel=1e-6)


def test_classifier_averages_the_tokens_and_predicts() -> None:
    head = built("linear")
    maps = feature_map()
    torch.testing.assert_close(head(maps)["logits"], head.linear(maps.flatten(2).mean(dim=2)))
    logits = torch.tensor([[0.0, math.log(2.0), 0.0]])
    prediction = head.predict({"logits": logits.bfloat16()}, [meta()])[0]
    assert prediction["label"] == 1
    torch.testing.assert_close(prediction["probabilities"], torch.tensor([0.25, 0.5, 0.25]), rtol=0.01, atol=0)


# ---------------------------------------------------------------- pyramid


def test_pyramid_levels_have_their_strides_and_widths() -> None:
    maps = torch.randn(2, 32, 5, 7)
    plain = SimpleFeaturePyramid(32, 16, (2, 4, 8, 16, 32, 64))
    sizes = [(40, 56), (20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]
    assert [tuple(level.shape) for level in plain(maps)] == [
        (2, width, *size) for width, size in zip((4, 8, 16, 32, 32, 32), sizes, strict=True)
    ]
    assert plain.widths == (4, 8, 16, 32, 32, 32)
    assert torch.equal(plain(maps)[3], maps)
    # The odd border cell is kept: the last cell of the coarser level holds the map's last cell alone.
    assert torch.equal(plain(maps)[4][:, :, -1, -1], maps[:, :, -1, -1])
    projected = SimpleFeaturePyramid(32, 16, (4, 32), channels=24)
    assert [tuple(level.shape) for level in projected(maps)] == [(2, 24, 20, 28), (2, 24, 3, 4)]


@pytest.mark.parametrize(("stride", "steps"), [(16, 0), (8, 1), (4, 2), (2, 3), (1, 4), (32, -1), (128, -3)])
def test_halvings(stride: int, steps: int) -> None:
    assert halvings(16, stride) == steps


@pytest.mark.parametrize("stride", [0, -8, 3, 12, 24, 48])
def test_strides_that_do_not_fit_the_patch_are_refused(stride: int) -> None:
    with pytest.raises(UserError, match=f"stride {stride} does not fit the patch size 16"):
        halvings(16, stride)


@pytest.mark.parametrize("strides", [[], [16, 8], [8, 8]])
def test_strides_must_rise(strides: list[int]) -> None:
    with pytest.raises(UserError, match="rising list"):
        SimpleFeaturePyramid(8, 16, strides)


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (512, 32), (48, 12), (64, 16), (10, 2), (3, 1), (7, 1)])
def test_norm_groups(channels: int, groups: int) -> None:
    assert norm_groups(channels) == groups


# ---------------------------------------------------------------- segmentation


def test_pixel_loss_by_hand() -> None:
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 0, 0, 0] = math.log(3.0)  # left pixel 3/4, 1/4; right pixel 1/2, 1/2
    term = pixel_loss(logits, torch.tensor([[[1, 255]]]), 0.4)
    assert term.sum.item() == pytest.approx(math.log(4), rel=1e-6)
    assert term.count.item() == 1 and term.weight == 0.4
    both = pixel_loss(logits, torch.tensor([[[0, 1]]]), 1.0)
    assert both.sum.item() == pytest.approx(math.log(4 / 3) + math.log(2), rel=1e-6)


@pytest.mark.parametrize("kind_of_head", ["upernet", "fcn"])
def test_segmentation_loss_is_mean_cross_entropy_at_full_size(kind_of_head: str) -> None:
    head, targets = built(kind_of_head), some_targets(kind_of_head)
    outputs = head(feature_map())
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {"logits": (4, 3, 8, 12), "aux": (4, 3, 4, 6)}
    terms = head.losses(outputs, targets)
    assert {name: term.weight for name, term in terms.items()} == {"ce": 1.0, "aux_ce": 0.4}
    for name, term in (("logits", terms["ce"]), ("aux", terms["aux_ce"])):
        full = F.interpolate(outputs[name], size=(32, 48), mode="bilinear", align_corners=False)
        expected = F.cross_entropy(full, targets["labels"], ignore_index=255)
        torch.testing.assert_close(term.sum / term.count, expected)
    assert terms["ce"].count.item() == 4 * 32 * 48 - 32 * 10


@pytest.mark.parametrize("kind_of_head", ["upernet", "fcn"])
def test_auxiliary_head_runs_in_training_only_and_can_be_left_out(kind_of_head: str) -> None:
    head = built(kind_of_head).eval()
    outputs = head(feature_map())
    assert set(outputs) == {"logits"}
    assert set(head.losses(outputs, some_targets(kind_of_head))) == {"ce"}
    without = built(kind_of_head, aux_weight=0.0)
    assert set(without(feature_map())) == {"logits"}
    assert not [name for name, _ in without.named_parameters() if name.startswith("aux")]


def test_mask_is_cropped_to_the_image_and_resized_to_its_original_size() -> None:
    head = built("fcn", 2)
    logits = torch.zeros(1, 2, 4, 6)  # canvas 16 x 24
    logits[0, 1, :2, 2:4] = 9.0  # class 1 in rows 0..8, columns 8..16
    logits[0, 1, :, 4:] = 9.0  # and in the padding
    image = {"valid": True, "content": (8, 16), "size": (16, 32)}
    mask = head.predict({"logits": logits}, [image])[0]["mask"]
    assert mask.shape == (16, 32) and mask.dtype == torch.uint8
    # Content: 8 x 16 pixels, class 1 from about column 8 on; twice that in the original. Bilinear edges blur by a cell.
    assert not mask[:, :11].any()
    assert mask[:10, 19:].all()


def test_a_mask_of_the_canvas_size_is_the_resized_logits() -> None:
    head = built("upernet").eval()
    outputs = head(feature_map())
    full = F.interpolate(outputs["logits"], size=(32, 48), mode="bilinear", align_corners=False)
    masks = head.predict(outputs, [meta()] * BATCH)
    assert torch.equal(torch.stack([p["mask"] for p in masks]), full.argmax(dim=1).to(torch.uint8))


@pytest.mark.parametrize(
    ("norm", "name"), [("group", "GroupNorm"), ("batch", "BatchNorm2d"), ("sync_batch", "SyncBatchNorm")]
)
def test_norms_of_the_decode_heads(norm: str, name: str) -> None:
    head = built("fcn", norm=norm)
    norms = {type(m).__name__ for m in [*head.decode.modules(), *head.aux.modules()] if "Norm" in type(m).__name__}
    assert norms == {name}


def test_norms_that_cannot_work_are_refused() -> None:
    spec = task("upernet", norm="sync_batch")
    with pytest.raises(UserError, match=r"head.norm: sync_batch .* 2 processes on cpu; use norm: group"):
        check_norm(spec, "cpu", 2)
    check_norm(spec, "cpu", 1)
    with pytest.raises(UserError, match=r"head.norm: the running statistics of sync_batch stand still in bf16"):
        check_norm(spec, "cuda", 8, bf16=True)
    check_norm(task("upernet"), "cuda", 8, bf16=True)
    check_norm(spec, "cuda", 8)
    check_norm(task("upernet"), "cpu", 2)
    check_norm(task("linear"), "cpu", 2)
    head = built("upernet", norm="batch")
    with pytest.raises(UserError, match="two images per rank"):
        head(feature_map(1))
    head.eval()(feature_map(1))
    head.train()(feature_map(2))


@pytest.mark.parametrize("classes", [1, 256])
def test_class_counts_that_do_not_fit_a_mask_are_refused(classes: int) -> None:
    with pytest.raises(UserError, match=f"num_classes: {classes} .* expected 2 to 255"):
        built("fcn", classes)


def test_a_segmentation_head_coarser_than_the_map_is_refused() -> None:
    with pytest.raises(UserError, match="stride 16 is coarser than the patch size 8"):
        built("fcn", stride=16)
