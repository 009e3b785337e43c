"""tools/setup.sh and tools/test.sh, run whole against stand-ins for python and the checkers: no network, no install."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Answers what setup.sh asks of an interpreter, and writes down each call.
PYTHON = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
    "-c import sys; sys.exit(sys.version_info < (3, 10))") exit "${OLD:-0}" ;;
    "-c import sys; sys.exit(sys.version_info[:2] != (3, 11))") exit "${NOT_311:-0}" ;;
    "--version") echo "Python 3.13.0" ;;
    "-m venv "*) mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
    *"install"*"--editable"*) sleep "${SLOW:-0}"; exit "${BROKEN:-0}" ;;
esac
"""


class Clone:
    """A copy of what setup reads, in a folder with a space, with only stand-ins and the base system on PATH."""

    def __init__(self, folder: Path) -> None:
        self.root, self.calls = folder / "a clone", folder / "calls"
        (self.root / "tools").mkdir(parents=True)
        for name in ("setup.cfg", "pyproject.toml", *(f"tools/{path.name}" for path in (ROOT / "tools").iterdir())):
            shutil.copy(ROOT / name, self.root / name)
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.program("python3.11", PYTHON)
        self.calls.touch()

    def program(self, name: str, text: str) -> None:
        """Put a stand-in on PATH."""
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def run(
        self, script: str = "tools/setup.sh", *arguments: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of the clone from another folder."""
        environment = {"PATH": f"{self.programs}:/usr/bin:/bin", "CALLS": str(self.calls), **variables}
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            cwd=self.programs,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def installs(self) -> int:
        """Times that the project was installed."""
        return self.calls.read_text().count("--editable .[quickstart,test]")

    @property
    def venv(self) -> Path:
        return self.root / ".venv"


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_first_run_installs_and_the_second_does_nothing(clone: Clone) -> None:
    first = clone.run()
    assert first.returncode == 0, first.stderr
    assert "some minutes" in first.stdout
    assert clone.installs() == 1
    assert f"--constraint {clone.root}/tools/constraints-py311.txt" in clone.calls.read_text()
    before = clone.calls.read_text()
    second = clone.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert clone.calls.read_text() == before


def test_failed_installation_says_so_and_is_redone_from_nothing(clone: Clone) -> None:
    failed = clone.run(BROKEN="1")
    assert failed.returncode == 1
    assert "the installation failed" in failed.stderr
    (clone.venv / "left over").touch()
    assert clone.run().returncode == 0
    assert not (clone.venv / "left over").exists()
    assert clone.installs() == 2


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml", "tools/constraints-py311.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(clone: Clone, name: str) -> None:
    clone.run()
    (clone.venv / "mine").touch()
    with (clone.root / name).open("a") as file:
        file.write("# changed\n")
    assert "up to date" in clone.run().stdout
    assert clone.installs() == 2
    assert (clone.venv / "mine").exists()


def test_moved_clone_makes_its_environment_anew(clone: Clone) -> None:
    clone.run()
    clone.root = clone.root.rename(clone.root.with_name("elsewhere"))
    assert clone.run().returncode == 0
    assert clone.installs() == 2
    assert (clone.venv / "modsquad_made_here").read_text() == str(clone.venv)


def test_environment_made_by_somebody_else_is_used_but_never_emptied(clone: Clone, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", "mine"):
        (other / name).touch()
    shutil.copy(clone.programs / "python3.11", other / "bin/python")
    assert clone.run(MODSQUAD_VENV=str(other), BROKEN="1").returncode == 1
    assert clone.run(MODSQUAD_VENV=str(other)).returncode == 0
    assert (other / "mine").exists()
    assert "-m venv" not in clone.calls.read_text()
    assert not clone.venv.exists()


def test_folder_that_is_no_environment_is_refused(clone: Clone, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter").touch()
    refused = clone.run(MODSQUAD_VENV=str(home))
    assert refused.returncode == 1
    assert f"{home} holds something else" in refused.stderr
    assert [path.name for path in home.iterdir()] == ["letter"]


def test_other_python_goes_without_constraints_and_says_so(clone: Clone) -> None:
    clone.program("python3", PYTHON)
    # As a version manager's placeholder: there, but refusing to run.
    clone.program("python3.11", "#!/bin/sh\nexit 127\n")
    result = clone.run(NOT_311="1")
    assert result.returncode == 0
    assert "Python 3.13.0 instead of 3.11: taking the newest packages, not the tested set" in result.stdout
    assert "--constraint" not in clone.calls.read_text()


def test_old_python_is_refused(clone: Clone) -> None:
    clone.program("python3", PYTHON)
    refused = clone.run(OLD="1")
    assert refused.returncode == 1
    assert "install Python 3.11" in refused.stderr


def test_two_at_once_install_once(clone: Clone) -> None:
    results = []
    threads = [threading.Thread(target=lambda: results.append(clone.run(SLOW="1"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.returncode for result in results] == [0, 0]
    assert clone.installs() == 1
    assert sum("waiting for another set-up" in result.stdout for result in results) == 1


CHECKER = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
exit "${%s:-0}"
"""


@pytest.mark.parametrize(
    ("failures", "code"),
    [({}, 0), ({"RUFF": "3"}, 3), ({"MYPY": "4"}, 4), ({"RUFF": "3", "MYPY": "4"}, 3), ({"PYTEST": "5"}, 5)],
)
def test_all_checks_run_and_the_first_failure_counts(clone: Clone, failures: dict[str, str], code: int) -> None:
    for name in ("ruff", "mypy"):
        clone.program(name, CHECKER % name.upper())
    clone.program("python3.11", PYTHON.replace("esac", '    "-m pytest"*) exit "${PYTEST:-0}" ;;\nesac'))
    result = clone.run("tools/test.sh", "-k", "order and not slow", **failures)
    assert result.returncode == code, result.stderr
    calls = clone.calls.read_text()
    assert "ruff check ." in calls
    assert "mypy \n" in calls
    assert "python -m pytest -k order and not slow" in calls
    assert ("all checks passed" in result.stdout) == (code == 0)


SCRIPTS = [*ROOT.glob("tools/*.sh"), *ROOT.glob("slurm/*.sbatch"), *ROOT.glob("slurm/*.env"), ROOT / ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_continuous_integration_runs_the_tests() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "tools/test.sh" in (ROOT / ".ci/run").read_text()
