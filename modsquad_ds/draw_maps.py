"""Maps of numbers, directions and segments as pictures, target and prediction in the same colours. For predict.py and report.py.

Axes: C channels, D dimensions of an embedding, H W rows and columns.
"""

import matplotlib
import torch
from PIL import Image
from torch import Tensor

from modsquad_ds import draw

Span = tuple[float, float]
"""Values that get the first and the last colour."""
_WHOLE: Span = (-1.0, 1.0)


def span_of(values_CHW: Tensor, valid_HW: Tensor) -> Span:
    """Smallest and largest valid value; the whole scale where nothing is valid."""
    known = values_CHW[:, valid_HW]
    return (float(known.min()), float(known.max())) if known.numel() else _WHOLE


def values(values_CHW: Tensor, span: Span, valid_HW: Tensor | None = None) -> Tensor:
    """uint8 RGB `[3, H, W]`: one channel by matplotlib's viridis, two as red and green, three as they are; black where invalid.

    With more channels than one the colours span -1 to 1, whatever `span` says, so that channels keep their ratio.
    """
    channels = len(values_CHW)
    low, high = span if channels == 1 else _WHOLE
    share_CHW = ((values_CHW.float() - low) / max(high - low, 1e-6)).clamp(0, 1)
    if channels == 1:
        table = torch.tensor(matplotlib.colormaps["viridis"].colors)  # type: ignore[attr-defined]
        image = table[(share_CHW[0] * (len(table) - 1)).round().long()].permute(2, 0, 1)
    else:
        image = torch.cat([share_CHW, torch.full_like(share_CHW[:1], 0.5)])[:3] if channels == 2 else share_CHW[:3]
    return _bytes(image, valid_HW)


def probabilities(probability_HW: Tensor, valid_HW: Tensor | None = None) -> Tensor:
    """uint8 RGB `[3, H, W]`: white is 1."""
    return _bytes(probability_HW.float().expand(3, -1, -1), valid_HW)


def segments(labels_HW: Tensor) -> Tensor:
    """uint8 RGB `[3, H, W]`: a colour per id, black below 0. Ids that differ by 256 share one."""
    palette = torch.tensor([draw.colour_of(label) for label in range(256)], dtype=torch.uint8)
    image = palette[labels_HW.clamp(min=0) % 256].permute(2, 0, 1)
    return torch.where(labels_HW >= 0, image, 0)


def embedding(embedding_DHW: Tensor) -> Tensor:
    """uint8 RGB `[3, H, W]`: the three directions in which the embedding varies most; equal colours are one segment."""
    rows = embedding_DHW.flatten(1).T.double()
    centred = rows - rows.mean(0)
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    # A direction's sign is the solver's whim: the largest entry is made positive.
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    found = torch.zeros(len(rows), 3, dtype=torch.float64)
    found[:, : len(basis)] = centred @ basis.T
    low, high = found.amin(0), found.amax(0)
    share = (found - low) / (high - low).clamp(min=1e-9)
    return _bytes(share.T.reshape(3, *embedding_DHW.shape[1:]), None)


def panel(image_CHW: Tensor, side: int) -> Image.Image:
    """A picture that fits a square of `side` pixels."""
    return draw.picture(image_CHW, draw.fitting(image_CHW.shape[1:], side))


def _bytes(image_CHW: Tensor, valid_HW: Tensor | None) -> Tensor:
    image = (image_CHW * 255).round().to(torch.uint8)
    return image if valid_HW is None else torch.where(valid_HW, image, 0)
