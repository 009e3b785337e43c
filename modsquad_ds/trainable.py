"""What of a network learns: the `adapt:` section as names of parameters and their entries. Pure; parallel/ freezes the rest.

Entries are along axis 0, which counts tasks in routers and task embeddings, experts in expert banks.

Axes: T tasks, E experts of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from modsquad_ds.adapt_spec import AdaptSpec
from modsquad_ds.config import Recipe
from modsquad_ds.errors import UserError
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model.sparse import SparseLayer
from modsquad_ds.model.vit import Block
from modsquad_ds.objective import Usage

Trainable = Mapping[str, tuple[int, ...] | None]
"""Name of a parameter -> its entries that learn, ascending; None: all of it. What is not named is frozen."""

Chosen = tuple[tuple[int, ...], ...]
"""Per sparse layer, in the order of the statistics: experts, ascending."""


def trainable_entries(network: MultiTaskNetwork, recipe: Recipe, done: int = 0, chosen: Chosen = ()) -> Trainable | None:
    """What learns of a network that holds all its experts, after `done` steps; None: everything.

    In the first `adapt.router_steps` that is routers, task embeddings and heads. `chosen`: the experts that learn afterwards
    with `adapt.train: experts`.
    """
    mode = recipe.adapt.train if done >= recipe.adapt.router_steps else "routers+heads"
    if mode == "all":
        return None
    tasks = [network.task_names.index(name) for name in recipe.adapted]
    found: dict[str, tuple[int, ...] | None] = {}
    if mode != "routers":
        found |= {f"heads.{name}.{n}": None for name in recipe.adapted for n, _ in network.head(name).named_parameters()}
    if mode != "heads":
        found |= {name: _all_as_none(network.get_parameter(name), tuple(tasks)) for name in _per_task(network)}
        found |= dict.fromkeys(_shared_routers(network))
    if network.task_scale is not None:
        found["task_scale"] = _all_as_none(network.task_scale, tuple(tasks))
    if mode == "experts":
        layers = network.backbone.sparse_layers().items()
        for (path, layer), experts in zip(layers, chosen, strict=True):
            found |= {f"backbone.{path}.experts.{n}": experts for n, _ in layer.experts.named_parameters() if experts}
    if not found:
        raise UserError(f"adapt.train {mode}: the network has no routers and no task embeddings; set adapt.train to heads or all")
    return found


def choose_experts(network: MultiTaskNetwork, recipe: Recipe, usage: Sequence[Usage]) -> Chosen:
    """The experts that learn with `adapt.train: experts`.

    A layer gives `adapt.experts` of them, or as many as it has. Usage of an expert is the mean over the adapted tasks of the
    share of their choices that fell on it; where none of them was seen yet, over all tasks. Equals: the lower number first.

    Raises UserError where nothing is known of usage, or no layer has an expert of the kind asked for.
    """
    spec, layers = recipe.adapt, list(network.backbone.sparse_layers().values())
    tasks = [network.task_names.index(name) for name in recipe.adapted]
    if layers and spec.choose != "added" and not any(bool(of_layer.share_TE.any()) for of_layer in usage):
        raise UserError(
            f"adapt.choose {spec.choose}: nothing is known yet of how this run's tasks use experts; set adapt.router_steps, "
            "and they are chosen by what the routers learn in these steps"
        )
    seen = usage or tuple(_nothing_seen(layer, len(network.task_names)) for layer in layers)
    chosen = tuple(_chosen_in(layer, spec, tasks, of_layer) for layer, of_layer in zip(layers, seen, strict=True))
    if not any(chosen):
        raise UserError(
            f"adapt.choose {spec.choose}: no layer has an expert that only {', '.join(recipe.adapted)} may choose; add some with "
            "`expand`, or set adapt.choose to best or worst"
            if layers
            else f"adapt.train experts: the layout {recipe.model.layout} has no experts; set adapt.train to another value"
        )
    return chosen


def count_trainable(network: MultiTaskNetwork, trainable: Trainable | None) -> int:
    """Number of parameters that learn."""
    if trainable is None:
        return sum(p.numel() for p in network.parameters())
    sizes = {name: network.get_parameter(name) for name in trainable}
    return sum(
        p.numel() if (entries := trainable[name]) is None else len(entries) * p[0].numel() for name, p in sizes.items()
    )


def _chosen_in(layer: SparseLayer, spec: AdaptSpec, tasks: Sequence[int], usage: Usage) -> tuple[int, ...]:
    seen_by_them = set().union(*(layer.router.seen_by(task) for task in tasks))
    if spec.choose == "added":
        others = [task for task in range(layer.router.tasks) if task not in tasks]
        added = sorted(seen_by_them.difference(*(layer.router.seen_by(task) for task in others)) if others else ())
        return tuple(added if spec.experts is None else added[: spec.experts])
    share_TE = usage.share_TE.detach().cpu()
    known = [task for task in tasks if share_TE[task].sum() > 0]
    score_E = (share_TE[known] if known else share_TE).double().mean(0).tolist()
    sign = -1 if spec.choose == "best" else 1
    ranked = sorted(seen_by_them, key=lambda expert: (sign * score_E[expert], expert))
    return tuple(sorted(ranked[: spec.experts or 1]))


def _nothing_seen(layer: SparseLayer, tasks: int) -> Usage:
    zeros_TE = torch.zeros(tasks, layer.experts.num_experts)
    return Usage(zeros_TE, zeros_TE)


def _per_task(network: MultiTaskNetwork) -> Iterator[str]:
    """Names of the parameters with an entry per task."""
    for path, layer in network.backbone.sparse_layers().items():
        if layer.router.spec.per_task:
            yield from (f"backbone.{path}.router.{name}" for name, _ in layer.router.named_parameters())
    for path, block in network.backbone.named_modules():
        if isinstance(block, Block) and block.task_embed is not None:
            yield f"backbone.{path}.task_embed"


def _shared_routers(network: MultiTaskNetwork) -> Iterator[str]:
    for path, layer in network.backbone.sparse_layers().items():
        if not layer.router.spec.per_task:
            yield from (f"backbone.{path}.router.{name}" for name, _ in layer.router.named_parameters())


def _all_as_none(parameter: nn.Parameter, entries: tuple[int, ...]) -> tuple[int, ...] | None:
    """Not for experts: as a whole a bank may be spread, and its gradients are then not those of all ranks."""
    return None if len(entries) == parameter.shape[0] else entries
