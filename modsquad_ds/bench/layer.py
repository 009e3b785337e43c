"""`bench layer`: one sparse MLP, forward and backward, beside the dense MLP that does the same work and other sparse layers.

Axes: S tokens, D width, E experts, K top-k.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from modsquad_ds.bench.measure import Row, interleave, timing_rows
from modsquad_ds.bench.routing import balanced_choice, steered
from modsquad_ds.model.experts import MLPExperts
from modsquad_ds.model.pack import Segment
from modsquad_ds.model.router import Router
from modsquad_ds.model.sparse import SparseMLP
from modsquad_ds.model_spec import RouterSpec
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.stock import StockLayer, offset_towards

EXPERTS, TOP_K, SHARES = 16, 4, (0.7, 0.2, 0.1)
"""Sixteen experts, four of them for each token; shares of the tokens of three tasks."""
DENSE = "dense MLP"
COLUMNS = {"width": "width", "tokens": "tokens", "routing": "routing", "case": "layer", "seconds": "seconds", "ratio": "x dense"}


def bench_layer(widths: Sequence[int], tokens: Sequence[int], repeat: int, show: bool = True) -> list[Row]:
    """Rows of every width, number of tokens, routing and layer. The experts' hidden width is the layer's width.

    Routings: balanced (every expert gets as many rows), random (routers as they start), specialised (three tasks with 70, 20 and
    10 % of the tokens, each on four experts of its own). Sizes are positive.
    """
    launch.start()
    rows = []
    for width in widths:
        for count in tokens:
            cases = layer_cases(width, count)
            seconds = interleave(cases, repeat, warmup=1, label=f"width {width}, {count} tokens", show=show)
            rows += [_named(row) for row in timing_rows(seconds, DENSE, width=width, tokens=count, experts=EXPERTS, top_k=TOP_K)]
    launch.stop()
    return rows


def layer_cases(width: int, tokens: int) -> dict[str, Callable[[], None]]:
    """`layer` or `layer, routing` -> one forward and backward pass on the same tokens."""
    torch.manual_seed(0)
    device = launch.device()
    segments = task_segments(tokens)
    sparse = sparse_layer(width).to(device)
    loop = PlainLoop(width).to(device)
    stock = {name: StockLayer(width, width, EXPERTS, TOP_K, factor).to(device)
             for name, factor in (("deepspeed, no drop", None), ("deepspeed, capacity 1.25", 1.25))}  # fmt: skip
    dense = dense_layer(width).to(device)
    x_SD = torch.randn(tokens, width, device=device)
    cases: dict[str, Callable[[], None]] = {DENSE: partial(forward_backward, dense, dense, x_SD)}
    for name, expert_SK in choices(sparse, x_SD, segments).items():
        cases[f"sparse, {name}"] = partial(forward_backward, partial(steered_layer, sparse, segments, expert_SK), sparse, x_SD)
        cases[f"plain loop, {name}"] = partial(forward_backward, partial(loop, expert_SK=expert_SK), loop, x_SD)
        offset_SE = offset_towards(expert_SK, EXPERTS)
        for label, layer in stock.items():
            cases[f"{label}, {name}"] = partial(forward_backward, partial(_stock, layer, offset_SE), layer, x_SD)
    return cases


def task_segments(tokens: int) -> tuple[Segment, ...]:
    """Three tasks' tokens, in the shares of SHARES."""
    first, second = (round(share * tokens) for share in SHARES[:2])
    return tuple(Segment(task, 1, n, 1) for task, n in enumerate((first, second, tokens - first - second)))


def sparse_layer(width: int) -> SparseMLP:
    """The layer that is measured, as a network would build it."""
    experts = MLPExperts(EXPERTS, width, width)
    experts.init_weights(seed=0, layer=0)
    return SparseMLP(Router(RouterSpec(), width, len(SHARES), EXPERTS, TOP_K), experts)


def dense_layer(width: int) -> nn.Sequential:
    """The dense MLP of as many FLOPs."""
    return nn.Sequential(nn.Linear(width, TOP_K * width), nn.GELU(), nn.Linear(TOP_K * width, width))


def choices(layer: SparseMLP, x_SD: Tensor, segments: tuple[Segment, ...]) -> dict[str, Tensor]:
    """Routing -> the chosen experts `[S, K]`."""
    with torch.no_grad():
        routing = layer.router(x_SD, segments)
    own_K = torch.arange(TOP_K, device=x_SD.device)
    own = [(segment.task * TOP_K + own_K).expand(segment.length, -1) for segment in segments]
    return {
        "balanced": balanced_choice(TOP_K, routing.stats.prob_TE.new_empty(x_SD.shape[0], EXPERTS)),
        "random": routing.expert_SK,
        "specialised": torch.cat(own),
    }


class PlainLoop(nn.Module):
    """A plain loop over experts, each of which picks its tokens, with one router."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(EXPERTS)
        )

    def forward(self, x_SD: Tensor, expert_SK: Tensor) -> Tensor:
        """`[S, D]` -> `[S, D]` through the given experts."""
        weight_SK = self.router(x_SD).softmax(-1).gather(1, expert_SK)
        out_SD = torch.zeros_like(x_SD)
        for number, expert in enumerate(self.experts):
            token, slot = (expert_SK == number).nonzero(as_tuple=True)
            out_SD.index_add_(0, token, expert(x_SD[token]) * weight_SK[token, slot].unsqueeze(1))
        return out_SD


def forward_backward(run: Callable[[Tensor], Tensor], layer: nn.Module, x_SD: Tensor) -> None:
    """One pass with gradients of the input and of all parameters."""
    x_SD = x_SD.detach().requires_grad_()
    y_SD = run(x_SD)
    torch.autograd.grad(y_SD, (x_SD, *layer.parameters()), torch.ones_like(y_SD), allow_unused=True)


def steered_layer(layer: SparseMLP, segments: tuple[Segment, ...], expert_SK: Tensor, x_SD: Tensor) -> Tensor:
    """`[S, D]` -> `[S, D]` of the layer through the given experts."""

    def choice(router: Router, prob_SE: Tensor) -> Tensor:
        Router.choose(router, prob_SE)  # costs what it costs, and is not followed
        return expert_SK

    with steered(layer, choice):
        return layer(x_SD, segments)[0]


def _stock(layer: StockLayer, offset_SE: Tensor, x_SD: Tensor) -> Tensor:
    layer.gate.offset_SE = offset_SE
    return layer(x_SD)


def _named(row: Row) -> Row:
    """The row with `sparse, random` split into layer and routing."""
    layer, _, routing = row["case"].rpartition(", ") if row["case"] != DENSE else (DENSE, "", "-")
    return {**row, "case": layer, "routing": routing}
