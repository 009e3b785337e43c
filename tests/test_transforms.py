"""Transforms: boxes and masks follow the pixels, randomness is the seed's alone, evaluation is exact geometry."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modsquad_ds.data.collate import Pixels, Ready
from modsquad_ds.data.decode import Decoded, DetectionLabel
from modsquad_ds.data.finish import finished_images
from modsquad_ds.data.transforms import (
    TRANSFORMS,
    classification_eval,
    classification_train,
    detection_eval,
    detection_train,
    eval_resize,
    seeded,
    segmentation_eval,
    segmentation_train,
    step_canvas,
)
from modsquad_ds.tasks import KINDS, ClassificationTransform, DetectionTransform, SegmentationTransform

RAW = Pixels(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), patch_size=8)
"""Leaves pixel values as they are."""
IMAGENET = Pixels(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), patch_size=8)


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


KIND_OF = {"label": "classification", "boxes": "detection", "labels": "segmentation"}
"""First target of a sample -> kind of its task."""


def seen(ready: Ready, pixels: Pixels = RAW) -> Tensor:
    """What the model sees of the sample, float32 `[3, h, w]`."""
    rows = TRANSFORMS[KIND_OF[next(iter(ready.target))]]
    return finished_images(rows.collate([ready], ["key"], pixels))[0]


# ---------------------------------------------------------------- seeds


def test_seeded_replays_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draws = []
    for seed in (5, 5, 6):
        with seeded(seed):
            draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_every_kind_has_its_transforms() -> None:
    assert set(TRANSFORMS) == set(KINDS)


# ---------------------------------------------------------------- classification


def test_training_leaves_an_image_of_the_right_size_sharp() -> None:
    image = noise(32, 32)
    spec = ClassificationTransform(image_size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, eval_resize=32)
    expected = (image.float() - torch.tensor(IMAGENET.mean)[:, None, None]) / torch.tensor(IMAGENET.std)[:, None, None]
    ready = classification_train(Decoded(image, 3), spec, IMAGENET, (32, 32))
    torch.testing.assert_close(seen(ready, IMAGENET), expected)
    assert ready.target == {"label": 3} and ready.meta == {}
    torch.testing.assert_close(seen(classification_eval(Decoded(image, 3), spec, IMAGENET), IMAGENET), expected)


def test_flip_mirrors_the_image() -> None:
    image = noise(32, 32)
    spec = ClassificationTransform(image_size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0)
    assert torch.equal(classification_train(Decoded(image, 0), spec, RAW, (32, 32)).image, image.flip(-1))


def test_crop_covers_the_share_that_the_recipe_says() -> None:
    # The value of a pixel of the left to right ramp tells where it came from.
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200)
    spec = ClassificationTransform(image_size=64, scale=(0.25, 0.25), ratio=(1.0, 1.0), flip=0.0)
    lefts = set()
    for seed in range(8):
        with seeded(seed):
            image = seen(classification_train(Decoded(ramp, 0), spec, RAW, (64, 64)))
        assert image.shape == (3, 64, 64)
        spread = (image[0, 32, 60] - image[0, 32, 4]).item()
        assert spread == pytest.approx(100 * 56 / 64, abs=2)
        lefts.add(image[0, 32, 0].item())
    assert len(lefts) > 4


@pytest.mark.parametrize("changes", [{"rand_augment_ops": 2}, {"erasing": 1.0}])
def test_augmentations_change_the_image_and_follow_the_seed(changes: dict[str, Any]) -> None:
    plain = ClassificationTransform(image_size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    spec = plain.model_copy(update=changes)
    sample = Decoded(noise(32, 32), 0)
    plain_image = seen(classification_train(sample, plain, IMAGENET, (32, 32)))
    images = []
    for seed in (0, 0, 1, 2, 3):
        with seeded(seed):
            images.append(seen(classification_train(sample, spec, IMAGENET, (32, 32))))
    assert torch.equal(images[0], images[1])
    assert sum(not torch.equal(image, plain_image) for image in images) >= 4
    assert not torch.equal(images[1], images[2])


def test_erasing_fills_a_rectangle_with_noise() -> None:
    spec = ClassificationTransform(image_size=64, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, erasing=1.0)
    with seeded(3):
        image = seen(classification_train(Decoded(torch.zeros(3, 64, 64, dtype=torch.uint8), 0), spec, RAW, (64, 64)))
    rows, columns = image[0].nonzero().unbind(1)
    height, width = (rows.max() - rows.min() + 1).item(), (columns.max() - columns.min() + 1).item()
    assert len(rows) == height * width and 0.015 < len(rows) / 64**2 < 0.35


@pytest.mark.parametrize(("height", "width"), [(100, 50), (50, 100), (64, 64), (7, 33)])
def test_classification_eval_shows_the_centre(height: int, width: int) -> None:
    ramp = torch.arange(width, dtype=torch.uint8).expand(3, height, width)
    spec = ClassificationTransform(image_size=48, eval_resize=64)
    ready = classification_eval(Decoded(ramp, 1), spec, RAW)
    assert ready.image.shape == (3, 48, 48)
    assert ready.meta == {"valid": True, "size": (height, width)}
    middle = ready.image.float()[0, 24, 23:25].mean().item()
    assert middle == pytest.approx((width - 1) / 2, abs=0.02 * width + 0.5)
    assert eval_resize(ClassificationTransform(image_size=224)) == 256


# ---------------------------------------------------------------- detection


def scene(height: int, width: int, rectangles: list[tuple[int, int, int, int]], crowd: int = 0) -> Decoded:
    """Black image with one white rectangle per box; the last `crowd` boxes are crowds. Channel i shows box i."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for index, (left, top, right, bottom) in enumerate(rectangles):
        image[index, top:bottom, left:right] = 255
    boxes = torch.tensor(rectangles, dtype=torch.float32).reshape(-1, 4)
    objects = len(rectangles) - crowd
    label = DetectionLabel(boxes[:objects], torch.arange(objects), boxes[objects:], {"image_id": 1})
    return Decoded(image, label)


def extent(channel: Tensor) -> list[float]:
    """x1, y1, x2, y2 of the bright rectangle, to a fraction of a pixel: the blurred border counts by its brightness."""
    weights = (channel / 255).clamp(0, 1)
    rows, columns = weights.amax(1), weights.amax(0)

    def bounds(profile: Tensor) -> tuple[float, float]:
        inside = profile.nonzero()[:, 0]
        first, last = int(inside[0]), int(inside[-1])
        middle = (first + last) // 2
        return middle - profile[first:middle].sum().item(), middle + profile[middle : last + 1].sum().item()

    (top, bottom), (left, right) = bounds(rows), bounds(columns)
    return [left, top, right, bottom]


@pytest.mark.parametrize("seed", range(12))
def test_boxes_follow_the_pixels_in_training(seed: int) -> None:
    spec = DetectionTransform(scale=(0.5, 1.0), flip=0.5)
    sample = scene(90, 120, [(10, 20, 50, 60), (70, 30, 110, 85), (0, 0, 120, 12)], crowd=1)
    with seeded(seed):
        ready = detection_train(sample, spec, RAW, (128, 192))
    assert ready.image.shape == (3, 128, 192) and ready.target["labels"].tolist() == [0, 1]
    boxes = [*ready.target["boxes"].tolist(), *ready.target["ignore"].tolist()]
    for channel, box in zip(seen(ready), boxes, strict=True):
        assert extent(channel) == pytest.approx(box, abs=0.6)


def test_scale_place_and_flip_vary_and_stay_on_the_canvas() -> None:
    spec = DetectionTransform(scale=(0.5, 1.0), flip=0.5)
    sample = scene(100, 100, [(0, 0, 100, 100), (0, 0, 30, 100)])
    sides, places, flips = set(), set(), 0
    for seed in range(40):
        with seeded(seed):
            boxes = detection_train(sample, spec, RAW, (160, 160)).target["boxes"]
        x1, y1, x2, y2 = boxes[0].tolist()
        assert min(x1, y1) >= 0 and max(x2, y2) <= 160 and 79 <= x2 - x1 <= 160
        sides.add(round(x2 - x1))
        places.add((round(x1), round(y1)))
        flips += boxes[1, 0].item() > x1 + 1
    assert len(sides) > 20 and len(places) > 20 and 10 <= flips <= 30


def test_scales_above_one_crop_and_drop_what_is_gone() -> None:
    spec = DetectionTransform(scale=(4.0, 4.0), flip=0.0)
    sample = scene(64, 64, [(0, 0, 16, 16), (24, 24, 40, 40), (48, 48, 64, 64)])
    kept = set()
    for seed in range(20):
        with seeded(seed):
            ready = detection_train(sample, spec, RAW, (64, 64))
        boxes, labels = ready.target["boxes"], ready.target["labels"].tolist()
        kept.add(tuple(labels))
        for box, label in zip(boxes.tolist(), labels, strict=True):
            assert min(box) >= 0 and max(box) <= 64
            # Enlarged 4 times a border is a ramp of 4 px; of a box narrower than that no pixel is fully bright.
            if min(box[2] - box[0], box[3] - box[1]) > 4:
                assert extent(seen(ready)[label]) == pytest.approx(box, abs=1)
        for label in set(range(3)) - set(labels):
            bright = ready.image[label] > 128
            assert min(bright.any(0).sum(), bright.any(1).sum()) <= 1
    assert len(kept) > 2


def test_boxes_are_clipped_to_the_image_and_slivers_dropped() -> None:
    image = noise(50, 50)
    boxes = torch.tensor([[-10.0, -5.0, 20.0, 60.0], [49.5, 0.0, 70.0, 20.0], [10.0, 10.0, 10.9, 40.0]])
    label = DetectionLabel(boxes, torch.tensor([4, 5, 6]), torch.tensor([[40.0, 40.0, 99.0, 99.0]]), {})
    ready = detection_eval(Decoded(image, label), DetectionTransform(eval_canvas=(64, 64)), RAW)
    # 50 px become 64: the second box keeps 0.64 px of width, the third 1.15 px.
    assert ready.target["labels"].tolist() == [4, 6]
    torch.testing.assert_close(ready.target["boxes"][0], torch.tensor([0.0, 0.0, 25.6, 64.0]))
    torch.testing.assert_close(ready.target["ignore"], torch.tensor([[51.2, 51.2, 64.0, 64.0]]))


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (33, 47), (400, 300)])
def test_detection_eval_fits_the_canvas_at_its_corner(height: int, width: int) -> None:
    spec = DetectionTransform(eval_canvas=(128, 192))
    sample = scene(height, width, [(5, 6, 20, 25)])
    ready = detection_eval(Decoded(sample.image | 1, sample.label), spec, IMAGENET)
    content = ready.meta["content"]
    scale = min(128 / min(height, width), 192 / max(height, width))
    assert content == (round(height * scale), round(width * scale))
    assert ready.meta["size"] == (height, width) and ready.meta["valid"] is True
    assert ready.meta["annotations"] == {"image_id": 1}
    image = seen(ready, IMAGENET)
    assert (image[:, : content[0], : content[1]] != 0).all()
    assert (image[:, content[0] :] == 0).all() and (image[:, :, content[1] :] == 0).all()
    x, y = content[1] / width, content[0] / height
    torch.testing.assert_close(ready.target["boxes"], torch.tensor([[5 * x, 6 * y, 20 * x, 25 * y]]))


def test_image_without_boxes_passes() -> None:
    ready = detection_train(scene(40, 40, []), DetectionTransform(), RAW, (64, 64))
    assert ready.target["boxes"].shape == (0, 4) and ready.target["ignore"].shape == (0, 4)


def test_padding_is_the_mean_colour() -> None:
    ready = detection_train(Decoded(noise(20, 64), scene(20, 64, []).label), DetectionTransform(), IMAGENET, (64, 64))
    assert (seen(ready, IMAGENET) == 0).all(0).sum() >= 44 * 64


def test_canvas_of_a_step_is_drawn_once_for_all() -> None:
    spec = DetectionTransform(canvases=((32, 32), (32, 64), (64, 64)))
    drawn = [step_canvas(spec, 0, "boxes", step) for step in range(300)]
    assert drawn == [step_canvas(spec, 0, "boxes", step) for step in range(300)]
    assert all(drawn.count(canvas) > 60 for canvas in spec.canvases)
    assert drawn != [step_canvas(spec, 1, "boxes", step) for step in range(300)]


# ---------------------------------------------------------------- segmentation


def painted(height: int, width: int, classes: int) -> Decoded:
    """Blocks of 12 pixels; a pixel's grey is 40 times its class."""
    rows, columns = torch.meshgrid(torch.arange(height) // 12, torch.arange(width) // 12, indexing="ij")
    mask = ((rows * 2 + columns) % classes).to(torch.uint8)
    return Decoded((mask * 40).expand(3, height, width).contiguous(), mask)


def agreement(image: Tensor, mask: Tensor) -> float:
    """Share of labelled pixels whose grey is that of their class; borders are blurred."""
    labelled = mask != 255
    return ((image[0][labelled] - mask[labelled].float() * 40).abs() < 20).float().mean().item()


@pytest.mark.parametrize("seed", range(8))
def test_masks_follow_the_pixels_in_training(seed: int) -> None:
    spec = SegmentationTransform(crop=(64, 96), resize=(96, 200), ratio=(0.5, 2.0), photometric=False)
    with seeded(seed):
        ready = segmentation_train(painted(100, 150, 5), spec, RAW, (64, 96))
    mask = ready.target["labels"]
    assert ready.image.shape == (3, 64, 96) and mask.shape == (64, 96) and mask.dtype == torch.uint8
    assert agreement(seen(ready), mask) > 0.8
    assert (seen(ready)[:, mask == 255] == 0).all()


def test_mask_is_not_shifted_against_the_image() -> None:
    # Enlarged 4 times, the border between two classes must lie at the same pixel in both.
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[:, 8:] = 1
    sample = Decoded((mask * 200).expand(3, 16, 16).contiguous(), mask)
    spec = SegmentationTransform(crop=(64, 64), resize=(64, 64), ratio=(1.0, 1.0), flip=0.0, photometric=False)
    ready = segmentation_train(sample, spec, RAW, (64, 64))
    assert torch.equal(ready.image[0] > 100, ready.target["labels"] == 1)
    small = Decoded(torch.zeros(3, 5, 5, dtype=torch.uint8), (torch.arange(25).reshape(5, 5)).to(torch.uint8))
    spec = spec.model_copy(update={"resize": (3, 3), "crop": (3, 3)})
    # Cell centres 0.5, 1.5, 2.5 of 3 lie at 0.83, 2.5, 4.17 of 5: rows and columns 0, 2, 4.
    expected = torch.tensor([[0, 2, 4], [10, 12, 14], [20, 22, 24]], dtype=torch.uint8)
    assert torch.equal(segmentation_train(small, spec, RAW, (3, 3)).target["labels"], expected)


def test_small_images_are_padded_with_ignored_pixels() -> None:
    spec = SegmentationTransform(crop=(64, 64), resize=(32, 48), ratio=(1.0, 1.0), flip=0.0, photometric=False)
    ready = segmentation_train(Decoded(noise(32, 48) | 1, painted(32, 48, 3).label), spec, IMAGENET, (64, 64))
    mask = ready.target["labels"]
    assert (mask[32:] == 255).all() and (mask[:, 48:] == 255).all() and (mask[:32, :48] != 255).all()
    image = seen(ready, IMAGENET)
    assert (image[:, mask == 255] == 0).all() and (image[:, :32, :48] != 0).any(0).all()


def test_crops_of_one_class_are_drawn_again() -> None:
    # 90 % of the image is class 0: crops with less than three quarters of it are found all the same.
    mask = torch.zeros(64, 640, dtype=torch.uint8)
    mask[:, 576:] = 1
    sample = Decoded(torch.zeros(3, 64, 640, dtype=torch.uint8), mask)

    def mixed_crops(share: float) -> int:
        changes = {"resize": (64, 640), "ratio": (1.0, 1.0), "photometric": False, "max_class_share": share}
        spec = SegmentationTransform(crop=(64, 64)).model_copy(update=changes)
        found = 0
        for seed in range(60):
            with seeded(seed):
                labels = segmentation_train(sample, spec, RAW, (64, 64)).target["labels"]
            found += 0.25 <= (labels == 1).float().mean().item() <= 0.75
        return found

    # One draw succeeds with probability 33 / 577 = 0.057, one of eleven with 0.48.
    assert mixed_crops(1.0) <= 10
    assert 18 <= mixed_crops(0.75) <= 40


def test_ignored_pixels_do_not_count_as_a_class() -> None:
    mask = torch.full((64, 64), 255, dtype=torch.uint8)
    mask[:2, :2] = torch.tensor([[0, 1], [1, 0]])
    spec = SegmentationTransform(crop=(64, 64), resize=(64, 64), ratio=(1.0, 1.0), flip=0.0, photometric=False)
    ready = segmentation_train(Decoded(noise(64, 64), mask), spec, RAW, (64, 64))
    assert torch.equal(ready.target["labels"], mask)


def test_photometric_changes_colours_but_never_swaps_channels() -> None:
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[0], image[1], image[2] = 200, 100, 20
    sample = Decoded(image, torch.zeros(64, 64, dtype=torch.uint8))
    spec = SegmentationTransform(crop=(64, 64), resize=(64, 64), ratio=(1.0, 1.0), flip=0.0)
    results = set()
    for seed in range(20):
        with seeded(seed):
            colour = segmentation_train(sample, spec, RAW, (64, 64)).image[:, 0, 0]
        assert colour[0] > colour[1] > colour[2]
        results.add(tuple(colour.tolist()))
    assert len(results) > 10


def test_segmentation_eval_pads_to_patches_and_keeps_the_label() -> None:
    sample = painted(50, 90, 4)
    spec = SegmentationTransform(resize=(100, 150))
    ready = segmentation_eval(sample, spec, RAW)
    # 150 / 90 is the smaller scale: 83 x 150, padded to 88 x 152.
    assert ready.meta["content"] == (83, 150) and ready.image.shape == (3, 88, 152)
    assert torch.equal(ready.meta["label"], sample.label) and ready.meta["size"] == (50, 90)
    mask = ready.target["labels"]
    assert (mask[83:] == 255).all() and (mask[:, 150:] == 255).all()
    assert agreement(seen(ready), mask) > 0.9


def test_segmentation_eval_batch_is_padded_to_its_largest() -> None:
    spec = SegmentationTransform(resize=(64, 128))
    samples = [segmentation_eval(painted(height, width, 3), spec, RAW) for height, width in ((40, 60), (60, 40))]
    batch = TRANSFORMS["segmentation"].collate(samples, ["a", "b"], IMAGENET)
    assert batch.images_BCHW.shape == (2, 3, 96, 96) and batch.targets["labels"].shape == (2, 96, 96)
    assert batch.targets["labels"].dtype == torch.int64 and batch.keys == ("a", "b")
    images = finished_images(batch)
    assert torch.equal(images[0, :, :64], seen(samples[0], IMAGENET))
    assert (images[0, :, 64:] == 0).all() and (images[1, :, :, 64:] == 0).all()
    assert (batch.targets["labels"][0, 64:] == 255).all()
