"""What a run starts from: the recipe's network with its first weights, and what is known of them. Used by train.py."""

from typing import NamedTuple

from torch import Tensor

from modsquad_ds.config import Recipe
from modsquad_ds.files import sha256_of
from modsquad_ds.init_from import initial_state, report, start_file
from modsquad_ds.model.network import MultiTaskNetwork, build_network
from modsquad_ds.objective import Usage


class Start(NamedTuple):
    """A network at step 0."""

    network: MultiTaskNetwork
    whole: dict[str, Tensor]
    """Its state dict, in the precision of the file that it came from: the network itself may be spread, frozen and cast later."""
    usage: tuple[Usage, ...]
    """Per sparse layer; empty where nothing is known."""
    classes: dict[str, list[str]]
    """Class names of the tasks that the file knows."""
    origin: str = ""
    """Checksum of the file; empty without one."""


def start_of(recipe: Recipe, read_file: bool = True, show: bool = False) -> Start:
    """The recipe's start, the same on every rank: random weights, or those of `init_from`, of which `show` tells.

    With `read_file` off the file is left alone, for runs all of whose weights come from a checkpoint.
    """
    network = build_network(recipe)
    if recipe.init_from is None or not read_file:
        return Start(network, network.state_dict(), (), {})
    started = initial_state(recipe, network)
    network.load_state_dict(started.state)
    if show:
        print(report(started), flush=True)
    return Start(network, started.state, started.usage, started.classes, sha256_of(start_file(recipe)))
