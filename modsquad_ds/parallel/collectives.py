"""Collectives besides the experts' all-to-alls: one reduction per training step, one gather per evaluation."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modsquad_ds.parallel.launch import device


def world_size() -> int:
    """Ranks in the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums of all tensors over all ranks, detached fp32, in one all-reduce for all of them together."""
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    if world_size() > 1:
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gather_json(value: Any) -> list[Any]:
    """Every rank's JSON-able value, in rank order, on every rank. JSON, because pickled bytes run code where they are read."""
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device())
    size = torch.tensor([data.numel()], device=data.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=data.device)
    padded[: data.numel()] = data
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return [json.loads(r[: int(s)].cpu().numpy().tobytes()) for r, s in zip(received, sizes, strict=True)]


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON-able value on every rank."""
    return gather_json(value if world_size() == 1 or dist.get_rank() == 0 else None)[0]


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()
