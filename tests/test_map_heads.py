"""Heads of the tasks of image sets: which number is which pixel, sizes, parameters, predictions by hand, and a whole network."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modsquad_ds.config import Recipe, recipe_from_tree
from modsquad_ds.errors import UserError
from modsquad_ds.memory_trace import forward_flops, trace_step
from modsquad_ds.model.heads import Head, build_head
from modsquad_ds.model.heads.map_heads import nearest_probabilities
from modsquad_ds.model.network import build_network
from set_tasks import CASES, Case, set_task, targets_of
from small import small_tree

DIM, CANVAS = 16, (32, 48)
PIXELS = [case for case in CASES if case.kind != "soft_classification"]


def built(target: str, patch: int = 8, **changes: Any) -> Head:
    """The target's head with seeded weights; `changes` go into its section."""
    torch.manual_seed(0)
    return build_head(set_task(target, **changes), DIM, patch)


def feature_map(patch: int = 8, batch: int = 2) -> Tensor:
    """Of a canvas of 32 x 48 pixels."""
    size = [side // patch for side in CANVAS]
    return torch.randn(batch, DIM, *size, generator=torch.Generator().manual_seed(1))


def on_canvas(**more: Any) -> dict[str, Any]:
    """Meta of an image that is scored on the canvas."""
    return {"valid": True, "size": (99, 99), "canvas": CANVAS, "window": None} | more


# ---------------------------------------------------------------- shapes and places


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_patch_head_puts_each_number_of_a_token_at_its_pixel(stride: int) -> None:
    head = built("principal_curvature", head={"type": "patch", "stride": stride})
    maps, side, channels = feature_map(), 8 // stride, 2
    found = head(maps)["map"]
    assert found.shape == (2, 2, 32 // stride, 48 // stride)
    for b, i, j in ((0, 0, 0), (1, 2, 5), (0, 3, 1)):
        token = F.layer_norm(maps[b, :, i, j], (DIM,), head.norm.weight, head.norm.bias, 1e-6)
        numbers = head.linear.weight @ token + head.linear.bias
        for y in range(side):
            for x in range(side):
                for c in range(channels):
                    expected = numbers[(y * side + x) * channels + c]
                    torch.testing.assert_close(found[b, c, i * side + y, j * side + x], expected, rtol=1e-5, atol=1e-6)


def test_pooled_head_step_by_step() -> None:
    head, maps = built("class_scene"), feature_map()
    with torch.no_grad():
        for norm in (head.pool_norm, head.norm):
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.uniform_(-1.0, 1.0)
    x = maps.flatten(2).mean(dim=2)
    for norm in (head.pool_norm, head.norm):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(head(maps)["output"], x @ head.linear.weight.T + head.linear.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stride", "channels", "convs"), [(1, 8, 1), (4, 16, 2), (8, 16, 3)])
def test_conv_map_head_has_its_stride_and_layers(stride: int, channels: int, convs: int) -> None:
    spec = {"type": "conv_map", "stride": stride, "channels": channels, "convs": convs}
    head = built("semseg", head=spec)
    assert head(feature_map())["map"].shape == (2, 21, 32 // stride, 48 // stride)
    three = [m for m in head.tower.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(m.kernel_size, m.out_channels) for m in three] == [((3, 3), channels)] * convs
    assert sum(isinstance(m, torch.nn.GroupNorm) for m in head.tower.modules()) == convs


@pytest.mark.parametrize("head", ["pooled", "patch", "conv_map"])
def test_the_last_layer_starts_small_and_without_bias(head: str) -> None:
    torch.manual_seed(0)
    target = "class_scene" if head == "pooled" else "semseg"
    linear = build_head(set_task(target, head={"type": head}), 256, 16).linear
    assert not linear.bias.any() and linear.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_embedding_costs_what_one_channel_at_full_resolution_costs() -> None:
    def parameters(target: str) -> int:
        return sum(p.numel() for p in built(target, patch=16).parameters())

    assert parameters("segment_unsup2d") == parameters("edge_texture") == 2 * DIM + 256 * (DIM + 1)
    assert built("segment_unsup2d", patch=16)(feature_map(16))["map"].shape == (2, 64, 4, 6)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"type": "patch", "stride": 3}, r"head.stride: 3 does not divide the patch size 8; expected one of 1, 2, 4, 8$"),
        ({"type": "patch", "stride": 16}, "head.stride: 16 does not divide the patch size 8"),
        ({"type": "conv_map", "stride": 3}, "stride 3 does not fit the patch size 8"),
        ({"type": "conv_map", "stride": 16}, "head.stride: 16 is coarser than the patch size 8"),
    ],
)
def test_strides_that_do_not_fit_are_refused(head: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built("edge_texture", head=head)


# ---------------------------------------------------------------- losses and learning


@pytest.mark.parametrize("head", ["patch", "conv_map"])
@pytest.mark.parametrize("case", PIXELS, ids=str)
def test_every_parameter_gets_a_gradient_also_from_nothing(case: Case, head: str) -> None:
    for nothing in (False, True):
        torch.manual_seed(0)
        module = build_head(case.spec(head={"type": head}), DIM, 8)
        terms = module.losses(module(feature_map()), targets_of(case, CANVAS, nothing, images=2))
        torch.stack([term.sum for term in terms.values()]).sum().backward()
        gradients = [p.grad for p in module.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert any(g is not None and g.any() for g in gradients) is not nothing


@pytest.mark.parametrize("stride", [1, 2])
def test_a_coarse_map_is_compared_at_full_resolution(stride: int) -> None:
    head = built("edge_texture", head={"type": "patch", "stride": stride})
    case = Case("regression", "l1", "edge_texture")
    outputs, targets = head(feature_map()), targets_of(case, CANVAS, images=2)
    term = head.losses(outputs, targets)["l1"]
    full = F.interpolate(outputs["map"], size=CANVAS, mode="bilinear", align_corners=False)
    valid = targets["valid"][:, None]
    torch.testing.assert_close(term.sum / term.count, (full - targets["values"])[valid].abs().mean())


@pytest.mark.parametrize(("target", "head"), [("normal", "patch"), ("human_parts", "conv_map"), ("segment_unsup2d", "patch")])
def test_a_head_learns_its_target(target: str, head: str) -> None:
    """Left half one thing, right half another; the features say which half."""
    module = built(target, head={"type": head})
    maps = torch.zeros(2, DIM, 4, 6)
    maps[:, 0, :, :3], maps[:, 1, :, 3:] = 1.0, 1.0
    targets = halves(target)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    values = []
    for _ in range(60):
        (term,) = module.losses(module(maps), targets).values()
        loss = term.sum / term.count
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.1 * values[0]


def halves(target: str) -> dict[str, Tensor]:
    """Two images whose left half is unlike the right one."""
    right = torch.arange(48) >= 24
    if target == "normal":
        values = torch.zeros(2, 3, *CANVAS)
        values[:, 0], values[:, 2] = right.float(), (~right).float()
        return {"values": values, "valid": torch.ones(2, *CANVAS, dtype=torch.bool)}
    return {"labels": right.long().expand(2, *CANVAS).contiguous()}


# ---------------------------------------------------------------- predictions


def test_predictions_on_the_canvas_by_kind() -> None:
    x = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    full = F.interpolate(x, size=CANVAS, mode="bilinear", align_corners=False)[0]

    def predicted(target: str, channels: int) -> dict[str, Any]:
        head = built(target, head={"type": "patch", "stride": 8})
        return head.predict({"map": x[:, :channels]}, [on_canvas()])[0]

    assert torch.equal(predicted("human_parts", 3)["mask"], full.argmax(dim=0).to(torch.uint8))
    assert torch.equal(predicted("reshading", 3)["values"], full)
    direction = predicted("normal", 3)["values"]
    torch.testing.assert_close(direction, full / full.square().sum(0).sqrt())
    assert torch.equal(predicted("edge", 1)["probability"], full[0].sigmoid())
    assert torch.equal(predicted("segment_unsup2d", 3)["embedding"], x[0])


def test_a_window_is_cut_out_and_resized_to_the_label() -> None:
    head = built("edge_texture", head={"type": "patch", "stride": 1})
    x = torch.full((1, 1, *CANVAS), 9999.0)
    x[0, 0, 8:24, 10:42] = torch.arange(16.0)[:, None] + 100 * torch.arange(32.0)  # the image; what is around it fills up
    window = {"window": (8, 10, 16, 32), "label": {"values": torch.zeros(1, 32, 64), "valid": torch.zeros(32, 64)}}
    values = head.predict({"map": x}, [on_canvas(**window)])[0]["values"]
    # Twice as many rows and columns; centres of pixels at half integers: 0, 0.25, 0.75, 1.25 ... up to the last.
    rows, columns = (torch.cat([torch.zeros(1), torch.arange(2 * n - 1) / 2 + 0.25]).clamp(max=n - 1) for n in (16, 32))
    torch.testing.assert_close(values, (rows[:, None] + 100 * columns)[None])
    of_any_size = {"window": (8, 10, 16, 32), "size": (16, 32)}
    alone = head.predict({"map": x}, [on_canvas(**of_any_size)])[0]["values"]
    assert torch.equal(alone, x[0, :, 8:24, 10:42])
    semantic = {"window": (0, 0, 32, 48), "label": {"labels": torch.zeros(64, 96, dtype=torch.uint8)}}
    masks = built("semseg", head={"type": "conv_map"})
    assert masks.predict(masks(feature_map(batch=1)), [on_canvas(**semantic)])[0]["mask"].shape == (64, 96)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_predictions_of_bf16_are_float32_of_the_promised_shapes(case: Case) -> None:
    torch.manual_seed(0)
    head = build_head(case.spec(), DIM, 8).bfloat16().eval()
    found = head.predict(head(feature_map().bfloat16()), [on_canvas()] * 2)[1]
    promised: dict[str, dict[str, Any]] = {
        "soft_classification": {"probabilities": (365,), "label": None}, "semantic": {"mask": CANVAS},
        "regression": {"values": (2, *CANVAS)}, "unit_vectors": {"values": (3, *CANVAS)},
        "binary": {"probability": CANVAS}, "segments": {"embedding": (64, 4, 6)},
    }  # fmt: skip
    assert {name: tuple(x.shape) if isinstance(x, Tensor) else None for name, x in found.items()} == promised[case.kind]
    kinds = {x.dtype for x in found.values() if isinstance(x, Tensor)}
    assert kinds == {torch.uint8 if case.kind == "semantic" else torch.float32}
    if case.kind == "soft_classification":
        assert found["probabilities"].sum().item() == pytest.approx(1, abs=1e-4)
        assert found["label"] == found["probabilities"].argmax().item()


def test_vectors_become_probabilities() -> None:
    output = torch.tensor([[0.7, 0.1, 0.2], [2.0, 0.0, 1.9], [-3.0, -1.0, -5.0], [0.0, 0.0, 0.0]])
    found = nearest_probabilities(output)
    by_hand = torch.tensor([[0.7, 0.1, 0.2], [0.55, 0.0, 0.45], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(found, by_hand)
    regressed = built("class_scene").predict({"output": output}, [on_canvas()] * 4)
    assert [p["label"] for p in regressed][:3] == [0, 0, 1]
    assert torch.equal(torch.stack([p["probabilities"] for p in regressed]), found)
    classified = built("class_scene", loss="cross_entropy").predict({"output": output}, [on_canvas()] * 4)
    torch.testing.assert_close(classified[1]["probabilities"], output[1].softmax(0))


def test_nearest_probabilities_are_the_nearest() -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(20, 6, generator=g)
    found = nearest_probabilities(x)
    others = torch.rand(5000, 6, generator=g).log().neg()
    others = others / others.sum(1, keepdim=True)
    assert (found >= 0).all() and torch.allclose(found.sum(1), torch.ones(20))
    assert ((found - x).square().sum(1) <= (others[:, None] - x).square().sum(2).amin(0)).all()


# ---------------------------------------------------------------- without contents, and in a network


def set_recipe(**of_tasks: dict[str, Any]) -> Recipe:
    """The small network with tasks of one image set alone."""
    tree = small_tree()
    tree["sets"] = {"views": {"data": "v", "batch_size": 4, "transform": {"crop": [32, 32]}}}
    tree["tasks"] = {name: {"set": "views", **changes} for name, changes in of_tasks.items()}
    return recipe_from_tree(tree, "sets")


EVERY: dict[str, dict[str, Any]] = {
    "class_scene": {}, "reshading": {}, "normal": {"head": {"type": "conv_map", "stride": 4}}, "sal": {}, "edge": {},
    "segment_unsup2d": {}, "human_parts": {"head": {"type": "conv_map", "stride": 8}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads_run_on_the_meta_device(case: Case) -> None:
    with torch.device("meta"):
        head = build_head(case.spec(), DIM, 8)
    outputs = head(feature_map().to("meta"))
    terms = head.losses(outputs, {name: of.to("meta") for name, of in targets_of(case, CANVAS, images=2).items()})
    assert {term.sum.device.type for term in terms.values()} == {"meta"}


def test_a_steps_memory_and_flops_are_found() -> None:
    recipe = set_recipe(**EVERY)
    images = dict.fromkeys(EVERY, (2, (32, 32)))
    trace = trace_step(recipe, recipe.parallel, 1, images, bf16=True)
    assert trace.peak > 0 and trace.flops > 0
    flops = forward_flops(recipe, {name: [(32, 32)] for name in EVERY})
    # A linear layer from 32 numbers to 8 * 8 pixels of 3 channels, for each of 16 tokens.
    assert flops["reshading"][0][1] == 2 * 32 * 8 * 8 * 3 * 16
    assert flops["segment_unsup2d"][0][1] == 2 * 32 * 64 * 16


def test_heads_of_a_network_and_its_recipe_survive_a_round_trip() -> None:
    recipe = set_recipe(**EVERY)
    again = recipe_from_tree(recipe.model_dump(mode="json"), "again")
    assert again == recipe
    one, other = build_network(recipe), build_network(again)
    other.load_state_dict(one.state_dict())
    assert {type(one.head(name)).__name__ for name in EVERY} == {"Pooled", "Patch", "ConvMap"}
