"""A command of the program as a user would give it, in a process that need not import everything first (`ranks.rank_context`)."""

import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

from ranks import Output, rank_context


def run_command(*arguments: str, cwd: Path, timeout: float = 240.0) -> "CompletedProcess[str]":
    """What `python -m modsquad_ds ARGUMENTS` in the folder `cwd` leaves: exit code, standard output and standard error."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        task = (arguments, str(cwd), dict(os.environ), Output(out.fileno()), Output(err.fileno()))
        process = rank_context().Process(target=_command, args=task)  # type: ignore[attr-defined]
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{' '.join(arguments)}: not done after {timeout} s")
        for file in (out, err):
            file.seek(0)
        return CompletedProcess(arguments, process.exitcode or 0, out.read(), err.read())


def _command(arguments: tuple[str, ...], cwd: str, environment: dict[str, str], out: Output, err: Output) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.dup2(out.descriptor, 1)
    os.dup2(err.descriptor, 2)
    sys.argv = ["modsquad_ds", *arguments]
    from modsquad_ds.cli import main

    main()
