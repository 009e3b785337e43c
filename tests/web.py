"""A web server on this machine that serves a folder and fails when told to: stalls, drops, corrupts. For shards by URL."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from modsquad_ds.config import CacheSpec

Fault = int | str
"""An HTTP status, or one of: stall, trickle, drop, short, long, corrupt, slow."""


class Web(ThreadingHTTPServer):
    """Faults of a file are used up, one by one, by its requests; `always` ones are not."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.closing = threading.Event()
        self.lock = threading.Lock()

    def fault_of(self, name: str) -> Fault | None:
        with self.lock:
            self.requests[name] += 1
            return self.faults[name].pop(0) if self.faults[name] else self.always.get(name)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        fault, path = self.server.fault_of(name), self.server.folder / name
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        data = path.read_bytes()
        self.send_response(200)
        if fault not in ("short", "long"):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        half = len(data) // 2
        if fault == "corrupt":
            data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        elif fault == "long":
            data += b"more"
        elif fault in ("drop", "short", "stall"):
            data = data[:half]
        if fault == "trickle":
            for i in range(len(data)):
                self.wfile.write(data[i : i + 1])
                self.wfile.flush()
                self.server.closing.wait(0.05)
        self.wfile.write(data)
        self.wfile.flush()
        if fault == "stall":
            self.server.closing.wait()
        if fault == "slow":
            self.server.closing.wait(0.3)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """The server, until the block ends."""
    server = Web(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def cache(folder: Path, **changes: object) -> CacheSpec:
    """A cache for tests: it loses patience soon."""
    return CacheSpec.model_validate({"folder": folder, "tries": 3, "stall_seconds": 1.0, "gigabytes": 1.0} | changes)
