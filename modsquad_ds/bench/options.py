"""What the bench commands' options have in common: read and refused here, before anything is measured. Called by cli_bench.py."""

from pathlib import Path

from modsquad_ds.errors import UserError
from modsquad_ds.files import make_folder


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4), ascending, each once. Raises UserError that names the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text!r}: expected whole numbers above 0, separated by commas")
    return tuple(sorted({int(part) for part in parts}))


def check_json(path: Path | None) -> None:
    """Refuse a file that could not be written. Raises UserError."""
    if path is not None:
        make_folder(path.parent, "--json")
        if path.is_dir():
            raise UserError(f"--json {path}: is a folder; give a file's name")
