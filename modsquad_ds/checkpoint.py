"""Training checkpoints that resume at any number of ranks, group size and ZeRO stage. Written by saving.py, read by resume.py.

    RUN/checkpoints/step-00000300/
        rank-00000.safetensors ...   each rank's own pieces of weights and optimizer state; which they are is in its metadata
        shared.safetensors           experts' usage by tasks, and the network's buffers (rank 0's)
        state.json                   step, recipe, shapes, every file's size and checksum; written last

A piece is a run of consecutive elements of a flattened full tensor (all experts stacked), as ZeRO cut it; every element is in
exactly one piece of the whole checkpoint. Saving therefore moves nothing between ranks, and loading is cutting the same
tensors anew. The folder gets its final name once everything is on disk: a checkpoint with that name is complete.
Weights and state are fp32, so at the same topology training goes on bit for bit. No pickle is read or written.
"""

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modsquad_ds.errors import UserError
from modsquad_ds.files import say, sha256_of, sync, write_json
from modsquad_ds.objective import Usage
from modsquad_ds.parallel import watchdog
from modsquad_ds.parallel.collectives import broadcast_json, gather_json
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.state import TrainingState
from modsquad_ds.placement import Move, Order, expert_moves, moved, permute_experts, permute_usage

FORMAT = 3
NAME = re.compile(r"step-(\d{8})")
SEEN_SECONDS = 90.0
"""How long a file of another node may stay unseen; NFS keeps old listings for up to a minute."""
SHARED, STATE = "shared.safetensors", "state.json"


class Progress(NamedTuple):
    """Where training stands."""

    step: int
    """Optimizer steps done."""
    usage: tuple[Usage, ...]
    chosen: tuple[tuple[int, ...], ...] = ()
    """Per sparse layer, the experts that learn where only some do (`trainable.py`)."""
    origin: str = ""
    """Checksum of the file that what is frozen comes from; empty where everything learns."""


class Written(NamedTuple):
    """A file of a checkpoint as it was meant to be."""

    file: str
    bytes: int
    sha256: str


Place = Callable[[tuple[Usage, ...]], Sequence[Order]]
"""A checkpoint's usage -> a new order of every sparse layer's experts, the same on every rank."""


# ---------------------------------------------------------------- folders


def folder_of(run: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is until all of it is on disk."""
    return folder.with_name(f".partial-{folder.name}")


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [folder for folder in _named(run) if (folder / STATE).is_file()]


def _named(run: Path) -> list[Path]:
    """Folders with a checkpoint's name, oldest first. They were complete; one without an index has lost it since."""
    root = run / "checkpoints"
    return sorted(p for p in (root.iterdir() if root.is_dir() else ()) if NAME.fullmatch(p.name))


def clear_remains(run: Path) -> None:
    """Remove what a killed job left half written. Called by one rank, before this life writes anything."""
    for folder in (run / "checkpoints").glob(".partial-*"):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("model.safetensors", "metrics.jsonl", "recipe.json"):
        for file in run.glob(f".partial-{name}-*"):  # of `write_atomic`; a model's is as large as the model
            with suppress(OSError):
                file.unlink()


# ---------------------------------------------------------------- writing


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Written:
    """Write a safetensors file to disk for good. Each of the three things that may take long is progress of its own."""
    save_file(tensors, path, metadata)
    watchdog.tell_beside()
    sync(path)
    watchdog.tell_beside()
    written = Written(path.name, path.stat().st_size, sha256_of(path))
    watchdog.tell_beside()
    return written


def publish(final: Path, content: dict[str, Any], files: Sequence[Written], keep: int) -> None:
    """Make a checkpoint of a folder whose files are all there: index it, name it, drop all but the newest `keep`."""
    partial = partial_of(final)
    _wait_until_seen(partial, files)
    content = {"format": FORMAT, **content, "files": [file._asdict() for file in files]}
    write_json(partial / STATE, {**content, "sha256": _checksum(content)})
    sync(partial)
    _remove(final)
    os.replace(partial, final)
    sync(final.parent)
    for old in complete_checkpoints(final.parents[1])[:-keep]:
        try:
            _remove(old)
        except OSError as error:  # the new one is whole all the same
            say(f"old checkpoint {old} could not be removed ({error})")


def _wait_until_seen(folder: Path, files: Sequence[Written]) -> None:
    """Wait for files of other nodes, which a shared file system may show late. Raises OSError if it does not show them."""
    deadline = time.monotonic() + SEEN_SECONDS
    for path, size in ((folder / file.file, file.bytes) for file in files):
        while not path.is_file() or path.stat().st_size != size:
            if time.monotonic() > deadline:
                unseen = f"rank 0 does not see {path.name}, which another rank has written"
                raise OSError(f"{unseen}: do all nodes share {folder.parent}?")
            time.sleep(0.2)


def shared_tensors(usage: tuple[Usage, ...], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the ranks have in common, by its names in the file."""
    tensors = {f"buffer.{name}": buffer for name, buffer in buffers.items()}
    for i, layer in enumerate(usage):
        tensors |= {f"usage.{i}.prob": layer.prob_TE, f"usage.{i}.share": layer.share_TE}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _remove(folder: Path) -> None:
    """Take away the name first: a checkpoint that is removed halfway must not pass for a complete one."""
    gone = folder.with_name(f".partial-{folder.name}-removed")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        os.replace(folder, gone)
        shutil.rmtree(gone)


# ---------------------------------------------------------------- choosing


def newest_sound(run: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint whose files are as they were written; None where there is no checkpoint. Every rank calls it.

    The ranks share the reading. A damaged one is told, put aside under another name, and the one before takes its place.
    Raises UserError if all are damaged, and then leaves them where they are: a run does not begin anew by itself where it had
    got further, however often it is started.
    """
    found = broadcast_json([folder.name for folder in _named(run)])
    told: list[tuple[str, str]] = []
    for name in reversed(found):
        folder = run / "checkpoints" / name
        faults = [fault for of_rank in gather_json(_faults(folder, ranks)) for fault in of_rank]
        if not faults:
            if ranks.first:
                for damaged, fault in told:
                    _put_aside(folder.with_name(damaged), fault)
            return folder
        told.append((name, faults[0]))
    if told:
        where, what = run / "checkpoints", "; ".join(fault for _, fault in told)
        raise UserError(f"no checkpoint under {where} is whole ({what}); restore one, or start a new run folder (run=...)")
    return None


def _put_aside(folder: Path, fault: str) -> None:
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.replace(folder, aside)
    except OSError as error:
        raise UserError(f"checkpoint damaged: {fault}; {folder} cannot be put aside ({error.strerror}), remove it") from None
    say(f"checkpoint damaged: {fault}; put aside as {aside}, going on from the one before")


def _faults(folder: Path, ranks: Ranks) -> list[str]:
    """What is wrong with this rank's part of a checkpoint's files."""
    try:
        content = json.loads((folder / STATE).read_bytes())
        if content.get("format") != FORMAT:
            return []  # another version's: read_state says so
        if content.pop("sha256", None) != _checksum(content):
            return [f"{folder / STATE} differs from its checksum"]
        files = [Written(**entry) for entry in content["files"]][ranks.rank :: ranks.world]
        return [fault for file in files for fault in _fault(folder / file.file, file)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / STATE} cannot be read ({error})"]


def _fault(path: Path, expected: Written) -> list[str]:
    watchdog.tell()
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return [f"{path} has {size} of {expected.bytes} bytes"]
        return [] if sha256_of(path) == expected.sha256 else [f"{path} differs from its checksum"]
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror})"]


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- reading

def load(folder: Path, state: TrainingState, place: Place | None = None) -> Progress:
    """Put a checkpoint into a freshly built training state, whatever topology wrote it. Every rank calls it.

    With `place`, weights, optimizer state, weight average and usage arrive with their experts in the orders that it gives.
    """
    content = read_state(folder)
    shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
    _compare_shapes(folder, shapes, state.shapes())
    tensors = _open(folder / SHARED)
    usage = tuple(
        Usage(tensors.get_tensor(f"usage.{i}.prob"), tensors.get_tensor(f"usage.{i}.share")) for i in range(content["layers"])
    )
    moves: dict[str, Move] = {}
    if place is not None and usage:
        orders = place(usage)
        moves, usage = expert_moves(state.engine.module, orders), permute_usage(usage, orders)
    reader = _Reader(folder, content, moves)
    state.load(reader.cut, content["optimizer_step"])
    buffers = {name: tensors.get_tensor(f"buffer.{name}") for name in state.buffers()}
    state.load_buffers(permute_experts(buffers, moves))
    return Progress(content["step"], usage, tuple(map(tuple, content["chosen"])), content["origin"])


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's index. Raises UserError on another format or a damaged file."""
    path = folder / STATE
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error}); remove the folder to go on from an older one") from None
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise UserError(f"checkpoint {path}: format {found}, this version reads {FORMAT}; train with the version that wrote it")
    return content


class _Reader:
    """Parts of full tensors out of all ranks' pieces, with experts moved."""

    def __init__(self, folder: Path, content: dict[str, Any], moves: Mapping[str, Move]) -> None:
        self.folder, self.shapes, self.moves = folder, content["shapes"], moves
        self.places: dict[tuple[str, str], list[tuple[Path, str, int, int]]] = defaultdict(list)
        self.open: dict[Path, Any] = {}
        for path in (folder / entry["file"] for entry in content["files"] if entry["file"] != SHARED):
            self.open[path] = _open(path)
            for key, name, kind, start, numel in json.loads(self.open[path].metadata()["pieces"]):
                self.places[name, kind].append((path, key, start, numel))

    def cut(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a flattened full tensor, fp32. Raises UserError where pieces are missing.

        Of the files no more is read than that, where experts stay: else every rank would read all of the checkpoint.
        """
        watchdog.tell()
        if name not in self.moves:
            return self._read(name, kind, start, stop)
        shape = self.shapes[name]
        return moved(self._read(name, kind, 0, math.prod(shape)).view(shape), self.moves[name]).flatten()[start:stop]

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        part, filled = torch.empty(stop - start), 0
        for path, key, first, numel in self.places[name, kind]:
            low, high = max(start, first), min(stop, first + numel)
            if low < high:
                part[low - start : high - start] = self.open[path].get_slice(key)[low - first : high - first]
                filled += high - low
        if filled != stop - start:
            what, way = f"{kind} of {name} has {filled} of {stop - start} elements", "use an older checkpoint"
            if kind == "average" and not filled:
                what, way = "holds no average of the weights", "resume with train.ema=0, or start a new run folder (run=...)"
            raise UserError(f"checkpoint {self.folder}: {what}; {way}")
        return part


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error}); remove its folder to go on from an older one") from None


def _compare_shapes(folder: Path, saved: dict[str, tuple[int, ...]], own: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise UserError(
                f"checkpoint {folder}: {name} has shape {saved.get(name)} there and {own.get(name)} in this recipe; "
                "resume with the recipe it was trained with, or start a new run folder (run=...)"
            )


