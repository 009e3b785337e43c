"""Expansion: a model file and a new task's entry in, a larger model file and the recipe that trains it out. One process.

    OUT (a model file)  OUT with .yaml in place of its ending (the recipe)
"""

from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from modsquad_ds.adapt_spec import AdaptSpec, InitSpec
from modsquad_ds.config import Recipe, recipe_from_tree, recipe_to_tree
from modsquad_ds.data.loader_plan import TRAIN, check_data
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import model_path
from modsquad_ds.files import check_new_file, write_atomic
from modsquad_ds.location import Location
from modsquad_ds.model_file import ModelFile, read_model, recipe_on, write_model
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from modsquad_ds.recipe_tree import UniqueKeys
from modsquad_ds.structure import PerKind, structure_of
from modsquad_ds.surgery import expand as grow
from modsquad_ds.surgery import experts_of
from modsquad_ds.tasks import SetTask, TaskSpec

EXAMPLE = "faces: {kind: classification, data: faces, num_classes: 2, batch_size: 16}"


def expand(run_or_model: Path, task: str, new: PerKind, out: Path, data: Location | None = None, overwrite: bool = False) -> None:
    """Add a task, and experts that only it sees, to a model; see `surgery.expand`. Old tasks' outputs stay as they are.

    Writes the larger model and, beside it, a recipe that trains the addition alone and leaves all else frozen.

    Args:
        run_or_model: a run folder, or a model file.
        task: YAML file, or YAML itself, with the task's entry as a recipe has it under `tasks:`.
        new: experts to add to each sparse layer, by kind.
        data: folder or URL that the task's relative `data:` path starts from, in place of the recipe's data_root.
        overwrite: replace results that are there already.

    Raises UserError, with nothing written, where the task, its data, the numbers or `out` do not fit.
    """
    recipe_file = out.with_suffix(".yaml")
    check_new_file(out, "--out", overwrite)
    if recipe_file == out:
        raise UserError(f"--out {out}: a recipe of this name is written beside the model; give the model another ending")
    check_new_file(recipe_file, "--out, its recipe", overwrite)
    path = model_path(run_or_model)
    model = read_model(path)
    readable = recipe_on(model, data)
    name, spec = read_task(task, model)
    larger = grow(model, name, spec, new, classes_of(readable, name, spec))
    recipe = training_recipe(larger.recipe.model_copy(update={"data_root": readable.data_root}), name, new, out)
    write_model(out, larger)
    write_atomic(recipe_file, yaml.safe_dump(recipe_to_tree(recipe), sort_keys=False, allow_unicode=True).encode())
    _tell(model, larger, name, out, recipe_file)


def read_task(text: str, model: ModelFile) -> tuple[str, TaskSpec]:
    """Name and checked entry of the new task: from a YAML file, its name ending in .yaml or .yml, or from YAML itself.

    One entry `NAME: {kind: ..., ...}`, also under `tasks:`; of a recipe's several tasks, the one that the model lacks. Its image
    set is one of the model's, or stands under `sets:` beside `tasks:`.
    """
    tree = _yaml(text)
    entries = tree.get("tasks", tree) if isinstance(tree, dict) else tree
    if isinstance(entries, dict) and len(entries) > 1:
        entries = {name: entry for name, entry in entries.items() if name not in model.recipe.active}
    if not isinstance(entries, dict) or len(entries) != 1:
        found = f"found {len(entries)} new tasks" if isinstance(entries, dict) else f"found {type(entries).__name__}"
        raise UserError(f"--task {_short(text)}: {found}; expected one entry, e.g. '{EXAMPLE}', or a YAML file with it")
    ((name, entry),) = entries.items()
    given = tree.get("sets") if entries is not tree else None
    whole = recipe_to_tree(model.recipe)
    whole |= {"tasks": {name: entry}, "only": [], "adapt": {}, "init_from": None}
    if given is not None:
        whole["sets"] = whole["sets"] | given if isinstance(given, dict) else given
    recipe = recipe_from_tree(whole, f"of --task {_short(text)}")
    spec = recipe.tasks[name]
    if spec.stream is not None and recipe.sets[spec.stream] != model.recipe.sets.get(spec.stream, recipe.sets[spec.stream]):
        raise UserError(f"--task {_short(text)}: sets.{spec.stream}: the model has another image set of this name; rename it")
    return name, spec


def _yaml(text: str) -> Any:
    if not text.endswith((".yaml", ".yml")):
        content = text
    else:
        try:
            content = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--task {text}: cannot be read ({error}); give a YAML file, or an entry: '{EXAMPLE}'") from None
    try:
        return yaml.load(content, UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"--task {_short(text)}: not valid YAML: {' '.join(str(error).split())}") from None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def classes_of(recipe: Recipe, name: str, spec: TaskSpec) -> tuple[str, ...]:
    """Class names of the task's training shards. Raises UserError where shards of either split are missing or do not fit."""
    plan = loader_plan(recipe, Ranks(), {name: spec})
    check_data(plan)
    return tuple(plan.classes(name, TRAIN))


def training_recipe(recipe: Recipe, name: str, new: PerKind, model: Path) -> Recipe:
    """The recipe that starts from the larger model and trains the new task's parts: its routers, head and new experts."""
    if any(new):
        adapt = AdaptSpec(tasks=(name,), train="experts", experts=max(new), choose="added")
    else:  # one router for all tasks must stay as it is
        adapt = AdaptSpec(tasks=(name,), train="routers+heads" if recipe.model.router.per_task else "heads")
    # A new run, part of which is frozen: there is no checkpoint to go on from, and no expert moves.
    parallel = recipe.parallel.model_copy(update={"placement": "fixed"})
    changes: dict[str, Any] = {"name": f"{recipe.name}_{name}", "run": model.with_suffix(""), "resume": "auto"}
    changes |= {"init_from": InitSpec(path=model), "adapt": adapt, "parallel": parallel}
    return recipe_from_tree(recipe_to_tree(recipe.model_copy(update=changes)), f"that trains {name}")


def _tell(model: ModelFile, larger: ModelFile, name: str, out: Path, recipe_file: Path) -> None:
    spec = larger.recipe.tasks[name]
    of_pixels = isinstance(spec, SetTask) and spec.kind not in ("soft_classification", "semantic")
    title = f"task {name}: {spec.kind}, {spec.num_classes} {'numbers a pixel' if of_pixels else 'classes'}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("sparse layer", overflow="fold")
    for heading in ("experts", "now", "parameters more"):
        table.add_column(heading, justify="right")
    for before, after in zip(structure_of(model.recipe).layers, structure_of(larger.recipe).layers, strict=True):
        old, now = experts_of(model, before), experts_of(larger, after)
        table.add_row(after.path, f"{old}", f"{now}", f"{(now - old) * after.size:,}")
    console = Console()
    (console if console.width <= 80 else Console(width=80)).print(table)
    for key in ("ep_size", "attention_ep_size"):
        old, now = (getattr(one.recipe.parallel, key) for one in (model, larger))
        if old != now:
            print(f"parallel.{key}: {now}, as {old} no longer divides the numbers of experts")
    print(f"{out}: {_numel(larger):,} numbers, {_numel(larger) - _numel(model):,} more. Train what was added, all else frozen:")
    print(f"  python -m modsquad_ds train {recipe_file}")


def _numel(model: ModelFile) -> int:
    return sum(tensor.numel() for tensor in model.state.values())
