"""The recipe's `model:` section: shape of the vision transformer, its sparse layers and routers. Part of config.py's recipe."""

from typing import Literal, NamedTuple

from pydantic import Field, model_validator
from typing_extensions import Self

from modsquad_ds.tasks import Strict


class Backbone(Strict):
    """Shape of a dense ViT; `SIZES` holds the named ones."""

    width: int
    depth: int
    heads: int
    patch: int


SIZES: dict[str, Backbone] = {
    "tiny": Backbone(width=192, depth=12, heads=3, patch=16),
    "small": Backbone(width=384, depth=12, heads=6, patch=16),
    "base": Backbone(width=768, depth=12, heads=12, patch=16),
    "quickstart": Backbone(width=96, depth=4, heads=3, patch=8),
}

Layout = Literal["alternate", "every_block", "mlp_only", "attention_only", "dense"]
"""Which blocks are sparse. `alternate` (Mod-Squad's): even blocks MoE attention and dense MLP, odd blocks dense attention and
MoE MLP. `mlp_only` and `attention_only` make that half of every block sparse; `every_block` both."""


class RouterSpec(Strict):
    """How tokens choose experts."""

    type: Literal["linear", "mlp"] = "linear"
    """`linear`: one bias-free map per task (Mod-Squad). `mlp`: two layers with GELU, D -> D/4 -> E (heterogeneous follow-up)."""
    per_task: bool = True
    """False: one router for all tasks, the plain mixture-of-experts baseline."""
    renormalize: bool = False
    """Divide the gate weights of the chosen experts by their sum."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation, in units of 1/E, of Gaussian noise on the logits while training."""


class MoESpec(Strict):
    """One kind of sparse layer."""

    num_experts: int = Field(gt=0)
    top_k: int = Field(gt=0)
    per_layer: tuple[int, ...] = ()
    """Experts of each sparse layer of this kind, first block first, in place of `num_experts`; empty: as many in all. Extracted
    models have it."""
    hidden: int | None = Field(None, gt=0)
    """MLP: hidden width of an expert, default mlp_ratio * width / top_k, so that active FLOPs equal the dense layer's.
    Attention: width of the one query head that an expert is, default `head_dim`."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is larger than num_experts {self.num_experts}")
        if self.per_layer and self.top_k > min(self.per_layer):
            raise ValueError(f"top_k {self.top_k} is larger than the least number in per_layer, {min(self.per_layer)}")
        return self

    def experts_in(self, layer: int) -> int:
        """Experts of a sparse layer, counted among those of its kind."""
        return self.per_layer[layer] if self.per_layer else self.num_experts

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of experts that occur."""
        return self.per_layer or (self.num_experts,)


class ModelSpec(Strict):
    """The sparse vision transformer."""

    size: str = "base"
    """One of the named sizes: tiny, small, base, quickstart. `width`, `depth`, `heads`, `patch` override it."""
    width: int | None = Field(None, gt=0)
    depth: int | None = Field(None, gt=0)
    heads: int | None = Field(None, gt=0)
    patch: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0)
    """Width of an attention head; default width / heads. Mod-Squad doubles it."""
    mlp_ratio: float = Field(4.0, gt=0)
    grid: int = Field(14, gt=0)
    """Side, in patches, of the learned position embedding; it is resized bicubically to each image's own grid."""
    layout: Layout = "alternate"
    mlp: MoESpec = MoESpec(num_experts=16, top_k=4)
    attention: MoESpec = MoESpec(num_experts=24, top_k=12)
    router: RouterSpec = RouterSpec()
    task_embedding: bool = True
    """A learned vector per task and block is added to the tokens before the block."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Rate of the last block; it grows linearly from 0 in the first."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""

    @model_validator(mode="after")
    def _size_known(self) -> Self:
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r} is not one of {', '.join(SIZES)}")
        if self.head_dim is None and self.shape.width % self.shape.heads:
            raise ValueError(f"width {self.shape.width} is not a multiple of heads {self.shape.heads}: set head_dim")
        for name, layers in zip(("attention", "mlp"), zip(*block_plans(self), strict=True), strict=True):
            given, wanted = len(getattr(self, name).per_layer), sum(layers)
            if given and given != wanted:
                raise ValueError(f"{name}.per_layer has {given} numbers, the layout {wanted} sparse layers of this kind")
        return self

    @property
    def shape(self) -> Backbone:
        """The named size with this section's overrides."""
        given = {k: v for k in ("width", "depth", "heads", "patch") if (v := getattr(self, k)) is not None}
        return SIZES[self.size].model_copy(update=given)

    @property
    def attention_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.shape.width // self.shape.heads

    @property
    def expert_hidden(self) -> int:
        """Hidden width of one MLP expert."""
        return self.mlp.hidden or round(self.mlp_ratio * self.shape.width / self.mlp.top_k)


class BlockPlan(NamedTuple):
    """Which halves of a block are sparse."""

    attention: bool
    mlp: bool


def block_plans(spec: ModelSpec) -> tuple[BlockPlan, ...]:
    """The layout of every block; pure, so it can be printed without building anything."""
    by_layout = {
        "alternate": lambda i: BlockPlan(attention=i % 2 == 0, mlp=i % 2 == 1),
        "every_block": lambda i: BlockPlan(attention=True, mlp=True),
        "mlp_only": lambda i: BlockPlan(attention=False, mlp=True),
        "attention_only": lambda i: BlockPlan(attention=True, mlp=False),
        "dense": lambda i: BlockPlan(attention=False, mlp=False),
    }
    return tuple(by_layout[spec.layout](i) for i in range(spec.shape.depth))
