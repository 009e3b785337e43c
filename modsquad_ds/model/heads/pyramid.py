"""One feature map of a plain ViT -> maps of several strides, for the heads that need more than one scale.

Axes: B images, D width, H W rows and columns of cells.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from modsquad_ds.errors import UserError


def norm_groups(channels: int) -> int:
    """Groups for GroupNorm: the largest divisor of `channels` up to 32 that leaves at least four channels per group."""
    return max((g for g in range(1, 33) if channels % g == 0 and channels // g >= 4), default=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation that depends neither on the other images of the batch nor on the number of ranks."""
    return nn.GroupNorm(norm_groups(channels), channels)


def halvings(patch_size: int, stride: int) -> int:
    """How often a cell of `patch_size` pixels is halved (negative: doubled) to reach `stride`; else `UserError`."""
    if stride > 0:
        small, large = sorted((patch_size, stride))
        factor = large // small
        if large % small == 0 and factor & (factor - 1) == 0:
            return (factor.bit_length() - 1) * (1 if stride <= patch_size else -1)
    raise UserError(
        f"head: stride {stride} does not fit the patch size {patch_size}; expected the patch size times or divided by "
        f"a power of two, e.g. {patch_size}, {2 * patch_size} or {4 * patch_size}"
    )


def _level(dim: int, steps: int) -> tuple[nn.Module, int]:
    """One level's resampling from the map, and its width: each halving of the stride halves the width too."""
    layers: list[nn.Module] = []
    width = dim
    for step in range(steps):
        if step > 0:
            layers += [group_norm(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, max(1, width // 2), kernel_size=2, stride=2))
        width = max(1, width // 2)
    layers += [nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True) for _ in range(-steps)]
    return nn.Sequential(*layers), width


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid (arXiv 2203.16527, section 3): each level is made from the one last map, with no top-down path.

    A finer level comes by 2x2 deconvolutions, a coarser one by 2x2 max pooling that keeps an odd border cell. With
    `channels` each level then goes through a 1x1 and a 3x3 convolution; without, the levels keep their own widths, for
    heads that begin with such convolutions themselves. `widths` holds the levels' channels.
    """

    def __init__(self, dim: int, patch_size: int, strides: Sequence[int], channels: int | None = None) -> None:
        super().__init__()
        if not strides or list(strides) != sorted(set(strides)):
            example = [patch_size, 2 * patch_size]
            raise UserError(f"head: strides {list(strides)} do not rise; expected a rising list, e.g. {example}")
        self.strides = tuple(strides)
        levels, widths = zip(*(_level(dim, halvings(patch_size, stride)) for stride in strides), strict=True)
        if channels is not None:
            for level, width in zip(levels, widths, strict=True):
                level.extend([nn.Conv2d(width, channels, 1, bias=False), group_norm(channels)])
                level.extend([nn.Conv2d(channels, channels, 3, padding=1, bias=False), group_norm(channels)])
            widths = (channels,) * len(widths)
        self.levels = nn.ModuleList(levels)
        self.widths: tuple[int, ...] = tuple(widths)

    def forward(self, map_BDHW: Tensor) -> list[Tensor]:
        """`[B, width, h * patch / stride, w * patch / stride]` (rounded up) of each level."""
        return [level(map_BDHW) for level in self.levels]
