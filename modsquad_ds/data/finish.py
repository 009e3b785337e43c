"""uint8 batch -> the model's input, on the device: the last step of the data, in training and evaluation alike.

Until here a pixel is a byte, a quarter of the memory to fill, to send from a worker and to copy to the device. All
randomness was drawn with the samples: this is arithmetic over the whole batch, the same on every device.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from modsquad_ds.data.types import Finish, Rows, SubBatch


def to_device(sub: SubBatch, device: torch.device) -> SubBatch:
    """Images, targets and what finishes the images on the device; asynchronous where the loader pinned them."""
    finish = Finish(*(_moved(value, device) for value in sub.finish))
    rows = {task: Rows(_moved(r.index_B, device), r.counted) for task, r in sub.rows.items()} if sub.rows else sub.rows
    images, targets = _moved(sub.images_BCHW, device), _moved(sub.targets, device)
    return sub._replace(images_BCHW=images, targets=targets, finish=finish, rows=rows)


def finished_images(sub: SubBatch) -> Tensor:
    """The model's input: float32 `[B, 3, H, W]`, on the batch's device, in memory of its own.

    In this order: (x - mean) / std, 0 beyond each image's area, RandomErasing's noise (arXiv 1708.04896), Mixup (arXiv
    1710.09412) and CutMix (arXiv 1905.04899) of the pairs 2i and 2i + 1. Nothing here waits for the device.
    """
    assert sub.images_BCHW.dtype == torch.uint8, f"images are {sub.images_BCHW.dtype}, expected uint8"
    finish = sub.finish
    mean, std = _mean_and_std(finish.mean, finish.std, sub.images_BCHW.device)
    x_BCHW = sub.images_BCHW.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)
    size = (x_BCHW.shape[2], x_BCHW.shape[3])
    if finish.area_B4 is not None:
        x_BCHW.mul_(_inside(finish.area_B4, size))
    if finish.erased_B4 is not None and finish.noise is not None and len(finish.noise):
        x_BCHW.masked_scatter_(_inside(finish.erased_B4, size), finish.noise)
    if finish.mixed_B4 is not None and finish.kept_B is not None:
        partners_BCHW = x_BCHW.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        share_B1HW = _inside(finish.mixed_B4, size) * (1 - finish.kept_B)[:, None, None, None]
        x_BCHW.lerp_(partners_BCHW, share_B1HW)
    return x_BCHW


@functools.lru_cache
def _mean_and_std(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 `[3, 1, 1]` each. Kept: a copy to the device at every step would make the host wait."""
    return torch.tensor(mean, device=device)[:, None, None], torch.tensor(std, device=device)[:, None, None]


def _inside(rectangles_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """bool `[B, 1, H, W]`: the pixels of each image's rectangle."""
    top, left, bottom, right = rectangles_B4[:, :, None].unbind(1)
    rows_H, columns_W = (torch.arange(side, device=rectangles_B4.device) for side in size)
    rows_BH = (rows_H >= top) & (rows_H < bottom)
    columns_BW = (columns_W >= left) & (columns_W < right)
    return rows_BH[:, None, :, None] & columns_BW[:, None, None, :]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return [_moved(v, device) for v in value] if isinstance(value, list) else value
