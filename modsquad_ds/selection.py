"""Which experts stay when a model is cut down to some of its tasks: usage in, numbers of experts out. surgery.py cuts.

Axes: T tasks, R rows of a router, E experts of a layer. Layers are the sparse ones, in the order of the statistics.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modsquad_ds.adapt_spec import PruneSpec
from modsquad_ds.config import Recipe
from modsquad_ds.errors import UserError
from modsquad_ds.model_file import ModelFile
from modsquad_ds.objective import Usage
from modsquad_ds.structure import PerKind, structure_of, top_k_of

Kept = tuple[tuple[int, ...], ...]
"""Per layer the experts that stay, ascending."""

ROUNDING = 1e-9


class Candidates(NamedTuple):
    """What decides which experts of one layer stay."""

    path: str
    """`blocks.1.mlp`; for messages."""
    use_TE: Tensor
    """fp64: share of the task's tokens that have the expert among their top-k; a row for each task that is asked for."""
    seen_TE: Tensor
    """bool, the same shape: experts that the task may choose."""
    size: int
    """Parameters of one expert."""
    least: int
    """Experts that must stay for each task: top-k of the smaller model."""


def kept_experts(model: ModelFile, tasks: Sequence[str], rule: PruneSpec | None, top_k: PerKind | None = None) -> Kept:
    """The experts of a model that the tasks need, by the usage that the file holds; without a rule, all that they see.

    Args:
        tasks: names among the model's tasks.
        top_k: of the smaller model; default the model's own.

    Raises UserError where a task has no usage yet, or the rule leaves fewer than top-k experts.
    """
    visible = [model.state[f"backbone.{layer.path}.router.visible"] for layer in structure_of(model.recipe).layers]
    layers = candidates(model.recipe, visible, model.usage, tasks, top_k)
    if rule is not None:
        unknown = [task for i, task in enumerate(tasks) for layer in layers if not layer.use_TE[i].any()]
        if unknown:
            raise UserError(
                f"task {unknown[0]!r}: the model holds no usage of experts for it, as it was not trained on it; train it first"
            )
    return kept_by_usage(layers, rule)


def candidates(
    recipe: Recipe, visible: Sequence[Tensor], usage: Sequence[Usage], tasks: Sequence[str], top_k: PerKind | None = None
) -> tuple[Candidates, ...]:
    """What `kept_by_usage` needs to know, for some tasks of a recipe's network.

    `Usage.share_TE` sums to 1 over experts and a token has k choices, all different: the share of a task's tokens that have
    an expert among their top-k is share * k.

    Args:
        visible: `router.visible` of each layer.
        usage: of each layer; empty is taken as all zero.
        top_k: of the smaller model; default the recipe's own.
    """
    now, then = top_k_of(recipe), top_k or top_k_of(recipe)
    rows = [list(recipe.active).index(task) for task in tasks]
    out = []
    for number, (layer, visible_RE) in enumerate(zip(structure_of(recipe).layers, visible, strict=True)):
        seen_RE = visible_RE.cpu()
        seen_TE = seen_RE[rows] if recipe.model.router.per_task else seen_RE.expand(len(rows), -1)
        share_TE = usage[number].share_TE.double().cpu()[rows] if usage else torch.zeros(seen_TE.shape, dtype=torch.float64)
        use_TE = share_TE * getattr(now, layer.kind)
        out.append(Candidates(layer.path, use_TE, seen_TE, layer.size, getattr(then, layer.kind)))
    return tuple(out)


def kept_by_usage(layers: Sequence[Candidates], rule: PruneSpec | None) -> Kept:
    """The experts that stay: the union of what each task needs of those it sees.

    `min_usage` (Mod-Squad's, as in its released pruning code): experts among the top-k of at least this share of the task's
    tokens, but no fewer than top-k, the most used. `keep`: so many per layer and task, the most used. `keep_params`: experts
    of all layers ranked by their largest use by a task, after each task's top-k in each layer, as long as they fit into this
    share of the parameters of all experts. No rule: all that the tasks see. Ties go to lower numbers of layer and expert.

    Raises UserError where `keep` or `keep_params` leaves a task fewer than top-k experts.
    """
    if rule is None:
        return tuple(_ascending(layer.seen_TE.any(0).nonzero().flatten().tolist()) for layer in layers)
    if rule.min_usage is not None:
        least = rule.min_usage
        return _union(layers, lambda layer, t: max(layer.least, int(((layer.use_TE >= least) & layer.seen_TE)[t].sum())))
    if rule.keep is not None:
        keep = rule.keep
        short = next((layer for layer in layers if keep < layer.least), None)
        if short is not None:
            raise UserError(
                f"keep {keep}: {short.path} needs {short.least} experts, as many as its top-k; keep {short.least} or more, or "
                "lower the top-k"
            )
        return _union(layers, lambda layer, t: keep)
    assert rule.keep_params is not None
    return _within(layers, rule.keep_params)


def share_kept(model: ModelFile, kept: Kept) -> float:
    """Parameters of the kept experts over those of all experts; 1 for a model without sparse layers."""
    whole = part = 0
    for layer, experts in zip(structure_of(model.recipe).layers, kept, strict=True):
        whole += layer.size * model.state[f"backbone.{layer.path}.router.visible"].shape[1]
        part += layer.size * len(experts)
    return part / whole if whole else 1.0


def _ranked(layer: Candidates, task: int) -> list[int]:
    """Experts that a task sees, the most used first; of equals the lower number first."""
    order = layer.use_TE[task].sort(descending=True, stable=True).indices.tolist()
    return [e for e in order if layer.seen_TE[task, e]]


def _union(layers: Sequence[Candidates], count: Callable[[Candidates, int], int]) -> Kept:
    """Per layer the `count(layer, task)` most used experts of each task."""
    return tuple(
        _ascending(e for t in range(len(layer.use_TE)) for e in _ranked(layer, t)[: count(layer, t)]) for layer in layers
    )


def _within(layers: Sequence[Candidates], share: float) -> Kept:
    """Each task's top-k of every layer, then the most used experts of all layers that fit the budget, until one does not."""
    kept = [set(experts) for experts in _union(layers, lambda layer, t: layer.least)]
    whole = sum(layer.size * layer.use_TE.shape[1] for layer in layers)
    budget = share * whole * (1 + ROUNDING)
    used = sum(layer.size * len(experts) for layer, experts in zip(layers, kept, strict=True))
    if used > budget:
        raise UserError(
            f"keep_params {share:.1%}: each task's top-k experts of every layer are {used / whole:.1%} of the experts' "
            f"parameters ({used:,} of {whole:,}); keep more, or lower the top-k"
        )
    rest = [
        (-float(layer.use_TE.where(layer.seen_TE, 0.0)[:, e].max()), number, e)
        for number, layer in enumerate(layers)
        for e in _ascending(layer.seen_TE.any(0).nonzero().flatten().tolist())
        if e not in kept[number]
    ]
    for _, number, e in sorted(rest):
        used += layers[number].size
        if used > budget:
            break
        kept[number].add(e)
    return tuple(_ascending(experts) for experts in kept)


def _ascending(experts: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(experts)))
