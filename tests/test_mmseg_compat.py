"""The door to mmsegmentation: who passes it, when, and what stands in for the missing compiled part."""

import ast
import importlib.util
import os
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

import modsquad_ds
from modsquad_ds import mmseg_compat

PACKAGE = Path(modsquad_ds.__file__).parent


def imported(file: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_nothing_else_imports_mmsegmentation() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if imported(file) & {"mmseg", "mmcv", "mmengine"}]
    assert files == [PACKAGE / "mmseg_compat.py"]


def test_importing_heads_and_metrics_does_not_import_mmsegmentation() -> None:
    code = "import sys, modsquad_ds.model.heads, modsquad_ds.metrics; sys.exit('mmseg' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, timeout=120).returncode == 0


def test_the_stand_in_refuses_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    if importlib.util.find_spec("mmcv._ext") is not None:
        pytest.skip("a full mmcv is installed")
    mmseg_compat._ensure_compiled_part()
    stand_in = sys.modules["mmcv._ext"]
    with pytest.raises(NotImplementedError, match=r"mmcv._ext.nms is part of the compiled mmcv"):
        stand_in.nms(1, 2)
    with pytest.raises(AttributeError):
        _ = stand_in.__path__
    mmseg_compat._ensure_compiled_part()
    assert sys.modules["mmcv._ext"] is stand_in


def test_a_real_compiled_part_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = types.ModuleType("mmcv._ext")
    real.__spec__ = ModuleSpec("mmcv._ext", loader=None)
    monkeypatch.setitem(sys.modules, "mmcv._ext", real)
    mmseg_compat._ensure_compiled_part()
    assert sys.modules["mmcv._ext"] is real


def test_heads_start_at_mmsegmentations_initial_values_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    common = {"channels": 64, "num_classes": 150, "out_channels": 150, "norm_cfg": {"type": "BN"}}
    for head in (
        mmseg_compat.fcn_head(in_channels=8, in_index=0, **common),
        mmseg_compat.uper_head(in_channels=[8, 8], in_index=[0, 1], **common),
    ):
        assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not head.conv_seg.bias.any()
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_iou_metric_is_mmsegmentations() -> None:
    metric = mmseg_compat.iou_metric()
    assert metric.__module__ == "mmseg.evaluation.metrics.iou_metric"
    areas = metric.intersect_and_union(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 255]), 2, 255)
    assert [area.tolist() for area in areas] == [[1, 1], [1, 1], [1, 1], [1, 1]]


def test_nothing_is_read_from_the_users_cache_folder(tmp_path: Path) -> None:
    """Where two ranks start at once, one would read what the other has written half: here a grammar that is empty."""
    everywhere = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import yapf"], env=everywhere, timeout=120, check=True)
    grammars = list(tmp_path.rglob("*.pickle"))
    assert grammars
    for grammar in grammars:
        grammar.write_bytes(b"")
    code = """
from modsquad_ds import mmseg_compat
mmseg_compat.fcn_head(in_channels=8, in_index=0, channels=8, num_classes=2, out_channels=2, norm_cfg={"type": "BN"})
mmseg_compat.iou_metric()
import mmengine, sys
assert not [name for name in sys.modules if name.startswith("yapf")]
try:
    mmengine.Config({"a": 1}).pretty_text
except SyntaxError:
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], env=everywhere, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 7  # the formatter is there once it is asked for, and then meets the empty file


def test_the_formatter_works_once_it_is_asked_for() -> None:
    from mmengine import Config

    mmseg_compat.iou_metric()
    assert Config({"a": [1]}).pretty_text.strip() == "a = [\n    1,\n]"
