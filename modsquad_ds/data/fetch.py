"""One file from a URL, whole and verified: webdataset's gopen with limits, checks and retries. Below the cache of the shards.

gopen dispatches on the URL's scheme to a program whose output is the file. Its own openers give no reason for a failure, wait
for ever on a server that stalls, let curl repeat in silence, and know no s3; so its table gets openers that start the same
programs in a process group of their own, with their errors kept. A pipe may end early without an error: sizes and checksums
are what a file is judged by.
"""

import hashlib
import os
import random
import re
import select
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from typing import IO, Any, NamedTuple

from webdataset import utils
from webdataset.gopen import Pipe, gopen, gopen_schemes

from modsquad_ds.config import CacheSpec
from modsquad_ds.errors import UserError

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second try, doubled for each further one, and their bound."""
HOPELESS_TRIES = 3
"""Tries where the server says that there is nothing to be had."""
SLOWEST = 1024
"""Bytes per second; a transfer that brings less is taken for stalled."""
LARGEST_INDEX = 1 << 28
"""Bytes of a file of unknown size."""
# Transforms draw from the generator of the random module, at the same time in another thread.
_CHANCE = random.SystemRandom()
# What curl says of 4xx, and aws of the same: all but 408 (timeout), 425 (too early) and 429 (too many requests).
_HOPELESS = re.compile(
    r"returned error: 4(?!08|25|29)\d\d|\((4(?!08|25|29)\d\d|NoSuch\w+|AccessDenied)\)|Unable to locate credentials"
)


class Wanted(NamedTuple):
    """A file and how it is recognised."""

    url: str
    size: int | None = None
    """None: at most LARGEST_INDEX."""
    sha256: str | None = None


class _TryError(Exception):
    """Why one try failed."""


def fetch(wanted: Wanted, file: IO[bytes], spec: CacheSpec) -> None:
    """Write what the URL answers to `file`, from its beginning; it ends where the content ends.

    UserError if none of `spec.tries` tries brings a file of the wanted size and checksum. OSError where `file` cannot be written.
    """
    started = time.monotonic()
    for tried in range(1, spec.tries + 1):
        file.seek(0)
        try:
            _try(wanted, file, spec.stall_seconds)
            file.truncate()
            return
        except _TryError as error:
            reason = str(error)
        if tried >= HOPELESS_TRIES and _HOPELESS.search(reason):
            break
        if tried < spec.tries:
            time.sleep(wait_before(tried))
    times = f"{tried} {'try' if tried == 1 else 'tries'} in {time.monotonic() - started:.0f} s"
    raise UserError(
        f"{wanted.url}: cannot be fetched ({times}); the last one: {reason}. See whether the source answers and start again; "
        "cache.tries and cache.stall_seconds in the recipe allow for more"
    )


def wait_before(tried: int) -> float:
    """Seconds to wait after `tried` tries: doubled each time, half of it random, so that many readers do not return at once."""
    return min(FIRST_WAIT * 2.0 ** (tried - 1), LONGEST_WAIT) * _CHANCE.uniform(0.5, 1.0)


def _try(wanted: Wanted, file: IO[bytes], stall: float) -> None:
    # In memory: no lock of tempfile's that a fork at this moment would leave held in the child.
    with open(os.memfd_create("errors"), "w+b") as errors:
        pipe = gopen(wanted.url, "rb", 0, stderr=errors, stall=stall)
        try:
            size, sha256 = _copy(pipe.stream.fileno(), file, wanted, stall)
            code = pipe.proc.wait(stall)
        except subprocess.TimeoutExpired:
            raise _TryError(f"the transfer did not end within {stall:g} s of its last byte") from None
        finally:
            _end(pipe)
        errors.seek(0)
        said = errors.read()[-2000:].decode(errors="replace").split("\n")
    if code:
        last = next((line.strip() for line in reversed(said) if line.strip()), "no reason given")
        raise _TryError(f"exit code {code}, {last}")
    if wanted.size not in (None, size):
        raise _TryError(f"it ended after {size} of {wanted.size} bytes")
    if wanted.sha256 not in (None, sha256):
        raise _TryError(
            f"its content is not what the index describes (sha256 {sha256[:12]}..., expected {str(wanted.sha256)[:12]}...): "
            "damaged on the way, or replaced since the index was read"
        )


def _copy(source: int, file: IO[bytes], wanted: Wanted, stall: float) -> tuple[int, str]:
    """Copy until the end; size and checksum. _TryError for a stall, and for more bytes than there should be."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    most = LARGEST_INDEX if wanted.size is None else wanted.size
    digest, size = hashlib.sha256(), 0
    counted, until = 0, time.monotonic() + stall
    while True:
        left = until - time.monotonic()
        if left <= 0:
            if size - counted < SLOWEST * stall:
                raise _TryError(f"stalled: {size - counted} bytes in {stall:g} s, {size} in all")
            counted, until = size, time.monotonic() + stall
        elif poll.poll(left * 1000):
            piece = os.read(source, 1 << 20)
            if not piece:
                return size, digest.hexdigest()
            size += len(piece)
            if size > most:
                raise _TryError(f"it goes on after {most} bytes, where it should end")
            digest.update(piece)
            file.write(piece)


def _end(pipe: Pipe) -> None:
    """End the transfer and whatever it started, without waiting for them."""
    if pipe.proc.returncode is None:  # not reaped yet, so the number is still its own
        with suppress(ProcessLookupError):
            os.killpg(pipe.proc.pid, signal.SIGKILL)
        pipe.proc.wait()
    pipe.stream.close()


# ---------------------------------------------------------------- openers of gopen's table


def _start(command: list[str] | str, stderr: IO[bytes]) -> Pipe:
    own = {"start_new_session": True, "stdin": subprocess.DEVNULL, "stderr": stderr}
    return Pipe(command, mode="rb", bufsize=0, shell=isinstance(command, str), **own)


def _tool(name: str, url: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise UserError(
            f"{url}: needs the program {name}, which is not on the PATH; install it, or have another one fetch: "
            "data_root='pipe:COMMAND', where {} in the command is the file's path"
        )
    return path


def _curl(url: str, mode: str, bufsize: int, stderr: IO[bytes], stall: float) -> Pipe:
    web = ["--proto", "=http,https", "--proto-redir", "=http,https", "--connect-timeout", f"{stall:g}"]
    # Its own limit ends it where nobody is left to do so.
    limits = ["--speed-limit", "1", "--speed-time", f"{2 * max(1, round(stall))}"]
    return _start([_tool("curl", url), "-fsSL", "--globoff", "--netrc-optional", *web, *limits, url], stderr)


def _aws(url: str, mode: str, bufsize: int, stderr: IO[bytes], stall: float) -> Pipe:
    return _start([_tool("aws", url), "s3", "cp", "--only-show-errors", url, "-"], stderr)


def _shell(url: str, mode: str, bufsize: int, stderr: IO[bytes], stall: float) -> Pipe:
    """The user's own command. The only text that is not the user's is a file's name, and location.py lets plain ones pass."""
    if utils.enforce_security:
        raise UserError(f"{url}: WDS_SECURE=1 forbids commands; unset it, or give a URL")
    return _start(url.removeprefix("pipe:"), stderr)


_OPENERS: dict[str, Any] = {"http": _curl, "https": _curl, "s3": _aws, "pipe": _shell}
gopen_schemes.update(_OPENERS)
