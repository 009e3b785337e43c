"""Where data lie: a folder, or a URL below which files are fetched one by one. What `data_root:` and `data:` of a recipe may be.

    /shards, data/shards           a folder
    https://host/shards            files are fetched with curl
    s3://bucket/shards             files are fetched with the AWS command line (aws)
    pipe:ssh host cat /shards/{}   a shell command that writes a file to its output; {} is the file's path
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import PlainSerializer, PlainValidator

from modsquad_ds.errors import UserError

PIPE = "pipe:"
HOLE = "{}"
"""Stands for a file's path in a `pipe:` command."""
_WEB = ("http://", "https://", "s3://")
# Nothing that a shell, a URL or a folder's path gives a meaning to, and no dot or dash in front.
_NAME = re.compile(r"[A-Za-z0-9_@+=][A-Za-z0-9_@+=.-]*")


@dataclass(frozen=True)
class Url:
    """A place of many files that is no folder of this machine. `/` goes down as with `Path`, and `str` is what a recipe says."""

    text: str

    @property
    def is_command(self) -> bool:
        """Whether it is a shell command (`pipe:`)."""
        return self.text.startswith(PIPE)

    def file(self, name: str) -> str:
        """What is opened to read the file `name` in it. UserError for a name that is not plain."""
        return self._with(name, name)

    def __truediv__(self, below: "str | Path | Url") -> "Path | Url":
        """A relative path leads down; an absolute one, or a URL, takes the place of this one. UserError for other names."""
        if isinstance(below, Url) or Path(below).is_absolute():
            return below if isinstance(below, Url) else Path(below)
        path = Path(below).as_posix()
        if path == ".":
            return self
        return Url(self._with(path, f"{path}/{HOLE}"))

    def __rtruediv__(self, above: Path) -> "Url":
        """As an absolute path, a URL does not depend on what is above."""
        return self

    def __str__(self) -> str:
        return self.text

    def _with(self, path: str, filled: str) -> str:
        for name in path.split("/"):
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"{self}: {path!r} cannot be fetched from there: names below a URL are made of letters, digits and _ @ + = . "
                    "- with neither dot nor dash in front; rename it, or give the task's data a URL of its own"
                )
        return self.text.replace(HOLE, filled) if self.is_command else f"{self.text}/{path}"


Location = Path | Url


def location(value: Any) -> Location:
    """The folder or URL that a recipe or a command line says. ValueError for a URL that could not be fetched from."""
    if isinstance(value, Path | Url):
        return value
    if not isinstance(value, str):
        raise ValueError("expected a folder or a URL")
    if value.startswith(PIPE):
        if HOLE not in value:
            raise ValueError(f"{HOLE} is missing: where the command takes the file's path, e.g. pipe:cat /shards/{HOLE}")
        return Url(value)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        return Path(value)
    if not value.startswith(_WEB):
        raise ValueError(f"expected a folder, http://, https://, s3://, or a command such as pipe:gsutil cat gs://bucket/{HOLE}")
    parts = urlsplit(value)
    if not parts.netloc or parts.query or parts.fragment or re.search(r"[\s\x00-\x1f]", value):
        example = f"pipe:curl -fsS 'URL/{HOLE}?key=...'"
        raise ValueError(f"expected a host and a path alone; others are fetched by a command, e.g. {example}")
    if "@" in parts.netloc:
        raise ValueError("a name or password would be saved with the run; put it into ~/.netrc, which curl reads")
    return Url(value.rstrip("/"))


def data_option(text: str | None) -> Location | None:
    """`location` of a command line's --data. UserError where it fails."""
    try:
        return None if text is None else location(text)
    except ValueError as error:
        raise UserError(f"--data {text}: {error}") from None


DataPlace = Annotated[Location, PlainValidator(location), PlainSerializer(str)]
"""A field of a recipe that holds a `Location`."""
