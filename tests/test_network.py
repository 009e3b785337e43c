"""The whole network: a function of its recipe, each task its own head, and all its parameters counted by hand."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from modsquad_ds.config import load_recipe
from modsquad_ds.model.counts import Counts, count_parameters
from modsquad_ds.model.network import MultiTaskNetwork, NetworkOutput, build_network
from small import small_batch, small_images, small_recipe


def test_network_is_a_function_of_the_recipe_alone() -> None:
    torch.manual_seed(1)
    first = build_network(small_recipe()).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build_network(small_recipe()).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "and building one leaves the generator as it was"
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(x.isfinite().all() for x in first.values())
    other = build_network(small_recipe(seed=1)).state_dict()
    same = {name for name in first if torch.equal(first[name], other[name])}
    assert all(first[name].unique().numel() == 1 for name in same), "only constants do not depend on the seed"
    assert any("experts" in name for name in first.keys() - same) and "heads.digits.linear.weight" not in same


def test_initial_values() -> None:
    network = build_network(small_recipe(model={"size": "tiny", "layout": "every_block"}))
    for name, parameter in network.backbone.named_parameters():
        drawn = parameter.dim() > 1 and "_bias" not in name
        if "norm" in name or not drawn:
            expected = 1.0 if name.split(".")[-2].startswith("norm") and name.endswith("weight") else 0.0
            if not name.startswith("patch_embed"):
                assert (parameter == expected).all(), name
        elif not name.startswith("patch_embed"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.002, name


def test_network_gives_every_task_its_own_head() -> None:
    network = build_network(small_recipe()).eval()
    batch = small_batch(0, 0, 1)
    output: NetworkOutput = network(small_images(batch))
    assert output.outputs["digits"]["logits"].shape == (8, 5)
    assert output.outputs["scenes"]["logits"][0].shape == (4, 3, 8, 12)
    assert output.outputs["textures"]["logits"].shape == (4, 4, 8, 8)
    assert len(output.stats) == 4
    alone = network({"textures": small_images(batch)["textures"]})
    assert_close(alone.outputs["textures"]["logits"], output.outputs["textures"]["logits"], atol=1e-5, rtol=1e-4)
    assert list(alone.outputs) == ["textures"] and alone.stats[0].token_T.tolist() == [0, 0, 64]


def test_only_the_recipes_active_tasks_have_parameters() -> None:
    network = build_network(small_recipe(only=["textures"]))
    assert network.task_names == ("textures",) and list(network.heads) == ["textures"]
    assert network.backbone.blocks[0].task_embed.shape == (1, 32)


# ---------------------------------------------------------------- counts


def meta(**changes: Any) -> MultiTaskNetwork:
    with torch.device("meta"):
        return build_network(small_recipe(**changes))


def test_counts_of_the_small_network_by_hand() -> None:
    network = meta()
    assert all(p.is_meta for p in network.parameters())
    d, experts, tasks = 32, 4, 3
    attention = experts * 2 * d * 16 + (d * 2 * 16 + 2 * 16) + tasks * experts * d  # W_q and W_o, keys and values, router
    mlp = experts * (d * 24 + 24 + 24 * d + d) + tasks * experts * d
    block = attention + mlp + tasks * d + 2 * 2 * d  # and task embedding, two norms
    backbone = (3 * 8 * 8 * d + d) + 4 * 4 * d + 2 * block + 2 * d  # patches, positions, blocks, norm
    idle_block = 2 * 2 * d * 16 + 2 * (d * 24 + 24 + 24 * d + d) + 2 * (2 * experts * d) + 2 * d
    deconvolution = d * 16 * 4 + 16
    heads = {
        "digits": d * 5 + 5,
        # Pyramid (deconvolution, 1x1 and 3x3 with norms), tower, classes, boxes, one level's scale.
        "scenes": deconvolution + 16 * 32 + 64 + 9 * 32 * 32 + 64 + (9 * 32 * 32 + 64) + (9 * 32 * 3 + 3) + (9 * 32 * 4 + 4) + 1,
        # Decode head on 16 channels, auxiliary head on the map's 32: 3x3 convolution, norm, classifier.
        "textures": deconvolution + (9 * 16 * 32 + 64 + 32 * 4 + 4) + (9 * 32 * 32 + 64 + 32 * 4 + 4),
    }
    counts = count_parameters(network)
    assert counts.backbone == backbone == 31776
    assert counts.heads == heads
    assert counts.total == backbone + sum(heads.values())
    assert counts.active == {task: backbone - 2 * idle_block + heads[task] for task in heads}


def test_shared_and_two_layer_routers_and_task_scales_are_counted() -> None:
    d, experts, hidden = 32, 4, 8
    plain = count_parameters(meta())
    shared = count_parameters(meta(**{"model.router.per_task": False}))
    assert plain.backbone - shared.backbone == 4 * 2 * experts * d
    assert shared.active == plain.active, "a task always has one router"
    two_layers = count_parameters(meta(**{"model.router.type": "mlp"}))
    row = hidden * d + hidden + experts * hidden + experts
    assert two_layers.backbone - plain.backbone == 4 * 3 * (row - experts * d)
    assert two_layers.active["digits"] - plain.active["digits"] == 4 * (row - experts * d)
    learned = count_parameters(meta(**{"loss.weighting": "uncertainty"}))
    assert learned.total - plain.total == 3 and learned.backbone == plain.backbone


def test_a_dense_network_is_all_active_but_for_other_tasks_embeddings() -> None:
    counts = count_parameters(meta(**{"model.layout": "dense"}))
    assert counts.active["digits"] == counts.backbone - 2 * 2 * 32 + counts.heads["digits"]


def heterogeneous_backbone() -> tuple[int, int]:
    """Parameters of the recipe's backbone, and those of them that do not work for a task."""
    d, depth, tasks, head, heads, hidden = 768, 12, 3, 128, 12, 4 * 768
    e_att, k_att, e_mlp, k_mlp, h_mlp = 24, 12, 16, 4, 768
    outside = (3 * 16 * 16 * d + d) + 14 * 14 * d + 2 * d  # patch embedding, position embedding, last norm
    every_block = tasks * d + 2 * 2 * d  # task embedding, two norms with weight and bias
    head_expert = d * head + head * d  # W_q, W_o, no biases
    moe_attention = e_att * head_expert + (d * 2 * head + 2 * head) + tasks * e_att * d  # experts, one K/V head, routers
    dense_attention = (d * 3 * heads * head + 3 * heads * head) + (heads * head * d + d)  # qkv, proj
    mlp_expert = (d * h_mlp + h_mlp) + (h_mlp * d + d)
    moe_mlp = e_mlp * mlp_expert + tasks * e_mlp * d
    dense_mlp = (d * hidden + hidden) + (hidden * d + d)
    pairs = depth // 2  # an even block: MoE attention, dense MLP; an odd block: dense attention, MoE MLP
    total = outside + depth * every_block + pairs * (moe_attention + dense_mlp + dense_attention + moe_mlp)
    idle_experts = (e_att - k_att) * head_expert + (e_mlp - k_mlp) * mlp_expert
    idle = pairs * (idle_experts + (tasks - 1) * (e_att + e_mlp) * d) + depth * (tasks - 1) * d
    return total, idle


def conv(inputs: int, outputs: int, kernel: int, bias: bool) -> int:
    return inputs * outputs * kernel * kernel + outputs * bias


def norm(channels: int) -> int:
    return 2 * channels


def heterogeneous_heads() -> dict[str, int]:
    """Parameters of the recipe's heads, layer by layer."""
    d, c = 768, 256
    up, up_again = conv(d, d // 2, 2, True), conv(d // 2, d // 4, 2, True)  # 2x2 deconvolutions
    # Simple feature pyramid at strides 8 (one deconvolution), 16, 32, 64, 128 (pooling has none), each level then to c.
    to_c = norm(c) + conv(c, c, 3, False) + norm(c)
    pyramid = up + conv(d // 2, c, 1, False) + 4 * conv(d, c, 1, False) + 5 * to_c
    towers = 2 * 4 * conv(c, c, 3, True)
    coco = pyramid + towers + conv(c, 9 * 80, 3, True) + conv(c, 9 * 4, 3, True)  # nine anchors per cell
    # UPerNet on strides 4, 8, 16, 32 of widths d/4, d/2, d, d; a convolution before a norm has no bias.
    u, classes = 512, 150
    levels = (up + norm(d // 2) + up_again) + up
    pooled = 4 * (conv(d, u, 1, False) + norm(u))  # one per pool scale, on the coarsest level
    bottleneck = conv(d + 4 * u, u, 3, False) + norm(u)
    laterals = sum(conv(width, u, 1, False) + norm(u) for width in (d // 4, d // 2, d))
    outputs = 3 * (conv(u, u, 3, False) + norm(u))
    fusion = conv(4 * u, u, 3, False) + norm(u)
    auxiliary = conv(d, 256, 3, False) + norm(256) + conv(256, classes, 1, True)
    ade20k = levels + pooled + bottleneck + laterals + outputs + fusion + conv(u, classes, 1, True) + auxiliary
    return {"imagenet": d * 1000 + 1000, "coco": coco, "ade20k": ade20k}


def test_heterogeneous_recipe_counted_by_hand() -> None:
    with torch.device("meta"):
        counts = count_parameters(build_network(load_recipe("heterogeneous")))
    backbone, idle = heterogeneous_backbone()
    heads = heterogeneous_heads()
    assert counts.backbone == backbone == 200_924_928
    assert counts.heads == heads == {"imagenet": 769_000, "coco": 11_482_228, "ade20k": 36_305_900}
    assert counts.total == backbone + sum(heads.values()) == 249_482_056
    assert backbone - idle == 101_336_832
    assert counts.active == {task: backbone - idle + heads[task] for task in heads}


def test_quickstart_baselines_have_the_quickstarts_active_size() -> None:
    counts: dict[str, Counts] = {}
    for name in ("quickstart", "quickstart_dense", "quickstart_plain_moe"):
        with torch.device("meta"):
            counts[name] = count_parameters(build_network(load_recipe(name)))
    active = {name: count.active["digits"] for name, count in counts.items()}
    assert active["quickstart_plain_moe"] == active["quickstart"]
    assert active["quickstart_dense"] == pytest.approx(active["quickstart"], rel=0.05)
    assert counts["quickstart"].total > 1.5 * counts["quickstart_dense"].total
