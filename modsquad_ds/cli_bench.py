"""The `bench` commands: parse, measure, print. A part of the command line (cli.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from modsquad_ds.bench.options import check_json, numbers

bench = typer.Typer(
    no_args_is_help=True,
    help="What the parts cost: every figure beside its peers in one run, medians with range.",
    epilog="OMP_NUM_THREADS sets the threads of a rank; step, comm and scaling take 1 where it is not set, loader always.",
)

Json = Annotated[Path | None, typer.Option("--json", help="Also write the rows, with versions, device and commit, to this file.")]


def _repeat(default: int) -> Any:
    return typer.Option("--repeat", min=1, help="Timed rounds.", show_default=str(default))


Numbers = Annotated[str, typer.Option(help="Sizes, separated by commas.")]


@bench.command()
def layer(
    width: Numbers = "384,768",
    tokens: Numbers = "4096,16384",
    repeat: Annotated[int, _repeat(5)] = 5,
    profile: Annotated[bool, typer.Option("--profile", help="Where their time goes, on CPU, without the other peers.")] = False,
    json_file: Json = None,
) -> None:
    """One sparse MLP (16 experts, 4 chosen), forward and backward: dense MLP = 1.

    Beside it DeepSpeed's own MoE layer, with and without dropping tokens, and a plain loop over experts, under three routings:
    balanced, random, and specialised (three tasks with 70, 20 and 10 % of the tokens, each on four experts of its own).
    """
    from modsquad_ds.bench import layer, layer_profile

    check_json(json_file)
    sizes = numbers("--width", width), numbers("--tokens", tokens)
    if profile:
        rows = layer_profile.profile_layer(*sizes, repeat)
        _finish("layer --profile", rows, layer_profile.COLUMNS, json_file, layer_profile.NOTE)
    else:
        _finish("layer", layer.bench_layer(*sizes, repeat), layer.COLUMNS, json_file)


@bench.command()
def step(
    repeat: Annotated[int, _repeat(7)] = 7,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where the time of a step goes, packed and with one pass per task.")
    ] = False,
    json_file: Json = None,
) -> None:
    """A training step of a sparse ViT-small with three tasks: packed, one pass per task, and a dense timm ViT.

    At 1 rank, and at 2 ranks with the experts spread over both. Memory and FLOPs are those of a step at 1 rank.
    """
    from modsquad_ds.bench import step, step_profile

    check_json(json_file)
    if profile:
        _finish("step --profile", step_profile.profile_step(repeat), step_profile.COLUMNS, json_file, step_profile.NOTE)
    else:
        _finish("step", step.bench_step(repeat), step.COLUMNS, json_file)


@bench.command()
def comm(ranks: Numbers = "2,4", json_file: Json = None) -> None:
    """What a training step sends between ranks, counted: against the least possible and against padded dispatch.

    The sparse ViT-small of `bench step`, its experts spread over all ranks.
    """
    from modsquad_ds.bench.comm import COLUMNS, NOTE, bench_comm

    check_json(json_file)
    _finish("comm", bench_comm(numbers("--ranks", ranks)), COLUMNS, json_file, NOTE)


@bench.command()
def loader(
    recipe: Annotated[str | None, typer.Argument(help="Recipe whose own shards are read; none: photographs.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe.", metavar="[KEY=VALUE]...")] = None,
    images: Annotated[int, typer.Option(min=1, help="Fewest images of a round.")] = 64,
    repeat: Annotated[int, _repeat(9)] = 9,
    profile: Annotated[
        bool, typer.Option("--profile", help="What an image of the plain classification task costs, part by part.")
    ] = False,
    output: Json = None,
) -> None:
    """Images per second of the training pipeline per process, beside bare decoding of the same files on one core.

    [dim]python -m modsquad_ds bench loader
    python -m modsquad_ds bench loader heterogeneous data_root=/shards[/dim]
    """
    from modsquad_ds.bench import loader_profile
    from modsquad_ds.bench.loader import measure_loader, print_loader
    from modsquad_ds.bench.measure import write_rows

    check_json(output)
    if profile:
        rows = loader_profile.profile_loader(recipe, overrides or (), images, repeat)
        _finish("loader --profile", rows, loader_profile.COLUMNS, output, loader_profile.NOTE)
        return
    rows = measure_loader(recipe, overrides or (), images, repeat)
    print_loader(rows)
    if output is not None:
        write_rows(output, "loader", rows)


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

    check_json(json_file)
    run(recipe, overrides or (), ranks, nodes, mode, ep, steps, trained, timeout, out, json_file)


def _finish(name: str, rows: list[dict[str, Any]], columns: dict[str, str], json_file: Path | None, note: str = "") -> None:
    """Print the table and what it depends on; write the rows where asked to."""
    from modsquad_ds.bench.measure import print_environment, print_rows, write_rows

    print_rows(f"bench {name}", rows, columns, note)
    print_environment(rows)
    if json_file is not None:
        write_rows(json_file, name, rows)


@bench.command(hidden=True)
def worker(name: str, arguments: Path, rows: Path) -> None:
    """One rank of a benchmark's job; the parent process gives the arguments and reads the first rank's rows."""
    from modsquad_ds.files import write_json

    measured = _worker(name)(**json.loads(arguments.read_text()))
    if measured is not None:
        write_json(rows, measured)


def _worker(name: str) -> Callable[..., list[dict[str, Any]] | None]:
    """What the ranks of a job run: arguments -> rows on the first rank, None on the others."""
    from modsquad_ds.bench import comm, scaling_step, step, step_profile

    workers: dict[str, Callable[..., list[dict[str, Any]] | None]] = {
        "step": step.measure_step,
        "step_alone": step.measure_alone,
        "step_profile": step_profile.measure_profile,
        "comm": comm.measure_comm,
        "scaling": scaling_step.measure,
    }
    return workers[name]
