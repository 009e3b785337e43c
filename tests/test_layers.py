"""The house rules that a program can check: which module may import which, docstrings, lengths, annotations."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "modsquad_ds"

# Low to high: a module imports from its own rung and those before it. `data.*` is every module of the package that is
# not named by itself; packages of one rung do not import each other. A new module gets its place here.
RUNGS = (
    ("errors", "location", "targets", "tasks", "files", "signals"),
    ("model_spec", "adapt_spec", "recipe_tree"),
    ("config",),
    ("losses", "mmseg_compat", "draw", "draw_maps", "delta", "data.types"),
    ("metrics.*",),
    ("data.*", "model.*"),
    ("structure",),
    ("objective", "model_file", "placement", "trainable", "upcycle", "weights_file", "init_from", "start"),
    ("selection", "surgery"),
    ("parallel.*",),
    ("checkpoint", "saving", "plan", "runlog", "costs", "trainer", "resume", "stage"),
    ("hardware", "projection", "memory_trace", "memory", "topologies", "step_work", "feasibility", "plan_table"),
    ("train", "evaluate", "answers", "predict", "tables", "report", "usage", "sweep", "extract", "expand", "adapt"),
    ("bench.*",),
    ("cli", "cli_bench", "cli_modular", "cli_plan", "__main__"),
)
# Who alone may import what.
OWNERS = {
    "deepspeed": "parallel",
    "torch.distributed": "parallel",
    "webdataset": "data",
    "mmseg": "mmseg_compat",
    "mmcv": "mmseg_compat",
    "mmengine": "mmseg_compat",
}
MAX_FUNCTION, MAX_FILE = 60, 400


def name_of(path: Path) -> str:
    """Module's name inside the package: `data.types`, `parallel` for its __init__, `` for the package's own."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
PYTHON_FILES = [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]


def opens_lower_rung(module: str) -> bool:
    """Whether the package `module` has a module on a lower rung than its own.

    Importing data.types runs data/__init__ first, so what that imports would be imported by the lower rung too.
    """
    own = rung(module)
    return own is not None and any(
        name.startswith(f"{module}.") and (rung(name) or 0) < own for name in MODULES if module in PACKAGES
    )


def rung(module: str) -> int | None:
    """Index in RUNGS; its own name goes before its package's star."""
    for wanted in (module, f"{module.split('.')[0]}.*"):
        for index, names in enumerate(RUNGS):
            if wanted in names:
                return index
    return None


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that the source imports or reaches as an attribute of torch."""
    package = [PACKAGE, *module.split(".")] if module in PACKAGES else [PACKAGE, *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [part for part in package if part][: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield node.lineno, f"torch.{node.attr}"


def own_module(name: str) -> str | None:
    """`modsquad_ds.data.types.Batch` -> `data.types`; None for what is not the project's."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    while ".".join(parts[1:]) not in MODULES:
        parts.pop()
    return ".".join(parts[1:])


def import_faults(source: str, module: str) -> list[str]:
    """Imports that point upwards, sideways into another package, at what another room owns, or at a private name."""
    faults = []
    own, room = rung(module), module.split(".")[0]
    for line, name in imports(source, module):
        for library, owner in OWNERS.items():
            if f"{name}.".startswith(f"{library}.") and room != owner:
                faults.append(f"{module}:{line} imports {name}: only {owner} may")
        target = own_module(name)
        if not target or target == module:
            continue
        if name.split(".")[-1].startswith("_"):
            faults.append(f"{module}:{line} imports {name}, which is private to its module")
        other, other_room = rung(target), target.split(".")[0]
        if own is None or other is None:
            faults.append(f"{module}:{line}: {module if own is None else target} has no rung in tests/test_layers.py")
        elif opens_lower_rung(module):
            faults.append(f"{module}:{line}: __init__ runs before modules of a lower rung, so it imports none of ours")
        elif other > own:
            faults.append(f"{module}:{line} imports upwards: {target}")
        elif other == own and room != other_room and "." in module + target:
            faults.append(f"{module}:{line} imports sideways: {target}")
    return faults


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions, methods and inner functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def docstring_faults(source: str, name: str) -> list[str]:
    """A module without a docstring."""
    return [] if ast.get_docstring(ast.parse(source)) else [f"{name} opens without a docstring"]


def length_faults(source: str, name: str) -> list[str]:
    """Functions and files that are too long."""
    lines = len(source.splitlines())
    faults = [f"{name}: {lines} lines, at most {MAX_FILE}"] if lines > MAX_FILE else []
    for node in functions(source):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION:
            faults.append(f"{name}:{node.lineno} {node.name}: {length} lines, at most {MAX_FUNCTION}")
    return faults


def annotation_faults(source: str, name: str) -> list[str]:
    """Arguments and results without a type."""
    faults = []
    for node in functions(source):
        given = node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        bare = [argument.arg for argument in every if not argument.annotation and argument.arg not in ("self", "cls")]
        faults += [f"{name}:{node.lineno} {node.name}: no type for {', '.join(bare)}"] if bare else []
        faults += [] if node.returns else [f"{name}:{node.lineno} {node.name}: no type for the result"]
    return faults


# Folders of one person's or one machine's, at the start of a path.
MACHINE_PATH = re.compile(r"(?<![\w.$}/~-])/(work|home|root|Users)/\w")


def path_faults(source: str, name: str) -> list[str]:
    """Absolute paths of one machine."""
    lines = enumerate(source.splitlines(), 1)
    return [f"{name}:{number} {line.strip()}" for number, line in lines if MACHINE_PATH.search(line)]


def find_rings(graph: dict[str, set[str]]) -> list[str]:
    """Import rings, one per module that closes one."""
    rings: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            rings.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return rings


def text_files() -> Iterator[Path]:
    """Every file of the project that is text, or is about to become one of it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in path.read_bytes():
            yield path


def test_imports_point_down() -> None:
    faults = [fault for module, path in MODULES.items() for fault in import_faults(path.read_text(), module)]
    assert not faults, "\n".join(faults)


def test_there_is_no_import_ring() -> None:
    graph = {
        module: {target for _, name in imports(path.read_text(), module) if (target := own_module(name))} - {module}
        for module, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 0
    assert not find_rings(graph)


@pytest.mark.parametrize("check", [docstring_faults, length_faults, annotation_faults], ids=lambda rule: rule.__name__)
def test_python_files_keep(check: Callable[[str, str], list[str]]) -> None:
    faults = [fault for path in PYTHON_FILES for fault in check(path.read_text(), str(path.relative_to(ROOT)))]
    assert not faults, "\n".join(faults)


def test_no_file_names_a_path_of_one_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = list(text_files())
    assert len(files) > len(MODULES)
    faults = [fault for path in files for fault in path_faults(path.read_text(), str(path.relative_to(ROOT)))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("losses", "from modsquad_ds.train import train", "losses:1 imports upwards: train"),
        ("losses", "def f():\n    import modsquad_ds.train", "losses:2 imports upwards: train"),
        ("data.decode", "from ..model import vit", "data.decode:1 imports sideways: model.vit"),
        ("data.types", "from . import decode", "data.types:1 imports upwards: data.decode"),
        ("data", "from modsquad_ds.errors import UserError", "data:1: __init__ runs before"),
        ("metrics", "import deepspeed.comm", "metrics:1 imports deepspeed.comm: only parallel may"),
        ("train", "import torch\ntorch.distributed.barrier()", "train:2 imports torch.distributed: only parallel may"),
        ("train", "from torch import distributed", "train:1 imports torch.distributed: only parallel may"),
        ("model.vit", "from webdataset import WebDataset", "model.vit:1 imports webdataset.WebDataset: only data may"),
        ("data.taskonomy", "from .sources import _files", "data.taskonomy:1 imports modsquad_ds.data.sources._files, which is"),
        ("newcomer", "from modsquad_ds import errors", "newcomer:1: newcomer has no rung"),
    ],
)
def test_wrong_import_is_found(module: str, source: str, fault: str) -> None:
    assert [found.startswith(fault) for found in import_faults(source, module)] == [True], import_faults(source, module)


def test_right_imports_pass() -> None:
    source = "import torch\nfrom modsquad_ds.errors import UserError\nfrom . import types\nfrom .types import Batch\n"
    assert import_faults(source, "data.decode") == []
    assert import_faults("import torch.distributed as dist\nimport deepspeed", "parallel.launch") == []


def test_rings_are_found() -> None:
    assert find_rings({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b -> c -> b"]
    assert find_rings({"a": {"b", "c"}, "b": {"c"}}) == []


def test_other_faults_are_found() -> None:
    long = "def f() -> None:\n" + "    f()\n" * MAX_FUNCTION
    assert docstring_faults("x = 1", "m") == ["m opens without a docstring"]
    assert length_faults(long, "m") == [f"m:1 f: {MAX_FUNCTION + 1} lines, at most {MAX_FUNCTION}"]
    assert length_faults("\n" * (MAX_FILE + 1), "m") == [f"m: {MAX_FILE + 1} lines, at most {MAX_FILE}"]
    bare = "class A:\n    def f(self, x, *y: int, **z): ..."
    assert annotation_faults(bare, "m") == ["m:2 f: no type for x, z", "m:2 f: no type for the result"]
    assert path_faults("see '/" + "home/me/data' or $HOME/work/x or https://a.b/home/c", "m") != []
    assert path_faults("see $HOME/work/x, ~/work/x or https://a.b/home/c", "m") == []
