"""What a network costs, against counts worked out by hand; and the table that sets networks side by side."""

from pathlib import Path

import pytest
import torch

from modsquad_ds import costs
from modsquad_ds.costs import (
    Costs,
    Version,
    costs_of,
    costs_side_by_side,
    count_flops,
    image_size,
    median_seconds,
    print_costs,
)
from modsquad_ds.model import laid_out, products
from modsquad_ds.model.network import build_network
from modsquad_ds.model.sparse import SparseMLP
from small import small_recipe

CPU = torch.device("cpu")
# Of the small recipe: width, patch, experts, top-k, hidden width of an expert, width of an attention expert, classes.
D, P, E, K, H, C, CLASSES = 32, 8, 4, 2, 24, 16, 5


def flops_by_hand(tokens: int, k: int = K, experts: int = E) -> int:
    """Of the small recipe's digits: two blocks, each with both halves sparse. Two per multiply-add."""
    patches = tokens * 3 * P * P * D
    router = tokens * D * experts
    attention = tokens * (k * D * C + 2 * D * C + k * C * D) + 2 * (k * tokens) * tokens * C
    mlp = tokens * k * 2 * D * H
    return 2 * (patches + 2 * (2 * router + attention + mlp) + D * CLASSES)


def test_flops_by_hand() -> None:
    recipe = small_recipe()
    assert costs_of(Version(build_network(recipe), recipe), "digits", runs=1).flops == flops_by_hand(16)
    changes = {"model.mlp": {"num_experts": 6, "top_k": 1, "hidden": H}, "model.attention": {"num_experts": 6, "top_k": 1}}
    recipe = small_recipe(**changes)
    assert costs_of(Version(build_network(recipe), recipe), "digits", runs=1).flops == flops_by_hand(16, 1, 6)


def test_parameters_by_hand() -> None:
    recipe = small_recipe(only=["digits"])
    network = build_network(recipe)
    found = costs_of(Version(network, recipe), "digits", runs=1)
    of_expert = (2 * D * C) + (2 * D * H + H + D)
    assert found.experts == 2 * E * of_expert
    assert found.total == sum(parameter.numel() for parameter in network.parameters())
    assert found.total - found.active == 2 * (E - K) * of_expert, "with one task only idle experts are not active"


def test_a_networks_file_is_weighed(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(1234))
    recipe = small_recipe()
    version = Version(build_network(recipe), recipe)
    assert costs_of(version, "digits", runs=1).file_bytes is None
    assert costs_of(version._replace(path=path), "digits", runs=1).file_bytes == 1234


def test_image_is_as_large_as_at_evaluation() -> None:
    recipe = small_recipe(**{"tasks.scenes.transform.eval_canvas": [24, 48], "tasks.textures.transform.resize": [50, 33]})
    sizes = {task: image_size(spec, recipe.model.shape.patch) for task, spec in recipe.active.items()}
    assert sizes == {"digits": (32, 32), "scenes": (24, 48), "textures": (40, 56)}
    seen = []
    network = build_network(recipe)
    network.backbone.register_forward_pre_hook(lambda _, args: seen.append({t: tuple(x.shape) for t, x in args[0].items()}))
    assert costs_of(Version(network, recipe), "textures", runs=1).image == (40, 56)
    assert len(seen) > 1 and all(shapes == {2: (1, 3, 40, 56)} for shapes in seen)


def test_bf16_network_is_measured_in_its_own_precision() -> None:
    recipe = small_recipe()
    version = Version(build_network(recipe).to(torch.bfloat16), recipe)
    assert costs_of(version, "digits", runs=1).flops == flops_by_hand(16)


def test_grouped_products_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's way in bf16, forward; and backward, twice that."""
    monkeypatch.setattr(products, "way_for", lambda x: laid_out)
    recipe = small_recipe()
    network = build_network(recipe).to(torch.bfloat16)
    assert all(laid_out.can_group(layer.experts.fc1_weight) for layer in network.modules() if isinstance(layer, SparseMLP))
    assert costs_of(Version(network, recipe), "digits", runs=1).flops == flops_by_hand(16)
    x, w = torch.randn(10, 16, dtype=torch.bfloat16), torch.randn(2, 16, 8, dtype=torch.bfloat16)
    ends = torch.tensor([4, 10], dtype=torch.int32)
    for tensor in (x, w):
        tensor.requires_grad_()
    assert count_flops(lambda: torch.nn.functional.grouped_mm(x, w, offs=ends).square().sum().backward()) == 3 * 2 * 10 * 16 * 8


def test_seconds_are_the_median_and_cases_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    lengths = {"a": iter([9, 9, 1, 3, 2, 7, 4]), "b": iter([8, 8, 1, 5, 5, 1, 6])}
    monkeypatch.setattr(costs, "WARMUP", 2)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])

    def case(name: str) -> None:
        order.append(name)
        clock[0] += next(lengths[name])

    cases = [lambda: case("a"), lambda: case("b")]
    monkeypatch.setattr(costs, "LONGEST", 1000.0)
    assert median_seconds(cases, CPU, runs=5) == [3, 5]
    assert order == ["a", "b"] * 7


@pytest.mark.parametrize(("longest", "rounds"), [(20.0, 9), (5.0, 5), (0.0, 3)])
def test_slow_passes_get_fewer_rounds(longest: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], [0]
    monkeypatch.setattr(costs, "LONGEST", longest)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])

    def case() -> None:
        clock[0] += 1
        calls[0] += 1

    assert median_seconds([case], CPU, runs=9) == [1]
    assert calls[0] == costs.WARMUP + rounds


def test_measured_passes_do_not_train() -> None:
    recipe = small_recipe(**{"model.router": {"noise": 5.0}, "model.drop_path": 0.5})
    network = build_network(recipe).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = costs_side_by_side([Version(network, recipe)] * 2, "digits", runs=2)
    assert found[0]._replace(seconds=0) == found[1]._replace(seconds=0) and found[0].seconds > 0
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_network_without_sparse_layers_has_no_expert_parameters() -> None:
    recipe = small_recipe(**{"model.layout": "dense"})
    found = costs_of(Version(build_network(recipe), recipe), "digits", runs=1)
    assert found.experts == 0 and found.flops > 0


BEFORE = Costs((48, 640), 249_482_056, 120_000_000, 200_000_000, 75_775_795_200, 4.6532, "cpu", 998_000_000)
AFTER = BEFORE._replace(total=124_741_028, experts=50_000_000, seconds=0.46532, file_bytes=None)


def test_table_fits_and_tells_shares(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = {"full": BEFORE, "extracted, with a name that is far too long for one line": AFTER}
    print_costs("scenes", rows, {"full": 0.4321}, "AP")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    cells = [line.split() for line in lines]
    assert ["full", "249,482,056", "120,000,000", "200,000,000", "75.776", "4,653.20", "998.00", "0.432"] in cells
    assert ["share", "50.0%", "100.0%", "25.0%", "100.0%", "10.0%", "-"] in cells
    assert any("124,741,028" in row and row[-1] == "-" for row in cells)
    assert any("48 x 640 pixels, cpu" in line for line in lines)


def test_table_without_a_metric_has_no_such_column(capsys: pytest.CaptureFixture[str]) -> None:
    dense = BEFORE._replace(experts=0)
    print_costs("scenes", {"full": dense, "other": dense._replace(total=1)})
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["network", "parameters", "active", "in", "experts", "GFLOPs", "ms", "file,", "MB"] in cells
    assert any(row[:4] == ["share", "0.0%", "100.0%", "-"] for row in cells), "no share of nothing"


def test_costs_can_be_taken_of_a_network_with_unequal_layers() -> None:
    recipe = small_recipe(**{"model.mlp": {"num_experts": 4, "top_k": 2, "hidden": H, "per_layer": [3, 2]}})
    found = costs_of(Version(build_network(recipe), recipe), "digits", runs=1)
    assert found.experts == 2 * E * (2 * D * C) + (3 + 2) * (2 * D * H + H + D)
    idle_router = 2 * 16 * D * (E - 3 + E - 2)
    assert found.flops == flops_by_hand(16) - idle_router
