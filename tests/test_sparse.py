"""The sparse layers against the dumbest loops that could be right: outputs, every gradient, statistics."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from modsquad_ds.model.experts import HeadExperts, MLPExperts
from modsquad_ds.model.laid_out import can_group
from modsquad_ds.model.pack import Segment
from modsquad_ds.model.router import Router
from modsquad_ds.model.sparse import SparseAttention, SparseLayer, SparseMLP
from modsquad_ds.model_spec import RouterSpec

SEGMENTS = (Segment(0, 2, 2, 3), Segment(2, 1, 1, 1), Segment(1, 3, 2, 2))
TOKENS = sum(s.length for s in SEGMENTS)
WIDTH = 8


def make(kind: str, num_experts: int, top_k: int, spec: RouterSpec | None = None) -> SparseLayer:
    torch.manual_seed(1)
    router = Router(spec or RouterSpec(), WIDTH, 3, num_experts, top_k)
    layer: SparseLayer
    if kind == "mlp":
        layer = SparseMLP(router, MLPExperts(num_experts, WIDTH, 12))
    else:
        layer = SparseAttention(router, HeadExperts(num_experts, WIDTH, 4), WIDTH)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def task_of_tokens() -> list[int]:
    return [s.task for s in SEGMENTS for _ in range(s.length)]


def choose(router: Router, x_D: Tensor, task: int) -> list[tuple[int, Tensor]]:
    """Experts and gate weights of one token."""
    prob_E = F.linear(x_D.float(), router.weight[task if router.spec.per_task else 0].float()).softmax(-1)
    order = sorted(range(len(prob_E)), key=lambda e: (-prob_E[e].item(), e))[: router.top_k]
    total = sum(prob_E[e] for e in order) if router.spec.renormalize else torch.ones(())
    return [(e, prob_E[e] / total) for e in order]


Choice = list[list[tuple[int, Tensor]]]


def choose_all(layer: SparseLayer, x_SD: Tensor) -> Choice:
    """Experts and gate weights of every token."""
    return [choose(layer.router, x_D, task) for x_D, task in zip(x_SD, task_of_tokens(), strict=True)]


def loop_mlp(layer: SparseMLP, x_SD: Tensor, chosen: Callable[..., Choice] = choose_all) -> Tensor:
    """One token at a time, one expert at a time."""
    out, ex = [], layer.experts
    for x_D, choice in zip(x_SD, chosen(layer, x_SD), strict=True):
        y = torch.zeros_like(x_D)
        for e, gate in choice:
            hidden = F.gelu(ex.fc1_weight[e] @ x_D + ex.fc1_bias[e])
            y = y + gate.to(x_D.dtype) * (ex.fc2_weight[e] @ hidden + ex.fc2_bias[e])
        out.append(y)
    return torch.stack(out)


def loop_attention(layer: SparseAttention, x_SD: Tensor, chosen: Callable[..., Choice] = choose_all) -> Tensor:
    """One token at a time, one chosen head at a time, softmax by hand over its own image's tokens."""
    images = []
    start = 0
    for segment in SEGMENTS:
        for _ in range(segment.batch):
            images += [range(start, start + segment.tokens)] * segment.tokens
            start += segment.tokens
    k_SC, v_SC = layer.kv(x_SD).chunk(2, dim=-1)
    out, ex = [], layer.experts
    for x_D, choice, image in zip(x_SD, chosen(layer, x_SD), images, strict=True):
        y = torch.zeros_like(x_D)
        for e, gate in choice:
            q = ex.q_weight[e] @ x_D
            scores = torch.stack([q @ k_SC[j] for j in image]) / layer.head_dim**0.5
            attended = sum(w * v_SC[j] for w, j in zip(scores.softmax(0), image, strict=True))
            y = y + gate.to(x_D.dtype) * (ex.proj_weight[e] @ attended)
        out.append(y)
    return torch.stack(out)


TWINS: dict[str, Callable[..., Tensor]] = {"mlp": loop_mlp, "attention": loop_attention}


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (4, 1), (3, 3), (40, 4)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_layer_equals_loop(kind: str, num_experts: int, top_k: int, renormalize: bool) -> None:
    layer = make(kind, num_experts, top_k, RouterSpec(renormalize=renormalize))
    compare(layer, TWINS[kind], torch.float32, 1e-5)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_layer_equals_loop_in_bf16(kind: str) -> None:
    layer = make(kind, 5, 2).to(torch.bfloat16)
    compare(layer, TWINS[kind], torch.bfloat16, 2e-2)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_skewed_routing_leaves_experts_without_tokens(kind: str) -> None:
    layer = make(kind, 6, 1, RouterSpec(type="linear"))
    with torch.no_grad():
        layer.router.weight.zero_()  # all logits equal: ties go to expert 0 for every token
    grads = compare(layer, TWINS[kind], torch.float32, 1e-5)
    stacked = grads["experts.fc1_weight" if kind == "mlp" else "experts.q_weight"]
    assert stacked[0].abs().sum() > 0 and stacked[1:].abs().sum() == 0


def compare(layer: SparseLayer, twin: Callable[..., Tensor], dtype: torch.dtype, tolerance: float) -> dict[str, Tensor]:
    """Outputs and gradients of layer and twin agree, relative to their largest entry; returns the layer's gradients."""
    torch.manual_seed(2)
    x = torch.randn(TOKENS, WIDTH).to(dtype)
    target = torch.randn(TOKENS, WIDTH)
    results = []
    for run in (lambda a: layer(a, SEGMENTS)[0], lambda a: twin(layer, a)):
        a = x.clone().requires_grad_()
        y = run(a)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        grads = torch.autograd.grad((y.float() * target).sum(), (a, *parameters), allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, (a, *parameters), strict=True)]
        results.append({"output": y.detach(), **dict(zip(("input", *names), filled, strict=True))})
    for name, expected in results[1].items():
        scale = expected.float().abs().max().clamp(min=0.1).item()
        found = results[0][name].float()
        assert_close(found, expected.float(), atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    return results[0]


def test_statistics_are_sums_over_each_tasks_tokens() -> None:
    layer = make("mlp", 5, 2)
    x = torch.randn(TOKENS, WIDTH)
    stats = layer(x, SEGMENTS)[1]
    assert stats.token_T.tolist() == [12, 12, 1]
    for task in range(3):
        own = [i for i, t in enumerate(task_of_tokens()) if t == task]
        logits = x[own] @ layer.router.weight[task].T
        assert_close(stats.prob_TE[task], logits.softmax(-1).sum(0))
        assert_close(stats.lse2_T[task], logits.logsumexp(-1).square().sum())
        chosen = [e for i in own for e, _ in choose(layer.router, x[i], task)]
        assert stats.count_TE[task].tolist() == [chosen.count(e) for e in range(5)]


def test_each_tasks_router_row_learns_from_its_own_tokens_only() -> None:
    layer = make("mlp", 5, 2)
    y, _ = layer(torch.randn(TOKENS, WIDTH), SEGMENTS)
    y[: SEGMENTS[0].length].sum().backward()
    grad = layer.router.weight.grad
    assert grad is not None and grad[0].abs().sum() > 0 and grad[1:].abs().sum() == 0


def test_shared_router_routes_all_tasks_alike() -> None:
    layer = make("mlp", 5, 2, RouterSpec(per_task=False))
    assert layer.router.weight.shape == (1, 5, WIDTH)
    compare(layer, loop_mlp, torch.float32, 1e-5)


def test_mlp_router_by_hand() -> None:
    router = Router(RouterSpec(type="mlp"), WIDTH, 3, 4, 2)
    x = torch.randn(SEGMENTS[0].length, WIDTH)
    routing = router(x, SEGMENTS[:1])
    hidden = F.gelu(x @ router.reduce[0].T + router.reduce_bias[0])
    prob = (hidden @ router.weight[0].T + router.bias[0]).softmax(-1)
    assert_close(routing.weight_SK, prob.sort(descending=True).values[:, :2])


def test_noise_acts_in_training_only() -> None:
    layer = make("mlp", 5, 2, RouterSpec(noise=50.0))
    x = torch.randn(TOKENS, WIDTH)
    assert not torch.equal(layer(x, SEGMENTS)[0], layer(x, SEGMENTS)[0])
    layer.eval()
    assert torch.equal(layer(x, SEGMENTS)[0], layer(x, SEGMENTS)[0])


def test_grouped_products_only_where_cuda_takes_them() -> None:
    aligned = torch.zeros(8 * 24 * 16 + 1, dtype=torch.bfloat16)
    assert can_group(aligned[:-1].view(8, 24, 16))
    assert not can_group(aligned[1:].view(8, 24, 16)), "begins between two multiples of 16 bytes"
    assert not can_group(torch.zeros(2, 154, 192, dtype=torch.bfloat16)), "rows of the transposed matrix are 308 bytes"
    assert not can_group(torch.zeros(2, 24, 16)), "fp32"


def test_expert_starts_from_its_own_number() -> None:
    whole, part = MLPExperts(6, WIDTH, 12), MLPExperts(6, WIDTH, 12)
    whole.init_weights(seed=3, layer=1)
    part.keep(first=2, local=3)
    part.init_weights(seed=3, layer=1)
    assert torch.equal(part.fc1_weight, whole.fc1_weight[2:5])
    assert not torch.equal(whole.fc1_weight[0], whole.fc1_weight[1])
    other = MLPExperts(6, WIDTH, 12)
    other.init_weights(seed=3, layer=2)
    assert not torch.equal(other.fc1_weight, whole.fc1_weight)
