"""Brightness, contrast, saturation and hue of a training image, between its crop and its normalisation.

The hue's arithmetic is torchvision's to the bit, written with operators that torch has vectorised: several times as fast.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

_ROWS = 128
"""Rows whose hue is shifted at a time: what lies between the steps stays in the processor's cache."""

_TINY = 1e-9


def shift_hue(image: Tensor, shift: float) -> Tensor:
    """Hue turned by `shift` of the full circle, uint8 `[3, h, w]` -> the same. Equals torchvision's adjust_hue."""
    turned = torch.empty_like(image, memory_format=torch.contiguous_format)
    for strip, out in zip(image.split(_ROWS, 1), turned.split(_ROWS, 1), strict=True):
        red, green, blue = F.to_dtype(strip, torch.float32, scale=True)
        largest = torch.maximum(torch.maximum(red, green), blue)
        smallest = torch.minimum(torch.minimum(red, green), blue)
        hue, saturation = _hue_and_saturation(red, green, blue, largest, smallest)
        hue = hue.add_(shift)
        hue.sub_(hue.floor())
        out.copy_(F.to_dtype(_from_hue(hue, saturation, largest), torch.uint8, scale=True))
    return turned


def _hue_and_saturation(
    red: Tensor, green: Tensor, blue: Tensor, largest: Tensor, smallest: Tensor
) -> tuple[Tensor, Tensor]:
    """Channels 0..1 `[h, w]` -> hue in [0, 1) and saturation; of a grey pixel both are 0."""
    span = largest - smallest
    # A grey pixel divides 0 by something; other values are 1/255 at least.
    saturation = span / largest.clamp(min=_TINY)
    divisor = span.clamp_(min=_TINY)
    r, g, b = ((largest - channel).div_(divisor) for channel in (red, green, blue))
    is_red = _equal(largest, red)
    is_green = _equal(largest, green).mul_(1.0 - is_red)
    is_blue = (1.0 - is_red).sub_(is_green)
    hue = (b - g).mul_(is_red)
    hue.addcmul_((r + 2.0).sub_(b), is_green).addcmul_((g + 4.0).sub_(r), is_blue)
    hue.mul_(1.0 / 6.0).add_(1.0)
    return hue.sub_(hue.floor()), saturation


def _from_hue(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Hue, saturation and value `[h, w]` in 0..1 -> channels `[3, h, w]`."""
    scaled = hue * 6
    sextant = scaled.floor()
    part = scaled.sub_(sextant)
    faded = saturation * part
    rest = 1.0 - saturation
    q = (1.0 - faded).mul_(value).clamp_(0.0, 1.0)
    t = faded.add_(rest).mul_(value).clamp_(0.0, 1.0)
    p = rest.mul_(value).clamp_(0.0, 1.0)
    one, two, three, four, five = (_equal(sextant, number) for number in range(1, 6))
    # Sextant 6, a full circle, is 0 again.
    zero = 1.0 - (one + two).add_(three).add_(four).add_(five)
    channels = torch.empty(3, *hue.shape)
    # Red is v q p p t v in the six sextants, green t v v q p p, blue p p t v v q.
    torch.mul(value, zero + five, out=channels[0]).addcmul_(q, one).addcmul_(p, two + three).addcmul_(t, four)
    torch.mul(value, one + two, out=channels[1]).addcmul_(t, zero).addcmul_(q, three).addcmul_(p, four + five)
    torch.mul(value, three + four, out=channels[2]).addcmul_(p, zero + one).addcmul_(t, two).addcmul_(q, five)
    return channels


def _equal(first: Tensor, second: Tensor | int) -> Tensor:
    """1.0 where equal, else 0.0: multiplying by it selects, far faster than torch.where on a CPU."""
    return torch.eq(first, second, out=torch.empty_like(first))


class PhotometricDistort(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation, hue, each with probability 1/2, as mmsegmentation's PhotoMetricDistortion.

    torchvision's own also swaps the colour channels, as SSD did for boxes; no segmentation recipe does.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """uint8 `[3, h, w]` -> the same. Contrast comes before or after saturation and hue."""
        image, contrast = inpt, params["contrast_factor"]
        if params["brightness_factor"] is not None:
            image = F.adjust_brightness(image, params["brightness_factor"])
        if contrast is not None and params["contrast_before"]:
            image = F.adjust_contrast(image, contrast)
        if params["saturation_factor"] is not None:
            image = F.adjust_saturation(image, params["saturation_factor"])
        if params["hue_factor"] is not None:
            image = shift_hue(image, params["hue_factor"])
        if contrast is not None and not params["contrast_before"]:
            image = F.adjust_contrast(image, contrast)
        return image
