"""Expert banks: the third verb of a sparse layer. Every expert works on its own rows with its own weights.

Axes: E experts held by this rank, R rows sorted by expert, D width, H hidden width of an expert.

Stacked parameters `[E, out, in]`. Each expert starts from a generator seeded by (seed, layer, expert), so its weights do not
depend on how many ranks share the bank. On CUDA in bf16 the products are grouped GEMMs; on CPU a loop is faster (1.1 times an
equal dense MLP against 1.2 to 1.5 times).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, rows_RD: Tensor, rows: Sequence[int]) -> Tensor:
        """`[R, D]` sorted by expert, `rows[e]` rows of expert e -> `[R, D]`."""
        hidden_RH = F.gelu(expert_linear(rows_RD, rows, self.fc1_weight, self.fc1_bias))
        return expert_linear(hidden_RH, rows, self.fc2_weight, self.fc2_bias)


class HeadExperts(ExpertBank):
    """Attention experts (Mod-Squad): a query projection D -> head_dim and an output projection back, without biases."""

    def __init__(self, num_experts: int, width: int, head_dim: int) -> None:
        super().__init__(num_experts)
        self.q_weight = nn.Parameter(torch.empty(num_experts, head_dim, width))
        self.proj_weight = nn.Parameter(torch.empty(num_experts, width, head_dim))


def expert_linear(x_RI: Tensor, rows: Sequence[int], weight_EOI: Tensor, bias_EO: Tensor | None = None) -> Tensor:
    """Rows of expert e times its own matrix (plus its bias): `[R, in]` -> `[R, out]`."""
    return (_grouped if x_RI.is_cuda and can_group(weight_EOI) else _looped)(x_RI, rows, weight_EOI, bias_EO)


def can_group(weight_EOI: Tensor) -> bool:
    """Whether CUDA's grouped GEMM takes this matrix: bf16, and every row begins at a multiple of 16 bytes.

    In fp32 torch falls back to a loop that asks the device for the row counts, which `_looped` has on the host. ZeRO lays
    parameters side by side in one buffer, so even matrices of even sizes may begin anywhere.
    """
    sizes_fit = all(size * weight_EOI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
    return weight_EOI.dtype == torch.bfloat16 and sizes_fit and weight_EOI.data_ptr() % 16 == 0


def _looped(x_RI: Tensor, rows: Sequence[int], weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    biases = bias_EO.unbind(0) if bias_EO is not None else [None] * len(rows)
    parts = zip(x_RI.split(list(rows)), weight_EOI.unbind(0), biases, strict=True)
    return torch.cat([F.linear(x, weight, bias) for x, weight, bias in parts])


def _grouped(x_RI: Tensor, rows: Sequence[int], weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    rows_E = torch.tensor(rows, dtype=torch.int32).to(x_RI.device, non_blocking=True)
    ends_E = rows_E.cumsum(0, dtype=torch.int32)
    y_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    if bias_EO is None:
        return y_RO
    return y_RO + bias_EO.repeat_interleave(rows_E, dim=0, output_size=x_RI.shape[0])


def _mix(numbers: Sequence[int]) -> int:
    """One 63-bit seed from several numbers; unlike a sum, (1, 2) and (2, 1) differ."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    return seed
