"""Dense to sparse: a timm vision transformer's weights as the start of a recipe's backbone. Pure; put to use by init_from.py.

Axes: D width, H hidden units of the dense MLP, E experts, C width of an attention head, N positions, T router rows.

Sparse upcycling (arXiv 2212.05055): every expert starts from the dense MLP, as a copy of it (`copy`) or as a slice of its hidden
units (`slice`), G = H / h slices of width h making the whole. E experts are E / G groups of G neighbours, a group the whole MLP.
Where top_k is a multiple of G, a router's random rows are equal inside of a group (virtual groups, arXiv 2410.07524), so that a
token chooses whole groups. fc2 is multiplied by G / g and each expert's bias by 1 / g, g the sum of the chosen gate weights
(1 if they are renormalised, else k / E for even probabilities). `fidelity` says what this gives at step 0.

Routers stay random: with zero rows all tokens would choose the experts of the lowest numbers, the others would never learn, and
mutual information has no gradient there. Without renormalisation their rows are made SMALL times smaller, so that the chosen
gates sum to nearly k / E. Task embeddings start at zero. A layer scale is multiplied into the projection before it, and a bias
that the ViT lacks is zero; both are exact.

MoE attention has one key-value head for all and experts without biases, so a dense attention has no equal there. Query and
output projection of expert e are those of dense head e mod heads, the key-value head is the mean of the dense ones.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modsquad_ds.errors import UserError
from modsquad_ds.model_spec import ModelSpec, MoESpec, block_plans

SMALL = 0.05
"""Factor on the random rows of routers whose gates are not renormalised: logits of about 0.02 at a width of 384."""

PREFIX = ("cls_token", "dist_token", "reg_token")
"""timm's tokens before the patches; this network has patches alone."""

HEAD = (*PREFIX, "head", "head_dist", "fc_norm", "attn_pool")
"""First parts of the names of what belongs to the ViT's own classifier."""

Fidelity = Literal["exact", "near", "average"]


class Upcycled(NamedTuple):
    """A backbone's start."""

    state: dict[str, Tensor]
    """Names inside of the backbone -> fp32 values; those missing here start as they are."""
    how: dict[str, str]
    """Those of `state` that are no plain copies -> what was done."""
    ours: frozenset[str]
    """The backbone's tensors that do not come from a ViT, by design: routers, task embeddings, and what it cannot give."""
    left: tuple[str, ...]
    """The ViT's tensors that have no place here by design: its classifier's, and biases of attention that becomes sparse."""
    lost: tuple[str, ...]
    """The ViT's tensors that change what it computes and that this network cannot represent."""
    missing: tuple[str, ...]
    """The backbone's tensors that the ViT lacks, though a ViT has such."""
    changes: tuple[str, ...]
    """Why the backbone does not compute what the ViT computes on patches; empty where it does, up to rounding."""


def is_vit(tensors: Iterable[str]) -> bool:
    """Whether these names are those of a timm vision transformer."""
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight"} <= set(tensors)


def upcycle(
    vit: Mapping[str, Tensor], spec: ModelSpec, own: Mapping[str, Tensor], way: Literal["slice", "copy"], where: str
) -> Upcycled:
    """The backbone's start from a timm ViT's state dict.

    Args:
        vit: timm's names, any precision.
        own: the backbone's own initial state; gives random routers and what the ViT has not.
        way: how a dense MLP becomes experts.
        where: the file, for errors.

    Raises UserError where width, depth, patch, attention or hidden widths differ, or experts do not tile the MLP.
    """
    check_sizes(vit, spec, where)
    work = _Work(vit, own)
    work.copy("patch_embed.proj.weight", "patch_embed.proj.bias")
    work.position(spec.grid, where)
    for number, plan in enumerate(block_plans(spec)):
        block = f"blocks.{number}"
        for norm in ("norm1", "norm2"):
            work.copy(f"{block}.{norm}.weight", f"{block}.{norm}.bias")
        if plan.attention:
            _sparse_attention(work, spec, block)
        else:
            work.linear(f"{block}.attn.qkv")
            work.linear(f"{block}.attn.proj", f"{block}.ls1.gamma")
        if plan.mlp:
            _sparse_mlp(work, spec, block, way, where)
        else:
            work.linear(f"{block}.mlp.fc1")
            work.linear(f"{block}.mlp.fc2", f"{block}.ls2.gamma")
        if f"{block}.task_embed" in own:
            work.ours.add(f"{block}.task_embed")
            work.put(f"{block}.task_embed", torch.zeros_like(own[f"{block}.task_embed"]), "zero")
    if any(name.startswith("fc_norm.") for name in vit) and "norm.weight" not in vit:
        work.ours |= {"norm.weight", "norm.bias"}
        work.changes.append("the ViT norms after pooling, this network before")
    else:
        work.copy("norm.weight", "norm.bias")
    return work.result()


def fidelity(num_experts: int, moe: MoESpec, hidden: int, dense_hidden: int, renormalize: bool) -> Fidelity:
    """What an upcycled MoE MLP of experts of width `hidden` computes at step 0, compared with its dense MLP.

    `exact`: the same for every token, up to rounding: experts fall into groups that a token chooses as a whole, and gates are
    renormalised or all experts are chosen. `near`: the same times (sum of the chosen gates) * E / k, a few percent above 1.
    `average`: a token gets part of the slices, or some more often than others; the expectation over even routers is the same.
    """
    if dense_hidden % hidden or moe.top_k % (dense_hidden // hidden):
        return "average"
    return "exact" if renormalize or moe.top_k == num_experts else "near"


def resized_grid(pos_1ND: Tensor, grid: int) -> Tensor:
    """Position embeddings of a square grid, resized to `grid` x `grid` as timm's `resample_abs_pos_embed` does; fp32."""
    side = round(pos_1ND.shape[1] ** 0.5)
    if side == grid:
        return pos_1ND.float()
    square = pos_1ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, (grid, grid), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)


def check_sizes(vit: Mapping[str, Tensor], spec: ModelSpec, where: str) -> None:
    """Raise UserError, with all differences at once, where the ViT's sizes are not the recipe's, or not those of a plain ViT."""
    shape, plans = spec.shape, block_plans(spec)
    patch, qkv = vit["patch_embed.proj.weight"], vit["blocks.0.attn.qkv.weight"]
    fc1, fc2 = (vit.get(f"blocks.0.mlp.{name}.weight", torch.empty(0, 0)) for name in ("fc1", "fc2"))
    if (patch.dim(), qkv.dim(), fc1.dim(), fc2.dim()) != (4, 2, 2, 2):
        shapes = ", ".join(_shown(tensor) for tensor in (patch, qkv, fc1, fc2))
        wrong = f"init_from {where}: patch_embed.proj and block 0's qkv, fc1 and fc2 are {shapes}"
        raise UserError(f"{wrong}, expected 4-D and 2-D ones")
    hidden = len(fc1) or fc2.shape[1]
    numbers = {int(of[1]) for name in vit if len(of := name.split(".")) > 2 and of[0] == "blocks" and of[1].isdigit()}
    found: list[tuple[str, object, object]] = [
        ("model.width", patch.shape[0], shape.width),
        ("model.depth", max(numbers) + 1, shape.depth),
        ("model.patch", "x".join(map(str, patch.shape[2:])), f"{shape.patch}x{shape.patch}"),
        ("the number of an image's channels", patch.shape[1], 3),
    ]
    if not all(plan.attention for plan in plans):
        found.append(("model.heads * head_dim", len(qkv) // 3, shape.heads * spec.attention_width))
        if "blocks.0.attn.q_norm.weight" in vit:
            found.append(("model.head_dim", vit["blocks.0.attn.q_norm.weight"].numel(), spec.attention_width))
    if hidden and not all(plan.mlp for plan in plans):
        found.append(("model.mlp_ratio * width", hidden, round(spec.mlp_ratio * shape.width)))
    unequal = [f"{key} is {there} there and {here} here" for key, there, here in found if str(there) != str(here)]
    if unequal:
        raise UserError(f"init_from {where}: {', '.join(unequal)}; change the recipe's model, or take another ViT")
    expected = _plain_shapes(shape.width, len(qkv) // 3, hidden, sorted(numbers))
    tokens = {name: vit[name].shape[-2:-1] for name in ("pos_embed", *PREFIX) if name in vit}
    expected |= {name: (1, *n, shape.width) for name, n in tokens.items()}
    for name, wanted in expected.items():
        if name in vit and vit[name].shape != wanted:
            plain = "x".join(map(str, wanted))
            raise UserError(f"init_from {where}: {name} is {_shown(vit[name])}, a plain ViT has {plain}; take another checkpoint")


def _plain_shapes(width: int, attention: int, hidden: int, blocks: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of a plain ViT's tensors; a gated MLP, say, has others."""
    of_block: dict[str, tuple[int, ...]] = {
        "attn.qkv.weight": (3 * attention, width), "attn.qkv.bias": (3 * attention,),
        "attn.proj.weight": (width, attention), "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
    }  # fmt: skip
    norms = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
    of_block |= dict.fromkeys((*norms, "attn.proj.bias", "ls1.gamma", "mlp.fc2.bias", "ls2.gamma"), (width,))
    whole = {f"blocks.{i}.{name}": shape for i in blocks for name, shape in of_block.items()}
    return whole | dict.fromkeys(("patch_embed.proj.bias", "norm.weight", "norm.bias"), (width,))


class _Work:
    """What is being put together, and which of the ViT's tensors were used."""

    def __init__(self, vit: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        self.vit, self.own = vit, own
        self.state: dict[str, Tensor] = {}
        self.how: dict[str, str] = {}
        self.used: set[str] = set()
        self.ours: set[str] = set()
        self.left: list[str] = []
        self.changes: list[str] = []

    def take(self, name: str) -> Tensor | None:
        """A tensor of the ViT in fp32, or None."""
        if name not in self.vit:
            return None
        self.used.add(name)
        return self.vit[name].float()

    def put(self, name: str, value: Tensor, how: str | None = None) -> None:
        """Set a tensor of the backbone."""
        assert value.shape == self.own[name].shape, f"{name}: {tuple(value.shape)}, not {tuple(self.own[name].shape)}"
        self.state[name] = value.contiguous().clone()
        if how:
            self.how[name] = how

    def copy(self, weight: str, bias: str) -> None:
        """Weight and bias as they are; a bias alone that is lacking is zero."""
        value = self.take(weight)
        if value is not None:
            self.put(weight, value)
            self._put_bias(bias, self.take(bias))

    def leave(self, names: Iterable[str]) -> None:
        """Say of tensors, if the ViT has them, that they find no place, at least in part."""
        here = [name for name in names if name in self.vit]
        self.left += here
        self.used.update(here)

    def has(self, *names: str) -> bool:
        """Whether the ViT has all of these."""
        return all(name in self.vit for name in names)

    def linear(self, name: str, scale: str = "") -> None:
        """A linear layer, its outputs times the layer scale of this name if there is one."""
        if self.has(f"{name}.weight"):
            weight, bias = self.scaled(name, scale)
            self.put(f"{name}.weight", weight, "times the layer scale" if scale in self.used else None)
            self._put_bias(f"{name}.bias", bias)

    def scaled(self, name: str, scale: str = "") -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear layer, with its layer scale multiplied in."""
        weight, bias, gamma = self.take(f"{name}.weight"), self.take(f"{name}.bias"), self.take(scale)
        assert weight is not None
        if gamma is None:
            return weight, bias
        return weight * gamma.unsqueeze(1), None if bias is None else bias * gamma

    def position(self, grid: int, where: str) -> None:
        """Position embeddings of the patches, resized to the recipe's grid."""
        pos_1ND = self.take("pos_embed")
        if pos_1ND is None:
            return
        prefix = sum(self.vit[name].shape[1] for name in PREFIX if name in self.vit)
        patches, how = pos_1ND[:, prefix:], "without the class token's" if prefix else None
        if not _is_square(patches.shape[1]):  # timm's `no_embed_class`: patches alone have positions
            patches, how = pos_1ND, None
        n = patches.shape[1]
        if not _is_square(n):
            raise UserError(
                f"init_from {where}: pos_embed has {pos_1ND.shape[1]} entries, {prefix} of them for tokens that are no patches: "
                "not a square grid; resize it to one (timm's resample_abs_pos_embed) first"
            )
        side = round(n**0.5)
        if side != grid:
            how = f"resized from {side}x{side} to {grid}x{grid}"
        self.put("pos_embed", resized_grid(patches, grid), how)

    def result(self) -> Upcycled:
        """All of it."""
        unused = [name for name in self.vit if name not in self.used]
        own_head = [name for name in unused if name.split(".")[0] in HEAD]
        lost = [name for name in unused if name not in own_head]
        missing = [name for name in self.own if name not in self.state and name not in self.ours]
        if any(name in self.vit for name in PREFIX):
            self.changes.insert(0, "patches attended to a class token or registers, which are gone")
        if lost or missing:
            self.changes.append("tensors of one side have no counterpart")
        left = (*own_head, *self.left)
        return Upcycled(self.state, self.how, frozenset(self.ours), left, tuple(lost), tuple(missing), tuple(self.changes))

    def _put_bias(self, name: str, value: Tensor | None) -> None:
        if value is None:
            self.put(name, torch.zeros_like(self.own[name]), "zero, as the ViT has none")
        else:
            self.put(name, value)


def _sparse_mlp(work: _Work, spec: ModelSpec, block: str, way: Literal["slice", "copy"], where: str) -> None:
    """A dense MLP as experts; see this module's docstring."""
    work.ours |= {name for name in work.own if name.startswith(f"{block}.mlp.router.")}
    if not work.has(f"{block}.mlp.fc1.weight", f"{block}.mlp.fc2.weight"):
        return
    fc1, fc2 = work.scaled(f"{block}.mlp.fc1"), work.scaled(f"{block}.mlp.fc2", f"{block}.ls2.gamma")
    bank, (experts, hidden) = f"{block}.mlp.experts", work.own[f"{block}.mlp.experts.fc1_bias"].shape
    dense = fc1[0].shape[0]
    _check_tiling(experts, hidden, dense, way, where)
    unit_EH = (torch.arange(experts * hidden) % dense).view(experts, hidden)
    bias1_H = torch.zeros(dense) if fc1[1] is None else fc1[1]
    bias2_D = torch.zeros(spec.shape.width) if fc2[1] is None else fc2[1]
    gates = 1.0 if spec.router.renormalize else spec.mlp.top_k / experts
    what = "a copy of the MLP" if hidden == dense else f"a slice of {hidden} of the MLP's {dense} units"
    work.put(f"{bank}.fc1_weight", fc1[0][unit_EH], what)
    work.put(f"{bank}.fc1_bias", bias1_H[unit_EH], what)
    work.put(f"{bank}.fc2_weight", fc2[0][:, unit_EH].movedim(0, 1) * (dense / hidden / gates), what)
    work.put(f"{bank}.fc2_bias", bias2_D.expand(experts, -1) / gates, what)
    kind = fidelity(experts, spec.mlp, hidden, dense, spec.router.renormalize)
    _router(work, f"{block}.mlp.router", kind, dense // hidden, not spec.router.renormalize and spec.mlp.top_k < experts)
    if kind == "near":
        work.changes.append(f"{block}.mlp: gate weights are not renormalised and sum to k / E within a few percent")
    if kind == "average":
        work.changes.append(f"{block}.mlp: the MLP on average, a token chooses {spec.mlp.top_k} parts of {dense / hidden:g}")


def _router(work: _Work, path: str, kind: Fidelity, slices: int, small: bool) -> None:
    """The layer's own random routers, equal inside of the groups that make a whole MLP, and small where gates must be even."""
    for name in (f"{path}.weight", f"{path}.bias"):
        if name in work.own:
            row_E = torch.arange(work.own[name].shape[1])
            row_E = row_E if kind == "average" else row_E // slices * slices
            work.put(name, work.own[name].float()[:, row_E] * (SMALL if small else 1.0), "random" + (", small" if small else ""))


def _check_tiling(experts: int, hidden: int, dense: int, way: str, where: str) -> None:
    if way == "copy" and hidden != dense:
        raise UserError(
            f"init_from {where}: upcycle copy needs experts as wide as the dense MLP: model.mlp.hidden is {hidden}, the MLP has "
            f"{dense} units; set model.mlp.hidden={dense}, or init_from.upcycle=slice"
        )
    if experts * hidden % dense:
        times = f"{experts} experts of {hidden} hidden units hold the {dense} of the MLP {experts * hidden / dense:.2f} times"
        way_out = "change model.mlp.num_experts or model.mlp.hidden, or set init_from.upcycle=copy"
        raise UserError(f"init_from {where}: {times}, not a whole number of times; {way_out}")


def _sparse_attention(work: _Work, spec: ModelSpec, block: str) -> None:
    """Experts from dense heads where their widths are equal, else random ones; never the dense attention's function."""
    path, heads = f"{block}.attn", spec.shape.heads
    work.ours |= {name for name in work.own if name.startswith(f"{path}.router.")}
    work.changes.append(f"{path}: MoE attention has no dense equal")
    if not work.has(f"{path}.qkv.weight", f"{path}.proj.weight"):
        return
    experts, width_C, width_D = work.own[f"{path}.experts.q_weight"].shape
    attention = len(work.vit[f"{path}.qkv.weight"]) // 3
    if attention != heads * width_C:
        wide = f"{attention} / {heads} heads there, {width_C} here"
        for name in ("experts.q_weight", "experts.proj_weight", "kv.weight", "kv.bias"):
            work.ours.add(f"{path}.{name}")
            work.put(f"{path}.{name}", work.own[f"{path}.{name}"].float(), f"random, heads differ in width ({wide})")
        names = [*(f"attn.{layer}.{kind}" for layer in ("qkv", "proj") for kind in ("weight", "bias")), "ls1.gamma"]
        work.leave(f"{block}.{name}" for name in names)
        return
    qkv, proj = work.scaled(f"{path}.qkv"), work.scaled(f"{path}.proj", f"{block}.ls1.gamma")
    head_E = torch.arange(experts) % heads
    gates = 1.0 if spec.router.renormalize else spec.attention.top_k / experts
    q, kv = qkv[0][: heads * width_C], qkv[0][heads * width_C :]
    bias = torch.zeros(3 * heads * width_C) if qkv[1] is None else qkv[1]
    work.put(f"{path}.experts.q_weight", q.view(heads, width_C, width_D)[head_E], "dense heads' queries")
    per_head = proj[0].view(width_D, heads, width_C).movedim(1, 0)
    # A token's chosen experts stand for all heads: together they weigh as much as these.
    work.put(f"{path}.experts.proj_weight", per_head[head_E] * (heads / gates), "dense heads' output projections")
    work.put(f"{path}.kv.weight", kv.view(2, heads, width_C, width_D).mean(1).flatten(0, 1), "mean of the dense heads")
    work.put(f"{path}.kv.bias", bias.view(3, heads, width_C)[1:].mean(1).flatten(), "mean of the dense heads")
    work.leave((f"{path}.qkv.bias", f"{path}.proj.bias"))
    _router(work, f"{path}.router", "average", 1, not spec.router.renormalize and spec.attention.top_k < experts)


def _shown(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _is_square(n: int) -> bool:
    return n > 0 and round(n**0.5) ** 2 == n
