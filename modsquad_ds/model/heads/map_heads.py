"""Heads of the tasks of image sets: one vector per image, or a map over its pixels. Built by `build_head`.

Axes: B images, C channels, D width, H W rows and columns of cells or pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modsquad_ds.errors import UserError
from modsquad_ds.model.heads.base import Head, LossTerm, Outputs, Prediction
from modsquad_ds.model.heads.map_losses import image_terms, map_terms
from modsquad_ds.model.heads.pyramid import SimpleFeaturePyramid, group_norm
from modsquad_ds.model.heads.segmentation import resize
from modsquad_ds.tasks import ConvMapHead, PatchHead, SetTask

SEGMENTS_STRIDE = 8
"""Default pixels per cell of an embedding: with 64 dimensions as many numbers per image as a map of one channel has."""


class Pooled(Head):
    """Mean of the patch tokens, two layer norms, one linear layer: Mod-Squad's classifier."""

    def __init__(self, spec: SetTask, dim: int, patch_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.pool_norm, self.norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, spec.num_classes)
        _initialise(self.linear)

    def forward(self, map_BDHW: Tensor) -> Outputs:
        """`output` `[B, C]`: logits, or with the loss `mse` the probabilities themselves."""
        return {"output": self.linear(self.norm(self.pool_norm(map_BDHW.mean(dim=(2, 3)))))}

    def losses(self, outputs: Outputs, targets: dict[str, Any]) -> dict[str, LossTerm]:
        """`mse` or `cross_entropy`; see map_losses.py."""
        return image_terms(self.spec, outputs["output"], targets)

    @torch.no_grad()
    def predict(self, outputs: Outputs, meta: Sequence[dict[str, Any]]) -> list[Prediction]:
        """`probabilities` and the likeliest `label` of each image."""
        output_BC = outputs["output"].float()
        found_BC = nearest_probabilities(output_BC) if self.spec.loss == "mse" else output_BC.softmax(dim=1)
        labels = output_BC.argmax(dim=1).tolist()
        return [{"probabilities": p, "label": label} for p, label in zip(found_BC.cpu(), labels, strict=True)]


def nearest_probabilities(x_BC: Tensor) -> Tensor:
    """The vectors of probabilities that are nearest by squared distance: max(x - t, 0) with the t at which they sum to 1.

    For a head that learned probabilities by squared error. The order of the classes stays (Duchi et al., ICML 2008, figure 1).
    """
    falling_BC = x_BC.sort(dim=1, descending=True).values
    rank_C = torch.arange(1, x_BC.shape[1] + 1, device=x_BC.device)
    t_BC = (falling_BC.cumsum(dim=1) - 1) / rank_C
    kept_B1 = (falling_BC > t_BC).sum(dim=1, keepdim=True)
    return (x_BC - t_BC.gather(1, kept_B1 - 1)).clamp(min=0)


class _MapHead(Head):
    """What heads of maps share: `forward` gives `map` `[B, C, h, w]`, whose cells are `stride` pixels."""

    def __init__(self, spec: SetTask, stride: int) -> None:
        super().__init__()
        self.spec, self.stride = spec, stride

    def losses(self, outputs: Outputs, targets: dict[str, Any]) -> dict[str, LossTerm]:
        """The terms of the task's kind and loss; see map_losses.py."""
        return map_terms(self.spec, outputs["map"], targets)

    @torch.no_grad()
    def predict(self, outputs: Outputs, meta: Sequence[dict[str, Any]]) -> list[Prediction]:
        """By kind, see `Head.predict`; at the size of `label`, or of the image where it has none, within `window` if any."""
        answer = ANSWERS[self.spec.kind]
        maps = zip(outputs["map"].float(), meta, strict=True)
        if self.spec.kind == "segments":
            return [answer(map_CHW) for map_CHW, _ in maps]
        return [answer(self._shown(map_CHW, image)) for map_CHW, image in maps]

    def _shown(self, map_CHW: Tensor, image: dict[str, Any]) -> Tensor:
        """Resized to the canvas, cut to the window, resized to what is scored: `[C, h, w]`."""
        canvas_1CHW = resize(map_CHW[None], [cells * self.stride for cells in map_CHW.shape[1:]])
        if image["window"] is None:
            return canvas_1CHW[0]
        top, left, height, width = image["window"]
        labels = list(image.get("label", {}).values())
        size = labels[0].shape[-2:] if labels else image["size"]
        return resize(canvas_1CHW[:, :, top : top + height, left : left + width], size)[0]


ANSWERS: dict[str, Callable[[Tensor], Prediction]] = {
    "semantic": lambda map_CHW: {"mask": map_CHW.argmax(dim=0).to(torch.uint8).cpu()},
    "regression": lambda map_CHW: {"values": map_CHW.cpu()},
    "unit_vectors": lambda map_CHW: {"values": F.normalize(map_CHW, dim=0).cpu()},
    "binary": lambda map_CHW: {"probability": map_CHW[0].sigmoid().cpu()},
    "segments": lambda map_CHW: {"embedding": map_CHW.cpu()},
}
"""Kind -> what a map of numbers says."""


class Patch(_MapHead):
    """Layer norm, then one linear layer per token whose outputs are the cells of its patch (Mod-Squad's head of maps)."""

    def __init__(self, spec: SetTask, dim: int, patch_size: int) -> None:
        assert isinstance(spec.head, PatchHead)
        stride = spec.head.stride or (SEGMENTS_STRIDE if spec.kind == "segments" else 1)
        if patch_size % stride:
            fitting = ", ".join(str(n) for n in range(1, patch_size + 1) if patch_size % n == 0)
            raise UserError(f"head.stride: {stride} does not divide the patch size {patch_size}; expected one of {fitting}")
        super().__init__(spec, stride)
        self.side = patch_size // stride
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, self.side**2 * spec.num_classes)
        _initialise(self.linear)

    def forward(self, map_BDHW: Tensor) -> Outputs:
        """`map` at the head's stride: number (y * side + x) * C + c of a token is channel c of row y, column x of its patch."""
        cells_BHWX = self.linear(self.norm(map_BDHW.permute(0, 2, 3, 1)))
        patches_BHWyxC = cells_BHWX.unflatten(3, (self.side, self.side, -1))
        return {"map": patches_BHWyxC.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)}


class ConvMap(_MapHead):
    """One level of a simple feature pyramid, 3x3 convolutions with group norm and GELU, a 1x1 convolution to the channels."""

    def __init__(self, spec: SetTask, dim: int, patch_size: int) -> None:
        assert isinstance(spec.head, ConvMapHead)
        stride, channels = spec.head.stride, spec.head.channels
        if stride > patch_size:
            raise UserError(
                f"head.stride: {stride} is coarser than the patch size {patch_size}; a head of maps expects at most that"
            )
        super().__init__(spec, stride)
        self.pyramid = SimpleFeaturePyramid(dim, patch_size, (stride,))
        self.tower = nn.Sequential()
        for width in (self.pyramid.widths[0], *[channels] * (spec.head.convs - 1)):
            conv = nn.Conv2d(width, channels, 3, padding=1, bias=False)
            self.tower.extend([conv, group_norm(channels), nn.GELU()])
        self.linear = nn.Conv2d(channels, spec.num_classes, 1)
        _initialise(self.linear)

    def forward(self, map_BDHW: Tensor) -> Outputs:
        """`map` at the head's stride."""
        (level,) = self.pyramid(map_BDHW)
        return {"map": self.linear(self.tower(level))}


def _initialise(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
