"""The `bench` commands: parse, measure, print. A part of the command line (cli.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(
    no_args_is_help=True,
    help="What the parts cost: every figure beside its peers in one run, medians with range.",
    epilog="OMP_NUM_THREADS sets the threads of a rank (1 where it is not set and several ranks run).",
)

Json = Annotated[Path | None, typer.Option("--json", help="Also write the rows, with versions, device and commit, to this file.")]


def _repeat(default: int) -> Any:
    return typer.Option("--repeat", min=1, help="Timed rounds.", show_default=str(default))


@bench.command()
def scaling(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the recipe, e.g. data_root=/shards.", metavar="[KEY=VALUE]...")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Sizes: ranks on this machine.")] = "1,2",
    nodes: Annotated[str, typer.Option(help="Sizes: nodes under Slurm, a job each; what a node is: slurm/cluster.env.")] = "",
    mode: Annotated[str, typer.Option(help="weak: images per rank stay; strong: images in all stay; or both.")] = "both",
    ep: Annotated[
        str, typer.Option(help="fixed: the recipe's ep_size, or its largest divisor that the ranks allow; growing: all ranks.")
    ] = "fixed",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each routing that are timed, and that are counted.")] = 20,
    trained: Annotated[bool, typer.Option(help="Take the weights, so the routing, of the newest checkpoint in run=.")] = False,
    timeout: Annotated[float, typer.Option(help="Minutes that one local size may take.")] = 30.0,
    out: Annotated[Path, typer.Option(help="Folder for rows and plot; the same command goes on there.")] = Path("runs/scaling"),
    json_file: Json = None,
) -> None:
    """The training step of a recipe at several sizes: rates, efficiency, where time goes; learned and balanced routing.

    [dim]modsquad-ds bench scaling quickstart --ranks 1,2,4
    modsquad-ds bench scaling heterogeneous data_root=/shards --nodes 1,2,4,8 --ep growing[/dim]
    """
    from modsquad_ds.bench.scaling_table import run

    run(recipe, overrides or (), ranks, nodes, mode, ep, steps, trained, timeout, out, json_file)


@bench.command(hidden=True)
def worker(name: str, arguments: Path, rows: Path) -> None:
    """One rank of a benchmark's job; the parent process gives the arguments and reads the first rank's rows."""
    from modsquad_ds.files import write_json

    measured = _worker(name)(**json.loads(arguments.read_text()))
    if measured is not None:
        write_json(rows, measured)


def _worker(name: str) -> Callable[..., list[dict[str, Any]] | None]:
    """What the ranks of a job run: arguments -> rows on the first rank, None on the others."""
    if name == "scaling":
        from modsquad_ds.bench.scaling_step import measure

        return measure
    raise KeyError(name)
