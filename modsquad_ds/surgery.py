"""Surgery: a model in, a smaller or a larger one out. Pure functions on model files, under the commands extract and expand.

Axes: T tasks, E experts of a layer. Layers are the sparse ones, in the order of the statistics.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modsquad_ds.adapt_spec import AdaptSpec
from modsquad_ds.config import Recipe, recipe_from_tree, recipe_to_tree
from modsquad_ds.errors import UserError
from modsquad_ds.model.network import build_network
from modsquad_ds.model_file import ModelFile
from modsquad_ds.objective import Usage
from modsquad_ds.selection import Kept
from modsquad_ds.structure import PerKind, SparsePlace, Structure, head_of, structure_of, top_k_of
from modsquad_ds.tasks import SetTask, TaskSpec, set_of

# ---------------------------------------------------------------- a smaller model


def extract(model: ModelFile, tasks: Sequence[str], kept: Kept, top_k: PerKind | None = None) -> ModelFile:
    """The part of a model that some of its tasks need: their heads, embeddings and router rows, and the kept experts.

    A task chooses among the kept experts that it saw before; where all that it saw are kept, its outputs are the model's, bit
    for bit. Usage is cut likewise and its rows are scaled to the sums they had: what the smaller model's own statistics would
    be if tokens turned to the rest in proportion.

    Args:
        kept: as `kept_by_usage` gives it.
        top_k: fewer experts per token than the model has; default as many.

    Raises UserError for an unknown task, a top-k above the model's, and a task that is left fewer experts than top-k.
    """
    for task in tasks:
        known_task(model, task)
    recipe, structure = model.recipe, structure_of(model.recipe)
    names = [name for name in recipe.active if name in tasks]
    rows = [list(recipe.active).index(name) for name in names]
    axes = {name: (axis, kept[i]) for i, layer in enumerate(structure.layers) for name, axis in layer.expert_axes.items()}
    state = {}
    for name, tensor in model.state.items():
        if head_of(name) not in (None, *names):
            continue
        taken = _taken(tensor, 0, rows) if name in structure.by_task else tensor
        state[name] = _taken(taken, *axes[name]) if name in axes else taken.clone()
    smaller = _smaller_recipe(recipe, structure, names, kept, check_top_k(recipe, top_k))
    for layer in structure.layers:
        _check_left(layer, state[f"backbone.{layer.path}.router.visible"], names, getattr(top_k_of(smaller), layer.kind))
    usage = tuple(Usage(*(_cut(x, rows, experts) for x in layer)) for layer, experts in zip(model.usage, kept, strict=False))
    return ModelFile(smaller, state, {n: model.classes[n] for n in names if n in model.classes}, usage)


def experts_of(model: ModelFile, layer: SparsePlace) -> int:
    """Experts of one of a model's layers."""
    return model.state[f"backbone.{layer.path}.router.visible"].shape[1]


def known_task(model: ModelFile, task: str) -> None:
    """Raises UserError for a name that is not one of the model's tasks."""
    if task not in model.recipe.active:
        raise UserError(f"task {task!r}: the model has no such task; its tasks are: {', '.join(model.recipe.active)}")


def check_top_k(recipe: Recipe, top_k: PerKind | None) -> PerKind:
    """The top-k of a smaller model. Raises UserError where it is above the recipe's own, or below 1."""
    own = top_k_of(recipe)
    wanted = top_k or own
    for kind, new, old in zip(PerKind._fields, wanted, own, strict=True):
        if not 1 <= new <= old:
            raise UserError(f"{kind} top-k {new}: the model was trained with {old}; give 1 to {old}")
    return wanted


def _taken(tensor: Tensor, axis: int, places: Sequence[int]) -> Tensor:
    return tensor.index_select(axis, torch.tensor(places, device=tensor.device))


def _cut(usage_TE: Tensor, rows: Sequence[int], experts: Sequence[int]) -> Tensor:
    """Rows and columns of a usage statistic, each row scaled to its old sum; a factor of exactly 1 where all stays."""
    whole_TE = _taken(usage_TE, 0, rows)
    part_TE = _taken(whole_TE, 1, experts)
    if part_TE.shape == whole_TE.shape:
        return part_TE
    sum_T1 = part_TE.sum(1, keepdim=True)
    return part_TE * torch.where(sum_T1 > 0, whole_TE.sum(1, keepdim=True) / sum_T1, 0.0)


def _check_left(layer: SparsePlace, visible: Tensor, names: Sequence[str], top_k: int) -> None:
    for row, seen in enumerate(visible.sum(1).tolist()):
        if seen < top_k:
            whose = f"task {names[row]!r}" if len(visible) == len(names) else "the tasks"
            raise UserError(
                f"{layer.path}: {seen} of the kept experts are seen by {whose}, and its top-k is {top_k}; keep more experts, or "
                "lower the top-k"
            )


def _smaller_recipe(recipe: Recipe, structure: Structure, names: Sequence[str], kept: Kept, top_k: PerKind) -> Recipe:
    tree = _alone(recipe)
    tree["tasks"] = {name: tree["tasks"][name] for name in names}
    tree["parallel"] |= {"ep_size": 1, "attention_ep_size": 1}
    for kind in PerKind._fields:
        counts = [len(e) for layer, e in zip(structure.layers, kept, strict=True) if layer.kind == kind]
        if counts:
            tree["model"][kind] |= _numbers(counts) | {"top_k": getattr(top_k, kind)}
    if top_k.mlp != recipe.model.mlp.top_k:
        tree["model"]["mlp"]["hidden"] = recipe.model.expert_hidden  # its default depends on top_k
    return recipe_from_tree(tree, "of the extracted model")


def _alone(recipe: Recipe) -> dict[str, Any]:
    """The recipe's tree, without what concerned the making of this model: only its own tasks, no start, no adaptation."""
    tree = recipe_to_tree(recipe)
    tree |= {"only": [], "init_from": None, "adapt": AdaptSpec().model_dump(mode="json")}
    tree["tasks"] = {name: tree["tasks"][name] for name in recipe.active}
    return tree


def _numbers(counts: Sequence[int]) -> dict[str, Any]:
    """The numbers of experts as the recipe states them."""
    return {"num_experts": max(counts), "per_layer": [] if len(set(counts)) == 1 else list(counts)}


# ---------------------------------------------------------------- a larger model


def expand(model: ModelFile, name: str, spec: TaskSpec, new: PerKind, classes: Sequence[str]) -> ModelFile:
    """The model with one more task, and in every sparse layer new experts that only this task sees; it sees the old ones too.

    Old tasks compute what they did, bit for bit. The task's head, embedding and router rows start as a fresh network of the
    larger recipe would have them. New experts get the highest numbers and start as copies of the layer's experts that all
    tasks together use most: what they compute is of use from the first step, which matters where the old parts stay frozen
    and little else can learn. (The heterogeneous follow-up's code copies the first experts.)

    Args:
        new: experts to add to each layer, by kind.
        classes: class names of the task.

    Raises UserError where the task exists, its entry does not fit, or new experts cannot be hidden or have no layer.
    """
    if name in model.recipe.active:
        raise UserError(f"task {name!r}: the model has a task of this name; choose another")
    if len(classes) != spec.num_classes:
        raise UserError(f"tasks.{name}.num_classes: {spec.num_classes}, but its data have {len(classes)} classes")
    structure = structure_of(model.recipe)
    larger = _larger_recipe(model, name, spec, new, structure)
    fresh, state = build_network(larger).state_dict(), {}
    for key, tensor in fresh.items():
        old = model.state.get(key)
        state[key] = tensor if old is None else _grown(old, tensor)
    for number, layer in enumerate(structure.layers):
        before = experts_of(model, layer)
        if getattr(new, layer.kind):
            state[f"backbone.{layer.path}.router.visible"][:-1, before:] = False
            sources = _most_used(model, number, before, getattr(new, layer.kind))
            for key, axis in layer.expert_axes.items():
                if axis == 0:
                    state[key][before:] = _taken(model.state[key], 0, sources)
    usage = tuple(
        Usage(*(_padded(x, 1, getattr(new, layer.kind)) for x in of_layer))
        for layer, of_layer in zip(structure.layers, model.usage, strict=False)
    )
    return ModelFile(larger, state, {**model.classes, name: list(classes)}, usage)


def _larger_recipe(model: ModelFile, name: str, spec: TaskSpec, new: PerKind, structure: Structure) -> Recipe:
    """The recipe with the task and the experts; ranks share experts as before where the numbers still divide, else not."""
    recipe, tree = model.recipe, _alone(model.recipe)
    if any(new) and not recipe.model.router.per_task:
        raise UserError(
            "new experts: the model has one router for all tasks (model.router.per_task: false), so old tasks would see them"
        )
    tree["tasks"][name] = spec.model_dump(mode="json")
    if isinstance(spec, SetTask):
        tree["sets"].setdefault(spec.set, set_of(spec).model_dump(mode="json"))
    for kind, ep in (("mlp", "ep_size"), ("attention", "attention_ep_size")):
        counts = [experts_of(model, layer) + getattr(new, kind) for layer in structure.layers if layer.kind == kind]
        if getattr(new, kind) < 0 or (getattr(new, kind) and not counts):
            raise UserError(f"{getattr(new, kind)} new {kind} experts: the model has {len(counts)} sparse {kind} layers")
        if counts:
            tree["model"][kind] |= _numbers(counts)
        if any(count % tree["parallel"][ep] for count in counts):
            tree["parallel"][ep] = 1
    return recipe_from_tree(tree, f"with the task {name}")


def _grown(old: Tensor, fresh: Tensor) -> Tensor:
    """The larger tensor with the old one in its first places along every axis."""
    if old.dim() != fresh.dim() or any(a > b for a, b in zip(old.shape, fresh.shape, strict=True)):
        raise ValueError(f"a tensor of {tuple(old.shape)} does not grow to {tuple(fresh.shape)}")
    grown = fresh.to(old.dtype, copy=True)
    grown[tuple(slice(0, size) for size in old.shape)] = old
    return grown


def _most_used(model: ModelFile, layer: int, experts: int, wanted: int) -> list[int]:
    """The experts that all tasks together use most, in turn where more are wanted; by number where nothing is known."""
    use_E = model.usage[layer].share_TE.sum(0) if model.usage else torch.zeros(experts)
    order = use_E.sort(descending=True, stable=True).indices.tolist()
    return [order[i % experts] for i in range(wanted)]


def _padded(usage_TE: Tensor, tasks: int, experts: int) -> Tensor:
    return F.pad(usage_TE, (0, experts, 0, tasks))
