"""Checkpoints written while training goes on: a copy of the state is taken between two steps, threads bring it to disk.

train.py asks for a checkpoint (`begin`), tells after every step whether all ranks' parts are on disk (`follow`), and waits for
the last one (`settle`). No rank's thread communicates: what one rank has to know of the others rides on the step's own reduction.
"""

import json
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from modsquad_ds import checkpoint
from modsquad_ds.checkpoint import Progress, Written
from modsquad_ds.files import say
from modsquad_ds.parallel.collectives import broadcast_json, gather_json
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.state import TrainingState


class Part(NamedTuple):
    """A rank's part of a checkpoint, as its thread left it."""

    files: tuple[Written, ...]
    failure: str = ""


class _Work(Thread):
    """A thread and what became of it."""

    def __init__(self, task: Callable[[], tuple[Written, ...]]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.task, self.part = task, Part((), "its thread died, see above")
        self.start()

    def run(self) -> None:
        try:
            self.part = Part(self.task())
        except (OSError, SafetensorError) as error:
            self.part = Part((), f"{error} on {socket.gethostname()}")


@dataclass
class Saver:
    """Writes a run's checkpoints, one at a time. Every rank makes the same calls in the same order."""

    run: Path
    recipe: Mapping[str, Any]
    ranks: Ranks
    keep: int
    pauses: list[float] = field(default_factory=list)
    """Seconds that training stood still for each checkpoint, on this rank."""
    _host: dict[str, Tensor] = field(default_factory=dict)
    """The copy; it is kept, since fresh memory costs more than the copying."""
    _final: Path | None = None
    """The checkpoint at work."""
    _content: dict[str, Any] = field(default_factory=dict)
    _writing: _Work | None = None
    """This rank's part on its way to disk."""
    _publishing: _Work | None = None
    """Rank 0: the folder on its way to its name."""

    @property
    def writing(self) -> bool:
        """Whether this rank's part of a checkpoint is not on disk yet."""
        return self._writing is not None and self._writing.is_alive()

    def begin(self, state: TrainingState, progress: Progress, images: Mapping[str, int]) -> None:
        """Take a copy of the state and start to write it. An unfinished checkpoint before it is finished first.

        `images`: images of each task in a step, over all ranks.
        """
        began = time.monotonic()
        self.settle()
        final = checkpoint.folder_of(self.run, progress.step)
        pieces = state.pieces()
        index = json.dumps([(f"{i}", p.name, p.kind, p.start, p.tensor.numel()) for i, p in enumerate(pieces)])
        tensors = {f"{i}": piece.tensor for i, piece in enumerate(pieces)}
        shared = checkpoint.shared_tensors(progress.usage, state.buffers()) if self.ranks.first else {}
        mine, common = self._copy("rank", tensors), self._copy("shared", shared)
        self._final = final
        self._content = {
            "step": progress.step,
            "optimizer_step": state.optimizer_step(),
            "shapes": {n: list(s) for n, s in state.shapes().items()},
            "layers": len(progress.usage),
            "chosen": progress.chosen,
            "origin": progress.origin,
            "world": self.ranks.world,
            "images": dict(images),
            "recipe": self.recipe,
        }
        self._writing = _Work(lambda: self._write(checkpoint.partial_of(final), mine, common, index))
        self.pauses.append(time.monotonic() - began)

    def follow(self, others_write: bool) -> None:
        """Once no rank writes any more, let rank 0 give the checkpoint its name. `others_write` is the same on every rank."""
        if self._writing is not None and not others_write:
            began = time.monotonic()
            self._collect()
            self.pauses[-1] += time.monotonic() - began

    def settle(self) -> Path | None:
        """Wait until the checkpoint at work is complete; returns it, or None if there is none or it could not be written."""
        if self._final is None:
            return None
        if self._writing is not None:
            self._collect()
        failure = ""
        if self._publishing is not None:
            self._publishing.join()
            failure, self._publishing = self._publishing.part.failure, None
        final, self._final = self._final, None
        return None if self._failed(final, [broadcast_json(failure)]) else final

    def summary(self) -> str:
        """One line for people."""
        if not self.pauses:
            return "no checkpoint written"
        middle, most = median(self.pauses), max(self.pauses)
        count = f"{len(self.pauses)} checkpoint" + "s" * (len(self.pauses) > 1)
        return f"{count}: training paused {middle:.3f} s for each (median), at most {most:.3f} s"

    def _copy(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the host's memory, page-locked where they come from a GPU."""
        copies = {}
        for name, tensor in tensors.items():
            key = f"{kind}.{name}"
            old = self._host.get(key)
            if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
                self._host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = self._host[key].copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _write(
        self, folder: Path, mine: dict[str, Tensor], common: dict[str, Tensor], index: str
    ) -> tuple[Written, ...]:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.ranks.rank:05d}.safetensors"
        files = [checkpoint.write_tensors(folder / name, mine, {"pieces": index})]
        if self.ranks.first:
            files.append(checkpoint.write_tensors(folder / checkpoint.SHARED, common))
        return tuple(files)

    def _collect(self) -> None:
        """Learn what became of all parts; rank 0 goes on with the folder, or drops it."""
        assert self._writing is not None and self._final is not None
        self._writing.join()
        parts = [Part(tuple(Written(*file) for file in files), failure) for files, failure in gather_json(self._writing.part)]
        self._writing = None
        if self._failed(self._final, [f"rank {rank}: {part.failure}" if part.failure else "" for rank, part in enumerate(parts)]):
            self._final = None
        elif self.ranks.first:
            files = [file for part in parts for file in part.files]
            final, content = self._final, self._content

            def publish() -> tuple[Written, ...]:
                checkpoint.publish(final, content, files, self.keep)
                return ()

            self._publishing = _Work(publish)

    def _failed(self, final: Path, failures: list[str]) -> bool:
        """Whether there is a failure in a list that is the same on every rank; rank 0 tells it and clears up.

        Training goes on: room may be made before the next checkpoint, while what is in memory now would be lost.
        """
        told = [failure for failure in failures if failure]
        if told and self.ranks.first:
            shutil.rmtree(checkpoint.partial_of(final), ignore_errors=True)
            good = checkpoint.complete_checkpoints(self.run)
            last = f"the last good one is {good[-1]}" if good else "there is no other one yet"
            say(f"checkpoint {final} could not be written ({'; '.join(told)}); {last}; going on")
        return bool(told)
