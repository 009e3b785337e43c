"""Errors that are the user's to mend: raised anywhere below cli.py, printed there as one line, exit code 2."""


class UserError(Exception):
    """Bad input: the message says what is wrong, where (file, key, field), what was expected and the way out."""


class Stopped(Exception):  # noqa: N818 - no error: a signal asked for it
    """Training ended early on request, with a checkpoint: the same command goes on. Exit code 75, sysexits' "try again"."""


STOPPED_CODE = 75
"""Exit code of `Stopped`; batch scripts put the job back into the queue on it."""
