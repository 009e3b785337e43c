"""The recipe's `init_from:`: a network's first weights out of a file, and what became of every tensor. Used by train.py.

A model file's tensors go by name: tasks by their names (rows of routers and usage, task embeddings, heads), experts by their
numbers, position embeddings to this run's grid. A timm ViT goes through upcycle.py. What has no counterpart is refused unless
`init_from.allow` names its kind, and told in any case.

Experts that the file lacks start as this run's own random ones, seen by all tasks: their outputs are small, and they differ from
each other. Copies of trained experts would need copies of their router rows, tie with their originals and learn the same.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modsquad_ds.config import Recipe
from modsquad_ds.errors import UserError
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model_file import ModelFile, read_model
from modsquad_ds.model_spec import block_plans
from modsquad_ds.objective import Usage
from modsquad_ds.structure import Structure, head_of, structure_of_network
from modsquad_ds.tasks import SetTask
from modsquad_ds.upcycle import is_vit, resized_grid, upcycle
from modsquad_ds.weights_file import is_model_file, read_weights

POSITION = "backbone.pos_embed"
SHOWN = 8
"""Items of a list that a line of the report or of an error shows."""


class Started(NamedTuple):
    """A start: what to load, and where it came from."""

    state: dict[str, Tensor]
    """The whole network's state dict."""
    usage: tuple[Usage, ...]
    """Per sparse layer; zero rows for tasks that the file lacks, and empty where it has no usage."""
    source: str
    matched: tuple[str, ...]
    """Tensors of the network that are the file's, as they are or in part."""
    changed: dict[str, str]
    """Tensors that are not the file's as they are -> what was done."""
    at_random: tuple[str, ...]
    """Tensors that keep this run's own start."""
    left_over: tuple[str, ...]
    """Tensors of the file that found no place."""
    notes: tuple[str, ...]
    classes: dict[str, list[str]]
    """Class names of the tasks that the file and the run have in common."""


class _Gap(NamedTuple):
    """A difference between file and recipe that needs leave."""

    kind: str
    """tasks, experts or tensors."""
    what: str


def start_file(recipe: Recipe) -> Path:
    """The file that `init_from` means."""
    assert recipe.init_from is not None
    path = recipe.init_from.path
    return path / "model.safetensors" if path.is_dir() else path


def initial_state(recipe: Recipe, network: MultiTaskNetwork) -> Started:
    """What the recipe's `init_from` makes of its freshly built network, which is not changed here.

    Every rank calls it before experts are spread, and gets the same. Raises UserError where the file cannot be read or does
    not fit, with the way out.
    """
    path = start_file(recipe)
    if is_model_file(path):
        return from_model(read_model(path), recipe, network, str(path))
    file = read_weights(path)
    if not is_vit(file.tensors):
        held = grouped(file.tensors)
        raise UserError(f"init_from {path}: neither a model file nor a timm vision transformer's state dict; it holds {held}")
    return from_vit(file.tensors, recipe, network, f"{path}" + (f" ({file.entry})" if file.entry else ""))


def from_vit(vit: Mapping[str, Tensor], recipe: Recipe, network: MultiTaskNetwork, where: str) -> Started:
    """The start from a timm ViT's state dict: the backbone by upcycle.py, the heads at random. `where` names the file."""
    assert recipe.init_from is not None
    own = network.state_dict()
    made = upcycle(vit, recipe.model, network.backbone.state_dict(), recipe.init_from.upcycle, where)
    gaps = [_Gap("tensors", f"this network cannot represent {grouped(made.lost)}")] if made.lost else []
    gaps += [_Gap("tensors", f"the file lacks {grouped(made.missing)}")] if made.missing else []
    _ask_leave(gaps, recipe, where)
    changed = {f"backbone.{name}": how for name, how in made.how.items()}
    state = own | {f"backbone.{name}": value.to(own[f"backbone.{name}"].dtype) for name, value in made.state.items()}
    matched = tuple(f"backbone.{name}" for name in made.state if name not in made.ours)
    rest = tuple(name for name in own if name not in matched and name not in changed)
    notes = [f"{recipe.model.shape.heads} attention heads by the recipe; a state dict does not tell their number"]
    notes += [f"not the ViT's function at step 0: {_by_block(made.changes)}" if made.changes else "the ViT's function at step 0"]
    return Started(state, (), f"timm ViT {where}", matched, changed, rest, made.left + made.lost, tuple(notes), {})


def from_model(model: ModelFile, recipe: Recipe, network: MultiTaskNetwork, where: str) -> Started:
    """The start from a model file with maybe other tasks, other numbers of experts, another grid."""
    with torch.device("meta"):
        source = MultiTaskNetwork(model.recipe)
    _check_tasks(model.recipe, recipe, where)
    shared = [task for task in network.task_names if task in source.task_names]
    own = network.state_dict()
    given = {n: model.state[n] for n in own if n in model.state and head_of(n) in (None, *shared)}
    at_random = tuple(name for name in own if name not in given)
    left = tuple(name for name in model.state if name not in given)
    rows = {network.task_names.index(task): source.task_names.index(task) for task in shared}
    placed = _place(own, given, (structure_of_network(source), structure_of_network(network)), rows)
    wrong = [name for name, (value, _) in placed.items() if value is None]
    if wrong:
        shapes = f"{wrong[0]} is {_shape(given[wrong[0]])} there and {_shape(own[wrong[0]])} here"
        raise UserError(f"init_from {where}: {shapes}; {_unlike(model.recipe, recipe)}")
    gaps = _task_gaps(source, network) + _expert_gaps(source, network)
    for text, names in (("the file lacks", at_random), ("this run has no place for the file's", left)):
        other = [name for name in names if head_of(name) in (None, *shared)]
        gaps += [_Gap("tensors", f"{text} {grouped(other)}")] if other else []
    _ask_leave(gaps, recipe, where)
    state = own | {name: value for name, (value, _) in placed.items() if value is not None}
    _check_visible(state, network, where)
    changed = {name: how for name, (_, how) in placed.items() if how}
    usage = _usage(model, source, network, rows)
    notes = _notes(model.recipe, recipe)
    classes = {task: names for task, names in model.classes.items() if task in network.task_names}
    return Started(state, usage, f"model file {where}", tuple(given), changed, at_random, left, notes, classes)


def report(started: Started) -> str:
    """What started from what, in at most a screen."""
    lines = [f"start from {started.source}: {len(started.matched)} of {len(started.state)} tensors"]
    by_how: dict[str, list[str]] = {}
    for name, how in started.changed.items():
        by_how.setdefault(how, []).append(name)
    lines += [f"  {how}: {grouped(names)}" for how, names in by_how.items()]
    lines += [f"  this run's own: {grouped(started.at_random)}"] if started.at_random else []
    lines += [f"  left over in the file: {grouped(started.left_over)}"] if started.left_over else []
    return "\n".join(lines + [f"  {note}" for note in started.notes])


def grouped(names: Iterable[str]) -> str:
    """Names in one line: those that differ in numbers or lie in one head are one group, with its size."""
    counts = Counter(f"heads.{head}" if (head := head_of(name)) else _unnumbered(name) for name in names)
    return _first([name if n == 1 else f"{name} ({n})" for name, n in counts.items()])


# ---------------------------------------------------------------- what may differ


def _check_tasks(there: Recipe, here: Recipe, where: str) -> None:
    """Refuse tasks of one name that are not one task, and attention that is cut into other heads, which no shape shows."""
    way_out = "give this run's task another name and set init_from.allow=[tasks], and it starts with a head of its own"
    for name, spec in here.active.items():
        old = there.active.get(name, spec)
        if old.kind != spec.kind:
            raise UserError(f"init_from {where}: task {name} is {old.kind} there and {spec.kind} here; {way_out}")
        if isinstance(old, SetTask) and isinstance(spec, SetTask) and old.target != spec.target:
            raise UserError(f"init_from {where}: task {name} has target {old.target} there and {spec.target} here; {way_out}")
        if old.num_classes != spec.num_classes:
            classes = f"{old.num_classes} classes there and {spec.num_classes} here"
            raise UserError(f"init_from {where}: task {name} has {classes}; {way_out}")
    old_heads, heads = ((r.model.shape.heads, r.model.attention_width) for r in (there, here))
    if old_heads != heads and not all(plan.attention for r in (there, here) for plan in block_plans(r.model)):
        cut = f"{old_heads[0]} heads of width {old_heads[1]} there and {heads[0]} of {heads[1]} here"
        raise UserError(f"init_from {where}: attention has {cut}; set model.heads and model.head_dim as there")


def _task_gaps(source: MultiTaskNetwork, network: MultiTaskNetwork) -> list[_Gap]:
    new = [task for task in network.task_names if task not in source.task_names]
    old = [task for task in source.task_names if task not in network.task_names]
    gaps = [_Gap("tasks", f"the file lacks task {', '.join(new)}")] if new else []
    return gaps + ([_Gap("tasks", f"this run lacks the file's task {', '.join(old)}")] if old else [])


def _expert_gaps(source: MultiTaskNetwork, network: MultiTaskNetwork) -> list[_Gap]:
    there, here = (
        {path: layer.experts.num_experts for path, layer in net.backbone.sparse_layers().items()} for net in (source, network)
    )
    unequal = [f"{path} has {there[path]} experts there and {n} here" for path, n in here.items() if there.get(path, n) != n]
    return [_Gap("experts", _first(unequal))] if unequal else []


def _ask_leave(gaps: Iterable[_Gap], recipe: Recipe, where: str) -> None:
    """Raise UserError unless `init_from.allow` names the kinds of all gaps."""
    assert recipe.init_from is not None
    allowed = set(recipe.init_from.allow)
    asked = [gap for gap in gaps if gap.kind not in allowed]
    if asked:
        kinds = sorted(allowed | {gap.kind for gap in asked})
        found = "; ".join(gap.what for gap in asked)
        raise UserError(f"init_from {where}: {found}; if this is meant, set init_from.allow=[{','.join(kinds)}]")


def _check_visible(state: Mapping[str, Tensor], network: MultiTaskNetwork, where: str) -> None:
    """Refuse a task that sees fewer experts than it chooses."""
    for path, layer in network.backbone.sparse_layers().items():
        top_k = layer.router.top_k
        for row, seen in enumerate(state[f"backbone.{path}.router.visible"].sum(1).tolist()):
            if seen < top_k:
                who = f"task {network.task_names[row]}" if layer.router.spec.per_task else "the router"
                what = f"{who} sees {seen} of the {layer.experts.num_experts} experts of {path}, top_k is {top_k}"
                raise UserError(f"init_from {where}: {what}; keep more experts (num_experts, per_layer) or lower top_k")


def _notes(there: Recipe, here: Recipe) -> tuple[str, ...]:
    """Settings that no tensor shows and by which the same weights compute something else."""
    pairs: list[tuple[str, Any, Any]] = [(key, getattr(there, key), getattr(here, key)) for key in ("mean", "std")]
    pairs.append(("model.router.renormalize", there.model.router.renormalize, here.model.router.renormalize))
    pairs += [(f"model.{k}.top_k", getattr(there.model, k).top_k, getattr(here.model, k).top_k) for k in ("mlp", "attention")]
    return tuple(f"{key} is {old} there and {new} here" for key, old, new in pairs if old != new)


def _unlike(there: Recipe, here: Recipe) -> str:
    """The settings of tensors' shapes that differ, and the way out."""

    def settings(recipe: Recipe) -> dict[str, Any]:
        model = recipe.model
        heads = {f"tasks.{name}.head": spec.head.model_dump() for name, spec in recipe.active.items()}
        return heads | {
            "model.width": model.shape.width, "model.patch": model.shape.patch, "model.head_dim": model.attention_width,
            "model.mlp_ratio": model.mlp_ratio, "model.mlp.hidden": model.expert_hidden,
            "model.attention.hidden": model.attention.hidden or model.attention_width,
            "model.router.type": model.router.type, "model.router.per_task": model.router.per_task,
        }  # fmt: skip

    old, new = settings(there), settings(here)
    differ = [f"{key} is {old[key]} there and {new[key]} here" for key in new if key in old and old[key] != new[key]]
    return f"{_first(differ)}{'; ' if differ else ''}use the file's settings"


# ---------------------------------------------------------------- tensor by tensor


def _place(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], structures: tuple[Structure, Structure], rows: Mapping[int, int]
) -> dict[str, tuple[Tensor | None, str]]:
    """Per tensor that the file gives: the start made of it, or None where shapes do not fit; and what was done, if anything.

    Args:
        structures: the file's and the network's.
        rows: the network's number of each shared task -> the file's.
    """
    there, here = structures
    axes_there, axes_here = there.expert_axes, here.expert_axes
    placed: dict[str, tuple[Tensor | None, str]] = {}
    for name, tensor in given.items():
        value, how = own[name], []
        if name == POSITION and tensor.shape[1:] != value.shape[1:] and tensor.shape[2] == value.shape[2]:
            side, grid = (round(t.shape[1] ** 0.5) for t in (tensor, value))
            tensor = resized_grid(tensor, grid)
            how.append(f"resized from {side}x{side} to {grid}x{grid}")
        by_task = rows if name in here.by_task else None
        axis = axes_here.get(name)
        same = (name in there.by_task) == (name in here.by_task) and axes_there.get(name) == axis
        if by_task is not None and (by_task != dict(zip(range(len(value)), range(len(tensor)), strict=False))):
            how.append(f"rows of the {len(by_task)} shared tasks")
        if axis is not None and same and tensor.shape[axis] != value.shape[axis]:
            how.append(f"experts 0 to {min(tensor.shape[axis], value.shape[axis]) - 1} of {tensor.shape[axis]}")
        placed[name] = (_laid_over(value, tensor, by_task, axis) if same else None, ", ".join(how))
    return placed


def _laid_over(own: Tensor, given: Tensor, rows: Mapping[int, int] | None, axis: int | None) -> Tensor | None:
    """`own` with the file's entries of shared tasks (axis 0) and common experts (`axis`); None where other axes differ."""
    free = {0 if rows is not None else None, axis}
    if own.dim() != given.dim() or any(own.shape[i] != given.shape[i] for i in range(own.dim()) if i not in free):
        return None
    out = own.clone()
    into = out
    if axis is not None:
        common = min(own.shape[axis], given.shape[axis])
        into, given = out.narrow(axis, 0, common), given.narrow(axis, 0, common)
    if rows is None:
        into.copy_(given)
    elif rows:
        into[list(rows)] = given[list(rows.values())].to(out.dtype)
    return out


def _usage(
    model: ModelFile, source: MultiTaskNetwork, network: MultiTaskNetwork, rows: Mapping[int, int]
) -> tuple[Usage, ...]:
    """The file's usage of each of the network's layers, of shared tasks and common experts, rows of shares of what is left."""
    if not model.usage:
        return ()
    of_layer = dict(zip(source.backbone.sparse_layers(), model.usage, strict=True))
    made = []
    for path, layer in network.backbone.sparse_layers().items():
        zeros_TE = torch.zeros(len(network.task_names), layer.experts.num_experts)
        old = of_layer.get(path)
        both = (zeros_TE, zeros_TE) if old is None else (_usage_rows(zeros_TE, old_TE, rows) for old_TE in old)
        made.append(Usage(*both))
    return tuple(made)


def _usage_rows(zeros_TE: Tensor, old_TE: Tensor, rows: Mapping[int, int]) -> Tensor:
    new_TE = _laid_over(zeros_TE, old_TE, rows, 1)
    assert new_TE is not None
    if new_TE.shape[1] < old_TE.shape[1]:
        new_TE = new_TE / new_TE.sum(1, keepdim=True).clamp(min=torch.finfo(new_TE.dtype).tiny)
    return new_TE


# ---------------------------------------------------------------- words


def _unnumbered(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _by_block(changes: Iterable[str]) -> str:
    """`blocks.3.mlp: why` of several blocks as one."""
    parted = Counter((_unnumbered(path), why) for path, _, why in (change.rpartition(": ") for change in changes))
    return _first([f"{path}: {why} ({n})" if path else why for (path, why), n in parted.items()])


def _first(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
