"""Upcycling timm's variants: nothing is dropped in silence, and what does not fit is refused in one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from modsquad_ds.errors import UserError
from modsquad_ds.upcycle import is_vit, upcycle
from test_upcycle import DENSE, backbone_of, moe, spec_of, timm_vit, upcycled

# ---------------------------------------------------------------- nothing is dropped in silence


VARIANTS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"class_token": True, "global_pool": "token", "reg_tokens": 1}, set()),
    ({"fc_norm": True}, set()),
    ({"init_values": 0.1}, set()),
    ({"qk_norm": True, "norm_layer": nn.LayerNorm}, {"attn.q_norm", "attn.k_norm"}),
    ({"scale_mlp_norm": True, "norm_layer": nn.LayerNorm}, {"mlp.norm"}),
    ({"scale_attn_norm": True, "norm_layer": nn.LayerNorm}, {"attn.norm"}),
    ({"pre_norm": True}, {"norm_pre"}),
    ({"global_pool": "map", "fc_norm": False}, set()),
]


@pytest.mark.parametrize(("variant", "lost"), VARIANTS, ids=[str(v) for v, _ in VARIANTS])
@pytest.mark.parametrize("layout", ["dense", "alternate", "every_block"])
def test_every_tensor_is_used_or_told(variant: dict[str, Any], lost: set[str], layout: str) -> None:
    """Each tensor of the ViT, changed alone, changes the backbone's start; those that do not are told."""
    vit = timm_vit(**variant).state_dict()
    changes = {"model.layout": layout, **moe(4, 2, 64, True)}
    own, spec = backbone_of(**changes).state_dict(), spec_of(**changes)
    made = upcycle(vit, spec, own, "slice", "f")
    told = {*made.left, *made.lost}
    for name in vit:
        again = upcycle({**vit, name: vit[name] + 1}, spec, own, "slice", "f").state
        moved = any(not torch.equal(again[n], tensor) for n, tensor in made.state.items())
        assert moved or name in told, f"{name} is dropped in silence"
        assert not moved or name not in told or name.endswith("attn.qkv.bias"), f"{name} is told as left, but used"
    pieces = {part for name in made.lost for part in lost if part in name}
    assert pieces == lost and bool(made.lost) == bool(lost)
    assert bool(made.lost) == any("no counterpart" in change for change in made.changes)
    assert made.missing == () and set(own) == set(made.state) | made.ours


def test_missing_tensors_are_told() -> None:
    vit = timm_vit().state_dict()
    for name in ("pos_embed", "norm.weight", "blocks.1.mlp.fc2.weight", "blocks.0.attn.proj.weight"):
        del vit[name]
    changes = {"model.layout": "alternate", **moe(4, 2, 64, True)}
    made = upcycle(vit, spec_of(**changes), backbone_of(**changes).state_dict(), "slice", "f")
    experts = {f"blocks.1.mlp.experts.{name}" for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")}
    attention = {f"blocks.0.attn.{name}" for name in ("experts.q_weight", "experts.proj_weight", "kv.weight", "kv.bias")}
    assert set(made.missing) == {"pos_embed", "norm.weight", "norm.bias", *experts, *attention}
    assert {"blocks.1.mlp.fc1.weight", "blocks.0.attn.qkv.weight", "norm.bias"} < set(made.lost)


def test_half_precision_is_widened() -> None:
    vit = {name: tensor.bfloat16() for name, tensor in timm_vit().state_dict().items()}
    made = upcycle(vit, spec_of(**DENSE), backbone_of(**DENSE).state_dict(), "slice", "f")
    assert {tensor.dtype for tensor in made.state.values()} == {torch.float32}
    assert torch.equal(made.state["norm.weight"], vit["norm.weight"].float())


# ---------------------------------------------------------------- refusals


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ({"embed_dim": 64}, DENSE, "model.width is 64 there and 32 here"),
        ({"depth": 3}, DENSE, "model.depth is 3 there and 2 here"),
        ({"patch_size": 16}, DENSE, "model.patch is 16x16 there and 8x8 here"),
        ({"in_chans": 1}, DENSE, "the number of an image's channels is 1 there and 3 here"),
        ({}, {**DENSE, "model.head_dim": 32}, "model.heads * head_dim is 32 there and 64 here"),
        ({"qk_norm": True, "norm_layer": nn.LayerNorm}, {**DENSE, "model.heads": 4}, "model.head_dim is 16 there and 8 here"),
        ({"mlp_ratio": 2}, DENSE, "model.mlp_ratio * width is 64 there and 128 here"),
        ({"embed_dim": 64, "depth": 1}, DENSE, "model.width is 64 there and 32 here, model.depth is 1 there and 2 here"),
        ({}, moe(3, 2, 24, True), "3 experts of 24 hidden units hold the 128 of the MLP 0.56 times"),
        ({}, moe(5, 2, 64, True), "5 experts of 64 hidden units hold the 128 of the MLP 2.50 times"),
        ({"img_size": (32, 16)}, DENSE, "pos_embed has 8 entries, 0 of them"),
    ],
)
def test_sizes_that_do_not_fit(variant: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    assert message in refusal(lambda: upcycled(timm_vit(**variant), **changes))


def test_copies_need_experts_as_wide_as_the_mlp() -> None:
    message = refusal(lambda: upcycled(timm_vit(), "copy", **moe(4, 2, 64, True)))
    assert "model.mlp.hidden is 64, the MLP has 128 units; set model.mlp.hidden=128, or init_from.upcycle=slice" in message


def test_other_kinds_of_vit() -> None:
    gated = timm_vit().state_dict()
    gated |= {f"blocks.{i}.mlp.fc1.weight": torch.zeros(256, 32) for i in (0, 1)}
    layout = moe(4, 2, 64, True)
    spec, own = spec_of(**layout), backbone_of(**layout).state_dict()
    message = refusal(lambda: upcycle(gated, spec, own, "slice", "f.pth"))
    assert "init_from f.pth: blocks.0.mlp.fc1.bias is 128, a plain ViT has 256" in message
    parted = timm_vit().state_dict()
    for name in [name for name in parted if "fc1" in name]:
        parted[f"{name.replace('fc1', 'fc1_g')}"] = parted.pop(name)
    made = upcycle(parted, spec_of(**DENSE), backbone_of(**DENSE).state_dict(), "slice", "f")
    assert {f"blocks.{i}.mlp.fc1_g.{kind}" for i in (0, 1) for kind in ("weight", "bias")} == set(made.lost)
    flat = timm_vit().state_dict() | {"patch_embed.proj.weight": torch.zeros(32, 192)}
    message = refusal(lambda: upcycle(flat, spec_of(**DENSE), backbone_of(**DENSE).state_dict(), "slice", "f"))
    assert "are 32x192, 96x32, 128x32, 32x128, expected 4-D and 2-D ones" in message
    assert is_vit(gated) and not is_vit(["patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"])
