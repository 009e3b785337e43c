"""The device's part of the data: bytes become what torchvision's own transforms on real numbers give, sample by sample."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from memory import MemoryStore, assert_equal, classification, plan, tasks
from modsquad_ds.data.collate import Erased, Pixels, Ready, collate_classification, collate_detection, fill
from modsquad_ds.data.decode import decode_sample
from modsquad_ds.data.finish import finished_images, to_device
from modsquad_ds.data.loader import StepDataset
from modsquad_ds.data.transforms import TRANSFORMS, classification_train, detection_train, seeded
from modsquad_ds.data.types import Finish, SubBatch
from modsquad_ds.tasks import DetectionTransform

IMAGENET = Pixels(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), patch_size=8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batch_of(images: Tensor, finish: Finish) -> SubBatch:
    n = len(images)
    return SubBatch(images, {}, ("",) * n, ({},) * n, finish)


def by_hand(sub: SubBatch) -> Tensor:
    """`finished_images`, pixel by pixel in double precision."""
    finish, (images, channels, height, width) = sub.finish, sub.images_BCHW.shape
    noise = iter([] if finish.noise is None else finish.noise.tolist())
    x = torch.zeros(sub.images_BCHW.shape, dtype=torch.float64)

    def lies_in(rectangles: Tensor | None, image: int, row: int, column: int) -> bool:
        if rectangles is None:
            return False
        top, left, bottom, right = rectangles[image].tolist()
        return bool(top <= row < bottom and left <= column < right)

    places = [(b, c, y, z) for b in range(images) for c in range(channels) for y in range(height) for z in range(width)]
    for b, c, y, z in places:
        if finish.area_B4 is None or lies_in(finish.area_B4, b, y, z):
            x[b, c, y, z] = (sub.images_BCHW[b, c, y, z].item() - finish.mean[c]) / finish.std[c]
        if lies_in(finish.erased_B4, b, y, z):
            x[b, c, y, z] = next(noise)
    before = x.clone()
    for b, c, y, z in places:
        if lies_in(finish.mixed_B4, b, y, z):
            assert finish.kept_B is not None
            kept = finish.kept_B[b].item()
            x[b, c, y, z] = kept * before[b, c, y, z] + (1 - kept) * before[b ^ 1, c, y, z]
    return x.float()


AREA = torch.tensor([[0, 0, 5, 6], [1, 2, 4, 6], [0, 0, 0, 0], [2, 0, 5, 3]])
ERASED = torch.tensor([[1, 1, 3, 4], [0, 0, 0, 0], [4, 5, 5, 6], [0, 0, 5, 6]])
MIXED = torch.tensor([[0, 0, 5, 6]] * 2 + [[1, 2, 4, 5]] * 2)
PARTS: dict[str, dict[str, Any]] = {
    "normalised": {},
    "padded": {"area_B4": AREA},
    "erased": {"erased_B4": ERASED, "noise": torch.randn(3 * (6 + 0 + 1 + 30), generator=torch.Generator().manual_seed(1))},
    "mixed": {"mixed_B4": MIXED, "kept_B": torch.tensor([0.3, 0.3, 0.0, 0.0])},
}


@pytest.mark.parametrize("names", [*[[name] for name in PARTS], [*PARTS]], ids="+".join)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_whole_batch_is_finished_as_pixel_by_pixel(names: list[str], layout: torch.memory_format) -> None:
    finish = Finish(*IMAGENET[:2])._replace(**{key: value for name in names for key, value in PARTS[name].items()})
    images = noise(4, 3, 5, 6).contiguous(memory_format=layout)
    sub = batch_of(images, finish)
    before = images.clone()
    found = finished_images(sub)
    torch.testing.assert_close(found, by_hand(sub))
    assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(images, before)
    # Once more: nothing that belongs to the batch was changed on the way.
    assert torch.equal(finished_images(sub), found)


def test_real_numbers_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"torch.float32, expected uint8"):
        finished_images(batch_of(torch.zeros(1, 3, 8, 8), Finish(*IMAGENET[:2])))


def normalised(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET[:2])
    return (image.float() - mean) / std


def test_erasing_is_torchvisions_on_the_normalised_image() -> None:
    """The same rectangles, the same noise: sample by sample, from the same seeds."""
    transform = {"image_size": 32, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
    spec = classification(transform=transform | {"erasing": 0.6}).transform
    plain = classification(transform=transform).transform
    theirs = v2.RandomErasing(0.6, (0.02, 1 / 3), (0.3, 1 / 0.3), value="random")
    store, ours, expected, changed = MemoryStore(plan().root / "digits" / "train"), [], [], 0
    for seed in range(24):
        sample = decode_sample(store.read(0, seed % 7), "classification", 3)
        with seeded(seed):
            ours.append(classification_train(sample, spec, IMAGENET, (32, 32)))
        with seeded(seed):
            image = normalised(classification_train(sample, plain, IMAGENET, (32, 32)).image)
            expected.append(theirs(image))
        changed += not torch.equal(image, expected[-1])
    sub = collate_classification(ours, ["x"] * 24, IMAGENET)
    assert torch.equal(finished_images(sub), torch.stack(expected))
    assert 6 <= changed <= 20


def test_padding_is_told_by_the_area_not_by_the_colour() -> None:
    """Black pixels of the image stay black, black pixels beside it become the mean colour."""
    sample = decode_sample(MemoryStore(plan().root / "scenes" / "train").read(0, 0), "detection", 3)
    sample = sample._replace(image=torch.zeros_like(sample.image))
    with seeded(0):
        ready = detection_train(sample, DetectionTransform(scale=(0.5, 0.5)), IMAGENET, (64, 48))
    assert ready.area is not None
    top, left, bottom, right = ready.area
    image = finished_images(collate_detection([ready], ["x"], IMAGENET))[0]
    assert torch.equal(image[:, top:bottom, left:right], normalised(torch.zeros(3, bottom - top, right - left)))
    assert (image != 0).all(0).sum() == (bottom - top) * (right - left) < 64 * 48 / 2


def test_moving_a_batch_moves_all_of_it() -> None:
    batch = StepDataset(plan())[0]
    for sub in batch.values():
        moved = to_device(sub, torch.device("meta"))
        tensors = [moved.images_BCHW, *(value for value in moved.finish if isinstance(value, Tensor))]
        for value in moved.targets.values():
            tensors += value if isinstance(value, list) else [value]
        assert all(tensor.is_meta for tensor in tensors) and moved.finish[:2] == sub.finish[:2]
        assert finished_images(moved).shape == sub.images_BCHW.shape
        assert_equal(to_device(sub, torch.device("cpu")), sub)


def test_a_task_s_batches_are_all_finished_by_the_same_steps() -> None:
    """Which fields of `Finish` are there is the recipe's to say, not chance's."""
    dataset = StepDataset(plan())
    for name in tasks():
        there = {tuple(value is None for value in dataset[step][name].finish) for step in range(12)}
        assert len(there) == 1, name
    assert not any(value is None for value in dataset[0]["digits"].finish[3:])


def test_an_empty_rectangle_brings_no_noise() -> None:
    nothing = Erased((0, 0, 0, 0), torch.empty(3, 0, 0))
    ready = [Ready(image, {"label": 0}, {}, erased=nothing) for image in noise(2, 3, 8, 8)]
    sub = collate_classification(ready, "ab", IMAGENET)
    assert sub.finish.noise is not None and len(sub.finish.noise) == 0
    assert torch.equal(finished_images(sub)[1], normalised(ready[1].image))


@pytest.mark.parametrize("to", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of", [torch.contiguous_format, torch.channels_last])
def test_filling_is_copying(to: torch.memory_format, of: torch.memory_format) -> None:
    image = noise(1, 3, 9, 12, seed=1).contiguous(memory_format=of)[0, :, 1:8, 2:11]
    out = torch.zeros(1, 3, 10, 14, dtype=torch.uint8).contiguous(memory_format=to)[0]
    fill(out[:, 2:9, 3:12], image)
    expected = torch.zeros(3, 10, 14, dtype=torch.uint8)
    expected[:, 2:9, 3:12] = image
    assert torch.equal(out, expected)


def test_every_kind_s_batch_is_bytes() -> None:
    for name, sub in StepDataset(plan())[0].items():
        assert sub.images_BCHW.dtype == torch.uint8 and name in tasks()
        assert sub.images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert set(TRANSFORMS) == {spec.kind for spec in tasks().values()}
