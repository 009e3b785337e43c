"""`plan`: what a recipe would need and take on a cluster, without one. A part of the command line (cli.py)."""

from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.", metavar="RECIPE")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe.", metavar="[KEY=VALUE]...")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node; a rank each.")] = 8,
    ep: Annotated[int | None, typer.Option(min=1, help="This expert-parallel size alone, also set in the recipe.")] = None,
    zero: Annotated[int | None, typer.Option(min=0, max=2, help="This ZeRO stage alone, also set in the recipe.")] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100 or h200.")] = "a100",
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of a GPU; default by --gpu.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Before you queue: will it run, does it fit, how long is a step, and which topology is best. Needs no GPU and no data.

    Exit code 2 if something would make the run fail.

    [dim]modsquad-ds plan heterogeneous data_root=/shards --nodes 2 --gpus-per-node 8 --gpu h100[/dim]
    """
    from modsquad_ds.config import load_recipe
    from modsquad_ds.files import check_new_file, write_json
    from modsquad_ds.hardware import gpu_named
    from modsquad_ds.projection import Cluster

    card, given = gpu_named(gpu), load_recipe(recipe, overrides or ())
    if json_file is not None:
        check_new_file(json_file, "--json", overwrite=True)
    # What takes seconds to import comes after what a mistake in the request meets.
    from modsquad_ds.feasibility import GIB, forecast
    from modsquad_ds.plan_table import as_json, print_forecast
    from modsquad_ds.topologies import at_topology

    wanted = at_topology(given, ep, zero)
    result = forecast(wanted, Cluster(card, nodes, gpus_per_node), (gpu_memory or card.memory) * GIB, ep, zero)
    print_forecast(result)
    if json_file is not None:
        write_json(json_file, as_json(result))
    if result.fails:
        raise typer.Exit(2)
