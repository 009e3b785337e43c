"""The model file: all of it comes back, one key per expert, no DeepSpeed needed, damage told in one line, never half written."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modsquad_ds.errors import UserError
from modsquad_ds.model.network import build_network
from modsquad_ds.model_file import (
    ModelFile,
    checksum_of,
    cut_experts,
    expert_parameters,
    network_of,
    read_model,
    stack_experts,
    write_model,
)
from modsquad_ds.objective import Usage
from small import small_recipe

CLASSES = {"digits": list("abcde"), "scenes": ["x", "é", "z"]}
# Without a segmentation task, whose head imports mmsegmentation, which may import DeepSpeed.
CHANGES = {"only": ["digits", "scenes"], "model.layout": "alternate"}
STACKED = {
    "backbone.blocks.0.attn.experts.q_weight": (16, 32),
    "backbone.blocks.0.attn.experts.proj_weight": (32, 16),
    "backbone.blocks.1.mlp.experts.fc1_weight": (24, 32),
    "backbone.blocks.1.mlp.experts.fc1_bias": (24,),
    "backbone.blocks.1.mlp.experts.fc2_weight": (32, 24),
    "backbone.blocks.1.mlp.experts.fc2_bias": (32,),
}
"""Expert parameters of the recipe above, with the shape of one of the four experts."""


def model_of(**changes: Any) -> ModelFile:
    recipe = small_recipe(**{**CHANGES, **changes})
    state = build_network(recipe).state_dict()
    g = torch.Generator().manual_seed(0)
    usage = tuple(Usage(torch.rand(2, 4, generator=g), torch.rand(2, 4, generator=g)) for _ in range(2))
    return ModelFile(recipe, {name: tensor.clone() for name, tensor in state.items()}, CLASSES, usage)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "model.safetensors"
    write_model(path, model_of())
    return path


def assert_equal(found: ModelFile, expected: ModelFile) -> None:
    assert found.recipe == expected.recipe and found.classes == expected.classes
    assert found.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert found.state[name].dtype == tensor.dtype and torch.equal(found.state[name], tensor), name
    assert len(found.usage) == len(expected.usage)
    for a, b in zip(found.usage, expected.usage, strict=True):
        assert torch.equal(a.prob_TE, b.prob_TE) and torch.equal(a.share_TE, b.share_TE)


# ---------------------------------------------------------------- what goes in comes out


def test_round_trip(written: Path) -> None:
    assert_equal(read_model(written), model_of())
    assert [path.name for path in written.parent.iterdir()] == ["model.safetensors"]


def test_untrained_model_has_no_usage(tmp_path: Path) -> None:
    model = model_of()._replace(usage=(), classes={})
    write_model(tmp_path / "m.safetensors", model)
    assert_equal(read_model(tmp_path / "m.safetensors"), model)


def test_half_precision_buffers_and_views_keep_their_kind(tmp_path: Path) -> None:
    changes = {"only": ["textures"], "tasks.textures.head": {"type": "fcn", "stride": 4, "norm": "batch", "channels": 32}}
    recipe = small_recipe(**changes)
    state: dict[str, Tensor] = {}
    for name, tensor in build_network(recipe).state_dict().items():
        wide = tensor.bfloat16() if tensor.is_floating_point() else tensor + 3
        state[name] = wide.t().contiguous().t() if wide.dim() == 2 else wide
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16, torch.int64}
    assert not all(tensor.is_contiguous() for tensor in state.values())
    model = ModelFile(recipe, state, {}, ())
    write_model(tmp_path / "m.safetensors", model)
    assert_equal(read_model(tmp_path / "m.safetensors"), model)


def test_network_of_a_file_is_the_network(written: Path) -> None:
    original = build_network(model_of().recipe).eval()
    network = network_of(read_model(written), str(written)).eval()
    images = {"digits": torch.randn(2, 3, 32, 32), "scenes": torch.randn(1, 3, 32, 48)}
    found, expected = network(images), original(images)
    assert torch.equal(found.outputs["digits"]["logits"], expected.outputs["digits"]["logits"])
    assert torch.equal(found.stats[1].prob_TE, expected.stats[1].prob_TE)


# ---------------------------------------------------------------- its layout


def test_one_key_per_tensor_and_expert(written: Path) -> None:
    with safe_open(written, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    state = model_of().state
    expected = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in STACKED}
    for name, shape in STACKED.items():
        bank, _, parameter = name.rpartition(".")
        assert state[name].shape == (4, *shape)
        expected |= {f"{bank}.{i}.{parameter}": shape for i in range(4)}
    expected |= {f"usage.{layer}.{kind}": (2, 4) for layer in (0, 1) for kind in ("prob", "share")}
    assert shapes == expected
    assert json.loads(metadata["recipe"])["model"]["width"] == 32
    assert json.loads(metadata["classes"]) == CLASSES


def test_expert_i_is_row_i_of_the_stack(written: Path) -> None:
    flat, state = load_file(written), model_of().state
    for i in range(4):
        assert torch.equal(
            flat[f"backbone.blocks.1.mlp.experts.{i}.fc1_weight"], state["backbone.blocks.1.mlp.experts.fc1_weight"][i]
        )


def test_cutting_and_stacking_are_inverse() -> None:
    state = model_of().state
    stacked = expert_parameters(model_of().recipe)
    assert stacked == dict.fromkeys(STACKED, 4)
    cut = cut_experts(state, stacked)
    assert not cut.keys() & stacked.keys()
    again = stack_experts(cut, stacked)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    del cut["backbone.blocks.1.mlp.experts.2.fc2_bias"]
    assert state.keys() - stack_experts(cut, stacked).keys() == {"backbone.blocks.1.mlp.experts.fc2_bias"}


ALONE = """
import pickle, sys, torch
from pathlib import Path
from modsquad_ds.model_file import network_of, read_model

def refuse(*args, **kwargs):
    raise AssertionError("unpickled something")

pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
path = Path(sys.argv[1])
network = network_of(read_model(path), str(path)).eval()
with torch.no_grad():
    logits = network({"digits": torch.ones(1, 3, 32, 32)}).outputs["digits"]["logits"]
foreign = ("deepspeed", "modsquad_ds.parallel", "mmseg", "mmcv", "webdataset")
loaded = [name for name in sys.modules if name.split(".")[0] in foreign or name.startswith("modsquad_ds.parallel")]
assert not loaded, loaded
assert not torch.distributed.is_initialized()
print(float(logits.sum()))
"""


def test_loads_without_deepspeed_or_a_process_group(written: Path) -> None:
    network = build_network(model_of().recipe).eval()
    with torch.no_grad():
        expected = network({"digits": torch.ones(1, 3, 32, 32)}).outputs["digits"]["logits"].sum().item()
    command = [sys.executable, "-c", ALONE, str(written)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------- files that are not what they should be


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        assert refusal(lambda path=path: read_model(path)).startswith(f"model {path}: no such file; give a run folder or")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_file(written: Path, keep: float) -> None:
    data = written.read_bytes()
    written.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    message = refusal(lambda: read_model(written))
    assert message.startswith(f"model {written}: not a readable safetensors file (") and message.endswith("copy it again")


@pytest.mark.parametrize("content", [b"PK\x03\x04 a pickled checkpoint", b"{}", b"\x80\x04." * 50])
def test_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert "not a readable safetensors file" in refusal(lambda: read_model(path))


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None], keep_checksum: bool = False) -> None:
    """Change tensors and metadata of a model file; its checksum follows, so that the fault behind it is met."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata if keep_checksum else {**metadata, "checksum": checksum_of(tensors, metadata)})


def recipe_with(key: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        recipe = json.loads(metadata["recipe"])
        recipe["model"][key] = value
        metadata["recipe"] = json.dumps(recipe)

    return change


EXPERT, DENSE = "backbone.blocks.1.mlp.experts.2.fc1_weight", "heads.digits.linear.weight"
OTHER = "backbone.blocks.1.mlp.experts.3.fc1_weight"

FAULTS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], list[str]]] = {
    "metadata of another program": (lambda t, m: (m.clear(), m.update(format="pt")), ["format 'pt', expected '2'"]),
    "a later format": (lambda t, m: m.update(format="3"), ["format '3', expected '2'", "by another version; use that one"]),
    "no recipe": (lambda t, m: m.pop("recipe"), ["not a model of modsquad_ds"]),
    "a recipe that is no JSON": (lambda t, m: m.update(recipe="{"), ["damaged", "copy it again"]),
    "a recipe with an unknown key": (recipe_with("layot", 1), ["recipe inside", "model.layot: unknown key"]),
    "no classes": (lambda t, m: m.pop("classes"), ["damaged, 'classes' is missing"]),
    "usage of fewer layers than it says": (lambda t, m: t.pop("usage.1.prob"), ["damaged, 'usage.1.prob' is missing"]),
    "a missing tensor": (lambda t, m: t.pop(DENSE), ["do not fit its recipe", DENSE]),
    "a missing expert": (lambda t, m: t.pop(EXPERT), ["do not fit its recipe", "backbone.blocks.1.mlp.experts.fc1_weight"]),
    "a tensor too many": (lambda t, m: t.update(more=torch.zeros(1)), ["do not fit its recipe", "more"]),
    "a tensor of another shape": (
        lambda t, m: t.update({DENSE: torch.zeros(7, 32)}),
        ["do not fit its recipe", DENSE, "[7, 32]"],
    ),
    "an expert of another shape": (lambda t, m: t.update({EXPERT: torch.zeros(23, 32)}), ["do not fit its recipe", "[23, 32]"]),
    "a recipe of another width": (recipe_with("width", 64), ["do not fit its recipe", "size mismatch"]),
    "a recipe of more experts": (recipe_with("mlp", {"num_experts": 6, "top_k": 2, "hidden": 24}), ["do not fit its recipe"]),
    "a recipe of fewer experts": (recipe_with("mlp", {"num_experts": 3, "top_k": 2, "hidden": 24}), ["do not fit its recipe"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_told_in_one_line(written: Path, fault: str) -> None:
    change, parts = FAULTS[fault]
    rewrite(written, change)
    message = refusal(lambda: network_of(read_model(written), str(written)))
    assert str(written) in message
    assert all(part in message for part in parts), message
    assert len(message) < 800


EDITS: dict[str, Callable[[dict[str, Tensor], dict[str, str]], Any]] = {
    "one bit of a weight": lambda t, m: t[DENSE].view(torch.uint8)[3, 5].bitwise_xor_(1),
    "two experts exchanged": lambda t, m: t.update({EXPERT: t[OTHER], OTHER: t[EXPERT]}),
    "a usage statistic": lambda t, m: t["usage.0.share"].mul_(2),
    "a class name": lambda t, m: m.update(classes=m["classes"].replace("x", "y")),
    "the recipe": recipe_with("mlp_ratio", 3.0),
    "one tensor more": lambda t, m: t.update(more=torch.zeros(1)),
    "a tensor's name": lambda t, m: t.update(more=t.pop(DENSE)),
    "a tensor's shape": lambda t, m: t.update({DENSE: t[DENSE].t().contiguous()}),
    "a word of metadata more": lambda t, m: m.update(more="x"),
    "no checksum": lambda t, m: m.pop("checksum"),
    "another checksum": lambda t, m: m.update(checksum="0" * 64),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_file_is_refused(written: Path, edit: str) -> None:
    rewrite(written, EDITS[edit], keep_checksum=True)
    message = refusal(lambda: read_model(written))
    assert message == f"model {written}: its content differs from its checksum: edited or damaged; copy or make it again"


def test_a_damaged_byte_is_met(written: Path) -> None:
    """A flipped byte of the data, which safetensors itself reads without complaint."""
    data = bytearray(written.read_bytes())
    data[-100] ^= 4
    written.write_bytes(data)
    load_file(written)
    assert "differs from its checksum" in refusal(lambda: read_model(written))


def test_checksum_is_of_content_and_not_of_order() -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(1)}
    first = checksum_of(tensors, {"x": "1", "y": "2"})
    assert first == checksum_of(dict(reversed(tensors.items())), {"y": "2", "x": "1", "checksum": "any"})
    assert first == checksum_of({**tensors, "b": tensors["b"].t().contiguous().t()}, {"x": "1", "y": "2"})
    assert first != checksum_of({**tensors, "b": tensors["b"].double()}, {"x": "1", "y": "2"})


def test_foreign_safetensors_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    assert "format None, expected '2'" in refusal(lambda: read_model(path))


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(written: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            write_model(written, model_of(seed=1))
    assert [path.name for path in written.parent.iterdir()] == ["model.safetensors"]
    assert_equal(read_model(written), model_of())
    write_model(written, model_of(seed=1))
    assert read_model(written).recipe.seed == 1
