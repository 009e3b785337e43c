"""The fast hue shift against torchvision's, to the bit."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from modsquad_ds.data.photometric import PhotometricDistort, shift_hue
from modsquad_ds.data.transforms import seeded

LEVELS = torch.tensor([0, 1, 2, 85, 127, 128, 170, 254, 255], dtype=torch.uint8)
# Every mix of these levels: greys, pure colours, ties of two channels, the borders of all sextants.
MIXES = torch.cartesian_prod(LEVELS, LEVELS, LEVELS).T.reshape(3, 27, 27).contiguous()
NOISE = torch.randint(256, (3, 300, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("shift", [-0.5, -1 / 6, -0.07, -1e-9, 0.0, 1e-9, 0.03, 1 / 3, 0.5])
def test_hue_is_torchvisions(shift: float) -> None:
    for image in (MIXES, NOISE, NOISE[:, :1, :1], NOISE.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert torch.equal(shift_hue(image, shift), F.adjust_hue(image, shift))


def test_distortion_is_torchvisions_without_the_swap_of_channels() -> None:
    class Plain(v2.RandomPhotometricDistort):
        def make_params(self, flat_inputs: list[torch.Tensor]) -> dict[str, object]:
            return super().make_params(flat_inputs) | {"channel_permutation": None}

    changed = 0
    for seed in range(24):
        with seeded(seed):
            ours = PhotometricDistort()(NOISE)
        with seeded(seed):
            theirs = Plain()(NOISE)
        assert torch.equal(ours, theirs)
        changed += not torch.equal(ours, NOISE)
    assert changed > 12
