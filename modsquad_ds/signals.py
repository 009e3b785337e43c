"""Signals that ask a run to end: a batch system's warning. Remembered here, answered by train.py."""

import signal
from types import FrameType
from typing import Any

from typing_extensions import Self

ASKING = (signal.SIGUSR1, signal.SIGTERM)
"""What batch systems send ahead: the one by agreement (sbatch --signal), the other before they kill."""


class StopSignal:
    """Inside of its `with` block, signals of `ASKING` are noted instead of ending the process. For the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def ignore_more() -> None:
    """For a process that ends since it was asked to: to be asked again must not change its exit code."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


def ignore_in_worker() -> None:
    """Leave signals to the main process: batch systems and terminals send them to every process of a job."""
    for number in (*ASKING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
