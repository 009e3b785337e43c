"""Mixup and CutMix: pixels and labels tell the same shares, and both are torchvision's, pair by pair."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from modsquad_ds.data.collate import Pixels, Ready, collate_classification
from modsquad_ds.data.finish import finished_images
from modsquad_ds.data.mixing import Mixing, mix_pairs
from modsquad_ds.data.transforms import seeded

RAW = Pixels(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), patch_size=8)
"""Leaves pixel values as they are."""


def pair_batch() -> tuple[Tensor, Any]:
    images = torch.tensor([0, 1, 10, 20], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 16, 16)
    ready = [Ready(image, {"label": label}, {}) for image, label in zip(images, (0, 1, 2, 0), strict=True)]
    return images, collate_classification(ready, "abcd", RAW)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_of_pairs(mixup: float, cutmix: float) -> None:
    images, batch = pair_batch()
    mixed = mix_pairs(batch, Mixing(mixup, cutmix, num_classes=3), [1, 2])
    rows = mixed.targets["probabilities"]
    assert rows.dtype == torch.float32 and list(mixed.targets) == ["probabilities"]
    torch.testing.assert_close(rows.sum(1), torch.ones(4))
    # The mean of an image tells how much of its partner it holds; its labels must say the same.
    share = finished_images(mixed).mean((1, 2, 3))
    torch.testing.assert_close(share[:2], rows[:2, 1])
    torch.testing.assert_close((share[2:] - 10) / 10, rows[2:, 0])
    torch.testing.assert_close(rows[0, 1], rows[1, 0])
    assert torch.equal(batch.images_BCHW, images), "the inputs stay as they were"
    # Cutting the batch at a pair's border changes nothing.
    half = batch._replace(images_BCHW=images[2:], targets={"labels": batch.targets["labels"][2:]})
    again = mix_pairs(half, Mixing(mixup, cutmix, num_classes=3), [2])
    assert torch.equal(finished_images(again), finished_images(mixed)[2:])
    assert torch.equal(again.targets["probabilities"], rows[2:])


def test_mixup_and_cutmix_take_turns() -> None:
    _, batch = pair_batch()
    blended = 0
    for seed in range(40):
        image = finished_images(mix_pairs(batch, Mixing(1.0, 1.0, num_classes=3), [seed, seed]))[0]
        # CutMix leaves every pixel 0 or 1, Mixup none.
        blended += len(image.unique()) == 1 and 0 < image[0, 0, 0] < 1
    assert 10 <= blended <= 30


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_torchvisions_on_the_normalised_images(alphas: tuple[float, float]) -> None:
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    pixels = torch.randint(256, (32, 3, 24, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(32) % 5
    ready = [Ready(image, {"label": int(label)}, {}) for image, label in zip(pixels, labels, strict=True)]
    batch = collate_classification(ready, ["x"] * 32, Pixels(tuple(mean.tolist()), tuple(std.tolist()), 8))
    normalised = (pixels - mean[:, None, None]) / std[:, None, None]
    ours = mix_pairs(batch, Mixing(*alphas, num_classes=5), range(16))
    kinds: tuple[Callable[..., Any], ...] = (v2.MixUp, v2.CutMix)
    mixers = [make(alpha=alpha, num_classes=5) for make, alpha in zip(kinds, alphas, strict=True) if alpha]
    for pair, image_pair in enumerate(finished_images(ours).split(2)):
        rows = slice(2 * pair, 2 * pair + 2)
        with seeded(pair):
            mixer = mixers[int(torch.randint(len(mixers), ()))]
            images, probabilities = mixer(normalised[rows], labels[rows])
        torch.testing.assert_close(image_pair, images, rtol=0, atol=1e-6)
        assert torch.equal(ours.targets["probabilities"][rows], probabilities)
