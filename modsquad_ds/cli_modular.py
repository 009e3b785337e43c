"""Commands that look into a model file, take it apart or add to it: plain functions, registered by cli.py."""

import os
from pathlib import Path
from typing import Annotated

import typer

from modsquad_ds.location import data_option


def usage(
    model: Annotated[Path, typer.Argument(help="A model file or a run folder.")],
    data: Annotated[str | None, typer.Option(help="Folder or URL of the tasks' shards, not the recipe's data_root.")] = None,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "val",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and pictures; default usage/ beside the model file.")] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Read the moving average that training kept; needs no data.")] = False,
) -> None:
    """Which task uses which expert, and how alike tasks are: table, JSON and pictures. Runs on any number of ranks."""
    from modsquad_ds.usage import print_usage
    from modsquad_ds.usage import usage as run

    report = run(model, data_option(data), split, out, stored)
    if os.environ.get("RANK", "0") == "0":
        print_usage(report)


def extract(
    model: Annotated[Path, typer.Argument(help="A model file or a run folder.")],
    task: Annotated[list[str], typer.Option(help="Task of the model; more than once for several.")],
    out: Annotated[Path, typer.Option(help="File for the smaller model.")],
    min_usage: Annotated[
        float | None, typer.Option(help="Keep experts among the top-k of this share of a task's tokens; default 0.03.")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Keep this many experts of each layer for each task, the most used.")] = None,
    keep_params: Annotated[
        str | None, typer.Option(help="Keep this share of all experts' parameters, e.g. 40%, the most used of all layers.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Fewer experts per token than the model has, in all sparse layers.")] = None,
    mlp_top_k: Annotated[int | None, typer.Option(help="The same for MLPs.")] = None,
    attention_top_k: Annotated[int | None, typer.Option(help="The same for attention.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder or URL of the tasks' shards (as data_root); held-out metrics are then told.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Measure many thresholds and top-k; OUT.sweep.csv and .png.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there already.")] = False,
) -> None:
    """Cut out of a model what some of its tasks need, by their use of experts while training; tells what that saves.

    The rule of Mod-Squad is the default. Every task keeps at least top-k experts of each layer.

    [dim]modsquad-ds extract runs/quickstart --task digits --out digits.safetensors
    modsquad-ds extract runs/quickstart --task digits --keep-params 40% --data shards --sweep --out small.safetensors[/dim]
    """
    from modsquad_ds.extract import Fewer, rule_from
    from modsquad_ds.extract import extract as run

    rule = rule_from(min_usage, keep, keep_params)
    run(model, task, out, rule, Fewer(top_k, mlp_top_k, attention_top_k), data_option(data), sweep, overwrite)


def expand(
    model: Annotated[Path, typer.Argument(help="A model file or a run folder.")],
    task: Annotated[str, typer.Option(help="The task as in a recipe: a YAML file (.yaml), or YAML itself.", metavar="SPEC")],
    out: Annotated[Path, typer.Option(help="File for the larger model; the recipe that trains it goes beside it (.yaml).")],
    new_mlp_experts: Annotated[int, typer.Option(min=0, help="Experts to add to each sparse MLP.")] = 0,
    new_attention_experts: Annotated[int, typer.Option(min=0, help="Experts to add to each sparse attention layer.")] = 0,
    data: Annotated[str | None, typer.Option(help="Folder or URL of the task's shards, not the recipe's data_root.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there already.")] = False,
) -> None:
    """Add a task to a model, and experts that only it sees: what the old tasks compute stays the same, bit for bit.

    SPEC is one entry, NAME: {kind: ..., data: ..., num_classes: ..., batch_size: ...}, or a recipe whose tasks: hold one new
    task. Class names are read from its shards. New experts start as copies of the most used.

    [dim]modsquad-ds expand runs/quickstart --task 'faces: {kind: classification, data: faces, num_classes: 2, batch_size: 16}'
    --new-mlp-experts 2 --new-attention-experts 2 --out runs/grown.safetensors
    modsquad-ds train runs/grown.yaml[/dim]
    """
    from modsquad_ds.expand import expand as run
    from modsquad_ds.structure import PerKind

    run(model, task, PerKind(new_mlp_experts, new_attention_experts), out, data_option(data), overwrite)
