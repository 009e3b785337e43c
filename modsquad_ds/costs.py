"""What a network costs for one image of a task: parameters, FLOPs, seconds, bytes. For tables that set networks side by side."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modsquad_ds.config import Recipe
from modsquad_ds.model.counts import count_parameters
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.tasks import ClassificationTransform, DetectionTransform, SetTransform, Size, TaskSpec

WARMUP, RUNS = 3, 30
"""Rounds that are dropped, and rounds whose median is told."""
LONGEST = 20.0
"""Seconds: slow passes get fewer rounds, at least three, so that all of them take about this long."""


class Version(NamedTuple):
    """A network to be measured."""

    network: MultiTaskNetwork
    """On the device where it is to be measured; the measurement leaves it in evaluation mode."""
    recipe: Recipe
    path: Path | None = None
    """Its model file, if it is written already."""


class Costs(NamedTuple):
    """What one image of a task costs."""

    image: Size
    """Height and width of the image in pixels."""
    total: int
    """Parameters of the network."""
    active: int
    """Parameters that one token of the task can meet (`model.counts`)."""
    experts: int
    """Parameters of all experts of all sparse layers."""
    flops: int
    """Of one forward pass, backbone and the task's head: two per multiply-add of matrix products and convolutions."""
    seconds: float
    """Median time of the same pass; what makes boxes or masks of its outputs is left out."""
    device: str
    """Where they were measured: `cpu` or `cuda`."""
    file_bytes: int | None
    """Size of the model file; None without one."""


def image_size(spec: TaskSpec, patch: int) -> Size:
    """Height and width in pixels of the task's images at evaluation; the largest possible where they depend on the image."""
    transform = spec.transform
    if isinstance(transform, ClassificationTransform):
        return transform.image_size, transform.image_size
    if isinstance(transform, DetectionTransform):
        return transform.eval_canvas
    if isinstance(transform, SetTransform):
        return transform.crop
    height, width = (-(-side // patch) * patch for side in sorted(transform.resize))
    return height, width


def costs_of(version: Version, task: str, runs: int = RUNS) -> Costs:
    """Costs of one network."""
    return costs_side_by_side([version], task, runs)[0]


def costs_side_by_side(versions: Sequence[Version], task: str, runs: int = RUNS) -> list[Costs]:
    """Costs of several networks that have the task; their passes take turns, so that a busy machine slows all of them.

    The image is one of noise, the same for networks that see images of one size.
    """
    sizes = [image_size(one.recipe.active[task], one.recipe.model.shape.patch) for one in versions]
    passes = [_pass(one.network, task, size) for one, size in zip(versions, sizes, strict=True)]
    seconds = median_seconds(passes, versions[0].network.backbone.pos_embed.device, runs)
    return [_costs(*row, task=task) for row in zip(versions, sizes, passes, seconds, strict=True)]


def median_seconds(cases: Sequence[Callable[[], object]], device: torch.device, runs: int = RUNS) -> list[float]:
    """Median seconds of each call until the device has done it, over `runs` rounds (fewer: `LONGEST`) after `WARMUP` others."""
    for _ in range(WARMUP):
        round_seconds = [_seconds(case, device) for case in cases]
    runs = max(1, min(runs, max(3, int(LONGEST / sum(round_seconds)))))
    rounds = [[_seconds(case, device) for case in cases] for _ in range(runs)]
    return [statistics.median(of_case) for of_case in zip(*rounds, strict=True)]


def _seconds(case: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    case()
    _wait_for(device)
    return time.perf_counter() - began


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of a call: two per multiply-add of matrix products and convolutions, backward passes included."""
    # The counter knows neither CPU's fused attention, so here attention is matrix products, nor CUDA's grouped products.
    mapping = {torch.ops.aten._grouped_mm: _grouped_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


def _grouped_flops(rows: Size, matrices: Sequence[int], *args: object, **kwargs: object) -> int:
    """Of `[R, I]` times a matrix of each group `[E, I, O]`, or of `[I, R]` times `[R, O]` summed over each group's rows."""
    return 2 * math.prod(rows) * matrices[-1]


def print_costs(
    title: str, rows: Mapping[str, Costs], metrics: Mapping[str, float | None] | None = None, metric: str = "metric"
) -> None:
    """Print a row per network, and below each but the first its share of the first's, in at most 100 columns.

    Args:
        rows: name of the network -> its costs.
        metrics: name of the network -> a held-out metric; without it there is no such column.
        metric: what that column is called.
    """
    first = next(iter(rows.values()))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    where = f"{first.device}, {torch.get_num_threads()} threads" if first.device == "cpu" else first.device
    height, width = first.image
    table.caption = f"GFLOPs and ms (median): forward pass of one image of {height} x {width} pixels, {where}"
    table.caption_justify = "left"
    table.add_column("network", overflow="fold")
    for heading in ("parameters", "active", "in experts", "GFLOPs", "ms", "file, MB", *([] if metrics is None else [metric])):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, costs in rows.items():
        scores = [] if metrics is None else [_score(metrics.get(name))]
        table.add_row(name, *_cells(costs), *scores)
        if costs is not first:
            table.add_row("  share", *_shares(costs, first), style="dim")
    console = Console()
    (console if console.width <= 100 else Console(width=100)).print(table)


def _pass(network: MultiTaskNetwork, task: str, size: Size) -> Callable[[], object]:
    """A forward pass of one image of noise."""
    network.eval()
    like = network.backbone.pos_embed
    image_BCHW = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)

    @torch.inference_mode()
    def run() -> object:
        return network({task: image_BCHW})

    return run


def _costs(version: Version, size: Size, run: Callable[[], object], seconds: float, task: str) -> Costs:
    counts = count_parameters(version.network)
    banks = [layer.experts for layer in version.network.backbone.sparse_layers().values()]
    return Costs(
        image=size,
        total=counts.total,
        active=counts.active[task],
        experts=sum(parameter.numel() for bank in banks for parameter in bank.parameters()),
        flops=count_flops(run),
        seconds=seconds,
        device=version.network.backbone.pos_embed.device.type,
        file_bytes=None if version.path is None else version.path.stat().st_size,
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cells(costs: Costs) -> list[str]:
    size = "-" if costs.file_bytes is None else f"{costs.file_bytes / 1e6:,.2f}"
    counts = [f"{number:,}" for number in (costs.total, costs.active, costs.experts)]
    return [*counts, f"{costs.flops / 1e9:,.3f}", f"{1e3 * costs.seconds:,.2f}", size]


def _shares(costs: Costs, first: Costs) -> list[str]:
    """Each value as a share of the first network's."""
    fields = ("total", "active", "experts", "flops", "seconds", "file_bytes")
    pairs = [(getattr(costs, field), getattr(first, field)) for field in fields]
    return [f"{mine / whole:.1%}" if mine is not None and whole else "-" for mine, whole in pairs]
