"""Shards fetched before they are read: one background thread in each process that reads. Between the shards and their cache."""

import os
import threading
from collections.abc import Callable, Sequence

from modsquad_ds.data.cache import NoRoomError
from modsquad_ds.errors import UserError


class _Plan:
    """What the thread of one process has before it."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.changed = threading.Condition()
        self.announced: tuple[int, ...] = ()
        self.wanted: list[int] = []
        """Those of them that are left."""


class FetchAhead:
    """Calls `bring(shard, announced)` in a thread for the shards that are announced, in their order.

    The thread starts with the first announcement in a process, so a forked process has its own, and it ends with its process.
    What it cannot get, the reader asks for again, and meets the error.
    """

    def __init__(self, bring: Callable[[int, Sequence[int]], None]) -> None:
        self._bring = bring
        self._plan: _Plan | None = None

    def announce(self, shards: Sequence[int]) -> None:
        """These will be read next. What was announced before and not begun yet is forgotten."""
        if self._plan is None or self._plan.process != os.getpid():
            self._plan = _Plan()
            threading.Thread(target=self._work, args=(self._plan,), name="shards ahead", daemon=True).start()
        with self._plan.changed:
            if self._plan.announced != tuple(shards):
                self._plan.announced, self._plan.wanted = tuple(shards), list(shards)
                self._plan.changed.notify()

    def _work(self, plan: _Plan) -> None:
        while True:
            with plan.changed:
                while not plan.wanted:
                    plan.changed.wait()
                announced, wanted = plan.announced, plan.wanted
                shard = wanted.pop(0)
            try:
                self._bring(shard, announced)
            except (UserError, NoRoomError):
                # No room for one means none for those after it, and a source that fails is asked no more than the reader asks.
                with plan.changed:
                    wanted.clear()
