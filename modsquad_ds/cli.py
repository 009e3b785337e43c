"""The command line: parse, build, call. Every command is a function below; a user's mistake is one line and exit code 2."""

import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from modsquad_ds import __version__, cli_modular
from modsquad_ds.cli_bench import bench
from modsquad_ds.cli_plan import plan
from modsquad_ds.errors import STOPPED_CODE, Stopped, UserError
from modsquad_ds.files import say
from modsquad_ds.location import data_option
from modsquad_ds.parallel import watchdog
from modsquad_ds.parallel.ranks import Ranks, check_world, ranks_from
from modsquad_ds.signals import ignore_more


class Commands(TyperGroup):
    """Typer takes an EOFError for Ctrl-D at a prompt and says "Aborted."; nothing prompts here, so it is a fault to be shown."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise RuntimeError(f"unexpected end of data: {error}") from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="One sparse vision transformer, many tasks, differently labelled datasets.",
    epilog="Start: bash tools/quickstart.sh. Then: shards -> train -> evaluate -> predict.",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, e.g. train.steps=100 'only=[digits]'.", metavar="[KEY=VALUE]..."),
]
RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.", metavar="RECIPE")]
app.add_typer(bench, name="bench")


@app.callback()
def options(
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options before the command. The deepspeed launcher puts --local_rank there; ranks are read from the environment."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train a recipe; goes on from the run's newest checkpoint.

    [dim]deepspeed --num_gpus 2 --module modsquad_ds train quickstart
    torchrun --nproc_per_node 8 -m modsquad_ds train heterogeneous data_root=/shards
    srun python -m modsquad_ds train my.yaml
    python -m modsquad_ds train quickstart parallel.ep_size=1[/dim]
    """
    from modsquad_ds.config import load_recipe

    read = load_recipe(recipe, overrides or ())
    check_world(ranks_from(os.environ), read.parallel.expect_world_size)
    from modsquad_ds.train import train as run  # takes seconds, which a mistake should not

    run(read)


@app.command()
def evaluate(
    run_or_model: Annotated[Path, typer.Argument(help="A run folder or a model file.")],
    data: Annotated[str | None, typer.Option(help="Folder or URL of the tasks' shards, not the recipe's data_root.")] = None,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "val",
    pictures: Annotated[bool, typer.Option(help="Also draw RUN/pictures/*.png (run folders and split val only).")] = True,
    untrained: Annotated[bool, typer.Option(help="Also measure the untrained network, which takes as long again.")] = True,
) -> None:
    """Held-out metrics, beside those of the untrained network; writes evaluation.json. Runs on any number of ranks."""
    from modsquad_ds.evaluate import evaluate as measure
    from modsquad_ds.evaluate import model_path
    from modsquad_ds.model_file import read_model
    from modsquad_ds.report import write_pictures
    from modsquad_ds.tables import information_of, print_results

    place = data_option(data)
    results = measure(run_or_model, place, split, untrained)
    if os.environ.get("RANK", "0") != "0":
        return
    model = read_model(model_path(run_or_model))
    print_results(results, model.recipe, information_of(model))
    if pictures and split == "val" and run_or_model.is_dir():
        for path in write_pictures(run_or_model, place):
            print(path)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A model file or a run folder.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures: JPEG, PNG, WebP or GIF.")],
    task: Annotated[str, typer.Option(help="Task of the model.")],
    out: Annotated[Path, typer.Option(help="Folder for the drawn pictures and the JSON files.")],
) -> None:
    """Label, boxes, mask or map of any picture: drawn on or beside it, and as JSON."""
    from modsquad_ds.predict import predict as run

    run(model, images, task, out)


@app.command()
def shards(
    layout: Annotated[str, typer.Argument(help="imagenet, coco, ade20k, taskonomy or pascal_context.")],
    src: Annotated[Path, typer.Argument(help="The dataset as it was downloaded.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; they go to OUT/SPLIT.")],
    split: Annotated[str, typer.Option(help="Split to convert.")] = "train",
    samples_per_shard: Annotated[int, typer.Option(help="Samples per tar.")] = 1000,
    workers: Annotated[int, typer.Option(help="Processes.")] = len(os.sched_getaffinity(0)),
    skip_bad: Annotated[bool, typer.Option(help="Leave out and count bad samples, or the bad of many labels.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace shards that are already there.")] = False,
    part: Annotated[str | None, typer.Option(metavar="I/N", help="Write only part I (0 to N-1) of N, for --merge.")] = None,
    merge: Annotated[int | None, typer.Option(metavar="N", help="Make OUT/SPLIT of its N parts.")] = None,
    split_list: Annotated[
        str | None, typer.Option(metavar="NAME", help="taskonomy: tiny, medium, full, fullplus or a CSV file.")
    ] = None,
    targets: Annotated[str | None, typer.Option(metavar="A,B", help="taskonomy, pascal_context: read only these.")] = None,
) -> None:
    """Convert a dataset to WebDataset shards with an index, checking every sample.

    [dim]modsquad-ds shards imagenet /data/ILSVRC /shards/imagenet --split train
    modsquad-ds shards coco /data/coco /shards/coco --split val
    modsquad-ds shards ade20k /data/ADEChallengeData2016 /shards/ade20k --split train
    modsquad-ds shards taskonomy /data/taskonomy /shards/taskonomy --split-list tiny --split val
    modsquad-ds shards taskonomy /data/taskonomy /shards/depth --split-list tiny --targets depth_zbuffer,normal
    modsquad-ds shards pascal_context /data/PASCAL_MT /shards/pascal --split val[/dim]

    Several jobs can share the work: each runs the same command with its own --part, in any order and as often as it likes;
    a part that is finished is not written again. Then --merge checks all parts and makes OUT/SPLIT, the same bytes as in
    one piece. --part I/N with --merge N merges only if that was the last part.

    [dim]modsquad-ds shards imagenet /data/ILSVRC /shards/imagenet --split train --part 0/32
    modsquad-ds shards imagenet /data/ILSVRC /shards/imagenet --split train --merge 32
    sbatch $MODSQUAD_SBATCH_CPU --array=0-31 slurm/shards.sbatch imagenet /data/ILSVRC /shards/imagenet --split train[/dim]
    """
    from modsquad_ds.data.convert import convert
    from modsquad_ds.data.part_job import parse_part
    from modsquad_ds.data.parts import convert_part, merge_parts
    from modsquad_ds.data.sources import Options

    options = Options(split_list, None if targets is None else tuple(targets.split(",")))
    given: dict[str, Any] = {"options": options, "samples_per_shard": samples_per_shard, "workers": workers, "skip_bad": skip_bad}
    if part is None and merge is None:
        convert(layout, src, out, split, overwrite=overwrite, progress=True, **given)
        return
    if overwrite:
        raise UserError("--overwrite does not go with --part and --merge: remove OUT/SPLIT first, or choose another OUT")
    if part is None:
        merge_parts(layout, src, out, split, merge or 0, progress=True, **given)
        return
    chosen = parse_part(part)
    if merge not in (None, chosen.total):
        raise UserError(f"--merge {merge} with --part {part}: expected --merge {chosen.total}")
    convert_part(layout, src, out, split, chosen, merge=merge is not None, progress=True, **given)


@app.command()
def stage(
    recipe: RecipeName,
    to: Annotated[Path, typer.Option(help="Folder on a disk of this machine; jobs may share it.")],
    overrides: Overrides = None,
) -> None:
    """Copy a recipe's shards to a local disk, once; then train with data_root=TO. slurm/train.sbatch does it on each node."""
    from modsquad_ds.config import load_recipe
    from modsquad_ds.stage import stage as copy

    copy(load_recipe(recipe, overrides or ()), to)


@app.command()
def quickstart_data(out: Annotated[Path, typer.Argument(help="Folder for the datasets and their shards.")]) -> None:
    """Make the quickstart's small datasets from real pixels, in ImageNet, COCO and ADE20K layout, and their shards."""
    from modsquad_ds.data.quickstart import build

    build(out)


@app.command()
def photo_scenes(out: Annotated[Path, typer.Argument(help="Folder for the dataset.")]) -> None:
    """Make a small Taskonomy of photographs with computed labels, eleven of its thirteen tasks, in Taskonomy's layout."""
    from modsquad_ds.data.photo_scenes import build

    build(out)


@app.command()
def describe(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Parameters of a recipe's network, total and active per task. Needs no memory for them and no data."""
    from modsquad_ds.config import load_recipe
    from modsquad_ds.tables import print_description

    print_description(load_recipe(recipe, overrides or ()))


@app.command()
def compare(runs: Annotated[list[Path], typer.Argument(help="Evaluated run folders.")]) -> None:
    """Headline metrics of several runs side by side, with mutual information and parameters."""
    from modsquad_ds.tables import print_comparison

    print_comparison(runs)


@app.command()
def delta_m(
    results: Annotated[
        list[str], typer.Argument(help="Run folders or tables (.json, .csv: task, metric, value).", metavar="RUN_OR_TABLE...")
    ],
    against: Annotated[
        list[str], typer.Option(help="Baseline: a table, a published one's name, or a run; more than once for several.")
    ],
    task: Annotated[list[str] | None, typer.Option(help="Task to compare; more than once for several. Default all.")] = None,
) -> None:
    """Mean relative difference of each task's headline metric to single-task results, in percent; more is better.

    [dim]modsquad-ds delta-m runs/pascal --against pascal_context
    modsquad-ds delta-m runs/both --against runs/only_depth --against runs/only_normals[/dim]
    """
    from modsquad_ds.delta import print_delta_m

    print_delta_m(results, against, task or ())


for command in (plan, cli_modular.usage, cli_modular.extract, cli_modular.expand):
    app.command()(command)


@app.command(hidden=True)
def free_port() -> None:
    """A port for a launcher's --master_port, so that two jobs on one machine do not meet."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        print(probe.getsockname()[1])


def main() -> None:
    """Run the command line; the exit code is 2 for a user's mistake, 75 for training that a signal ended early.

    A rank that fails does not wait for others: it says why, tells the watchdog of the others, and leaves, which ends the job.
    Other ranks than the first wait a moment before they speak, so that a mistake that all of them meet is told once. What is no
    user's mistake may be another rank's doing (a connection that broke): then the watchdog names that rank in place of a trace.
    """
    try:
        app()
    except Stopped as stopped:
        ignore_more()
        ranks = _ranks()
        if ranks.first:
            say(str(stopped))
        _end(STOPPED_CODE, ranks)
    except UserError as error:
        _leave(2, f"error: {error}", _ranks())
    except SystemExit as ended:
        if not ended.code:
            raise
        # Typer's end, after its own words or without (Ctrl-C, nobody reads our output): the other ranks have to end too.
        _end(ended.code if isinstance(ended.code, int) else 1, _ranks())
    except Exception:
        ranks = _ranks()
        if ranks.world == 1:
            raise
        watchdog.suspect()
        _leave(1, traceback.format_exc(), ranks)


def _ranks() -> Ranks:
    try:
        return ranks_from(os.environ)
    except UserError:  # the launcher's statement makes no sense, which is what ended the program
        return Ranks()


def _leave(code: int, message: str, ranks: Ranks) -> None:
    if not ranks.first:
        time.sleep(2.0)
        message = f"rank {ranks.rank}: {message}"
    with suppress(OSError):  # as in `say`
        print(message, file=sys.stderr, flush=True)
    _end(code, ranks)


def _end(code: int, ranks: Ranks) -> None:
    if ranks.world == 1:
        sys.exit(code)
    with suppress(OSError):
        sys.stdout.flush()
    watchdog.leave(code)
    os._exit(code)
