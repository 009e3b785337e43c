"""Training checkpoints that resume at any number of ranks, group size and ZeRO stage. Written and read by train.py.

    RUN/checkpoints/step-00000300/
        rank-00000.safetensors ...   each rank's own pieces of weights and optimizer state
        shared.safetensors           experts' usage by tasks, and the network's buffers (rank 0's)
        state.json                   step, recipe, shapes, pieces of every file; written last

A piece is a run of consecutive elements of a flattened full tensor (all experts stacked), as ZeRO cut it; every element is in
exactly one piece of the whole checkpoint. Saving therefore moves nothing between ranks, and loading is cutting the same
tensors anew. The folder gets its final name once everything is on disk: a checkpoint with that name is complete.
Weights and state are fp32, so at the same topology training goes on bit for bit. No pickle is read or written.
"""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modsquad_ds.errors import UserError
from modsquad_ds.files import sync, write_json
from modsquad_ds.objective import Usage
from modsquad_ds.parallel.collectives import barrier, gather_json
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.state import TrainingState
from modsquad_ds.placement import Move, Order, expert_moves, moved, permute_experts, permute_usage

FORMAT = 2
NAME = re.compile(r"step-(\d{8})")


class Progress(NamedTuple):
    """Where training stands."""

    step: int
    """Optimizer steps done."""
    usage: tuple[Usage, ...]
    chosen: tuple[tuple[int, ...], ...] = ()
    """Per sparse layer, the experts that learn where only some do (`trainable.py`)."""


Place = Callable[[tuple[Usage, ...]], Sequence[Order]]
"""A checkpoint's usage -> a new order of every sparse layer's experts, the same on every rank."""


def folder_of(run: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    root = run / "checkpoints"
    found = root.iterdir() if root.is_dir() else []
    return sorted(p for p in found if NAME.fullmatch(p.name) and (p / "state.json").is_file())


def save(run: Path, state: TrainingState, progress: Progress, recipe: dict[str, Any], ranks: Ranks, keep: int) -> Path:
    """Write a checkpoint and drop all but the newest `keep`. Every rank calls it."""
    final = folder_of(run, progress.step)
    partial = final.with_name(f".partial-{final.name}")
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    name = f"rank-{ranks.rank:05d}.safetensors"
    pieces = state.pieces()
    tensors = {f"{i}": piece.tensor.detach().cpu().contiguous() for i, piece in enumerate(pieces)}
    _save_tensors(partial / name, tensors)
    index = [{"name": p.name, "kind": p.kind, "start": p.start, "numel": p.tensor.numel()} for p in pieces]
    files = gather_json({"file": name, "pieces": index})
    if ranks.first:
        _save_tensors(partial / "shared.safetensors", _shared_tensors(progress.usage, state.buffers()))
        content = {
            "format": FORMAT,
            "step": progress.step,
            "optimizer_step": state.optimizer_step(),
            "shapes": {n: list(s) for n, s in state.shapes().items()},
            "files": files,
            "layers": len(progress.usage),
            "chosen": progress.chosen,
            "recipe": recipe,
        }
        write_json(partial / "state.json", content)
        sync(partial)
        _remove(final)
        os.replace(partial, final)
        sync(final.parent)
        for old in complete_checkpoints(run)[:-keep]:
            _remove(old)
    barrier()
    return final


def load(folder: Path, state: TrainingState, place: Place | None = None) -> Progress:
    """Put a checkpoint into a freshly built training state, whatever topology wrote it. Every rank calls it.

    With `place`, weights, optimizer state, weight average and usage arrive with their experts in the orders that it gives.
    """
    content = read_state(folder)
    shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
    _compare_shapes(folder, shapes, state.shapes())
    tensors = _open(folder / "shared.safetensors")
    usage = tuple(
        Usage(tensors.get_tensor(f"usage.{i}.prob"), tensors.get_tensor(f"usage.{i}.share")) for i in range(content["layers"])
    )
    moves: dict[str, Move] = {}
    if place is not None and usage:
        orders = place(usage)
        moves, usage = expert_moves(state.engine.module, orders), permute_usage(usage, orders)
    reader = _Reader(folder, content, moves)
    state.load(reader.full, content["optimizer_step"])
    buffers = {name: tensors.get_tensor(f"buffer.{name}") for name in state.buffers()}
    state.load_buffers(permute_experts(buffers, moves))
    return Progress(content["step"], usage, tuple(map(tuple, content["chosen"])))


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's index. Raises UserError on another format or a damaged file."""
    path = folder / "state.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error}); remove the folder to go on from an older one") from None
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise UserError(f"checkpoint {path}: format {found}, this version reads {FORMAT}; train with the version that wrote it")
    return content


class _Reader:
    """Full tensors out of all ranks' pieces, with experts moved."""

    def __init__(self, folder: Path, content: dict[str, Any], moves: Mapping[str, Move]) -> None:
        self.shapes, self.moves = content["shapes"], moves
        self.places: dict[tuple[str, str], list[tuple[Path, str, int, int]]] = defaultdict(list)
        self.open: dict[Path, Any] = {}
        for entry in content["files"]:
            for i, piece in enumerate(entry["pieces"]):
                place = (folder / entry["file"], f"{i}", piece["start"], piece["numel"])
                self.places[piece["name"], piece["kind"]].append(place)

    def full(self, name: str, kind: str) -> Tensor:
        """One full tensor, flattened, fp32. Raises UserError where pieces are missing."""
        size = 1
        for n in self.shapes[name]:
            size *= n
        whole, filled = torch.empty(size), 0
        for path, key, start, numel in self.places[name, kind]:
            if path not in self.open:
                self.open[path] = _open(path)
            whole[start : start + numel] = self.open[path].get_tensor(key)
            filled += numel
        if filled != size:
            where = sorted({str(place[0].parent) for place in self.places[name, kind]})
            what = f"{kind} of {name} has {filled} of {size} elements"
            raise UserError(f"checkpoint {', '.join(where)}: {what}; use an older checkpoint")
        if name in self.moves:
            whole = moved(whole.view(self.shapes[name]), self.moves[name]).flatten()
        return whole


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error}); remove its folder to go on from an older one") from None


def _remove(folder: Path) -> None:
    """Take away the name first: a checkpoint that is removed halfway must not pass for a complete one."""
    gone = folder.with_name(f".partial-{folder.name}-removed")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        os.replace(folder, gone)
        shutil.rmtree(gone)


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shared_tensors(usage: tuple[Usage, ...], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"buffer.{name}": buffer for name, buffer in buffers.items()}
    for i, layer in enumerate(usage):
        tensors |= {f"usage.{i}.prob": layer.prob_TE, f"usage.{i}.share": layer.share_TE}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _compare_shapes(folder: Path, saved: dict[str, tuple[int, ...]], own: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise UserError(
                f"checkpoint {folder}: {name} has shape {saved.get(name)} there and {own.get(name)} in this recipe; "
                "resume with the recipe it was trained with, or start a new run folder (run=...)"
            )


