"""What an installation promises: the wheel's contents, the command, the pinned environment, the documents."""

import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import modsquad_ds

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "tools/constraints-py311.txt"


def setup_cfg() -> configparser.ConfigParser:
    """The project's metadata."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements() -> list[Requirement]:
    """Everything that setup.cfg asks for, extras included."""
    parser = setup_cfg()
    groups = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    return [Requirement(line) for group in groups for line in group.splitlines() if line]


def pinned() -> dict[str, Version]:
    """Package -> version in the constraints file; every line of it must pin one version."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    parts = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line) for line in lines]
    assert all(parts), [line for line, part in zip(lines, parts, strict=True) if not part]
    return {canonicalize_name(part[1]): Version(part[2]) for part in parts if part}


def closure(roots: list[Requirement]) -> set[str]:
    """Names of all installed packages that the requirements pull in on this machine."""
    seen: set[str] = set()
    todo = [(requirement, extra) for requirement in roots for extra in ("", *requirement.extras)]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in seen:
            seen.add(name)
            needed = [Requirement(text) for text in importlib.metadata.distribution(name).requires or []]
            todo += [(child, own) for child in needed for own in ("", *requirement.extras)]
    return seen


def test_pins_satisfy_what_the_project_asks_for() -> None:
    pins = pinned()
    unmet = [str(wanted) for wanted in requirements() if pins[canonicalize_name(wanted.name)] not in wanted.specifier]
    assert not unmet


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the constraints are those of Python 3.11")
def test_every_package_that_gets_installed_is_pinned() -> None:
    missing = closure(requirements()) - pinned().keys()
    assert not missing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("project") / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "data", "*.egg-info", ".*_cache", "wandb")
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("modsquad_ds", "ds_configs", "tests"):
        # `data` is ignored at the top level only: modsquad_ds/data is code.
        pattern = ignored if name != "modsquad_ds" else shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=pattern)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=copy, check=True, timeout=120)
    (built,) = (copy / "out").iterdir()
    return zipfile.ZipFile(built)


def test_wheel_holds_the_code_the_recipes_and_the_deepspeed_configs(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    package = ROOT / "modsquad_ds"
    expected = {
        str(path.relative_to(ROOT))
        for pattern in ("**/*.py", "recipes/*.yaml", "ds_configs/*.json", "tables_published/*.json")
        for path in package.glob(pattern)
    }
    assert "modsquad_ds/ds_configs/zero2.json" in expected
    assert {"modsquad_ds/recipes/quickstart.yaml", "modsquad_ds/data/types.py"} <= expected
    assert expected <= names
    assert {name.split("/")[0] for name in names - expected} == {f"modsquad_ds-{modsquad_ds.__version__}.dist-info"}


def test_wheel_brings_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    info = f"modsquad_ds-{modsquad_ds.__version__}.dist-info"
    assert "modsquad-ds = modsquad_ds.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in wheel.namelist())
    assert re.search(r"^License(-Expression)?: Apache-2.0$", wheel.read(f"{info}/METADATA").decode(), re.MULTILINE)


def test_version_is_one_that_can_be_released_and_has_its_place_in_the_changelog() -> None:
    assert str(Version(modsquad_ds.__version__)) == modsquad_ds.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    versions = [Version(heading) for heading in headings[1:]]
    assert versions == sorted(versions, reverse=True)


def test_contributing_fits_a_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "CHANGELOG.md", "ds_configs/README.md", "slurm/README.md", "README.md"])
def test_files_that_a_document_names_exist(document: str) -> None:
    path = ROOT / document
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|sh|json|yaml|sbatch|env|txt|md))`", path.read_text())
    places = (ROOT, ROOT / "modsquad_ds", path.parent)
    assert named
    assert not [name for name in named if not any((place / name).exists() for place in places)]
