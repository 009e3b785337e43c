"""The model file: safetensors with one key per tensor and expert, and the recipe as JSON. What training leaves behind.

Loads without DeepSpeed, without a process group and without unpickling. Keys are the network's parameter names, with each
stacked expert parameter `...experts.NAME` cut into `...experts.I.NAME`; usage statistics lie beside them as `usage.L.prob` and
`usage.L.share`, L counting the sparse layers. A checksum in the metadata covers all of it.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from modsquad_ds.config import Recipe, recipe_from_tree, recipe_to_tree
from modsquad_ds.errors import UserError
from modsquad_ds.files import write_atomic
from modsquad_ds.location import Location, Url
from modsquad_ds.model.experts import ExpertBank
from modsquad_ds.model.network import MultiTaskNetwork, build_network
from modsquad_ds.objective import Usage
from modsquad_ds.tasks import section_of

FORMAT = "2"


class ModelFile(NamedTuple):
    """All that a model file holds."""

    recipe: Recipe
    state: dict[str, Tensor]
    """The network's state dict, experts stacked."""
    classes: dict[str, list[str]]
    """Class names of each task."""
    usage: tuple[Usage, ...]
    """Per sparse layer; empty for a model that was not trained."""


def recipe_on(model: ModelFile, data: Location | None) -> Recipe:
    """The model's recipe, its tasks' data below `data`, if given, and the cache of what comes by URL in its default folder.

    A model file may come from another machine and from anybody. UserError where its recipe would read data by a command of its
    own (`pipe:`), unless MODSQUAD_TRUST_COMMANDS=1 is in the environment; a command that is given as `data` is the user's.
    """
    recipe = model.recipe.model_copy(update={"cache": model.recipe.cache.model_copy(update={"folder": None})})
    if data is not None:
        recipe = recipe.model_copy(update={"data_root": data})
    for name, spec in recipe.active.items():
        place = recipe.data_root / spec.data
        own = data is None or isinstance(spec.data, Url)
        if own and isinstance(place, Url) and place.is_command and os.environ.get("MODSQUAD_TRUST_COMMANDS") != "1":
            raise UserError(
                f"{section_of(name, spec)}.data: the model file names a command that would read the data: {place}; say where the "
                "data lie (--data), or set MODSQUAD_TRUST_COMMANDS=1 if you trust the file"
            )
    return recipe


def write_model(path: Path, model: ModelFile) -> None:
    """Write atomically."""
    tensors = cut_experts(model.state, expert_parameters(model.recipe))
    for i, layer in enumerate(model.usage):
        tensors[f"usage.{i}.prob"], tensors[f"usage.{i}.share"] = layer.prob_TE.cpu(), layer.share_TE.cpu()
    metadata = {
        "format": FORMAT,
        "recipe": json.dumps(recipe_to_tree(model.recipe)),
        "classes": json.dumps(model.classes),
        "layers": str(len(model.usage)),
    }
    metadata["checksum"] = checksum_of(tensors, metadata)
    write_atomic(path, save({k: v.contiguous() for k, v in tensors.items()}, metadata=metadata))


def read_model(path: Path) -> ModelFile:
    """Read a model file. Raises UserError where it is missing, damaged or not one of ours."""
    if not path.is_file():
        raise UserError(f"model {path}: no such file; give a run folder or a .safetensors file that `train` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"model {path}: not a readable safetensors file ({error}); copy it again") from None
    if metadata.get("format") != FORMAT or "recipe" not in metadata:
        ours = "recipe" in metadata
        whose = "written by another version; use that one, or train again" if ours else "not a model of modsquad_ds"
        raise UserError(f"model {path}: format {metadata.get('format')!r}, expected {FORMAT!r}: {whose}")
    if metadata.get("checksum") != checksum_of(tensors, metadata):
        raise UserError(f"model {path}: its content differs from its checksum: edited or damaged; copy or make it again")
    try:
        tree, classes, layers = (json.loads(metadata[key]) for key in ("recipe", "classes", "layers"))
        usage = tuple(Usage(tensors.pop(f"usage.{i}.prob"), tensors.pop(f"usage.{i}.share")) for i in range(layers))
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"model {path}: damaged, {error} is missing or not valid; copy it again") from None
    recipe = recipe_from_tree(tree, f"inside {path}")
    try:
        state = stack_experts(tensors, expert_parameters(recipe))
    except RuntimeError as error:
        raise UserError(f"model {path}: its tensors do not fit its recipe: {' '.join(str(error).split())}") from None
    return ModelFile(recipe, state, classes, usage)


def checksum_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of a model file's metadata, itself left out, and of every tensor's name, type, shape and bytes, by name."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"checksum"}):
        digest.update(json.dumps([key, metadata[key]]).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def network_of(model: ModelFile, where: str) -> MultiTaskNetwork:
    """The network with the file's weights. Raises UserError where tensors and recipe do not fit each other."""
    network = build_network(model.recipe)
    try:
        network.load_state_dict(model.state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"model {where}: its tensors do not fit its recipe: {detail}") from None
    return network


def expert_parameters(recipe: Recipe) -> dict[str, int]:
    """Name of every stacked expert parameter of the recipe's network -> number of experts. Builds it without memory."""
    with torch.device("meta"):
        network = MultiTaskNetwork(recipe)
    return stacked_parameters(network)


def stacked_parameters(network: nn.Module) -> dict[str, int]:
    """Name of every stacked expert parameter -> number of experts of its layer."""
    return {
        f"{path}.{name}": bank.num_experts
        for path, bank in network.named_modules()
        if isinstance(bank, ExpertBank)
        for name, _ in bank.named_parameters(recurse=False)
    }


def cut_experts(state: Mapping[str, Tensor], stacked: Mapping[str, int]) -> dict[str, Tensor]:
    """Every stacked tensor as one tensor per expert."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in stacked:
            for i, expert in enumerate(tensor.unbind(0)):
                out[expert_key(name, i)] = expert.clone()
        else:
            out[name] = tensor
    return out


def stack_experts(tensors: Mapping[str, Tensor], stacked: Mapping[str, int]) -> dict[str, Tensor]:
    """The inverse of `cut_experts`. Experts that are missing leave their parameter out."""
    keys: dict[str, Sequence[str]] = {n: [expert_key(n, i) for i in range(count)] for n, count in stacked.items()}
    single = {key for of_name in keys.values() for key in of_name}
    out = {name: tensor for name, tensor in tensors.items() if name not in single}
    for name, of_name in keys.items():
        if all(key in tensors for key in of_name):
            out[name] = torch.stack([tensors[key] for key in of_name])
    return out


def expert_key(name: str, i: int) -> str:
    """`blocks.1.mlp.experts.fc1_weight`, 3 -> `blocks.1.mlp.experts.3.fc1_weight`."""
    bank, _, parameter = name.rpartition(".")
    return f"{bank}.{i}.{parameter}"
