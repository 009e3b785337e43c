"""`bench layer --profile`: where the time of a sparse MLP on CPU goes, kind of work by kind, beside the dense MLP's.

The products of both are as many, so what they take in the sparse layer is its floor: all else at no cost.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.profiler import profile

from modsquad_ds.bench.layer import (
    TOP_K,
    choices,
    dense_layer,
    forward_backward,
    sparse_layer,
    steered_layer,
    task_segments,
)
from modsquad_ds.bench.measure import Row
from modsquad_ds.errors import UserError

PRODUCTS, WHOLE = "matrix products", "whole pass"
BETWEEN, AROUND = "between operations", "router, plan"
KINDS = {
    "aten::mm": PRODUCTS,
    "aten::addmm": PRODUCTS,
    "aten::gelu": "GELU",
    "aten::gelu_backward": "GELU's gradient",
    "aten::index_select": "rows picked",
    "aten::index_add_": "rows added",
    "aten::scatter_add_": "rows added",
}
OTHER = "sums, weights, views"
PARTS = (*dict.fromkeys(KINDS.values()), OTHER, BETWEEN, AROUND, WHOLE)
COLUMNS = {"width": "width", "tokens": "tokens", "part": "part", "dense": "dense, ms", "sparse": "sparse, ms",
           "dense_rate": "dense GF/s", "sparse_rate": "sparse GF/s", "ratio": "x dense"}  # fmt: skip
NOTE = (
    "Random routing; medians of passes under the profiler, which lengthens the smaller parts. GF/s: 10^9 operations a second. "
    "x dense: the sparse layer's time over the dense one's whole; of the products it is the floor. All but the last two rows "
    "of the sparse layer are inside its experts."
)


def profile_layer(widths: Sequence[int], tokens: Sequence[int], repeat: int) -> list[Row]:
    """A row per width, number of tokens and part: milliseconds of a forward and backward pass, medians of `repeat`."""
    if torch.cuda.is_available():
        raise UserError("--profile: takes the experts on CPU apart; set CUDA_VISIBLE_DEVICES= to hide the GPU")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines to stderr for each pass
    return [row for width in widths for count in tokens for row in _rows(width, count, repeat)]


def _rows(width: int, tokens: int, repeat: int) -> list[Row]:
    dense, sparse = (_medians(passes) for passes in _profiled(_cases(width, tokens), repeat))
    flops = 2 * 2 * 3 * tokens * TOP_K * width**2  # of two products, each with two of its size in the backward pass
    rows: list[Row] = []
    for part in PARTS:
        row: Row = {"width": width, "tokens": tokens, "part": part, "dense": dense.get(part), "sparse": sparse.get(part)}
        if part == PRODUCTS:
            row |= {"dense_rate": flops / dense[part] / 1e6, "sparse_rate": flops / sparse[part] / 1e6}
        rows.append(row | {"ratio": None if part not in sparse else sparse[part] / dense[WHOLE]})
    return rows


def _cases(width: int, tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
    torch.manual_seed(0)
    segments, sparse, dense, x_SD = task_segments(tokens), sparse_layer(width), dense_layer(width), torch.randn(tokens, width)
    run = partial(steered_layer, sparse, segments, choices(sparse, x_SD, segments)["random"])
    return partial(forward_backward, dense, dense, x_SD), partial(forward_backward, run, sparse, x_SD)


def _profiled(cases: Sequence[Callable[[], None]], repeat: int) -> list[list[dict[str, float]]]:
    """Milliseconds of each part, case by case and pass by pass; the cases take turns, and their first passes are left out."""
    passes: list[list[dict[str, float]]] = [[] for _ in cases]
    for turn in range(1 + repeat):
        for case, here in zip(cases, passes, strict=True):
            with profile(use_kineto=False) as seen:
                case()
            if turn > 0:
                here.append(parts_of(seen.function_events or ()))
    return passes


def parts_of(events: Sequence[Any]) -> dict[str, float]:
    """Milliseconds of each part: the time of every operation without those that it calls."""
    has_experts = any(event.name == "_MLP" for event in events)
    parts: dict[str, float] = {WHOLE: 0.0}
    for event in events:
        part = _part(event) if not has_experts or _in_experts(event) else AROUND
        parts[part] = parts.get(part, 0.0) + event.self_cpu_time_total / 1e3
        parts[WHOLE] += event.self_cpu_time_total / 1e3
    return parts


def _part(event: Any) -> str:
    return KINDS.get(event.name, OTHER if event.name.partition("::")[0] == "aten" else BETWEEN)


def _in_experts(event: Any) -> bool:
    while event is not None:
        if event.name in ("_MLP", "_MLPBackward"):
            return True
        event = event.cpu_parent
    return False


def _medians(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: statistics.median(one.get(part, 0.0) for one in passes) for part in passes[0]}
