"""Commands that look into a model file, take it apart or add to it: plain functions, registered by cli.py."""

import os
from pathlib import Path
from typing import Annotated

import typer


def usage(
    model: Annotated[Path, typer.Argument(help="A model file or a run folder.")],
    data: Annotated[Path | None, typer.Option(help="Folder with the tasks' shards, in place of the recipe's data_root.")] = None,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "val",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and pictures; default usage/ beside the model file.")] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Read the moving average that training kept; needs no data.")] = False,
) -> None:
    """Which task uses which expert, and how alike tasks are: table, JSON and pictures. Runs on any number of ranks."""
    from modsquad_ds.usage import print_usage
    from modsquad_ds.usage import usage as run

    report = run(model, data, split, out, stored)
    if os.environ.get("RANK", "0") == "0":
        print_usage(report)
