"""Weights that others wrote: a state dict out of a safetensors file or a torch file, without unpickling. Read by init_from.py."""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modsquad_ds.errors import UserError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training checkpoints keep a state dict, in timm's order: averaged weights first."""


GIVE = "give a run folder, or a .safetensors or .pth file"


class WeightsFile(NamedTuple):
    """A file's tensors."""

    tensors: dict[str, Tensor]
    entry: str
    """The wrapper that held them, or empty."""


def is_model_file(path: Path) -> bool:
    """Whether a file is a safetensors file that holds a recipe. Raises UserError where it cannot be read."""
    if not _is_safetensors(path):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "recipe" in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"init_from {path}: not a readable safetensors file ({_line(error)}); copy it again") from None


def read_weights(path: Path) -> WeightsFile:
    """A state dict: safetensors, or a torch file with tensors alone, maybe under one of WRAPPERS; `module.` prefixes are cut.

    Raises UserError where the file is damaged, holds something else, or would run code to be read.
    """
    if _is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"init_from {path}: not a readable safetensors file ({_line(error)}); copy it again") from None
        return WeightsFile(_unprefixed(tensors), "")
    content, entry = _load(path), ""
    if isinstance(content, dict):
        entry = next((name for name in WRAPPERS if isinstance(content.get(name), dict)), "")
        content = content[entry] if entry else content
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"init_from {path}: holds no state dict, on top or under {', '.join(WRAPPERS)}; save one alone")
    return WeightsFile(_unprefixed({str(name): tensor for name, tensor in content.items()}), entry)


def _is_safetensors(path: Path) -> bool:
    """By content: safetensors opens with the length of its JSON header, torch's files with a zip's or a pickle's mark."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"init_from {path}: cannot be read ({error.strerror}); {GIVE}") from None
    if start[8:9] == b"{":
        return True
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return False
    raise UserError(f"init_from {path}: neither a safetensors file nor one of torch.save; {GIVE}")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"init_from {path}: damaged, or holds more than tensors and plain values, which only running code out of the file "
            "could read; where you trust it, save its state dict alone: torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:  # on damaged bytes torch's reader fails in any way: assertions, missing attributes, bad indices
        raise UserError(f"init_from {path}: not a readable torch file ({_line(error)}); copy it again") from None


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the `module.` that DistributedDataParallel puts before all of them."""
    if not all(name.startswith("module.") for name in tensors):
        return tensors
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
