"""Foreign weights from disk: told by content, wrappers undone, damage and code refused, and a run that starts from them."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from modsquad_ds.config import Recipe
from modsquad_ds.errors import UserError
from modsquad_ds.init_from import Started, initial_state, report
from modsquad_ds.model.network import build_network
from modsquad_ds.model_file import ModelFile, write_model
from modsquad_ds.weights_file import is_model_file, read_weights
from ranks import run_ranks
from small import small_recipe
from test_topology import Topology, config_file, curves
from test_upcycle import moe, timm_vit

SLICED = {"model.layout": "alternate", **moe(4, 2, 64, True)}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def here(path: Path, allow: tuple[str, ...] = (), **changes: Any) -> Recipe:
    return small_recipe(**{"init_from": {"path": str(path), "allow": list(allow)}, **SLICED, **changes})


def started(path: Path, allow: tuple[str, ...] = (), **changes: Any) -> Started:
    recipe = here(path, allow, **changes)
    return initial_state(recipe, build_network(recipe))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("entry", ["", "state_dict", "model", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(entry: str, prefix: str, zipped: bool, tmp_path: Path) -> None:
    vit = dict(timm_vit().state_dict())
    content: Any = {prefix + name: tensor for name, tensor in vit.items()}
    if entry:
        content = {entry: content, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}}
    path = tmp_path / "weights"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_weights(path)
    assert found.entry == entry and not is_model_file(path)
    assert_same(found.tensors, vit)


def test_averaged_weights_go_first_and_are_named(tmp_path: Path) -> None:
    plain, average = timm_vit(seed=0).state_dict(), timm_vit(seed=1).state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": average}, tmp_path / "f.pth")
    found = started(tmp_path / "f.pth")
    assert torch.equal(found.state["backbone.norm.bias"], average["norm.bias"])
    assert f"start from timm ViT {tmp_path / 'f.pth'} (state_dict_ema): " in report(found)


def test_safetensors_whatever_their_name(tmp_path: Path) -> None:
    vit = dict(timm_vit().state_dict())
    save_file(vit, tmp_path / "f.pth", metadata={"format": "pt"})
    assert_same(read_weights(tmp_path / "f.pth").tensors, vit)
    assert not is_model_file(tmp_path / "f.pth")


class Evil:
    """Would make a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    torch.save({"model": timm_vit().state_dict(), "x": Evil(tmp_path / "made")}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: started(path))
    assert message.startswith(f"init_from {path}: damaged, or holds more than tensors")
    assert "save its state dict alone: torch.save(model.state_dict(), ...)" in message
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists(), "the file is as dangerous as it should be"
    torch.save({"model": timm_vit().state_dict(), "args": argparse.Namespace(lr=1)}, path)
    assert "save its state dict alone" in refusal(lambda: started(path))


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors", "model"])
@pytest.mark.parametrize("kept", [0, 1, 8, 9, 40, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(kind: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / "f"
    vit = dict(timm_vit().state_dict())
    if kind == "safetensors":
        save_file(vit, path)
    elif kind == "model":
        recipe = small_recipe(**SLICED)
        write_model(path, ModelFile(recipe, build_network(recipe).state_dict(), {}, ()))
    else:
        torch.save(vit, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    assert str(path) in refusal(lambda: started(path))


def test_damaged_bytes_are_refused_whatever_they_lead_to(tmp_path: Path) -> None:
    """Every byte of a small file changed in turn: torch's reader fails assertions, misses attributes, or reads other values."""
    path = tmp_path / "f"
    torch.save({"model": {"a": torch.zeros(2)}}, path, _use_new_zipfile_serialization=False)
    whole, refused = path.read_bytes(), 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        try:
            assert len(read_weights(path).tensors) == 1
        except UserError:
            refused += 1
    assert refused > len(whole) / 4


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert refusal(lambda: started(path)) == (
        f"init_from {path}: cannot be read (No such file or directory); give a run folder, or a .safetensors or .pth file"
    )
    (tmp_path / "run").mkdir()
    assert f"init_from {tmp_path / 'run' / 'model.safetensors'}: cannot be read" in refusal(lambda: started(tmp_path / "run"))
    path.write_text("no weights, but a long enough text")
    assert "neither a safetensors file nor one of torch.save" in refusal(lambda: started(path))
    for content in ([1, 2], {"epoch": 3}, {}, torch.zeros(2), {"model": {"a": 1}}):
        torch.save(content, path)
        assert f"init_from {path}: holds no state dict, on top or under state_dict_ema" in refusal(lambda: started(path))
    torch.save({"conv1.weight": torch.zeros(2), "layer1.0.weight": torch.zeros(2)}, path)
    message = refusal(lambda: started(path))
    assert message.endswith("nor a timm vision transformer's state dict; it holds conv1.weight, layer1.*.weight")


# ---------------------------------------------------------------- the network's start


def test_what_becomes_of_the_network(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    vit = timm_vit(class_token=True, global_pool="token").state_dict()
    save_file(dict(vit), path)
    found = started(path, **{"model.grid": 6})
    recipe = here(path, **{"model.grid": 6})
    own = build_network(recipe).state_dict()
    build_network(recipe).load_state_dict(found.state)
    assert torch.equal(found.state["backbone.blocks.1.attn.qkv.weight"], vit["blocks.1.attn.qkv.weight"])
    kept = [name for name in own if name.startswith("heads.") or name.endswith("router.visible")]
    assert set(found.at_random) == set(kept)
    assert all(torch.equal(found.state[name], own[name]) for name in kept)
    assert set(found.left_over) == {
        "cls_token", "head.weight", "head.bias", "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.bias"
    }  # fmt: skip
    assert found.usage == () and set(found.matched) | set(found.changed) | set(found.at_random) == set(own)
    lines = report(found).splitlines()
    assert lines[0] == f"start from timm ViT {path}: {len(found.matched)} of {len(own)} tensors"
    assert "  resized from 4x4 to 6x6: backbone.pos_embed" in lines
    assert "  a slice of 64 of the MLP's 128 units: backbone.blocks.*.mlp.experts.fc1_weight, " in "\n".join(lines)
    assert lines[-1] == (
        "  not the ViT's function at step 0: patches attended to a class token or registers, which are gone, "
        "blocks.*.attn: MoE attention has no dense equal (1)"
    )
    assert len(lines) < 15


def test_a_whole_timm_model(tmp_path: Path) -> None:
    """`vit_tiny_patch16_224` as it comes, into Mod-Squad's layout at its default widths: slices that are chosen as a whole."""
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    changes = {"model": {"size": "tiny", "layout": "mlp_only", "router": {"renormalize": True}}}
    found = started(tmp_path / "vit.pth", **changes)
    assert "blocks" not in found.notes[-1] and "class token" in found.notes[-1]
    assert set(found.left_over) == {"cls_token", "head.weight", "head.bias"}
    fc1 = found.state["backbone.blocks.11.mlp.experts.fc1_weight"]
    assert fc1.shape == (16, 192, 192)
    assert torch.equal(fc1[4:8].flatten(0, 1), vit.state_dict()["blocks.11.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"qk_norm": True, "norm_layer": torch.nn.LayerNorm}, "cannot represent blocks.*.attn.q_norm.weight (2), "),
        ({"pre_norm": True}, "cannot represent norm_pre.weight, norm_pre.bias"),
        ({"pos_embed": "none"}, "the file lacks pos_embed"),
    ],
)
def test_what_has_no_counterpart_needs_leave(variant: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    torch.save(timm_vit(**variant).state_dict(), path)
    told = refusal(lambda: started(path))
    assert message in told and told.endswith("if this is meant, set init_from.allow=[tensors]")
    assert "tensors of one side have no counterpart" in started(path, ("tensors",)).notes[-1]


@pytest.mark.dist
def test_two_ranks_start_from_a_vit_as_one(tmp_path: Path) -> None:
    torch.save(timm_vit().state_dict(), tmp_path / "f.pth")
    changes = {**SLICED, "init_from": str(tmp_path / "f.pth"), "run": str(tmp_path / "new")}
    config = config_file(tmp_path, 2)
    alone = run_ranks(1, curves, [(Topology(1, 1, 2, changes), config)])[0][0]
    found = run_ranks(2, curves, [(Topology(2, 2, 2, changes), config)], timeout=200)[0][0]
    for step, (a, b) in enumerate(zip(found.values, alone.values, strict=True)):
        assert a[:-1] == pytest.approx(b[:-1], rel=5e-5, abs=5e-5), f"step {step}"
