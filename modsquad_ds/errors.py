"""Errors that are the user's to mend: raised anywhere below cli.py, printed there as one line, exit code 2."""


class UserError(Exception):
    """Bad input: the message says what is wrong, where (file, key, field), what was expected and the way out."""
