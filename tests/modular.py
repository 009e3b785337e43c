"""Shards of the three small datasets and a model file for them, for the tests of commands that work on model files."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import layouts
from modsquad_ds import cli
from modsquad_ds.data.convert import convert
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.model.network import build_network
from modsquad_ds.model_file import ModelFile, write_model
from modsquad_ds.objective import Usage
from small import small_recipe

FOLDERS = {"digits": ("imagenet", "d"), "scenes": ("coco", "s"), "textures": ("ade20k", "t")}
"""Task -> layout, folder of its shards."""


def make_shards(data: Path, split: str = "val", tasks: tuple[str, ...] = tuple(FOLDERS)) -> Path:
    """Shards of a split of the small datasets, where the small recipe looks for them."""
    for task in tasks:
        layout, folder = FOLDERS[task]
        source = data / "src" / split / layout
        layouts.MAKERS[layout](source, split)
        convert(layout, source, data / folder, split, progress=False)
    return data


def model_for(data: Path, **changes: Any) -> ModelFile:
    """An untrained network of the small recipe whose weights were shaken, with made-up usage: expert 0 is the most used."""
    classes = {task: list(ShardSet(data / folder / "val").classes) for task, (_, folder) in FOLDERS.items()}
    sizes: dict[str, Any] = {f"tasks.{task}.num_classes": len(names) for task, names in classes.items()}
    # Every cell detects something, so that an untrained network has boxes to show.
    sizes |= {"tasks.scenes.transform.eval_canvas": [24, 32], "tasks.scenes.head.score_threshold": 0.001}
    sizes |= {"tasks.textures.transform.resize": [24, 32]}
    recipe = small_recipe(**sizes, **changes)
    network, g = build_network(recipe), torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        scale = 0.5 if ".router." in name or name.startswith("heads.") else 0.05
        parameter.data += scale * torch.randn(parameter.shape, generator=g)
    usage = []
    for layer in network.backbone.sparse_layers().values():
        share_TE = 0.4 ** torch.arange(layer.router.num_experts).repeat(len(recipe.active), 1).float()
        share_TE /= share_TE.sum(1, keepdim=True)
        usage.append(Usage(share_TE, share_TE.clone()))
    return ModelFile(recipe, network.state_dict(), {t: classes[t] for t in recipe.active}, tuple(usage))


class Shell:
    """The command line in this process and in a folder of its own: much quicker than a new process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["modsquad-ds", *arguments])
            patch.chdir(self.folder)
            try:
                cli.main()
            except SystemExit as left:
                told = self.capsys.readouterr()
                assert isinstance(left.code, int)
                return left.code, told.out, told.err
        raise AssertionError("main always leaves by SystemExit")

    def refused(self, *arguments: str) -> str:
        """The one line of a command that is a user's mistake; it leaves nothing behind."""
        code, _, told = self.run(*arguments)
        errors = [line for line in told.splitlines() if "error: " in line]
        assert code == 2 and len(errors) == 1 and "Traceback" not in told, told
        assert not list(self.folder.iterdir()), "nothing is written"
        return errors[0]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """To be imported by the tests that use it."""
    (tmp_path / "shell").mkdir()
    return Shell(tmp_path / "shell", monkeypatch, capsys)


def write(path: Path, model: ModelFile) -> Path:
    write_model(path, model)
    return path
