"""What GPUs and the wires between them achieve: the constants that a projection stands on, each with its source.

Read by projection.py. Rates are achieved ones unless said, in FLOP/s and bytes/s per GPU and direction.
"""

import itertools
import math
from typing import NamedTuple

from modsquad_ds.errors import UserError


class Gpu(NamedTuple):
    """One GPU of a node, and its share of the network."""

    name: str
    peak: float
    """bf16 tensor cores without sparsity, by the data sheet."""
    peak_fp32: float
    """The same for fp32 as torch multiplies it by default: without TF32."""
    memory_rate: float
    """HBM."""
    inside: float
    """All-reduce bus bandwidth between the GPUs of a node (NVLink), as nccl-tests counts it."""
    outside: float
    """The GPU's own network card."""
    memory: float
    """GB, by the data sheet."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        # Peak, HBM, bus bandwidth in a node (ring): stas00/ml-engineering, compute/accelerator and network README (A100: 235 of
        # 300 GB/s, H100: 368 of 450). Network cards of 200 and 400 Gb/s: NVIDIA/nccl-tests issues 267 and 290 (46 to 49 of
        # 50 GB/s on H100; 94 % of 25 GB/s taken for A100). fp32: NVIDIA's data sheets.
        Gpu("a100", 312e12, 19.5e12, 2.0e12, 235e9, 23.5e9, 80),
        Gpu("h100", 989e12, 67e12, 3.35e12, 368e9, 47e9, 80),
        Gpu("h200", 989e12, 67e12, 4.8e12, 368e9, 47e9, 141),
    )
}

RING_START, RING_INSIDE, RING_OUTSIDE = 8.4e-6, 3.4e-6, 14e-6
"""Seconds: start of a ring collective, and each of its hops in a node and between nodes. NVIDIA/nccl, src/graph/tuning.cc
(protocol Simple)."""
TREE_START, TREE_INSIDE, TREE_OUTSIDE = 8.4e-6, 4e-6, 14e-6
"""The same for a tree."""
ALL_TO_ALL_START, ALL_TO_ALL_INSIDE, ALL_TO_ALL_OUTSIDE = 20e-6, 1e-6, 3e-6
"""Seconds: start of an all-to-all, and what each further rank adds. A choice: between NCCL's and DeepEP's published latencies
(deepseek-ai/DeepEP, docs/legacy.md: 77 us for 8 ranks, 118 for 16, 173 for 64)."""
COUNT_EXCHANGE = 45e-6
"""Seconds that a dropless layer waits for the exchange of row counts to reach the host. A choice within 30 to 60 us."""

SMALL_INSIDE = ((2**20, 1.3), (2**24, 1.20), (2**27, 1.11), (2**30, 1.0))
"""Message in bytes -> how many times as long as the formula an all-reduce takes in a node. 8 B200, measured / formula: 255 for
307 GB/s at 16 MiB, 568 for 629 at 128 MiB, 723 for 724 at 1 GiB (stas00/ml-engineering, network README); 1 MiB is a choice."""
SMALL_OUTSIDE = ((2**20, 2.5), (2**24, 2.45), (2**27, 1.62), (2**30, 1.02))
"""The same between nodes. 4 nodes of 8 B200, measured / formula: 64 for 157 GB/s at 16 MiB, 198 for 320 at 128 MiB, 362 for 368
at 1 GiB (as above); 1 MiB is a choice."""

EFFICIENCY: tuple[tuple[int, tuple[float, float, float], tuple[float, float, float]], ...] = (
    (192, (0.01, 0.03, 0.08), (0.005, 0.015, 0.05)),
    (512, (0.05, 0.10, 0.15), (0.04, 0.065, 0.15)),
    (1024, (0.20, 0.28, 0.38), (0.12, 0.20, 0.30)),
    (10**9, (0.30, 0.40, 0.445), (0.20, 0.27, 0.29)),
)
"""Width of the model up to -> share of the bf16 peak that a dense ViT's training reaches: least, likely, most; on A100, on later.

Published: ViT g/14 .445 on 8 A100, .289 on 8 H100 (NVIDIA NeMo's ViT page); ViT-5-Small on H100 .046 to .066 eager, .16 to .22
compiled (nvSubquadratic benchmarks); ViT-B/16 inference on A100 .25 eager, .37 (meta-pytorch/superblock PR 9). Training here is
eager. The first row, models smaller than any published figure, is a choice."""
SPARSE_EFFICIENCY = (0.80, 0.85, 0.90)
"""Share of a dense model's efficiency that a sparse one keeps: least, likely, most. A choice: sorting, smaller products."""


HOST = (20e-6, 10e-6, 5e-6)
"""Seconds in which the host starts an operation, autograd included: most, likely, least. A choice, which small models feel."""


def gpu_named(name: str) -> Gpu:
    """A row of `GPUS`. Raises UserError for another name."""
    if name not in GPUS:
        raise UserError(f"--gpu {name!r}: expected one of {', '.join(GPUS)}")
    return GPUS[name]


def efficiency(gpu: Gpu, width: int) -> tuple[float, float, float]:
    """Share of the peak that a dense ViT of this width reaches: least, likely, most."""
    _, a100, later = next(row for row in EFFICIENCY if width <= row[0])
    return a100 if gpu.name == "a100" else later


def slowdown(table: tuple[tuple[int, float], ...], size: float) -> float:
    """A factor of `SMALL_INSIDE` or `SMALL_OUTSIDE` for a message of `size` bytes, between its rows by the size's logarithm."""
    if size <= table[0][0]:
        return table[0][1]
    for (low, of_low), (high, of_high) in itertools.pairwise(table):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return of_low + share * (of_high - of_low)
    return table[-1][1]
