"""Routing under a benchmark's control: choices forced to be balanced, choices counted. Used by the benchmarks of layer and step.

Axes: S tokens in the pack, K top-k, E experts, T tasks, G expert-parallel groups, P ranks of a group.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modsquad_ds.model.router import Router, Routing
from modsquad_ds.parallel.collectives import sum_over_ranks
from modsquad_ds.parallel.ranks import Ranks

Choice = Callable[[Router, Tensor], Tensor]
"""(router, probabilities `[S, E]`) -> chosen experts `[S, K]`, int64."""


@contextmanager
def steered(network: nn.Module, choice: Choice) -> Iterator[None]:
    """Inside the block every router of the network chooses as told.

    Gate weights are the router's probabilities of these experts, so weights and gradients cost what they do with learned choices.
    """
    routers = [module for module in network.modules() if isinstance(module, Router)]
    for router in routers:
        # On the instance, which goes before the class's method.
        router.__dict__["choose"] = partial(choice, router)
    try:
        yield
    finally:
        for router in routers:
            del router.__dict__["choose"]


def balanced(network: nn.Module) -> AbstractContextManager[None]:
    """Inside the block every router of the network gives each expert as many tokens as any other, up to one.

    Token i takes the experts (i K + j) mod E.
    """
    return steered(network, lambda router, prob_SE: balanced_choice(router.top_k, prob_SE))


def balanced_choice(top_k: int, prob_SE: Tensor) -> Tensor:
    """Experts `[S, K]`, int64, whatever the probabilities."""
    tokens, experts = prob_SE.shape
    slots = torch.arange(tokens * top_k, device=prob_SE.device)
    return (slots % experts).view(tokens, top_k)


@contextmanager
def observed(routers: Sequence[Router]) -> Iterator[list[list[Tensor]]]:
    """Inside the block each forward pass of a router adds the rows of its experts `[E]` to the router's list; no wait.

    All that are computed, of images that only fill up too.
    """
    counts: list[list[Tensor]] = [[] for _ in routers]

    def hook(here: list[Tensor]) -> Callable[[nn.Module, tuple[object, ...], Routing], None]:
        return lambda _module, _inputs, routing: here.append(routing.rows_per_expert)

    handles = [router.register_forward_hook(hook(here)) for router, here in zip(routers, counts, strict=True)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class Load(NamedTuple):
    """Rows of the busiest rank of an expert-parallel group over the group's mean; 1 is balanced."""

    mean: float
    """Over groups, layers and passes."""
    worst: float
    """Of the layer and group where it is largest, over its passes."""


def load_of_ranks(counts: Sequence[Sequence[Tensor]], ep_sizes: Sequence[int], ranks: Ranks) -> Load | None:
    """How unevenly the rows of all passes lay on ranks; None where no layer is spread. Every rank calls it.

    Args:
        counts: per layer, counts `[E]` of each pass on this rank, as `observed` gives them.
        ep_sizes: per layer, ranks that share its experts.
    """
    spread = [(torch.stack(list(passes)), ep) for passes, ep in zip(counts, ep_sizes, strict=True) if ep > 1 and passes]
    if not spread:
        return None
    everyone = sum_over_ranks([_by_group(passes_NE, ep, ranks) for passes_NE, ep in spread])
    ratios = [rows_GNP.amax(-1) / rows_GNP.mean(-1) for rows_GNP in everyone]
    return Load(
        float(torch.cat([ratio_GN.flatten() for ratio_GN in ratios]).mean()),
        max(float(ratio_GN.mean(1).max()) for ratio_GN in ratios),
    )


def _by_group(passes_NE: Tensor, ep_size: int, ranks: Ranks) -> Tensor:
    """`[G, N, P]`: rows that this rank sends to each rank of its group, zeros for other groups."""
    rows_GNP = passes_NE.new_zeros(ranks.world // ep_size, len(passes_NE), ep_size)
    rows_GNP[ranks.rank // ep_size] = passes_NE.view(len(passes_NE), ep_size, -1).sum(-1)
    return rows_GNP
