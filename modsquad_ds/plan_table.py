"""A forecast on the terminal, in at most 100 columns, and as JSON. Called by cli_plan.py."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modsquad_ds.feasibility import GAPS, GIB, RESERVED, UNEVEN_ROWS, Forecast, Row, usable_memory
from modsquad_ds.projection import Band

WIDTH = 100


def print_forecast(forecast: Forecast) -> None:
    """Print what was found, the tasks and the topologies."""
    console = Console(width=WIDTH, highlight=False)
    recipe, cluster, counts = forecast.recipe, forecast.cluster, forecast.counts
    gpus = f"{cluster.nodes} x {cluster.per_node} {cluster.gpu.name.upper()} of {forecast.gpu_memory / GIB:.0f} GiB"
    console.print(f"{recipe.name} on {gpus}: {counts.total:,} parameters, {counts.backbone:,} of them in the backbone")
    if forecast.flops:
        console.print(
            f"{forecast.flops / 1e12:,.3g} TFLOPs per step over all ranks; {recipe.train.steps:,} steps of "
            f"{recipe.train.accumulation} micro-batch(es), {recipe.train.sampling}"
        )
    if forecast.tasks:
        console.print(_tasks(forecast))
    fits = [row for row in forecast.rows if row.spare >= 0]
    others = [row for row in forecast.rows if row.spare < 0]
    fastest = min((row.seconds.likely for row in fits or others), default=1.0)
    if fits:
        console.print(_rows("these fit, fastest first", fits, fastest))
    if others:
        console.print(_rows("these do not fit: 'spare' is what lacks", others, fastest))
    if forecast.rows:
        console.print(_legend(forecast))
    for kind in ("note", "error"):
        for finding in forecast.findings:
            if finding.kind == kind:
                console.print(f"{kind}: {finding.text}", soft_wrap=True)


def as_json(forecast: Forecast) -> dict[str, Any]:
    """The forecast as plain values; bytes, seconds and FLOPs."""
    cluster = forecast.cluster
    return {
        "recipe": forecast.recipe.name,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.per_node,
        "gpu": cluster.gpu._asdict(),
        "gpu_memory": forecast.gpu_memory,
        "usable_memory": usable_memory(forecast.gpu_memory),
        "fails": forecast.fails,
        "findings": [finding._asdict() for finding in forecast.findings],
        "parameters": forecast.counts._asdict(),
        "flops_per_step": forecast.flops,
        "tasks": [task._asdict() for task in forecast.tasks],
        "topologies": [_row_as_json(row) for row in forecast.rows],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    nested = {name: getattr(row, name)._asdict() for name in ("topology", "memory", "seconds", "times")}
    return {**row._asdict(), **nested, "fits": row.spare >= 0, "memory_total": row.memory.total}


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _tasks(forecast: Forecast) -> Table:
    steps = forecast.recipe.train.steps
    names = ("task", "images/step", "samples", "steps/epoch", "epochs", "in head", "active", "GFLOPs")
    table = _table("", names)
    for row in forecast.tasks:
        samples = "?" if row.samples is None else f"{row.samples:,}"
        per_epoch = "?" if row.steps_per_epoch is None else f"{row.steps_per_epoch:,.1f}"
        epochs = "?" if not row.steps_per_epoch else f"{steps / row.steps_per_epoch:,.1f}"
        numbers = (f"{row.head:,}", f"{row.active:,}", f"{row.gflops:,.3g}")
        table.add_row(row.task, f"{row.images:,}", samples, per_epoch, epochs, *numbers)
    return table


def _rows(title: str, rows: Sequence[Row], fastest: float) -> Table:
    names = (" EP", "ZeRO", "GiB", "spare", "weights", "grads", "optim", "activ", "s/step (range)", "x", "a2a MB", "sums MB")
    table = _table(title, names)
    for row in rows:
        held, topology = row.memory, row.topology
        ep = f"{'*' if row.chosen else ' '}{topology.ep}" + (f"/{topology.attention_ep}" if topology.attention_ep > 1 else "")
        sizes = (held.total, row.spare, *held[:3], held.buffers + held.activations)
        gib = [_short(size / GIB) for size in sizes]
        sent = [_short(size / 1e6) for size in (row.exchanged, row.summed)]
        ratio = f"{row.seconds.likely / fastest:.2f}"
        table.add_row(ep + ("!" if row.crosses else ""), str(topology.zero), *gib, _band(row.seconds), ratio, *sent)
    return table


def _legend(forecast: Forecast) -> str:
    usable = usable_memory(forecast.gpu_memory) / GIB
    dropless = forecast.recipe.parallel.capacity_factor is None
    return (
        f"*: the recipe's own. !: experts' rows cross nodes. GiB per GPU on CUDA when it is fullest, mostly before "
        f"gradients come; {usable:.1f} can be filled "
        f"({RESERVED / GIB:.1f} for CUDA and NCCL, {GAPS:.0%} lost in gaps)"
        + (f"; with EP > 1 experts may get {UNEVEN_ROWS} times the mean rows. " if dropless else ". ")
        + "activ: activations and buffers. s/step: a projection, not a measurement, without data loading. x: times the fastest. "
        "a2a, sums: what a GPU sends to others in a step for experts; for gradients and weights."
    )


def _band(band: Band) -> str:
    return f"{_short(band.likely)} ({_short(band.low)}-{_short(band.high)})"


def _short(value: float) -> str:
    """Three figures at most: 0.012, 0.35, 7.1, 42, 1,234."""
    size = abs(value)
    if size >= 10 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 1 else f"{value:.2f}" if size >= 0.1 else f"{value:.3f}"
