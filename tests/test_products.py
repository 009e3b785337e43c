"""The experts' products in both ways, CPU's and CUDA's, against a loop over single rows: results and every gradient."""

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from modsquad_ds.model import cached, laid_out, products
from modsquad_ds.model.dispatch import Groups, sort_by_expert
from modsquad_ds.model.pack import Segment
from test_sparse import SEGMENTS, TOKENS, TWINS, WIDTH, compare, make

WAYS = (cached, laid_out)
INPUT, HIDDEN, OUTPUT = 8, 16, 24


class Case(NamedTuple):
    """Rows, their experts and their gate weights."""

    x: Tensor
    expert_SK: Tensor
    gate_SK: Tensor
    num_experts: int

    @property
    def groups(self) -> Groups:
        rows = torch.bincount(self.expert_SK.flatten(), minlength=self.num_experts)
        return Groups(tuple(rows.tolist()), *sort_by_expert(self.expert_SK))


def case_of(tokens: int, num_experts: int, top_k: int, skew: float, seed: int = 0, per_slot: bool = False) -> Case:
    """`skew` moves tokens to the first experts; `per_slot`: a row of its own for each of a token's experts."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=g) - skew * torch.arange(num_experts) / num_experts
    expert_SK = logits.argsort(1, descending=True)[:, :top_k]
    x = torch.randn(tokens * (top_k if per_slot else 1), INPUT, generator=g)
    return Case(x, expert_SK, torch.rand(tokens, top_k, generator=g), num_experts)


def weights(num_experts: int, out: int, width: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(out)
    return torch.randn(num_experts, out, width, generator=g) / width**0.5, torch.randn(num_experts, out, generator=g)


def by_rows(case: Case, fc1: tuple[Tensor, Tensor], fc2: tuple[Tensor, Tensor] | None, gate_SK: Tensor | None) -> Tensor:
    """One slot at a time."""
    tokens, top_k = case.expert_SK.shape
    slots = []
    for s in range(tokens * top_k):
        e = int(case.expert_SK.flatten()[s])
        y = fc1[0][e] @ case.x[s if len(case.x) == tokens * top_k else s // top_k] + fc1[1][e]
        slots.append(y if fc2 is None else fc2[0][e] @ F.gelu(y) + fc2[1][e])
    out = torch.stack(slots)
    return out if gate_SK is None else (out.view(tokens, top_k, -1) * gate_SK.unsqueeze(-1)).sum(1)


def outcome(case: Case, way: ModuleType | None, mlp: bool, gated: bool, dtype: torch.dtype) -> list[Tensor]:
    """Output, then gradients of input, gate weights and parameters; `way` None is the loop."""
    fc1, fc2 = weights(case.num_experts, HIDDEN, INPUT), weights(case.num_experts, OUTPUT, HIDDEN)
    leaves = [t.to(dtype).requires_grad_() for t in (case.x, *fc1, *fc2)]
    gate_SK = case.gate_SK.clone().requires_grad_() if gated else None
    x, w1, b1, w2, b2 = leaves
    moved = case._replace(x=x)
    if way is None:
        y = by_rows(moved, (w1, b1), (w2, b2) if mlp else None, gate_SK)
    elif mlp:
        y = way.mlp(x, case.groups, (w1, b1), (w2, b2), gate_SK)
    else:
        y = way.linear(x, case.groups, w1, b1, gate_SK)
    wanted = [*([x, w1, b1, w2, b2] if mlp else [x, w1, b1]), *([] if gate_SK is None else [gate_SK])]
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad((y.float() * target).sum(), wanted, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True))]


def assert_as_loop(case: Case, way: ModuleType, mlp: bool, gated: bool, dtype: torch.dtype = torch.float32) -> None:
    """The loop always counts in fp32, from the same rounded numbers."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    rounded = case._replace(x=case.x.to(dtype).float(), gate_SK=case.gate_SK.to(dtype).float())
    expected, found = outcome(rounded, None, mlp, gated, torch.float32), outcome(rounded, way, mlp, gated, dtype)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        scale = max(b.abs().max().item(), 1.0)
        assert_close(a.float(), b, atol=tolerance * scale, rtol=0, msg=lambda m, n=number: f"value {n}: {m}")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_routing(data: st.DataObject) -> None:
    """Any number of tokens, experts and choices, any skew: experts without rows and with all of them come up by themselves."""
    num_experts = data.draw(st.integers(1, 9), label="experts")
    top_k = data.draw(st.integers(1, num_experts), label="top_k")
    skew = data.draw(st.sampled_from([0.0, 2.0, 50.0]), label="skew")
    case = case_of(data.draw(st.integers(1, 20), label="tokens"), num_experts, top_k, skew,
                   data.draw(st.integers(0, 99), label="seed"), data.draw(st.booleans(), label="per slot"))  # fmt: skip
    mlp, gated = data.draw(st.booleans(), label="mlp"), data.draw(st.booleans(), label="gated")
    for way in WAYS:
        assert_as_loop(case, way, mlp, gated)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.rpartition(".")[2])
@pytest.mark.parametrize("mlp", [False, True])
def test_in_bf16(way: ModuleType, mlp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With grouped products where they are CUDA's way. Weights are rounded to bf16 in both."""
    grouped: list[int] = []
    real = laid_out._grouped
    monkeypatch.setattr(laid_out, "_grouped", lambda *a: grouped.append(1) or real(*a))
    monkeypatch.setitem(globals(), "weights", lambda *a, f=weights: tuple(t.bfloat16().float() for t in f(*a)))
    assert_as_loop(case_of(30, 6, 2, 4.0), way, mlp, True, torch.bfloat16)
    assert len(grouped) == (0 if way is cached else 1 + mlp)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.rpartition(".")[2])
def test_bias_of_an_expert_with_many_rows_in_bf16(way: ModuleType) -> None:
    """3000 ones add up to 3000; one after the other in bf16 they would stop at 256."""
    groups = Groups((3000, 5), *sort_by_expert(torch.tensor([0] * 3000 + [1] * 5).unsqueeze(1)))
    w, b = (t.bfloat16().requires_grad_() for t in weights(2, HIDDEN, INPUT))
    way.linear(torch.randn(3005, INPUT).bfloat16(), groups, w, b, None).sum().backward()
    assert b.grad is not None
    assert_close(b.grad.float(), torch.tensor([[3000.0], [5.0]]).expand(2, HIDDEN), rtol=4e-3, atol=0)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.rpartition(".")[2])
def test_expert_larger_than_a_block(way: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "BLOCK", 7)
    for mlp in (False, True):
        assert_as_loop(case_of(20, 3, 2, 50.0), way, mlp, True)


def test_rows_in_expert_order_need_no_index() -> None:
    x, (w, b) = torch.randn(9, INPUT), weights(3, HIDDEN, INPUT)
    expected = torch.cat([x[:4] @ w[0].T + b[0], x[4:] @ w[2].T + b[2]])
    for way in WAYS:
        assert_close(way.linear(x, Groups((4, 0, 5)), w, b, None), expected)


def test_no_rows_at_all() -> None:
    """A rank whose experts nobody chose: gradients are zeros, not None, for ZeRO waits for them."""
    empty = Groups((0, 0), *sort_by_expert(torch.zeros(0, 1, dtype=torch.int64)))
    for way in WAYS:
        fc1, fc2 = weights(2, HIDDEN, INPUT), weights(2, INPUT, HIDDEN)
        x = torch.zeros(0, INPUT, requires_grad=True)
        for parameter in (*fc1, *fc2):
            parameter.requires_grad_()
        y = way.mlp(x, empty, fc1, fc2, None)
        y.sum().backward()
        assert y.shape == (0, INPUT)
        assert all(p.grad is not None and not p.grad.any() for p in (*fc1, *fc2))


def test_frozen_parameters_get_no_gradient() -> None:
    case = case_of(12, 4, 2, 0.0)
    fc1, fc2 = weights(4, HIDDEN, INPUT), weights(4, OUTPUT, HIDDEN)
    fc2[0].requires_grad_()
    cached.mlp(case.x, case.groups, fc1, fc2, case.gate_SK).sum().backward()
    assert fc2[0].grad is not None and fc1[0].grad is None and case.x.grad is None


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation holds a block of hidden rows, not all of them, though parameters want gradients."""
    monkeypatch.setattr(cached, "BLOCK", 3)
    case = case_of(12, 4, 2, 0.0)
    fc1, fc2 = weights(4, HIDDEN, INPUT), weights(4, OUTPUT, HIDDEN)
    fc1[0].requires_grad_()
    sizes: list[int] = []
    real = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: sizes.append(a[1]) or real(*a, **k))
    with torch.no_grad():
        y = cached.mlp(case.x, case.groups, fc1, fc2, case.gate_SK)
    assert not y.requires_grad and max(sizes) <= 4, "a block and half of one"
    assert_close(y, by_rows(case, fc1, fc2, case.gate_SK).detach())


@pytest.mark.parametrize("mlp", [False, True])
def test_many_blocks_in_bf16_keep_the_bits_of_their_sums(mlp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert's gradients over 100 blocks are as close to fp32 as those of one block."""
    case = case_of(300, 1, 1, 0.0)
    rounded = case._replace(x=case.x.bfloat16().float(), gate_SK=case.gate_SK.bfloat16().float())
    monkeypatch.setitem(globals(), "weights", lambda *a, f=weights: tuple(t.bfloat16().float() for t in f(*a)))
    expected = outcome(rounded, None, mlp, True, torch.float32)
    apart = {}
    for block in (1024, 3):
        monkeypatch.setattr(cached, "BLOCK", block)
        found = outcome(rounded, cached, mlp, True, torch.bfloat16)
        apart[block] = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    assert all(few < 1.5 * one + 1e-4 for few, one in zip(apart[3], apart[1024], strict=True)), apart


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_layers_in_cudas_way(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, on this device, against the same loops over tokens as CPU's."""
    monkeypatch.setattr(products, "way_for", lambda x: laid_out)
    compare(make(kind, 5, 2).to(dtype), TWINS[kind], dtype, 1e-5 if dtype == torch.float32 else 2e-2)
    assert sum(s.length for s in SEGMENTS) == TOKENS and WIDTH == 8


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("left", [SEGMENTS[:1], SEGMENTS[1:2], SEGMENTS[1:]], ids=["one task", "one token", "one absent"])
def test_parts_of_a_pack_route_alone_as_in_it(kind: str, left: tuple[Segment, ...]) -> None:
    """Tasks absent from a step, a single image, a single token: the others' outputs and statistics are what they were."""
    layer = make(kind, 5, 2)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(4))
    whole, stats = layer(x, SEGMENTS)
    rows = torch.cat([torch.full((s.length,), s in left) for s in SEGMENTS])
    part, of_part = layer(x[rows], left)
    assert_close(part, whole[rows], atol=1e-6, rtol=1e-5)
    for task in range(3):
        here = any(s.task == task for s in left)
        assert torch.equal(of_part.count_TE[task], stats.count_TE[task] * here)
        assert of_part.token_T[task] == stats.token_T[task] * here
