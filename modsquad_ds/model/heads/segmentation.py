"""Segmentation: pyramid -> mmsegmentation's UPerHead or FCNHead -> logits; in training an auxiliary FCNHead as well.

Axes: B images, C classes, D width, H W rows and columns of cells or pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modsquad_ds.errors import UserError
from modsquad_ds.mmseg_compat import fcn_head, uper_head
from modsquad_ds.model.heads.base import Head, LossTerm, Outputs, Prediction
from modsquad_ds.model.heads.pyramid import SimpleFeaturePyramid, norm_groups
from modsquad_ds.tasks import IGNORE_INDEX, FCNSegHead, SegmentationTask, TaskSpec, UPerNetHead

SegmentationSpec = UPerNetHead | FCNSegHead


def check_norm(spec: TaskSpec, device_type: str, world_size: int, bf16: bool = False) -> None:
    """Refuses synchronised batch norm on several ranks without CUDA, where torch cannot do it, and any batch norm in bf16."""
    norm = spec.head.norm if isinstance(spec.head, SegmentationSpec) else "group"
    if bf16 and norm != "group":
        raise UserError(
            f"head.norm: the running statistics of {norm} stand still in bf16, whose 8 bits lose their small changes; use "
            "norm: group, or an fp32 deepspeed_config"
        )
    if norm == "sync_batch" and device_type != "cuda" and world_size > 1:
        raise UserError(
            f"head.norm: sync_batch works in one process or on CUDA devices, not in {world_size} processes on "
            f"{device_type}; use norm: group"
        )


def _norm(spec: SegmentationSpec, channels: int) -> dict[str, Any]:
    """mmcv's norm_cfg."""
    if spec.norm == "group":
        return {"type": "GN", "num_groups": norm_groups(channels), "requires_grad": True}
    return {"type": {"batch": "BN", "sync_batch": "SyncBN"}[spec.norm], "requires_grad": True}


def _common(spec: SegmentationTask, channels: int) -> dict[str, Any]:
    """Arguments that all of mmsegmentation's decode heads share."""
    classes = spec.num_classes
    return {
        "channels": channels,
        "num_classes": classes,
        "out_channels": classes,
        "dropout_ratio": spec.head.dropout,
        "norm_cfg": _norm(spec.head, channels),
        "align_corners": False,
        "ignore_index": IGNORE_INDEX,
    }


def pixel_loss(logits_BCHW: Tensor, labels_BHW: Tensor, weight: float) -> LossTerm:
    """Cross-entropy of the logits, resized bilinearly to the labels, summed over the pixels that are not ignored."""
    logits_BCHW = resize(logits_BCHW.float(), labels_BHW.shape[1:])
    total = F.cross_entropy(logits_BCHW, labels_BHW, ignore_index=IGNORE_INDEX, reduction="sum")
    return LossTerm(total, (labels_BHW != IGNORE_INDEX).sum().float(), weight)


def resize(map_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, pixel centres at half integers; as it is where the size is right."""
    if tuple(map_BCHW.shape[2:]) == tuple(size):
        return map_BCHW
    return F.interpolate(map_BCHW, size=tuple(size), mode="bilinear", align_corners=False)


class Segmentation(Head):
    """Pyramid (levels keep their widths, as decode heads begin with convolutions), decode head, auxiliary head."""

    def __init__(self, spec: SegmentationTask, dim: int, patch_size: int) -> None:
        super().__init__()
        if not 2 <= spec.num_classes <= IGNORE_INDEX:
            raise UserError(
                f"num_classes: {spec.num_classes} for a segmentation head; expected 2 to {IGNORE_INDEX}, as label "
                f"{IGNORE_INDEX} marks ignored pixels"
            )
        self.spec = spec.head
        strides = spec.head.strides if isinstance(spec.head, UPerNetHead) else (spec.head.stride,)
        self.pyramid = SimpleFeaturePyramid(dim, patch_size, strides)
        self.stride = strides[0]
        if self.stride > patch_size:
            raise UserError(
                f"head: stride {self.stride} is coarser than the patch size {patch_size}; a segmentation head expects "
                "at most the patch size as its finest stride"
            )
        self.decode = self._decode_head(spec)
        aux = {"in_channels": dim, "in_index": 0, "num_convs": 1, "concat_input": False}
        self.aux = fcn_head(**aux, **_common(spec, spec.head.aux_channels)) if spec.head.aux_weight > 0 else None

    def _decode_head(self, spec: SegmentationTask) -> nn.Module:
        widths = self.pyramid.widths
        common = _common(spec, spec.head.channels)
        if isinstance(spec.head, UPerNetHead):
            levels = {"in_channels": list(widths), "in_index": list(range(len(widths)))}
            return uper_head(**levels, pool_scales=spec.head.pool_scales, **common)
        return fcn_head(in_channels=widths[0], in_index=0, num_convs=spec.head.convs, concat_input=False, **common)

    def forward(self, map_BDHW: Tensor) -> Outputs:
        """`logits` `[B, C, h, w]` at the finest stride; in training also `aux` at the patch size's."""
        if self.training and self.spec.norm == "batch" and len(map_BDHW) == 1 and isinstance(self.spec, UPerNetHead):
            raise UserError(
                "head.norm: batch cannot normalise the one pooled cell of a single image per rank; use norm: group or "
                "at least two images per rank"
            )
        outputs = {"logits": self.decode(self.pyramid(map_BDHW))}
        if self.training and self.aux is not None:
            outputs["aux"] = self.aux([map_BDHW])
        return outputs

    def losses(self, outputs: Outputs, targets: dict[str, Any]) -> dict[str, LossTerm]:
        """`ce` and, of a training forward, `aux_ce`: summed over the pixels whose label is not 255."""
        terms = {"ce": pixel_loss(outputs["logits"], targets["labels"], 1.0)}
        if "aux" in outputs:
            terms["aux_ce"] = pixel_loss(outputs["aux"], targets["labels"], self.spec.aux_weight)
        return terms

    @torch.no_grad()
    def predict(self, outputs: Outputs, meta: Sequence[dict[str, Any]]) -> list[Prediction]:
        """`mask`: the likeliest class of every pixel of the original image."""
        return [self._mask(logits_CHW, image) for logits_CHW, image in zip(outputs["logits"], meta, strict=True)]

    def _mask(self, logits_CHW: Tensor, image: dict[str, Any]) -> Prediction:
        """Resize to the canvas, crop to the image, resize to its original size, decide: mmsegmentation's way."""
        canvas = [cells * self.stride for cells in logits_CHW.shape[1:]]
        height, width = image["content"]
        content_1CHW = resize(logits_CHW[None].float(), canvas)[:, :, :height, :width]
        return {"mask": resize(content_1CHW, image["size"])[0].argmax(dim=0).to(torch.uint8).cpu()}
