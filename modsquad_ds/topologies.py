"""Ways to lay a recipe on so many ranks: size of the expert-parallel groups and ZeRO stage. Read by feasibility.py.

The size of attention's groups stays the recipe's: attention experts are small, and every rank may hold them all.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from modsquad_ds.config import Recipe, recipe_from_tree, recipe_to_tree
from modsquad_ds.errors import UserError
from modsquad_ds.memory import Zero, zero_of
from modsquad_ds.model_spec import block_plans
from modsquad_ds.parallel.engine import CONFIGS, complete_config, in_bf16, read_deepspeed_config, zero_stage


class Topology(NamedTuple):
    """A way to lay the model on the ranks."""

    ep: int
    attention_ep: int
    zero: int
    config: str
    """What to set `deepspeed_config` to."""


def at_topology(recipe: Recipe, ep: int | None, zero: int | None) -> Recipe:
    """The recipe with an expert-parallel size and a ZeRO stage set. Raises UserError where the experts cannot be divided so."""
    tree = recipe_to_tree(recipe)
    if ep is not None:
        tree["parallel"]["ep_size"] = ep
    if zero is not None:
        name, config = config_at(recipe.deepspeed_config, read_deepspeed_config(recipe.deepspeed_config), zero)
        if config is not None and (name.endswith(".json") or (CONFIGS / f"{name}.json").is_file()):
            tree["deepspeed_config"] = name
        else:
            raise UserError(f"--zero {zero}: deepspeed_config {recipe.deepspeed_config} has another stage; give a config with it")
    return recipe_from_tree(tree, recipe.name)


def topologies(
    recipe: Recipe, world: int, config: Mapping[str, Any], ep: int | None, zero: int | None
) -> list[tuple[Topology, Zero]]:
    """Every size of expert-parallel group that divides ranks and experts, with every ZeRO stage that the recipe can take."""
    spec, own = recipe.parallel, zero_stage(dict(config))
    sparse = any(block.mlp for block in block_plans(recipe.model))
    sizes = [n for n in range(1, world + 1) if world % n == 0 and all(count % n == 0 for count in recipe.model.mlp.counts)]
    sizes = sizes if sparse else [1]
    attention = spec.attention_ep_size if world % spec.attention_ep_size == 0 else 1
    found = []
    for stage in sorted({own, 1, 2}):
        name, settings = config_at(recipe.deepspeed_config, config, stage)
        try:
            complete_config(dict(settings), recipe, world)
        except UserError:
            continue
        if zero in (None, stage):
            found += [(Topology(n, attention, stage, name), zero_of(settings)) for n in sizes if ep in (None, n)]
    return found


def config_at(name: str, config: Mapping[str, Any], stage: int) -> tuple[str, Mapping[str, Any]]:
    """A DeepSpeed config's name and content at another ZeRO stage: the shipped one of the same precision, or a changed copy."""
    if zero_stage(dict(config)) == stage:
        return name, config
    shipped = f"zero{stage}{'_bf16' if in_bf16(dict(config)) else ''}"
    if not name.endswith(".json") and (CONFIGS / f"{shipped}.json").is_file():
        return shipped, read_deepspeed_config(shipped)
    section = {**config.get("zero_optimization", {}), "stage": stage}
    return f"{name} with stage {stage}", {**config, "zero_optimization": section}
