"""The command line from outside: help, one-line errors with exit code 2, and no job that outlives a failed rank."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODULE = [sys.executable, "-m", "modsquad_ds"]


def run(
    *arguments: str, cwd: Path, launcher: list[str] | None = None, timeout: float = 120, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **(env or {})}
    command = [*(launcher or MODULE), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_help_names_every_command(tmp_path: Path) -> None:
    found = run("--help", cwd=tmp_path)
    assert found.returncode == 0
    for command in ("train", "evaluate", "predict", "shards", "quickstart-data", "describe", "compare", "usage", "plan"):
        assert command in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "error: recipe nothing: no such file"),
        (["train", "quickstart", "train.stps=3"], "error: recipe quickstart: train.stps: unknown key; did you mean steps?"),
        (["evaluate", "nowhere.safetensors"], "error: model nowhere.safetensors: no such file"),
        (["usage", "nowhere.safetensors"], "error: model nowhere.safetensors: no such file"),
        (["shards", "imagenet", "nowhere", "out"], "error: "),
        (["shards", "cifar", ".", "out"], "error: "),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    found = run(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    errors = [line for line in found.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0].startswith(message)
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_missing_shards_name_the_command_that_makes_them(tmp_path: Path) -> None:
    found = run("train", "quickstart", "parallel.ep_size=1", cwd=tmp_path)
    assert found.returncode == 2
    assert "data/quickstart/shards/digits/train" in found.stderr and "modsquad" in found.stderr


def test_describe_prints_parameters(tmp_path: Path) -> None:
    found = run("describe", "heterogeneous", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "249,482,056" in found.stdout.replace(" ", "") or "249.5" in found.stdout


@pytest.mark.dist
def test_launcher_argument_is_accepted_and_a_failing_rank_ends_the_job(tmp_path: Path) -> None:
    """The 64 images of a step cannot be cut for three ranks: all refuse, and the launcher hands on that the job failed."""
    began = time.monotonic()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "--standalone", "-m", "modsquad_ds"]
    (tmp_path / "data").mkdir()
    found = run("--local_rank=0", "train", "quickstart", cwd=tmp_path, launcher=launcher)
    assert found.returncode != 0
    assert "64 images cannot be divided over 3 ranks" in found.stderr and time.monotonic() - began < 100


ASKED_TO_STOP = """
import atexit, os, signal
from modsquad_ds import cli
from modsquad_ds.errors import Stopped

def app():
    # When the interpreter ends, with a moment in which a batch system may be impatient.
    atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGUSR1)])
    raise Stopped("asked to stop after step 3 of 9")

cli.app = app
cli.main()
"""


def test_a_run_that_was_asked_twice_to_stop_has_the_same_exit_code(tmp_path: Path) -> None:
    found = run("-c", ASKED_TO_STOP, cwd=tmp_path, launcher=[sys.executable])
    assert (found.returncode, found.stdout) == (75, "asked to stop after step 3 of 9\n"), found.stderr


ENDS_ON_ONE_RANK = """
import os, sys
from modsquad_ds import cli
from modsquad_ds.parallel import watchdog

@cli.app.command()
def fail(how: str) -> None:
    if how == "end of data":
        raise EOFError("Ran out of input")
    if how == "interrupt":
        raise KeyboardInterrupt
    raise BrokenPipeError(32, "nobody reads")

watchdog.suspect = lambda: None
watchdog.leave = lambda code: print("told the others", code, flush=True)
cli.main()
"""


@pytest.mark.parametrize(("how", "code"), [("end of data", 1), ("interrupt", 130), ("broken pipe", 1)])
def test_what_the_command_line_library_ends_itself_ends_the_other_ranks_too(tmp_path: Path, how: str, code: int) -> None:
    """It takes some errors for a user's wish, and would end this rank with code and word of its own."""
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    found = run("-c", ENDS_ON_ONE_RANK, "fail", how, cwd=tmp_path, launcher=[sys.executable], env=ranks)
    assert (found.returncode, found.stdout) == (code, f"told the others {code}\n"), found.stderr
    assert ("EOFError: Ran out of input" in found.stderr) == (how == "end of data")
    assert "Aborted" not in found.stderr
