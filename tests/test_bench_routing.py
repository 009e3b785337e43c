"""Forced-balanced routing against counting by hand; counts of ranks against one process; the learned choice comes back."""

import pytest
import torch

from modsquad_ds.bench.routing import Load, balanced, balanced_choice, load_of_ranks, observed
from modsquad_ds.data.types import Rows
from modsquad_ds.model.network import build_network
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.ranks import Ranks
from ranks import run_ranks
from small import small_batch, small_images, small_recipe


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(12, 4, 2), (7, 6, 3), (5, 3, 3), (3, 8, 1)])
def test_balanced_choice_gives_every_expert_as_many_tokens_up_to_one(tokens: int, experts: int, top_k: int) -> None:
    chosen_SK = balanced_choice(top_k, torch.rand(tokens, experts))
    assert chosen_SK.tolist() == [[(i * top_k + j) % experts for j in range(top_k)] for i in range(tokens)]
    assert all(len(set(row)) == top_k for row in chosen_SK.tolist())
    count = chosen_SK.flatten().bincount(minlength=experts)
    assert count.max() - count.min() <= 1


def test_network_routes_in_balance_inside_the_block_and_as_learned_outside() -> None:
    torch.manual_seed(0)
    network = build_network(small_recipe())
    images = small_images(small_batch(0, 0, 1))
    routers = [layer.router for layer in network.backbone.sparse_layers().values()]
    learned = network(images)
    with balanced(network), observed(routers) as counts:
        output = network(images)
    again = network(images)
    for layer, (stats, before, after, seen) in enumerate(zip(output.stats, learned.stats, again.stats, counts, strict=True)):
        count_E = stats.count_TE.sum(0)
        assert count_E.max() - count_E.min() <= 1, layer
        assert [c.tolist() for c in seen] == [count_E.tolist()]
        assert torch.equal(before.count_TE, after.count_TE) and not torch.equal(before.count_TE, stats.count_TE)
    # Gate weights stay the router's probabilities, so its gradient flows.
    torch.cat([head.flatten() for head in output.outputs["digits"].values()]).square().sum().backward()
    assert all(router.weight.grad is not None and router.weight.grad.abs().sum() > 0 for router in routers[-1:])


def test_rows_that_only_fill_up_are_observed_too() -> None:
    """Two images of 16 tokens, of which one task reads one and fills up with the other: 32 tokens with two experts each."""
    network = build_network(small_recipe())
    rows = {"digits": Rows(torch.tensor([0, 1]), 1)}
    routers = [layer.router for layer in network.backbone.sparse_layers().values()]
    with observed(routers) as counts:
        output = network({}, [(torch.zeros(2, 3, 32, 32), rows)])
    for stats, (seen,) in zip(output.stats, counts, strict=True):
        assert (stats.count_TE.sum().item(), seen.sum().item()) == (32, 64)


def two_groups(rank: int, world: int) -> Load | None:
    launch.start()
    # Experts 0, 1 on the first rank of a pair, 2, 3 on the second.
    passes = [[[3.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 2.0, 2.0]], [[1.0, 1.0, 1.0, 1.0]], [[5.0, 0.0, 1.0, 0.0]]][rank]
    layer = [torch.tensor(p) for p in passes]
    unspread = [torch.tensor([9.0, 0.0])]
    return load_of_ranks([layer, unspread], [2, 1], Ranks(rank, world))


@pytest.mark.dist
def test_busiest_rank_over_the_mean_is_that_of_each_group() -> None:
    """Ranks 0 and 1: 4 rows each. Ranks 2 and 3: 7 and 3 rows, mean 5."""
    for load in run_ranks(4, two_groups):
        assert load == pytest.approx((1.2, 1.4))


def test_no_spread_layer_has_no_load() -> None:
    assert load_of_ranks([[torch.ones(4)]], [1], Ranks()) is None
