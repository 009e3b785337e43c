"""Upcycling a timm ViT: timm's own features where the layout allows it, and by hand what the experts become elsewhere."""

import math
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from modsquad_ds.model.network import build_network
from modsquad_ds.model.pack import Segment
from modsquad_ds.model.vit import SparseViT
from modsquad_ds.model_spec import ModelSpec
from modsquad_ds.upcycle import SMALL, Upcycled, fidelity, resized_grid, upcycle
from small import small_recipe

PLAIN = {"class_token": False, "global_pool": "avg", "fc_norm": False}
"""A ViT of patches alone, normed before pooling, as this network is."""


def timm_vit(seed: int = 0, **changes: Any) -> VisionTransformer:
    """A small ViT whose every tensor is random, so that one that is not carried over shows."""
    vit = VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3, **PLAIN, **changes}
    )
    return randomised(vit, seed).eval()


def randomised(vit: VisionTransformer, seed: int = 0) -> VisionTransformer:
    g = torch.Generator().manual_seed(seed)
    for name, parameter in vit.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = around + 0.2 * torch.randn(parameter.shape, generator=g)
    return vit


def backbone_of(**changes: Any) -> SparseViT:
    return build_network(small_recipe(**{"model.layout": "mlp_only", **changes})).backbone.eval()


def spec_of(**changes: Any) -> ModelSpec:
    return small_recipe(**{"model.layout": "mlp_only", **changes}).model


def moe(experts: int, k: int, hidden: int, renormalize: bool, **changes: Any) -> dict[str, Any]:
    return {
        "model.mlp": {"num_experts": experts, "top_k": k, "hidden": hidden},
        "model.router": {"renormalize": renormalize, **changes},
    }


def upcycled(vit: nn.Module, way: Any = "slice", **changes: Any) -> tuple[SparseViT, Upcycled]:
    """The backbone of a recipe with the ViT's weights, and what was made of them."""
    backbone = backbone_of(**changes)
    made = upcycle(vit.state_dict(), spec_of(**changes), backbone.state_dict(), way, "f.pth")
    backbone.load_state_dict(backbone.state_dict() | made.state)
    return backbone, made


@torch.no_grad()
def features(backbone: SparseViT, images: Tensor, task: int = 1) -> Tensor:
    """`[B, N, D]`, as timm gives them."""
    return backbone({task: images})[0][task].flatten(2).transpose(1, 2)


@torch.no_grad()
def expected(vit: VisionTransformer, images: Tensor) -> Tensor:
    return vit.forward_features(images)


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))


# ---------------------------------------------------------------- the ViT's own function


DENSE = {"model.layout": "dense"}


@pytest.mark.parametrize(
    "variant",
    [{}, {"qkv_bias": False}, {"proj_bias": False}, {"init_values": 0.1}, {"init_values": 0.1, "qkv_bias": False}],
    ids=str,
)
def test_dense_layout_is_timm(variant: dict[str, Any]) -> None:
    vit = timm_vit(**variant)
    backbone, made = upcycled(vit, **DENSE)
    found = features(backbone, IMAGES)
    assert torch.allclose(found, expected(vit, IMAGES), atol=1e-5)
    assert torch.equal(found, features(backbone, IMAGES, task=0)), "task embeddings start at zero"
    assert made.changes == () and made.lost == () and made.missing == () and set(made.left) == {"head.weight", "head.bias"}
    if variant == {}:
        for name in ("blocks.1.attn.qkv.weight", "norm.bias", "pos_embed", "blocks.0.mlp.fc2.bias", "patch_embed.proj.weight"):
            assert torch.equal(made.state[name], vit.state_dict()[name]) and name not in made.how


def test_a_real_timm_vit_at_its_own_size() -> None:
    """`vit_tiny_patch16_224` as timm names and shapes it, but for the class token, to which timm's patches attend."""
    vit = randomised(timm.create_model("vit_tiny_patch16_224", pretrained=False, **PLAIN))
    changes = {"model": {"size": "tiny", "layout": "dense"}}
    backbone, made = upcycled(vit.eval(), **changes)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    truth = expected(vit, images)
    assert (features(backbone, images) - truth).abs().max() < 1e-4 * truth.abs().max()
    assert made.changes == ()


def test_images_of_another_size_are_timms_too() -> None:
    vit = timm_vit(dynamic_img_size=True)
    backbone, _ = upcycled(vit, **DENSE)
    images = torch.randn(2, 3, 48, 24, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(features(backbone, images), expected(vit, images), atol=1e-5)


EXACT = [
    ("copy", moe(5, 2, 128, True)),
    ("copy", moe(4, 1, 128, True)),
    ("copy", moe(4, 3, 128, True, type="mlp")),
    ("copy", moe(3, 3, 128, False)),
    ("slice", moe(4, 2, 64, True)),
    ("slice", moe(6, 4, 64, True)),
    ("slice", moe(8, 4, 32, True, type="mlp")),
    ("slice", moe(4, 2, 64, True, per_task=False)),
    ("slice", moe(2, 2, 64, False)),
    ("slice", moe(4, 4, 64, False)),
]


@pytest.mark.parametrize(("way", "changes"), EXACT, ids=str)
@pytest.mark.parametrize("variant", [{}, {"init_values": 0.1, "proj_bias": False}], ids=["plain", "layer_scale"])
def test_sparse_layers_that_preserve_the_function(way: str, changes: dict[str, Any], variant: dict[str, Any]) -> None:
    vit = timm_vit(**variant)
    backbone, made = upcycled(vit, way, **changes)
    truth = expected(vit, IMAGES)
    found = [features(backbone, IMAGES, task) for task in (0, 1)]
    for of_task in found:
        assert torch.allclose(of_task, truth, atol=3e-5)
    assert made.changes == () and made.missing == ()
    # Not because the routers would all do the same: tasks and tokens choose differently wherever there is a choice.
    stats = backbone({0: IMAGES, 1: IMAGES})[1][0]
    spec = spec_of(**changes)
    if spec.mlp.top_k < spec.mlp.num_experts:
        assert (stats.count_TE[:2] > 0).sum(1).min() > spec.mlp.top_k
        assert spec.router.per_task is torch.ne(stats.count_TE[0], stats.count_TE[1]).any().item()


def test_a_slice_group_is_chosen_as_a_whole() -> None:
    vit = timm_vit()
    backbone, _ = upcycled(vit, **moe(8, 4, 32, True))
    stats = backbone({0: IMAGES})[1][0]
    assert torch.equal(stats.count_TE[0, :4], stats.count_TE[0, :1].expand(4))
    assert torch.equal(stats.count_TE[0, 4:], stats.count_TE[0, 4:5].expand(4))


def dense_mlp(vit: VisionTransformer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return vit.blocks[0].mlp(x)


@torch.no_grad()
def expert_output(backbone: SparseViT, expert: int, x: Tensor) -> Tensor:
    bank = backbone.blocks[0].mlp.experts
    hidden = nn.functional.gelu(x @ bank.fc1_weight[expert].t() + bank.fc1_bias[expert])
    return hidden @ bank.fc2_weight[expert].t() + bank.fc2_bias[expert]


def test_gates_that_are_not_renormalised_scale_the_function_a_little() -> None:
    """Groups of 2 slices, 4 groups, 2 of 8 chosen: the dense MLP times (sum of gates) * 8 / 2."""
    vit = timm_vit()
    backbone, made = upcycled(vit, **moe(8, 2, 64, False))
    assert made.changes == tuple(
        f"blocks.{i}.mlp: gate weights are not renormalised and sum to k / E within a few percent" for i in (0, 1)
    )
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    layer = backbone.blocks[0].mlp
    with torch.no_grad():
        segments = (Segment(0, 1, 5, 10),)
        found, gates = layer(x, segments)[0], layer.router(x, segments).weight_SK.sum(1, keepdim=True)
    assert torch.allclose(found, dense_mlp(vit, x) * gates * 4, atol=1e-5)
    assert (gates * 4 > 1).all() and (gates * 4 < 1.05).all()
    own = backbone_of(**moe(8, 2, 64, False)).blocks[0].mlp.router.weight
    assert torch.equal(layer.router.weight[:, 2], own[:, 2] * SMALL) and torch.equal(layer.router.weight[:, 3], own[:, 2] * SMALL)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "k", "hidden"), [(8, 1, 32), (6, 3, 64), (4, 2, 96), (2, 1, 64)])
def test_otherwise_it_is_the_mean_over_even_choices(experts: int, k: int, hidden: int, renormalize: bool) -> None:
    """Every expert k / E of the time, at a gate of 1 / k or 1 / E; (4, 2, 96): slices that wrap around, 3 times in all."""
    vit = timm_vit()
    backbone, made = upcycled(vit, **moe(experts, k, hidden, renormalize))
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(3))
    gate = 1 / k if renormalize else 1 / experts
    mean = sum(expert_output(backbone, e, x) for e in range(experts)) * (k / experts) * gate
    assert torch.allclose(mean, dense_mlp(vit, x), atol=1e-5)
    assert made.changes[0] == f"blocks.0.mlp: the MLP on average, a token chooses {k} parts of {128 / hidden:g}"
    rows = backbone.blocks[0].mlp.router.weight[0]
    assert len(rows.unique(dim=0)) == experts, "rows are not tied, or some slices would never be chosen"


def test_slices_by_hand() -> None:
    """Width 1, H 4, two experts of 2 units, both chosen with gates renormalised: fc2 * 2, units 0 1 and 2 3, bias as it is."""
    weights = {"fc1.weight": [[1.0], [2.0], [3.0], [4.0]], "fc1.bias": [0.1, 0.2, 0.3, 0.4],
               "fc2.weight": [[5.0, 6.0, 7.0, 8.0]], "fc2.bias": [0.5]}  # fmt: skip
    vit = timm_vit(embed_dim=1, num_heads=1, mlp_ratio=4).state_dict()
    vit |= {f"blocks.0.mlp.{name}": torch.tensor(value) for name, value in weights.items()}
    changes = {"model.width": 1, "model.heads": 1, "only": ["digits"], **moe(2, 2, 2, True)}
    backbone = backbone_of(**changes)
    state = upcycle(vit, spec_of(**changes), backbone.state_dict(), "slice", "f").state
    bank = "blocks.0.mlp.experts."
    assert state[f"{bank}fc1_weight"].tolist() == [[[1.0], [2.0]], [[3.0], [4.0]]]
    assert torch.equal(state[f"{bank}fc1_bias"], torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    assert state[f"{bank}fc2_weight"].tolist() == [[[10.0, 12.0]], [[14.0, 16.0]]]
    assert state[f"{bank}fc2_bias"].tolist() == [[0.5], [0.5]]


def test_fidelity() -> None:
    def of(experts: int, k: int, hidden: int, renormalize: bool) -> str:
        return fidelity(experts, spec_of(**moe(experts, k, hidden, renormalize)).mlp, hidden, 128, renormalize)

    assert of(16, 4, 32, True) == "exact" and of(16, 4, 32, False) == "near"
    assert of(16, 2, 32, True) == "average" and of(16, 4, 48, True) == "average"
    assert of(8, 8, 32, False) == "exact" and of(8, 1, 128, True) == "exact" and of(8, 1, 128, False) == "near"


def test_layers_of_unequal_numbers_of_experts() -> None:
    vit = timm_vit()
    changes = moe(4, 2, 64, True)
    changes["model.mlp"]["per_layer"] = [4, 6]
    backbone, _ = upcycled(vit, **changes)
    assert [len(block.mlp.experts.fc1_bias) for block in backbone.blocks] == [4, 6]
    assert torch.allclose(features(backbone, IMAGES), expected(vit, IMAGES), atol=3e-5)


# ---------------------------------------------------------------- attention


ATTENTION = {"model.layout": "attention_only", "model.router.renormalize": True}


def test_attention_of_one_head_without_biases_has_an_equal() -> None:
    """One head: its keys and values are shared by nature, every expert is the same head, gates sum to one."""
    vit = timm_vit(num_heads=1, qkv_bias=False, proj_bias=False, init_values=0.3)
    backbone, made = upcycled(vit, **{"model.heads": 1, "model.attention": {"num_experts": 4, "top_k": 2}, **ATTENTION})
    assert torch.allclose(features(backbone, IMAGES), expected(vit, IMAGES), atol=3e-5)
    assert made.changes == ("blocks.0.attn: MoE attention has no dense equal", "blocks.1.attn: MoE attention has no dense equal")


@pytest.mark.parametrize("renormalize", [True, False])
def test_attention_experts_are_dense_heads(renormalize: bool) -> None:
    """5 experts of 2 heads of width 16; 3 chosen: output projections times 2 heads / sum of gates (1, or 3 / 5)."""
    vit = timm_vit()
    moe_attention = {"num_experts": 5, "top_k": 3}
    changes = {"model.layout": "attention_only", "model.router.renormalize": renormalize, "model.attention": moe_attention}
    backbone, made = upcycled(vit, **changes)
    qkv, bias, proj = (vit.state_dict()[f"blocks.1.attn.{name}"] for name in ("qkv.weight", "qkv.bias", "proj.weight"))
    layer = backbone.blocks[1].attn
    for expert in range(5):
        head = expert % 2
        assert torch.equal(layer.experts.q_weight[expert], qkv[16 * head : 16 * head + 16])
        scale = 2 if renormalize else 2 * 5 / 3
        assert torch.allclose(layer.experts.proj_weight[expert], proj[:, 16 * head : 16 * head + 16] * scale)
    for part, (first, second) in enumerate([((32, 48), (48, 64)), ((64, 80), (80, 96))]):
        here = slice(16 * part, 16 * part + 16)
        assert torch.allclose(layer.kv.weight[here], (qkv[slice(*first)] + qkv[slice(*second)]) / 2)
        assert torch.allclose(layer.kv.bias[here], (bias[slice(*first)] + bias[slice(*second)]) / 2)
    assert {f"blocks.{i}.attn.{part}.bias" for i in (0, 1) for part in ("qkv", "proj")} < set(made.left)
    assert made.lost == () and len(made.changes) == 2


def test_heads_of_another_width_stay_random() -> None:
    changes = {**ATTENTION, "model.attention": {"num_experts": 4, "top_k": 2, "hidden": 24}}
    backbone, made = upcycled(timm_vit(init_values=0.1), **changes)
    own = backbone_of(**changes).state_dict()
    for name in ("experts.q_weight", "experts.proj_weight", "kv.weight", "kv.bias"):
        path = f"blocks.0.attn.{name}"
        assert torch.equal(backbone.state_dict()[path], own[path]) and path in made.ours
        assert made.how[path] == "random, heads differ in width (32 / 2 heads there, 24 here)"
    names = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "ls1.gamma")
    told = {f"blocks.{i}.{name}" for i in (0, 1) for name in names}
    assert told < set(made.left) and made.lost == ()


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize(("side", "grid"), [(4, 7), (7, 4), (4, 4), (3, 14)])
def test_positions_are_resized_as_timm_does(side: int, grid: int) -> None:
    pos = torch.randn(1, side * side, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resized_grid(pos, grid), resample_abs_pos_embed(pos, [grid, grid], num_prefix_tokens=0))


@pytest.mark.parametrize(
    ("variant", "prefix"),
    [
        ({"class_token": True, "global_pool": "token"}, 1),
        ({"class_token": True, "global_pool": "token", "reg_tokens": 4}, 5),
        ({"class_token": True, "global_pool": "token", "reg_tokens": 4, "no_embed_class": True}, 0),
        ({"reg_tokens": 2}, 2),
    ],
)
def test_positions_of_other_tokens_are_left(variant: dict[str, Any], prefix: int) -> None:
    vit = timm_vit(**variant)
    for grid in (4, 6):
        _, made = upcycled(vit, **{**DENSE, "model.grid": grid})
        truth = resample_abs_pos_embed(vit.pos_embed.detach(), [grid, grid], num_prefix_tokens=prefix)[:, prefix:]
        assert torch.equal(made.state["pos_embed"], truth)
        assert made.changes == ("patches attended to a class token or registers, which are gone",)
        assert ("pos_embed" in made.how) == (grid == 6 or prefix > 0)
        assert set(made.left) == {n for n in vit.state_dict() if n.split(".")[0] in ("head", "cls_token", "reg_token")}


def test_only_the_class_token_stands_between_us_and_timm() -> None:
    """With it hidden from the patches, timm's features of `vit_tiny_patch16_224`'s kind are ours."""
    vit = timm_vit(class_token=True, global_pool="token")
    backbone, _ = upcycled(vit, **DENSE)
    assert not torch.allclose(features(backbone, IMAGES), expected(vit, IMAGES)[:, 1:], atol=1e-2)
    hidden = torch.zeros(17, 17).index_fill(1, torch.tensor([0]), -math.inf)
    with torch.no_grad():
        masked = vit.forward_features(IMAGES, attn_mask=hidden)[:, 1:]
    assert torch.allclose(features(backbone, IMAGES), masked, atol=1e-5)
