"""A recipe as a plain mapping: YAML files over their bases, then variants, then key=value. First stop; config.py checks it.

A recipe may start from another one (`base: quickstart`) and change only what differs. Its `variants:` are named sets of changes,
`variant=dense` on the command line makes one of them: baselines and sizes that differ from the recipe in few keys.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from modsquad_ds.errors import UserError

RECIPES = Path(__file__).parent / "recipes"

Tree = dict[str, Any]


def read_tree(recipe: str, overrides: Iterable[str] = ()) -> Tree:
    """A shipped recipe's name or a YAML file, with `key=value` overrides (dotted keys, YAML values); nothing is checked yet.

    `variant=NAME` or `variant=[A, B]` lays these of the recipe's `variants:` over it, in this order and before the other
    overrides. The run's name and folder then end in `-NAME`, so that variants do not meet; `name=` and `run=` go before that.
    Raises UserError for what is no recipe file, variant or override.
    """
    tree = _read(recipe, ())
    variants = tree.pop("variants", None) or {}
    changes: Tree = {}
    texts = list(overrides)
    for text in (text for text in texts if _key(text) == "variant"):
        _override(changes, text)
    tree = _with_variants(tree, variants, changes.get("variant", []), recipe)
    for text in (text for text in texts if _key(text) != "variant"):
        _override(tree, text)
    return tree


def recipe_file(recipe: str) -> Path:
    """Path of a shipped recipe's name or of a YAML file. Raises UserError where there is neither."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        shipped = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise UserError(f"recipe {recipe}: no such file {path}; give a YAML file or one of: {', '.join(shipped)}")
    return path


class UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice in one mapping is a mistake; YAML's own way drops the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, its keys checked."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(recipe: str, seen: tuple[Path, ...]) -> Tree:
    """The mapping of a recipe file, laid over that of its `base:`."""
    path = recipe_file(recipe)
    if path.resolve() in seen:
        raise UserError(f"recipe {path}: its chain of base: recipes leads back to itself; remove one base: key")
    try:
        tree = yaml.load(path.read_text(), UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read as text ({error}); give a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: expected a mapping of keys to values, found {type(tree).__name__}")
    _check_variants(tree.get("variants"), path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    # A file is named as seen from the recipe that names it, wherever the command runs.
    name = str(path.parent / str(base)) if str(base).endswith((".yaml", ".yml")) else str(base)
    return _merge(_read(name, (*seen, path.resolve())), tree)


def _check_variants(variants: Any, path: Path) -> None:
    """UserError unless `variants:` is absent or maps names to changes; null takes back a variant of the base."""
    if not isinstance(variants, Mapping | None):
        raise UserError(f"recipe {path}: variants: expected names with changes to the recipe, found {type(variants).__name__}")
    for name, changes in (variants or {}).items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)):
            raise UserError(f"recipe {path}: variants.{name}: use lower-case letters, digits and _ (it names folders)")
        if not isinstance(changes, Mapping | None):
            raise UserError(f"recipe {path}: variants.{name}: expected keys and values, found {type(changes).__name__}")


def _with_variants(tree: Tree, variants: Mapping[str, Tree | None], chosen: Any, recipe: str) -> Tree:
    """The recipe with one variant (`chosen` a name) or several (a list) laid over it, and named after them."""
    for name in chosen if isinstance(chosen, list) else [chosen]:
        changes = variants.get(str(name))
        if changes is None:
            known = ", ".join(key for key, value in variants.items() if value is not None)
            raise UserError(f"recipe {recipe}: no variant {name}; " + (f"it has {known}" if known else "it has no variants:"))
        tree = _merge(tree, changes)
        tree |= {key: f"{tree[key]}-{name}" for key in ("name", "run") if key in tree}
    return tree


def _merge(below: Tree, above: Tree) -> Tree:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _key(override: str) -> str:
    return override.partition("=")[0]


def _override(tree: Tree, text: str) -> None:
    """Apply one `dotted.key=value` to the tree in place."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r}: expected key=value, e.g. train.steps=100")
    *path, last = key.split(".")
    if path == ["init_from"] and isinstance(tree.get("init_from"), str):
        tree["init_from"] = {"path": tree["init_from"]}  # its short form
    for depth, part in enumerate(path):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {text!r}: {'.'.join(path[: depth + 1])} is a value, not a section")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override {text!r}: {value!r} is not a YAML value; quote it") from None
