"""Which experts stay: every rule worked out by hand."""

import pytest
import torch

from modsquad_ds.adapt_spec import PruneSpec
from modsquad_ds.errors import UserError
from modsquad_ds.objective import Usage
from modsquad_ds.selection import Candidates, kept_by_usage, kept_experts, share_kept
from modsquad_ds.structure import PerKind
from test_surgery import everything, trained


def layer(use: list[list[float]], seen: list[list[int]] | None = None, size: int = 10, least: int = 2) -> Candidates:
    use_TE = torch.tensor(use, dtype=torch.float64)
    seen_TE = torch.ones_like(use_TE, dtype=torch.bool) if seen is None else torch.tensor(seen, dtype=torch.bool)
    return Candidates("blocks.1.mlp", use_TE, seen_TE, size, least)


def test_rule_of_mod_squad() -> None:
    """Top-2 of 6 experts: shares of tokens, which sum to 2. 3 % of the tokens is the line, and at least two stay."""
    rule = PruneSpec(min_usage=0.03)
    one = [0.9, 0.02, 0.03, 1.0, 0.05, 0.0]
    assert kept_by_usage([layer([one])], rule) == ((0, 2, 3, 4),)
    concentrated = [0.01, 1.99, 0.0, 0.0, 0.0, 0.0]
    assert kept_by_usage([layer([concentrated])], rule) == ((0, 1),), "the second most used stays, as top-k is 2"
    assert kept_by_usage([layer([[0.0, 2.0, 0.0, 0.0]])], rule) == ((0, 1),), "of equals the lower number"
    assert kept_by_usage([layer([one, concentrated])], rule) == ((0, 1, 2, 3, 4),), "union over tasks"
    assert kept_by_usage([layer([one]), layer([concentrated], least=1)], rule) == ((0, 2, 3, 4), (1,))


def test_most_used_of_each_layer() -> None:
    layers = [layer([[0.5, 0.9, 0.6, 0.0], [0.0, 0.0, 0.1, 1.9]]), layer([[0.4, 0.5, 0.5, 0.6], [1.0, 1.0, 0.0, 0.0]])]
    assert kept_by_usage(layers, PruneSpec(keep=2)) == ((1, 2, 3), (0, 1, 3)), "each task's two"
    assert kept_by_usage(layers, PruneSpec(keep=9)) == ((0, 1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(UserError, match=r"keep 1: blocks\.1\.mlp needs 2 experts, as many as its top-k; keep 2 or more"):
        kept_by_usage(layers, PruneSpec(keep=1))
    assert kept_by_usage([one._replace(least=1) for one in layers], PruneSpec(keep=1)) == ((1, 3), (0, 3))


def test_share_of_the_parameters_over_all_layers() -> None:
    """Four experts of 10 and four of 30: 160 in all. Two of each layer must stay: 80, half of it."""
    small, large = layer([[0.9, 0.8, 0.2, 0.1]]), layer([[0.9, 0.7, 0.3, 0.05]], size=30)
    kept = {share: kept_by_usage([small, large], PruneSpec(keep_params=share)) for share in (0.5, 0.6, 0.69, 0.75, 0.8, 1.0)}
    least = ((0, 1), (0, 1))
    assert kept[0.5] == kept[0.6] == least, "the next, expert 2 of the large layer, would make 110 of 160"
    assert kept[0.69] == ((0, 1), (0, 1, 2)), "110 of 160 are 68.75 %"
    assert kept[0.75] == ((0, 1, 2), (0, 1, 2)), "120 of 160, exactly"
    assert kept[0.8] == kept[0.75], "130 of 160 are 81 %"
    assert kept[1.0] == ((0, 1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(UserError, match=r"keep_params 49\.0%: .* are 50\.0% of the experts' parameters \(80 of 160\)"):
        kept_by_usage([small, large], PruneSpec(keep_params=0.49))
    two = [layer([[0.9, 0.8, 0.2, 0.1], [0.0, 0.9, 0.9, 0.3]], least=1)]
    assert kept_by_usage(two, PruneSpec(keep_params=0.75)) == ((0, 1, 2),), "by the largest use of any task"


def test_experts_that_a_task_does_not_see_are_not_kept_for_it() -> None:
    """Whatever the usage says of expert 3."""
    half = layer([[0.5, 0.6, 0.0, 0.9]], [[1, 1, 1, 0]])
    for rule in (PruneSpec(min_usage=0.03), PruneSpec(keep=2)):
        assert kept_by_usage([half], rule) == ((0, 1),)
    assert kept_by_usage([half], PruneSpec(keep=4)) == kept_by_usage([half], None) == ((0, 1, 2),)
    assert kept_by_usage([half], PruneSpec(keep_params=1.0)) == ((0, 1, 2),)
    assert kept_by_usage([half], PruneSpec(keep_params=0.6)) == ((0, 1),)


def test_no_layers_no_experts() -> None:
    for rule in (None, PruneSpec(min_usage=0.1), PruneSpec(keep=2), PruneSpec(keep_params=0.2)):
        assert kept_by_usage([], rule) == ()


def test_usage_is_the_share_of_tokens() -> None:
    """A share of choices of 0.015 is 3 % of the tokens at top-2, and the rule's line lies at the model's own top-k."""
    model = trained()
    share_TE = torch.tensor([[0.485, 0.5, 0.015, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]])
    model = model._replace(usage=tuple(Usage(share_TE, share_TE) for _ in range(4)))
    assert kept_experts(model, ["digits"], PruneSpec(min_usage=0.0299)) == ((0, 1, 2),) * 4
    assert kept_experts(model, ["digits"], PruneSpec(min_usage=0.031)) == ((0, 1),) * 4
    assert kept_experts(model, ["textures"], PruneSpec(min_usage=0.9), PerKind(1, 2)) == ((0, 1),) * 4
    assert kept_experts(model, ["textures"], PruneSpec(keep=1), PerKind(1, 1)) == ((0,),) * 4
    assert kept_experts(model, ["textures", "digits"], PruneSpec(keep=2)) == ((0, 1),) * 4
    assert share_kept(model, ((0, 1), (0,), (0, 1, 2, 3), (1,))) == pytest.approx((6 * 1024 + 2 * 1592) / (8 * (1024 + 1592)))


def test_without_usage_only_everything_can_be_kept() -> None:
    model = trained()._replace(usage=())
    assert everything(model, ["digits"]) == ((0, 1, 2, 3),) * 4
    zero = trained()
    for usage in zero.usage:
        usage.share_TE[1] = 0
    for rule in (PruneSpec(min_usage=0.03), PruneSpec(keep=2), PruneSpec(keep_params=0.9)):
        with pytest.raises(UserError, match="task 'digits': the model holds no usage of experts for it"):
            kept_experts(model, ["digits"], rule)
        with pytest.raises(UserError, match="task 'scenes': the model holds no usage"):
            kept_experts(zero, ["digits", "scenes"], rule)
        assert kept_experts(zero, ["digits"], rule)
