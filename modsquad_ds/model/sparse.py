"""The sparse layers of a block: MoE MLP and MoE attention, each as route, dispatch, compute, combine.

Axes: S tokens in the pack, D width, K top-k, R = S * K slots, C width of one attention head, B images, N tokens of an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modsquad_ds.model.capacity import with_dropped
from modsquad_ds.model.dispatch import Dispatcher, LocalDispatcher
from modsquad_ds.model.experts import ExpertBank, HeadExperts, MLPExperts
from modsquad_ds.model.pack import Segment, slices
from modsquad_ds.model.router import Router, RoutingStats


class SparseLayer(nn.Module):
    """A router, a bank of experts and the dispatchers between them, which the parallel side may replace."""

    experts: ExpertBank

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.training_dispatcher: Dispatcher | None = None
        """With `parallel.capacity_factor`: takes the place of `dispatcher` while training. Evaluation drops nothing, or an
        image's output would depend on its neighbours."""

    def dispatcher_of_pass(self) -> Dispatcher:
        """The dispatcher of a forward pass, by whether the layer is training."""
        return self.training_dispatcher if self.training and self.training_dispatcher else self.dispatcher

    def expert_axes(self) -> dict[str, int]:
        """Name of every tensor of the state with an entry per expert -> the axis of these entries."""
        axes = {f"experts.{name}": 0 for name, _ in self.experts.named_parameters(recurse=False)}
        return axes | {f"router.{name}": 1 for name in (*self.router.per_expert, "visible")}


class SparseMLP(SparseLayer):
    """y = sum over the chosen experts of gate weight * expert MLP (Mod-Squad, equation of its MoE MLP layer)."""

    def __init__(self, router: Router, experts: MLPExperts) -> None:
        super().__init__(router)
        self.experts: MLPExperts = experts

    def forward(self, x_SD: Tensor, segments: tuple[Segment, ...]) -> tuple[Tensor, RoutingStats]:
        """`[S, D]` -> `[S, D]` and the routing's statistics."""
        routing, dispatcher = self.router(x_SD, segments), self.dispatcher_of_pass()
        plan = dispatcher.plan(routing)
        y_SD = dispatcher.run(self.experts, x_SD, plan, routing.weight_SK)
        return y_SD, with_dropped(routing, plan, segments)


class SparseAttention(SparseLayer):
    """Mixture of attention heads (Mod-Squad): an expert is a query and an output projection; keys and values are shared.

    A token's K chosen experts give K queries against the one key-value head of its image; each result goes back through
    its expert's output projection, is weighted by its gate, and summed. One plan serves both projections.
    """

    def __init__(self, router: Router, experts: HeadExperts, width: int) -> None:
        super().__init__(router)
        self.experts: HeadExperts = experts
        self.head_dim = experts.q_weight.shape[1]
        self.kv = nn.Linear(width, 2 * self.head_dim)

    def forward(self, x_SD: Tensor, segments: tuple[Segment, ...]) -> tuple[Tensor, RoutingStats]:
        """`[S, D]` -> `[S, D]` and the routing's statistics."""
        routing, dispatcher = self.router(x_SD, segments), self.dispatcher_of_pass()
        plan = dispatcher.plan(routing)
        q_RC = dispatcher.run(self.experts.query, x_SD, plan)
        attended_RC = self._attend(q_RC, self.kv(x_SD), segments)
        y_SD = dispatcher.run(self.experts.project, attended_RC, plan, routing.weight_SK)
        return y_SD, with_dropped(routing, plan, segments)

    def _attend(self, q_RC: Tensor, kv_S2C: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """One-head attention per image, with N * K queries on N keys."""
        top_k = self.router.top_k
        parts, start = [], 0
        for segment, kv in slices(kv_S2C, segments):
            stop = start + segment.length * top_k
            q = q_RC[start:stop].view(segment.batch, 1, segment.tokens * top_k, self.head_dim)
            k, v = kv.view(segment.batch, 1, segment.tokens, 2 * self.head_dim).chunk(2, dim=-1)
            parts.append(F.scaled_dot_product_attention(q, k, v).reshape(-1, self.head_dim))
            start = stop
        return torch.cat(parts)
