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
def loader(
    recipe: Annotated[str | None, typer.Argument(help="Recipe whose own shards are read; none: photographs.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe.", metavar="[KEY=VALUE]...")] = None,
    images: Annotated[int, typer.Option(min=1, help="Fewest images of a round.")] = 64,
    repeat: Annotated[int, _repeat(9)] = 9,
    output: Json = None,
) -> None:
    """Images per second of the training pipeline per process, beside bare decoding of the same files on one core.

    [dim]python -m modsquad_ds bench loader
    python -m modsquad_ds bench loader heterogeneous data_root=/shards[/dim]
    """
    from modsquad_ds.bench.loader import measure_loader, print_loader
    from modsquad_ds.bench.measure import write_rows

    rows = measure_loader(recipe, overrides or (), images, repeat)
    print_loader(rows)
    if output is not None:
        write_rows(output, "loader", rows)


@bench.command(hidden=True)
def worker(name: str, arguments: Path, rows: Path) -> None:
    """One rank of a benchmark's job; the parent process gives the arguments and reads the first rank's rows."""
    from modsquad_ds.files import write_json

    measured = _worker(name)(**json.loads(arguments.read_text()))
    if measured is not None:
        write_json(rows, measured)


def _worker(name: str) -> Callable[..., list[dict[str, Any]] | None]:
    """What the ranks of a job run: arguments -> rows on the first rank, None on the others."""
    raise KeyError(name)
