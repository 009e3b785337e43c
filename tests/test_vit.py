"""The backbone: timm's ViT when dense; packs, activation checkpointing and half precision change nothing but the cost."""

from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.testing import assert_close

from modsquad_ds.model.pack import Segment
from modsquad_ds.model.router import Routing, RoutingStats
from modsquad_ds.model.sparse import SparseAttention, SparseMLP
from modsquad_ds.model.vit import Attention, Block, SparseViT, block_plans, init_weights
from modsquad_ds.model_spec import ModelSpec

SPARSE = {"num_experts": 4, "top_k": 2, "hidden": 12}


def spec_of(**changes: Any) -> ModelSpec:
    small = {"size": "tiny", "width": 24, "depth": 4, "heads": 3, "patch": 4, "grid": 4, "mlp": SPARSE, "attention": SPARSE}
    return ModelSpec.model_validate({**small, **changes})


def backbone_of(tasks: int = 3, spread: float = 4.0, **changes: Any) -> SparseViT:
    """A backbone whose weights are large enough for every path to matter."""
    torch.manual_seed(0)
    backbone = SparseViT(spec_of(**changes), tasks)
    init_weights(backbone, seed=1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(spread)
    return backbone.eval()


def image(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- dense: timm's vision transformer


def timm_vit() -> nn.Module:
    torch.manual_seed(3)
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=3, class_token=False, global_pool="avg",
        fc_norm=False, num_classes=0, dynamic_img_size=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit.eval()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 12), (8, 32)])
def test_dense_backbone_is_timms_vit(height: int, width: int) -> None:
    vit, backbone = timm_vit(), backbone_of(tasks=1, layout="dense", task_embedding=False)
    backbone.load_state_dict(vit.state_dict())  # strict: the same names and shapes
    x = image(2, height, width)
    maps, stats = backbone({0: x})
    expected = vit.forward_features(x).transpose(1, 2).unflatten(2, (height // 4, width // 4))
    assert stats == () and maps[0].shape == (2, 24, height // 4, width // 4)
    assert_close(maps[0], expected, atol=1e-5, rtol=1e-5)


def test_head_dim_may_differ_from_width_by_heads() -> None:
    attention = backbone_of(layout="dense", head_dim=16).blocks[0].attn
    assert isinstance(attention, Attention)
    assert attention.qkv.weight.shape == (3 * 3 * 16, 24) and attention.proj.weight.shape == (24, 3 * 16)


def test_position_embedding_is_itself_on_its_own_grid() -> None:
    backbone = backbone_of()
    assert backbone.position(4, 4) is backbone.pos_embed


@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 3), (7, 5), (4, 6), (1, 1)])
def test_position_embedding_is_resized_as_timm_does(height: int, width: int) -> None:
    backbone = backbone_of()
    resized = backbone.position(height, width)
    assert resized.shape == (1, height * width, 24)
    assert_close(resized, resample_abs_pos_embed(backbone.pos_embed, [height, width], [4, 4], num_prefix_tokens=0))


# ---------------------------------------------------------------- layouts

BOTH, MIXED_HEADS, MIXED_MLP, NONE = (True, True), (True, False), (False, True), (False, False)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("alternate", [MIXED_HEADS, MIXED_MLP, MIXED_HEADS, MIXED_MLP]),
        ("every_block", [BOTH] * 4),
        ("mlp_only", [MIXED_MLP] * 4),
        ("attention_only", [MIXED_HEADS] * 4),
        ("dense", [NONE] * 4),
    ],
)
def test_layouts(layout: str, expected: list[tuple[bool, bool]]) -> None:
    backbone = backbone_of(layout=layout)
    built = [(isinstance(block.attn, SparseAttention), isinstance(block.mlp, SparseMLP)) for block in backbone.blocks]
    assert built == expected == [tuple(plan) for plan in block_plans(spec_of(layout=layout))]
    layers = list(backbone.sparse_layers())
    halves = zip(("attn", "mlp"), (0, 1), strict=True)
    assert sorted(layers) == sorted(f"blocks.{i}.{half}" for half, at in halves for i in range(4) if expected[i][at])


def test_statistics_come_in_the_order_of_the_sparse_layers() -> None:
    backbone = backbone_of(layout="every_block", attention={"num_experts": 5, "top_k": 3})
    stats = backbone({0: image(1, 8, 8)})[1]
    layers = list(backbone.sparse_layers().items())
    assert [name for name, _ in layers] == [f"blocks.{i}.{half}" for i in range(4) for half in ("attn", "mlp")]
    assert len(stats) == len(layers) == 8
    for (name, layer), one in zip(layers, stats, strict=True):
        assert one.prob_TE.shape == (3, layer.router.num_experts), name
        assert one.count_TE.sum() == 4 * layer.router.top_k, name


# ---------------------------------------------------------------- packs


@pytest.mark.parametrize("layout", ["alternate", "every_block", "dense"])
def test_a_pack_of_tasks_and_sizes_is_each_alone(layout: str) -> None:
    backbone = backbone_of(layout=layout)
    images = {2: image(2, 16, 16, 1), 0: image(3, 8, 20, 2), 1: image(1, 24, 8, 3)}
    together, stats = backbone(images)
    assert list(together) == [2, 0, 1]
    for task, x in images.items():
        alone, own = backbone({task: x})
        assert_close(together[task], alone[task], atol=1e-5, rtol=1e-5)
        each = torch.cat([backbone({task: one[None]})[0][task] for one in x])
        assert_close(alone[task], each, atol=1e-5, rtol=1e-5)
        for packed, single in zip(stats, own, strict=True):
            assert torch.equal(packed.count_TE[task], single.count_TE[task])
            assert_close(packed.prob_TE[task], single.prob_TE[task])
    other = backbone({0: images[2]})[0][0]
    assert (other - together[2]).abs().max() > 0.01, "the task changes an image's features"


def test_an_image_in_two_tasks_is_routed_by_each() -> None:
    backbone = backbone_of(layout="every_block", task_embedding=False)
    x = image(1, 8, 8)
    maps, stats = backbone({0: x, 1: x})
    assert (maps[0] - maps[1]).abs().max() > 0.01, "by the routers alone"
    shared = backbone_of(layout="every_block", task_embedding=False, router={"per_task": False})
    maps, stats = shared({0: x, 1: x})
    assert_close(maps[0], maps[1])
    assert torch.equal(stats[0].count_TE[0], stats[0].count_TE[1]) and stats[0].count_TE[2].sum() == 0


def test_task_embedding_is_added_before_every_block() -> None:
    backbone = backbone_of(layout="dense", depth=2)
    seen: list[Tensor] = []
    for block in backbone.blocks:
        block.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain = backbone({1: image(1, 8, 8)})[0][1]
    shift = torch.arange(24.0)
    with torch.no_grad():
        backbone.blocks[0].task_embed[1] += shift
        backbone.blocks[1].task_embed[0] += shift  # another task's: no effect
    once = backbone({1: image(1, 8, 8)})[0][1]
    assert_close(seen[2], seen[0] + shift)
    with torch.no_grad():
        backbone.blocks[1].task_embed[1] += shift
    twice = backbone({1: image(1, 8, 8)})[0][1]
    assert_close(seen[5], seen[3] + shift)
    assert (once - plain).abs().max() > 0.1 and (twice - once).abs().max() > 0.1
    assert backbone_of(task_embedding=False).blocks[0].task_embed is None


# ---------------------------------------------------------------- drop path


class Constant(nn.Module):
    """Stands in for an attention or MLP: the same number everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x_SD: Tensor, segments: tuple[Segment, ...]) -> tuple[Tensor, None]:
        return torch.full_like(x_SD, self.value), None


def test_drop_path_rates_grow_linearly() -> None:
    rates = [block.drop_path for block in backbone_of(drop_path=0.3).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_drop_path_drops_branches_of_whole_images() -> None:
    block = backbone_of(drop_path=0.75, task_embedding=False).blocks[3]
    assert isinstance(block, Block)
    block.attn, block.mlp = Constant(1.0), Constant(10.0)  # type: ignore[assignment]
    segments = (Segment(0, 300, 1, 2), Segment(2, 200, 2, 2))
    x = torch.zeros(sum(s.length for s in segments), 24)
    assert_close(block(x, segments)[0], torch.full_like(x, 11.0))
    block.train()
    torch.manual_seed(0)
    y, _ = block(x, segments)
    images = [*y[:600].view(300, 48), *y[600:].view(200, 96)]
    values = [one.unique().tolist() for one in images]
    assert all(len(value) == 1 for value in values), "all tokens of an image share its luck"
    # A branch that is kept counts 1 / (1 - 0.75) = 4 times; both branches draw by themselves.
    found = [value[0] for value in values]
    assert set(found) == {0.0, 4.0, 40.0, 44.0}
    shares = [sum(v in pair for v in found) / 500 for pair in ((4.0, 44.0), (40.0, 44.0), (44.0,))]
    assert shares == pytest.approx([0.25, 0.25, 0.0625], abs=0.05)
    assert not torch.equal(block(x, segments)[0], y)


def test_evaluation_is_deterministic() -> None:
    backbone = backbone_of(layout="every_block", drop_path=0.5, router={"noise": 2.0})
    x = image(4, 8, 8)
    first, again = (backbone({0: x})[0][0] for _ in range(2))
    assert torch.equal(first, again)
    backbone.train()
    first, again = (backbone({0: x})[0][0] for _ in range(2))
    assert not torch.equal(first, again)


# ---------------------------------------------------------------- activation checkpointing


class Pass(NamedTuple):
    """One training step of a backbone."""

    output: Tensor
    """All feature maps, and a random number drawn afterwards."""
    stats: tuple[RoutingStats, ...]
    gradients: dict[str, Tensor]
    runs: list[int]
    """Blocks in the order in which they ran."""


def train_pass(checkpointing: bool, noise: float) -> Pass:
    backbone = backbone_of(
        layout="alternate", spread=2.0, drop_path=0.3, activation_checkpointing=checkpointing, router={"noise": noise}
    ).train()
    runs: list[int] = []
    for i, block in enumerate(backbone.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    torch.manual_seed(5)
    maps, stats = backbone({1: image(2, 16, 16), 0: image(3, 8, 12)})
    loss = sum(m.square().sum() for m in maps.values())
    # The routing losses' way into the routers as well.
    loss = loss + sum((s.prob_TE.square().sum() + s.lse2_T.sum()) for s in stats)
    loss.backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    output = torch.cat([*(m.detach().flatten() for m in maps.values()), torch.rand(1)])
    return Pass(output, stats, gradients, runs)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_activation_checkpointing_changes_nothing(noise: float) -> None:
    plain, saving = train_pass(False, noise), train_pass(True, noise)
    assert plain.runs == [0, 1, 2, 3] and saving.runs == [0, 1, 2, 3, 3, 2, 1, 0]
    assert torch.equal(plain.output, saving.output)
    assert len(plain.stats) == len(saving.stats) == 4
    for a, b in zip(plain.stats, saving.stats, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert b.token_T.tolist() == [3 * 6, 2 * 16, 0], "counted once, though every block ran twice"
        assert b.count_TE.sum(1).tolist() == [2 * 18, 2 * 32, 0]
    assert plain.gradients.keys() == saving.gradients.keys()
    assert all(torch.equal(g, saving.gradients[name]) for name, g in plain.gradients.items()), "noise, drop path replayed"


def test_noise_matters_to_the_test_above() -> None:
    assert not torch.equal(train_pass(True, 0.0).output[:-1], train_pass(True, 3.0).output[:-1])


# ---------------------------------------------------------------- precision


def test_bf16_model_routes_in_fp32() -> None:
    backbone = backbone_of(layout="every_block", router={"type": "mlp"}).to(torch.bfloat16)
    seen: dict[str, tuple[Tensor, Routing]] = {}
    for name, layer in backbone.sparse_layers().items():
        layer.router.register_forward_hook(lambda _, args, routing, name=name: seen.__setitem__(name, (args[0], routing)))
    maps, stats = backbone({1: image(2, 16, 16).bfloat16(), 0: image(1, 8, 8).bfloat16()})
    assert maps[1].dtype == torch.bfloat16
    assert {x.dtype for one in stats for x in one} == {torch.float32}
    for name, layer in backbone.sparse_layers().items():
        x, routing = seen[name]
        assert x.dtype == torch.bfloat16 and routing.weight_SK.dtype == torch.float32
        router = layer.router
        hidden = nn.functional.gelu(x[:32].float() @ router.reduce[1].float().T + router.reduce_bias[1].float())
        prob = (hidden @ router.weight[1].float().T + router.bias[1].float()).softmax(-1)
        assert_close(routing.weight_SK[:32], prob.sort(descending=True).values[:, :2], atol=1e-6, rtol=1e-5)
        assert_close(routing.stats.prob_TE[1], prob.sum(0), atol=1e-4, rtol=1e-5)


def test_bf16_resizes_the_position_embedding_in_fp32() -> None:
    backbone = backbone_of()
    expected = nn.Parameter(backbone.pos_embed.detach().bfloat16().float())
    backbone.to(torch.bfloat16)
    square = expected.view(1, 4, 4, 24).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(square, (8, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.equal(backbone.position(8, 8), resized.bfloat16())
