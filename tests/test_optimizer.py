"""Learning-rate curves against torch's, parameter groups name by name, LAMB against timm's."""

import math
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from modsquad_ds.config import OptimizerSpec, ScheduleSpec
from modsquad_ds.model.network import MultiTaskNetwork, build_network
from modsquad_ds.parallel.lamb import Lamb
from modsquad_ds.parallel.optimizer import build_optimizer, learning_rate_factor, parameter_groups, set_learning_rate
from small import small_recipe

# ---------------------------------------------------------------- learning rate


def onecycle_of_torch(spec: ScheduleSpec, steps: int) -> list[float]:
    """Learning rate of every step, as a share of the peak, by torch's scheduler."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, pct_start=spec.rise, anneal_strategy="cos",
        div_factor=spec.start_div, final_div_factor=spec.final_div,
    )  # fmt: skip
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("steps", "changes"),
    [
        (100, {}),
        (37, {"rise": 0.5, "start_div": 10.0, "final_div": 100.0}),
        (10, {"rise": 0.05}),
        (5, {"rise": 0.9}),
        (3, {"rise": 0.4}),
    ],
)
def test_onecycle_is_that_of_torch(steps: int, changes: dict[str, float]) -> None:
    spec = ScheduleSpec(type="onecycle", **changes)
    rates = [learning_rate_factor(spec, step, steps) for step in range(steps)]
    assert rates == pytest.approx(onecycle_of_torch(spec, steps), rel=1e-9)
    assert rates[-1] == pytest.approx(1 / (spec.start_div * spec.final_div))


def test_onecycle_of_very_few_steps_stays_within_bounds() -> None:
    for steps in (1, 2, 4):
        for rise in (0.25, 0.3, 0.5):
            spec = ScheduleSpec(type="onecycle", rise=rise)
            rates = [learning_rate_factor(spec, step, steps) for step in range(steps)]
            assert all(0 < rate <= 1 for rate in rates), (steps, rise, rates)


def test_cosine_by_hand() -> None:
    spec = ScheduleSpec(type="cosine", warmup=10, final=0.1)

    def at(step: int) -> float:
        return learning_rate_factor(spec, step, 110)

    assert at(0) == pytest.approx(0.1), "the first step moves: one tenth of the way up"
    assert at(4) == pytest.approx(0.5)
    assert at(9) == pytest.approx(1.0), "the last step of the warm-up is at the peak"
    assert at(10) == pytest.approx(1.0), "and so is the first of the cosine"
    assert at(35) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert at(60) == pytest.approx(0.55), "half-way between the peak and final"
    assert at(109) == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.99 * math.pi)))
    assert 0.1 < at(109) < 0.1003
    rates = [at(step) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_without_warmup_and_with_nothing_but_warmup() -> None:
    assert learning_rate_factor(ScheduleSpec(), 0, 10) == 1.0
    assert [learning_rate_factor(ScheduleSpec(warmup=4), step, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_factor(ScheduleSpec(final=1.0), 7, 10) == 1.0


# ---------------------------------------------------------------- parameter groups


def network_of(**changes: Any) -> MultiTaskNetwork:
    return build_network(small_recipe(**changes))


def names_of(network: MultiTaskNetwork, parameters: list[Tensor]) -> list[str]:
    name = {id(parameter): n for n, parameter in network.named_parameters()}
    return [name[id(parameter)] for parameter in parameters]


# Of the small network, written out: all biases and norms, embeddings, per-level and per-task scales.
NOT_DECAYED = {
    "backbone.pos_embed", "backbone.patch_embed.proj.bias", "backbone.norm.weight", "backbone.norm.bias",
    *(
        f"backbone.blocks.{i}.{name}"
        for i in (0, 1)
        for name in (
            "task_embed", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias",
            "attn.kv.bias", "mlp.experts.fc1_bias", "mlp.experts.fc2_bias",
        )
    ),
    "heads.digits.linear.bias",
    # Pyramid to stride 4: one deconvolution; then 1x1 and 3x3 convolutions without bias, each with a norm.
    "heads.scenes.pyramid.levels.0.0.bias",
    "heads.scenes.pyramid.levels.0.2.weight", "heads.scenes.pyramid.levels.0.2.bias",
    "heads.scenes.pyramid.levels.0.4.weight", "heads.scenes.pyramid.levels.0.4.bias",
    "heads.scenes.tower.1.weight", "heads.scenes.tower.1.bias",
    "heads.scenes.class_logits.bias", "heads.scenes.box_exponents.bias", "heads.scenes.level_scales",
    "heads.textures.pyramid.levels.0.0.bias",
    "heads.textures.decode.conv_seg.bias", "heads.textures.decode.convs.0.gn.weight", "heads.textures.decode.convs.0.gn.bias",
    "heads.textures.aux.conv_seg.bias", "heads.textures.aux.convs.0.gn.weight", "heads.textures.aux.convs.0.gn.bias",
}  # fmt: skip
DECAYED = {
    "backbone.patch_embed.proj.weight",
    *(
        f"backbone.blocks.{i}.{name}"
        for i in (0, 1)
        for name in (
            "attn.router.weight", "attn.kv.weight", "attn.experts.q_weight", "attn.experts.proj_weight",
            "mlp.router.weight", "mlp.experts.fc1_weight", "mlp.experts.fc2_weight",
        )
    ),
    "heads.digits.linear.weight",
    "heads.scenes.pyramid.levels.0.0.weight", "heads.scenes.pyramid.levels.0.1.weight",
    "heads.scenes.pyramid.levels.0.3.weight", "heads.scenes.tower.0.weight",
    "heads.scenes.class_logits.weight", "heads.scenes.box_exponents.weight",
    "heads.textures.pyramid.levels.0.0.weight", "heads.textures.decode.convs.0.conv.weight",
    "heads.textures.decode.conv_seg.weight", "heads.textures.aux.convs.0.conv.weight", "heads.textures.aux.conv_seg.weight",
}  # fmt: skip


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    network = network_of()
    groups = parameter_groups(network, OptimizerSpec(lr=1.0, weight_decay=0.25))
    every = [name for group in groups for name in names_of(network, group["params"])]
    assert sorted(every) == sorted(name for name, _ in network.named_parameters())
    by_decay = {group["weight_decay"]: set(names_of(network, group["params"])) for group in groups}
    assert by_decay == {0.25: DECAYED, 0.0: NOT_DECAYED}
    assert all(group["lr_scale"] == 1.0 for group in groups)


def test_two_layer_routers_and_task_scales() -> None:
    network = network_of(**{"model.router.type": "mlp", "loss.weighting": "uncertainty"})
    groups = parameter_groups(network, OptimizerSpec(lr=1.0, weight_decay=0.25))
    decay = {name: group["weight_decay"] for group in groups for name in names_of(network, group["params"])}
    router = "backbone.blocks.0.mlp.router"
    assert {decay[f"{router}.weight"], decay[f"{router}.reduce"]} == {0.25}
    assert {decay[f"{router}.bias"], decay[f"{router}.reduce_bias"], decay["task_scale"]} == {0.0}


def test_frozen_parameters_are_left_out() -> None:
    network = network_of()
    for parameter in network.backbone.parameters():
        parameter.requires_grad = False
    groups = parameter_groups(network, OptimizerSpec(lr=1.0))
    names = {name for group in groups for name in names_of(network, group["params"])}
    assert names == {name for name, _ in network.named_parameters() if name.startswith("heads.")}


def test_layer_decay_by_hand() -> None:
    network = network_of(**{"loss.weighting": "uncertainty"})
    groups = parameter_groups(network, OptimizerSpec(lr=1.0, layer_decay=0.5))
    scale = {name: group["lr_scale"] for group in groups for name in names_of(network, group["params"])}
    assert len(scale) == len(list(network.parameters()))
    # Two blocks: head 1, last block 1/2, first block 1/4, embeddings 1/8.
    for name, value in scale.items():
        expected = {
            "backbone.patch_embed": 0.125, "backbone.pos_embed": 0.125, "backbone.blocks.0": 0.25, "backbone.blocks.1": 0.5,
        }.get(".".join(name.split(".")[: 3 if ".blocks." in name else 2]), 1.0)  # fmt: skip
        assert value == expected, name
    assert scale["backbone.norm.weight"] == scale["heads.digits.linear.bias"] == scale["task_scale"] == 1.0


def test_groups_have_distinct_names_even_at_nearly_equal_scales() -> None:
    """DeepSpeed tells groups apart by name alone when it takes the experts out, and loses one of two with the same name."""
    network = network_of()
    for block in network.backbone.blocks:
        for parameter in block.mlp.experts.parameters():
            parameter.allreduce, parameter.group_name = False, "ep_size_2"
    groups = parameter_groups(network, OptimizerSpec(lr=1.0, layer_decay=1 - 1e-9))
    dense = [group["name"] for group in groups if not group.get("moe")]
    assert len(dense) == len(set(dense)) == 8
    every = [name for group in groups for name in names_of(network, group["params"])]
    assert sorted(every) == sorted(name for name, _ in network.named_parameters())
    spread = [group for group in groups if group.get("moe")]
    assert {name for group in spread for name in names_of(network, group["params"])} == {
        f"backbone.blocks.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    }
    assert all(group["name"] == "ep_size_2" for group in spread), "DeepSpeed looks its process group up under this name"


def test_learning_rate_reaches_every_group_with_its_scale() -> None:
    network = network_of()
    for kind, built in (("adamw", torch.optim.AdamW), ("lamb", Lamb)):
        spec = OptimizerSpec(type=kind, lr=0.3, betas=(0.8, 0.9), eps=1e-5, layer_decay=0.5, weight_decay=0.1)
        optimizer = build_optimizer(network, spec)
        assert type(optimizer) is built
        set_learning_rate(optimizer, 0.08)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.08 * group["lr_scale"])
            assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.9), 1e-5)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
        assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0, 0.5, 0.25, 0.125}


# ---------------------------------------------------------------- LAMB


def timm_lamb(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    return timm.optim.Lamb(groups, max_grad_norm=None, **settings)


SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}


def gradients(shapes: list[tuple[int, ...]], step: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=g) * 10 ** float(i - 1) for i, shape in enumerate(shapes)]


def test_lamb_is_that_of_timm() -> None:
    g = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(6, 5), (7,), (3, 2, 4), (4,)]
    start = [torch.randn(shape, generator=g) for shape in shapes]
    start[3].zero_()  # |weights| = 0: the ratio is 1
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))

    def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        # The third alone is without decay, so it is not rescaled.
        return [
            {"params": [parameters[0], parameters[1], parameters[3]], "weight_decay": 0.1},
            {"params": [parameters[2]], "weight_decay": 0.0, "lr": 0.02},
        ]

    pair = ((Lamb(groups(ours), **SETTINGS), ours), (timm_lamb(groups(theirs), **SETTINGS), theirs))
    for step in range(6):
        for optimizer, parameters in pair:
            for parameter, gradient in zip(parameters, gradients(shapes, step), strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        for ours_now, theirs_now in zip(ours, theirs, strict=True):
            assert_close(ours_now, theirs_now, rtol=1e-5, atol=1e-6)
    assert all((now - before).abs().max() > 0.01 for now, before in zip(ours, start, strict=True))


def test_stacked_parameters_are_one_tensor_of_timm_each() -> None:
    g = torch.Generator().manual_seed(1)
    # Experts of very different sizes: one common norm would give quite other ratios.
    start = torch.randn(4, 3, 5, generator=g) * torch.tensor([0.01, 1.0, 30.0, 0.0]).view(4, 1, 1)
    stacked = nn.Parameter(start.clone())
    stacked.stacked = True  # type: ignore[attr-defined]
    whole = nn.Parameter(start.clone())
    single = [nn.Parameter(x.clone()) for x in start]
    ours = Lamb([{"params": [stacked], "weight_decay": 0.1}], **SETTINGS)
    common = Lamb([{"params": [whole], "weight_decay": 0.1}], **SETTINGS)
    theirs = timm_lamb([{"params": single, "weight_decay": 0.1}], **SETTINGS)
    for step in range(5):
        (gradient,) = gradients([(4, 3, 5)], step)
        gradient[1] = 0.0  # an expert without tokens
        stacked.grad, whole.grad = gradient.clone(), gradient.clone()
        for parameter, own in zip(single, gradient, strict=True):
            parameter.grad = own.clone()
        for optimizer in (ours, common, theirs):
            optimizer.step()
        assert_close(stacked.detach(), torch.stack([p.detach() for p in single]), rtol=1e-5, atol=1e-6)
    assert (stacked - whole).abs().max() > 0.01, "cutting matters here"


def test_lamb_by_hand() -> None:
    # First step: moments are corrected to g and g^2, so the update is sign(g) + decay * w = (1 + 0.3, -1 + 0.4) for w = (3, 4);
    # |w| = 5; lr = 0.1.
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    parameter.grad = torch.tensor([2.0, -7.0])
    Lamb([{"params": [parameter], "weight_decay": 0.1}], lr=0.1, eps=0.0).step()
    ratio = 5 / math.hypot(1.3, -0.6)
    assert_close(parameter.detach(), torch.tensor([3 - 0.1 * ratio * 1.3, 4 + 0.1 * ratio * 0.6]))


def test_lamb_leaves_parameters_without_gradient_alone() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    first.grad = torch.ones(3)
    optimizer = Lamb([{"params": [first, second], "weight_decay": 0.1}], lr=0.1)
    assert optimizer.step(lambda: 4.0) == 4.0
    assert (second == 1).all() and (first != 1).all() and not optimizer.state[second]
