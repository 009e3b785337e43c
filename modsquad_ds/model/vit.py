"""The shared backbone: a vision transformer on a TokenPack, with dense and sparse blocks. Images in, a feature map per task out.

Axes: S tokens in the pack, D width, B images, N tokens of an image, H heads, T tasks.
Parameter names are timm's (`patch_embed.proj`, `blocks.3.attn.qkv`, `mlp.fc1`, `norm`), so ViT checkpoints need no map.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modsquad_ds.model.experts import HeadExperts, MLPExperts
from modsquad_ds.model.pack import Segment, Shared, TokenPack, slices
from modsquad_ds.model.router import Router, RoutingStats
from modsquad_ds.model.sparse import SparseAttention, SparseLayer, SparseMLP
from modsquad_ds.model_spec import ModelSpec, block_plans


class PatchEmbed(nn.Module):
    """Patches to tokens by one strided convolution."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """`[B, 3, H, W]` -> `[B, D, H / patch, W / patch]`."""
        return self.proj(images_BCHW)


class Attention(nn.Module):
    """Dense multi-head self-attention, within each image."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x_SD: Tensor, segments: tuple[Segment, ...]) -> tuple[Tensor, None]:
        """`[S, D]` -> `[S, D]`; the second value stands where a sparse layer returns statistics."""
        parts = []
        for segment, qkv in slices(self.qkv(x_SD), segments):
            q, k, v = qkv.view(segment.batch, segment.tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            out_BHNC = F.scaled_dot_product_attention(q, k, v)
            parts.append(out_BHNC.transpose(1, 2).reshape(segment.length, -1))
        return self.proj(torch.cat(parts)), None


class MLP(nn.Module):
    """Dense two-layer MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_SD: Tensor, segments: tuple[Segment, ...]) -> tuple[Tensor, None]:
        """`[S, D]` -> `[S, D]`; the second value stands where a sparse layer returns statistics."""
        return self.fc2(F.gelu(self.fc1(x_SD))), None


class Block(nn.Module):
    """Task embedding, then pre-norm attention and MLP, each dense or sparse, with residuals."""

    def __init__(self, spec: ModelSpec, number: int, tasks: int, drop_path: float) -> None:
        super().__init__()
        shape, plans = spec.shape, block_plans(spec)
        plan, before = plans[number], plans[:number]
        self.drop_path = drop_path
        self.task_embed = nn.Parameter(torch.zeros(tasks, shape.width)) if spec.task_embedding else None
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-6)
        attention = sum(one.attention for one in before)
        self.attn = _sparse_attention(spec, attention, tasks) if plan.attention else _dense_attention(spec)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-6)
        mlp = sum(one.mlp for one in before)
        self.mlp = _sparse_mlp(spec, mlp, tasks) if plan.mlp else MLP(shape.width, round(spec.mlp_ratio * shape.width))

    def forward(self, x_SD: Tensor, segments: tuple[Segment, ...]) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """`[S, D]` -> `[S, D]` and the statistics of the block's sparse layers, attention before MLP."""
        if self.task_embed is not None:
            x_SD = torch.cat([x_ND + self.task_embed[segment.task] for segment, x_ND in slices(x_SD, segments)])
        attended, attention_stats = self.attn(self.norm1(x_SD), segments)
        x_SD = x_SD + self._dropped(attended, segments)
        mixed, mlp_stats = self.mlp(self.norm2(x_SD), segments)
        x_SD = x_SD + self._dropped(mixed, segments)
        return x_SD, tuple(stats for stats in (attention_stats, mlp_stats) if stats is not None)

    def _dropped(self, branch_SD: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """Stochastic depth per image: the branch of an unlucky image is zero, the others are scaled up."""
        if not self.training or self.drop_path == 0:
            return branch_SD
        parts = []
        for segment, x in slices(branch_SD, segments):
            keep_B11 = x.new_empty(segment.batch, 1, 1).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
            parts.append((x.view(segment.batch, segment.tokens, -1) * keep_B11).view_as(x))
        return torch.cat(parts)


class SparseViT(nn.Module):
    """Patch and position embedding, blocks, final norm."""

    def __init__(self, spec: ModelSpec, tasks: int) -> None:
        super().__init__()
        shape = spec.shape
        self.patch, self.grid = shape.patch, spec.grid
        self.checkpointing = spec.activation_checkpointing
        self.patch_embed = PatchEmbed(shape.patch, shape.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.grid * spec.grid, shape.width))
        rates = torch.linspace(0, spec.drop_path, shape.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(spec, number, tasks, rate) for number, rate in enumerate(rates))
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)

    def forward(
        self, images: Mapping[int, Tensor], shared: Sequence[Shared] = ()
    ) -> tuple[dict[int, Tensor], tuple[RoutingStats, ...]]:
        """Images `[B, 3, H, W]` by task index -> feature maps `[B, D, H / patch, W / patch]`, and statistics per sparse layer."""
        pack = self.embed(images, shared)
        x_SD, stats = pack.tokens_SD, []
        for block in self.blocks:
            if self.checkpointing and self.training:
                x_SD, of_block = checkpoint(block, x_SD, pack.segments, use_reentrant=False)
            else:
                x_SD, of_block = block(x_SD, pack.segments)
            stats.extend(of_block)
        maps = {
            segment.task: x.view(segment.batch, segment.height, segment.width, -1).permute(0, 3, 1, 2)
            for segment, x in slices(self.norm(x_SD), pack.segments)
        }
        return maps, tuple(stats)

    def embed(self, images: Mapping[int, Tensor], shared: Sequence[Shared] = ()) -> TokenPack:
        """One segment per task, in the order of the mapping and of the readers."""
        parts, segments = [], []
        for task, images_BCHW in images.items():
            x_BND, height, width = self._tokens(images_BCHW)
            parts.append(x_BND.flatten(0, 1))
            segments.append(Segment(task, len(x_BND), height, width))
        for images_BCHW, readers in shared:
            x_BND, height, width = self._tokens(images_BCHW)
            for task, rows in readers.items():
                parts.append(x_BND.index_select(0, rows.index_B).flatten(0, 1))
                segments.append(Segment(task, len(rows.index_B), height, width, rows.counted))
        return TokenPack(torch.cat(parts), tuple(segments))

    def _tokens(self, images_BCHW: Tensor) -> tuple[Tensor, int, int]:
        """Tokens `[B, N, D]` of images, and the rows and columns that they stand in."""
        map_BDHW = self.patch_embed(images_BCHW)
        height, width = map_BDHW.shape[2:]
        return map_BDHW.flatten(2).transpose(1, 2) + self.position(height, width), height, width

    def position(self, height: int, width: int) -> Tensor:
        """Position embedding `[1, height * width, D]`, resized from the learned grid."""
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed
        square = self.pos_embed.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(square.float(), (height, width), mode="bicubic", antialias=True)
        return resized.to(self.pos_embed.dtype).flatten(2).transpose(1, 2)

    def sparse_layers(self) -> dict[str, SparseLayer]:
        """Path of each sparse layer -> layer, in the order of the statistics."""
        return {name: module for name, module in self.named_modules() if isinstance(module, SparseLayer)}


def init_weights(backbone: SparseViT, seed: int) -> None:
    """timm's ViT initialisation (truncated normal 0.02, zero biases) and each expert from its own generator."""
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(backbone.pos_embed, std=0.02)
    for block in backbone.blocks:
        if isinstance(block, Block) and block.task_embed is not None:
            nn.init.trunc_normal_(block.task_embed, std=0.02)
    for layer, sparse in enumerate(backbone.sparse_layers().values()):
        sparse.experts.init_weights(seed, layer)
        sparse.experts.mark_stacked()
        for parameter in sparse.router.parameters():
            parameter.stacked = True  # type: ignore[attr-defined]


def _dense_attention(spec: ModelSpec) -> Attention:
    return Attention(spec.shape.width, spec.shape.heads, spec.attention_width)


def _sparse_attention(spec: ModelSpec, layer: int, tasks: int) -> SparseAttention:
    moe, width, experts = spec.attention, spec.shape.width, spec.attention.experts_in(layer)
    router = Router(spec.router, width, tasks, experts, moe.top_k)
    return SparseAttention(router, HeadExperts(experts, width, moe.hidden or spec.attention_width), width)


def _sparse_mlp(spec: ModelSpec, layer: int, tasks: int) -> SparseMLP:
    moe, width, experts = spec.mlp, spec.shape.width, spec.mlp.experts_in(layer)
    router = Router(spec.router, width, tasks, experts, moe.top_k)
    return SparseMLP(router, MLPExperts(experts, width, spec.expert_hidden))
