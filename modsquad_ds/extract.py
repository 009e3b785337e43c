"""Extraction: a model file in, a smaller one for some of its tasks out, and what that saves. One process, no ranks.

    OUT (a model file)  with a sweep also OUT's name with .sweep.csv and .sweep.png in place of its ending
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from modsquad_ds.adapt_spec import PruneSpec
from modsquad_ds.config import Recipe
from modsquad_ds.costs import Costs, Version, costs_side_by_side, print_costs
from modsquad_ds.data.loader_plan import VAL, LoaderPlan, check_split
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import Results, check_classes, evaluate_network, model_path
from modsquad_ds.files import check_new_file, write_atomic
from modsquad_ds.location import Location
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model_file import ModelFile, network_of, read_model, recipe_on, write_model
from modsquad_ds.parallel.launch import device
from modsquad_ds.parallel.ranks import Ranks, ranks_from
from modsquad_ds.plan import loader_plan
from modsquad_ds.selection import kept_experts, share_kept
from modsquad_ds.structure import PerKind, structure_of, top_k_of
from modsquad_ds.surgery import check_top_k, known_task
from modsquad_ds.surgery import extract as cut
from modsquad_ds.sweep import Point, outcomes, points_of, rule_name, sweep_csv, sweep_png
from modsquad_ds.tables import metric_name
from modsquad_ds.tasks import metrics_of

DEFAULT_RULE = PruneSpec(min_usage=0.03)
"""Mod-Squad's."""


class Fewer(NamedTuple):
    """Experts per token that the user asks for; None leaves the model's number."""

    both: int | None = None
    mlp: int | None = None
    attention: int | None = None


class _Measured(NamedTuple):
    """Held-out metrics, where data were given."""

    plan: LoaderPlan
    full: Results
    part: Results


def extract(
    run_or_model: Path,
    tasks: Sequence[str],
    out: Path,
    rule: PruneSpec = DEFAULT_RULE,
    fewer: Fewer = Fewer(),  # noqa: B008  (immutable)
    data: Location | None = None,
    sweep: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the part of a model that some of its tasks need, and print what it costs beside the whole.

    Which experts are needed is read from the moving average of usage that training left in the file, as Mod-Squad does: it
    needs no data, and what is chosen on held-out data would flatter the metric that is then measured on them.

    Args:
        run_or_model: a run folder, or a model file.
        rule: which experts stay.
        data: folder that relative `data:` paths of the tasks start from; with it, metrics on the split `val` are told.
        sweep: also measure other thresholds and top-k; needs `data`.
        overwrite: replace results that are there already.

    Everything is checked and measured before the first file is written. Raises UserError where something does not fit.
    """
    files = [out, *(out.with_suffix(f".sweep.{ending}") for ending in ("csv", "png") if sweep)]
    for file in files:
        check_new_file(file, "--out", overwrite)
    if sweep and data is None:
        raise UserError("--sweep: measures metrics, for which it needs the tasks' shards; give --data FOLDER")
    if ranks_from(os.environ).world > 1:
        raise UserError("extract: works in one process; start it without a launcher")
    path = model_path(run_or_model)
    model = read_model(path)
    _check_tasks(model, tasks)
    top_k = top_k_from(model, fewer)
    kept = kept_experts(model, tasks, rule, top_k)
    part = cut(model, tasks, kept, top_k)
    full, small = (network_of(one, str(path)).to(device()) for one in (model, part))
    measured = None if data is None else _measure(model, part, full, small, data)
    results = []
    if sweep and measured is not None:
        results = _sweep(model, tasks, Point(rule, top_k, kept, True), measured)
    versions = [Version(full, model.recipe, path), Version(small, part.recipe)]
    costs = {task: costs_side_by_side(versions, task) for task in part.recipe.tasks}
    write_model(out, part)
    for file, content in zip(files[1:], results, strict=True):
        write_atomic(file, content)
    _tell(costs, measured, out)
    numbers = [f"{layer.path} {len(e)}" for layer, e in zip(structure_of(model.recipe).layers, kept, strict=True)]
    told = f"{share_kept(model, kept):.1%} of their parameters; {', '.join(numbers) or 'no sparse layers'}"
    print(f"experts kept, {rule_name(rule)}: {told}", *files, sep="\n")


def _tell(costs: Mapping[str, Sequence[Costs]], measured: _Measured | None, out: Path) -> None:
    """A table per task: the full model and the written one."""
    for task, (whole, smaller) in costs.items():
        rows = {"full": whole, "extracted": smaller._replace(file_bytes=out.stat().st_size)}
        title = f"{task}: one image of {whole.image[0]} x {whole.image[1]} px"
        if measured is None:
            print_costs(title, rows)
            continue
        metric = metrics_of(measured.plan.tasks[task])[0]
        name = metric_name(measured.plan.tasks[task], metric)
        title += f"; {name}" if name != metric else ""  # a heading of that length would cut the columns of numbers
        values = {"full": measured.full[task][metric], "extracted": measured.part[task][metric]}
        print_costs(title, rows, values, metric)


def _check_tasks(model: ModelFile, tasks: Sequence[str]) -> None:
    for task in tasks:
        known_task(model, task)
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"--task {', '.join(tasks)}: name at least one task, each once")


def rule_from(min_usage: float | None, keep: int | None, keep_params: str | None) -> PruneSpec:
    """The rule of the options; Mod-Squad's where none is given. Raises UserError for several and for values out of range."""
    given = {"--min-usage": min_usage, "--keep": keep, "--keep-params": keep_params}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: give one of them, as each says which experts stay")
    if not named:
        return DEFAULT_RULE
    try:
        share = None if keep_params is None else _share(keep_params)
        return PruneSpec(min_usage=min_usage, keep=keep, keep_params=share)
    except ValidationError as error:
        raise UserError(f"{named[0]} {given[named[0]]}: {error.errors()[0]['msg'].lower()}") from None


def _share(text: str) -> float:
    """`40%` and `0.4` -> 0.4"""
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UserError(f"--keep-params {text}: expected a share such as 40% or 0.4") from None


def top_k_from(model: ModelFile, fewer: Fewer) -> PerKind:
    """The smaller model's top-k. Raises UserError for numbers the model cannot have, and for kinds of layer that it lacks."""
    if fewer.both is not None and (fewer.mlp is not None or fewer.attention is not None):
        raise UserError("--top-k: sets both kinds; give it, or --mlp-top-k and --attention-top-k")
    kinds = {layer.kind for layer in structure_of(model.recipe).layers}
    for kind in PerKind._fields:
        if getattr(fewer, kind) is not None and kind not in kinds:
            raise UserError(f"--{kind}-top-k {getattr(fewer, kind)}: the model has no sparse {kind} layers; leave it out")
    if fewer.both is not None and not kinds:
        raise UserError(f"--top-k {fewer.both}: the model has no sparse layers; leave it out")
    asked = {kind: getattr(fewer, kind) if fewer.both is None else fewer.both for kind in PerKind._fields if kind in kinds}
    wanted = {kind: number for kind, number in asked.items() if number is not None}
    return check_top_k(model.recipe, top_k_of(model.recipe)._replace(**wanted))


def _measure(model: ModelFile, part: ModelFile, full: MultiTaskNetwork, small: MultiTaskNetwork, data: Location) -> _Measured:
    """Metrics of both on held-out data, of the part's tasks alone."""
    recipe: Recipe = recipe_on(model, data).model_copy(update={"only": tuple(part.recipe.tasks)})
    plan = loader_plan(recipe, Ranks())
    check_split(plan, VAL)
    check_classes(part, plan, VAL)
    return _Measured(plan, evaluate_network(full, recipe, plan, VAL), evaluate_network(small, part.recipe, plan, VAL))


def _sweep(model: ModelFile, tasks: Sequence[str], chosen: Point, measured: _Measured) -> list[bytes]:
    """The CSV file's and the picture's bytes. With every expert kept the outputs are the full model's, so they are known."""
    points = points_of(model, tasks, chosen)
    known = {(points[0].kept, points[0].top_k): measured.full, (chosen.kept, chosen.top_k): measured.part}
    found = outcomes(model, tasks, points, measured.plan, known)
    return [sweep_csv(model, points, found), sweep_png(model, points, found, measured.full)]
