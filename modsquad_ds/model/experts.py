"""Expert banks: the third verb of a sparse layer. Every expert works on its own rows with its own weights.

Axes: E experts held by this rank, R rows, S tokens, K top-k, D width, C width of an attention head, H hidden width of an expert.

Stacked parameters `[E, out, in]`. Each expert starts from a generator seeded by (seed, layer, expert), so its weights do not
depend on how many ranks share the bank. The products themselves are in products.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modsquad_ds.model.dispatch import Groups
from modsquad_ds.model.products import expert_linear, expert_mlp


class ExpertBank(nn.Module):
    """Stacked parameters of a layer's experts: those numbered `first` to `first + local - 1` of `num_experts`."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.first, self.local = 0, num_experts

    def init_weights(self, seed: int, layer: int) -> None:
        """Truncated normal (std 0.02) for matrices, zero for biases, expert by expert."""
        for kind, (_, stacked) in enumerate(sorted(self.named_parameters(recurse=False))):
            for i, tensor in enumerate(stacked.data.unbind(0)):
                if tensor.is_meta or tensor.dim() == 1:
                    nn.init.zeros_(tensor)
                else:
                    generator = torch.Generator().manual_seed(_mix((seed, layer, self.first + i, kind)))
                    nn.init.trunc_normal_(tensor, std=0.02, generator=generator)

    def mark_stacked(self) -> None:
        """Mark parameters as one piece per expert, for optimizers that treat each matrix by itself."""
        for parameter in self.parameters(recurse=False):
            parameter.stacked = True  # type: ignore[attr-defined]

    def keep(self, first: int, local: int) -> None:
        """Drop all but `local` experts from number `first` on: this rank's share of the bank."""
        for name, stacked in list(self.named_parameters(recurse=False)):
            own = stacked.data[first - self.first : first - self.first + local].clone()
            setattr(self, name, nn.Parameter(own, requires_grad=stacked.requires_grad))
        self.first, self.local = first, local
        self.mark_stacked()


class MLPExperts(ExpertBank):
    """y = fc2(GELU(fc1(x))) per expert, with biases."""

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__(num_experts)
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x: Tensor, groups: Groups, weight_SK: Tensor | None = None) -> Tensor:
        """Every row through its expert; shapes as in `dispatch.Compute`."""
        return expert_mlp(x, groups, (self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias), weight_SK)


class HeadExperts(ExpertBank):
    """Attention experts (Mod-Squad): a query projection D -> head_dim and an output projection back, without biases."""

    def __init__(self, num_experts: int, width: int, head_dim: int) -> None:
        super().__init__(num_experts)
        self.q_weight = nn.Parameter(torch.empty(num_experts, head_dim, width))
        self.proj_weight = nn.Parameter(torch.empty(num_experts, width, head_dim))

    def query(self, x: Tensor, groups: Groups, weight_SK: Tensor | None = None) -> Tensor:
        """Rows of width D -> queries of width C; shapes as in `dispatch.Compute`."""
        return expert_linear(x, groups, self.q_weight, gate_SK=weight_SK)

    def project(self, x: Tensor, groups: Groups, weight_SK: Tensor | None = None) -> Tensor:
        """Attended rows of width C -> D; shapes as in `dispatch.Compute`."""
        return expert_linear(x, groups, self.proj_weight, gate_SK=weight_SK)


def _mix(numbers: Sequence[int]) -> int:
    """One 63-bit seed from several numbers; unlike a sum, (1, 2) and (2, 1) differ."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    return seed
