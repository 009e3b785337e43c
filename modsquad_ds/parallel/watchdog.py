"""Who holds up a job: a rank that stands still or is gone ends it and is named. Started and stopped by launch.py.

Every rank tells where it is (`tell`, an assignment). Two threads of it do the rest, and neither touches a device or a process
group: one exchanges beats through the store that ranks meet at, over a connection of its own; the other one judges by its own
clock, so that a store which no longer answers holds up nobody's judgement. Rank 0 judges all ranks, the others judge rank 0.

A rank is gone when its beats stop; it stands still when beats go on and no rank of the job makes progress. A rank that fails
by itself says so on its way out (`leave`), and the others then end without a word of their own.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple, get_args

import torch.distributed as dist

from modsquad_ds.parallel.ranks import Ranks

Phase = Literal["starting", "loading data", "computing", "saving", "finishing"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which a step goes through them: of two ranks in one step, others wait for the one in the earlier phase."""

BEAT = 1.0
"""Seconds between two beats of a rank."""
SILENT = 60.0
"""Seconds without a beat after which a rank is gone, where collective_timeout is longer."""
SOON = 3.5
"""The same once a collective has failed on some rank: then somebody is gone, and the question is only who."""
PATIENCE = 8.0
"""Seconds that a rank whose collective failed leaves to the watchdog before it shows its own trace."""
SHOWN = 3
"""Ranks that one line names."""
WAITING = ("modsquad_ds.parallel.collectives", "modsquad_ds.parallel.dispatch", "modsquad_ds.parallel.capacity")
"""Our modules in which a rank waits for others; besides these, torch.distributed."""


class Beat(NamedTuple):
    """What a rank says of itself."""

    number: int = 0
    """Rises with every beat."""
    node: str = "?"
    progress: int = 0
    """Rises with every `tell`."""
    step: int = 0
    phase: Phase = "starting"
    place: str = ""
    """Line that the main thread is at."""
    waits: bool = False
    """Whether that line is inside of a collective."""
    broken: bool = False
    """Whether something failed that may be another rank's doing."""
    code: int | None = None
    """Exit code of a rank that has said all it has to say: 0 when it is through."""


class Seen(NamedTuple):
    """A rank as the judge sees it."""

    rank: int
    beat: Beat
    silent: float
    """Seconds since its last beat."""
    still: float
    """Seconds since its last progress."""

    def __str__(self) -> str:
        # One that leaves is where it says so, which tells nothing.
        at = f", at {self.beat.place}" if self.beat.place and self.beat.code is None else ""
        return f"rank {self.rank} on {self.beat.node} (step {self.beat.step}, {self.beat.phase}{at})"


class Verdict(NamedTuple):
    """Why a job ends, and the exit code of its ranks."""

    message: str
    code: int = 1


def verdict(seen: Sequence[Seen], timeout: float) -> Verdict | None:
    """Whether a job has to end, and by whose doing. `timeout`: the recipe's collective_timeout, in seconds."""
    failed = [s for s in seen if s.beat.code]
    if failed:
        return Verdict(f"ends with {_names(failed)}, which failed and says itself why", failed[0].beat.code or 1)
    still, broken = min(s.still for s in seen), any(s.beat.broken for s in seen)
    limit = min(SOON if broken or still > timeout else SILENT, timeout)
    gone = sorted((s for s in seen if s.silent > limit and s.beat.code is None), key=lambda s: -s.silent)
    if gone:
        why = "killed, out of memory, or the node is down or cut off"
        return Verdict(f"error: {_names(gone)}: no sign of life for {gone[0].silent:.0f} s; {why}")
    left = [s for s in seen if s.beat.code == 0]
    if len(left) == len(seen) or not (broken or still > timeout):
        return None
    if left:
        return Verdict(f"error: {_names(left)}: left the job while others were at work")
    if broken:
        return None  # the rank on which something failed is about to speak for itself
    first = min(map(_position, seen))
    behind = [s for s in seen if _position(s) == first]
    others = len(seen) - len(behind)
    rest = f"{others} other rank{'s wait' if others > 1 else ' waits'}" if others else "none is behind the others"
    limits = f"{still:.0f} s (parallel.collective_timeout {timeout:g})"
    return Verdict(f"error: {_names(behind)}: no progress for {limits}; {rest}")


def _position(seen: Seen) -> tuple[int, int, bool]:
    """Order of ranks in a job that stands still. At the same place, one that waits for others is not whom they wait for."""
    return seen.beat.step, PHASES.index(seen.beat.phase), seen.beat.waits


def _names(seen: Sequence[Seen]) -> str:
    more = f" and {len(seen) - SHOWN} more" if len(seen) > SHOWN else ""
    return ", ".join(map(str, seen[:SHOWN])) + more


class _Where(NamedTuple):
    progress: int = 0
    step: int = 0
    phase: Phase = "starting"


_where = _Where()
_beside = 0
_active: "_Watchdog | None" = None
_starts = 0


def tell(step: int | None = None, phase: Phase | None = None) -> None:
    """Say that this rank got on: now in this step (from 1) and phase; each stays as it was where it is left out.

    One assignment: no lock, no collective, no wait for the device.
    """
    global _where
    progress, old_step, old_phase = _where
    _where = _Where(progress + 1, old_step if step is None else step, phase or old_phase)


def tell_beside() -> None:
    """Say the same from the one thread that works beside training, which brings a checkpoint to disk; step and phase stay."""
    global _beside
    _beside += 1


def start(ranks: Ranks, timeout: float) -> None:
    """Watch this job from now on, if it has several ranks. Call after the process group is there.

    From then on, within `timeout` seconds (and some beats) after the last progress of any rank the job ends: every rank with
    os._exit(1) after one of them named the rank that is behind. A rank whose process or node is gone is named after
    min(timeout, SILENT) seconds, or SOON after another rank's collective has failed by it.
    """
    global _active, _where, _starts
    if ranks.world == 1 or _active is not None:
        return
    _where, _starts = _Where(), _starts + 1
    _active = _Watchdog(ranks, timeout, _starts)
    _active.begin()


def stop() -> None:
    """Watch no longer: this rank is through."""
    global _active
    active, _active = _active, None
    if active is not None and active.pid == os.getpid():
        active.say(0)
        active.over.set()
        for thread in active.threads:
            thread.join(PATIENCE)


atexit.register(stop)  # a thread that is inside of the store when the interpreter ends takes the process down with a crash


def suspect() -> None:
    """Something failed that may be another rank's doing: leave the watchdog time to find out. It ends the process if so."""
    if _active is not None:
        _active.broken = True
        _active.wake.set()
        time.sleep(PATIENCE)


def leave(code: int) -> None:
    """This rank fails by itself and has said why: tell the others, so that they end too and have nothing to add."""
    if _active is not None:
        _active.say(code)


class _Clock:
    """Seconds in which this process ran: a suspended job goes on when it is resumed, as that time is nobody's silence."""

    def __init__(self) -> None:
        self.ran, self.before = 0.0, time.monotonic()

    def __call__(self) -> float:
        now = time.monotonic()
        self.ran, self.before = self.ran + min(now - self.before, 2 * BEAT), now
        return self.ran


class _Since:
    """Seconds since a number last changed."""

    def __init__(self) -> None:
        self.value, self.when = -1, 0.0

    def __call__(self, value: int, now: float) -> float:
        if value != self.value:
            self.value, self.when = value, now
        return now - self.when


class _Watchdog:
    def __init__(self, ranks: Ranks, timeout: float, life: int) -> None:
        self.ranks, self.timeout, self.pid = ranks, timeout, os.getpid()
        # A launcher that restarts its ranks keeps its store, with the beats of the life before.
        prefix = f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{life}"
        self.keys, self.told_key = [f"{prefix}/{rank}" for rank in range(ranks.world)], f"{prefix}/told"
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.beats = [Beat() for _ in range(ranks.world)]
        """The ranks' last beats. Rank 0 knows them all; others know their own and that of rank 0."""
        self.silent = [_Since() for _ in self.beats]
        self.still = [_Since() for _ in self.beats]
        self.told: int | None = None
        """The exit code with which rank 0 ends the job."""
        self.code: int | None = None
        self.broken = self.lost = False
        self.over, self.wake, self.met, self.said = (threading.Event() for _ in range(4))
        self.threads = [threading.Thread(target=run, daemon=True, name="watchdog") for run in (self._talk, self._judge)]

    def begin(self) -> None:
        for thread in self.threads:
            thread.start()
        self.met.wait(self.timeout)  # so that every rank's node is known, however early it dies

    def say(self, code: int) -> None:
        """Say with the last beat that this rank leaves, and see that it arrives, as far as that is possible."""
        self.code = code
        if self.ranks.first and code:
            self.told = code
        self.wake.set()
        self.said.wait(PATIENCE / 2)
        if self.told is not None:
            time.sleep(2.5 * BEAT)  # the store ends with this process; until then the others have read it

    # ------------------------------------------------------------ the thread that exchanges beats

    def _talk(self) -> None:
        host, port = self.address.rsplit(":", 1)
        try:
            patience = timedelta(seconds=self.timeout)
            store = dist.TCPStore(host, int(port), None, False, patience, wait_for_workers=False)  # type: ignore[attr-defined]
            self._publish(store, self._beat(1))
            store.wait(self.keys if self.ranks.first else [self.told_key])
            last = False
            while not last:
                last = self.code is not None
                self._exchange(store)
                self.met.set()
                if not last:
                    self.wake.wait(BEAT)
                    self.wake.clear()
        except dist.DistError:
            self.lost = True
        finally:
            self.met.set()
            self.said.set()

    def _publish(self, store: Any, own: Beat) -> None:
        store.set(self.keys[self.ranks.rank], json.dumps(own))
        if self.ranks.first:
            store.set(self.told_key, json.dumps([own, self.told]))

    def _exchange(self, store: Any) -> None:
        own = self._beat(self.beats[self.ranks.rank].number + 1)
        self._publish(store, own)
        if self.ranks.first:
            self.beats = [own, *(Beat(*json.loads(text)) for text in store.multi_get(self.keys[1:]))]
        else:
            first, self.told = json.loads(store.get(self.told_key))
            self.beats[0], self.beats[self.ranks.rank] = Beat(*first), own

    def _beat(self, number: int) -> Beat:
        where, (place, waits) = _where, _place_of(threading.main_thread().ident)
        return Beat(number, self.node, where.progress + _beside, where.step, where.phase, place, waits, self.broken, self.code)

    # ------------------------------------------------------------ the thread that judges

    def _judge(self) -> None:
        clock = _Clock()
        while not self.over.wait(BEAT / 2):
            found = self._find(clock())
            if found is not None and self.code is None:
                self._end(found)

    def _find(self, now: float) -> Verdict | None:
        seen = [
            Seen(rank, beat, self.silent[rank](beat.number, now), self.still[rank](beat.progress, now))
            for rank, beat in enumerate(self.beats)
        ]
        if self.told is not None:
            return Verdict("", self.told)
        impatient = self.broken or self.lost
        # torchrun keeps the store. Without it nothing is known of any rank.
        cut_off = seen[self.ranks.rank].silent > min(SOON if impatient else SILENT, self.timeout)
        if cut_off and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return Verdict(f"error: the launcher at {self.address}, where ranks meet, is gone or cut off from {self.node}")
        if self.ranks.first:
            return verdict(seen, self.timeout)
        if seen[0].beat.code == 0:
            return None  # it was through, so nobody waits for anybody
        return verdict([seen[0]._replace(beat=seen[0].beat._replace(broken=impatient), still=0.0)], self.timeout)

    def _end(self, found: Verdict) -> None:
        """End this process, and with rank 0 the job. One rank speaks: rank 0, or those that are left in turn."""
        if self.ranks.rank > 1 and found.message:
            time.sleep(1.0 if self.ranks.local_rank == 0 else 3.0)
        if found.message:
            # Not through sys.stderr, whose lock the main thread may hold for good.
            os.write(2, f"rank {self.ranks.rank}: {found.message}\n".encode())
        if self.ranks.first:
            self.told = found.code
            self.wake.set()
            time.sleep(2.5 * BEAT)
        os._exit(found.code)


def _place_of(thread: int | None) -> tuple[str, bool]:
    """Line that a thread is at, the innermost one of ours, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(thread or 0)
    places, collective = [], False
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        collective = collective or module.startswith("torch.distributed.")
        if module != __name__:
            places.append((module, f"{module}:{frame.f_lineno} {frame.f_code.co_name}"))
        frame = frame.f_back
    if not places:
        return "", False
    module, place = next((p for p in places if p[0].startswith("modsquad_ds.")), places[0])
    return place, collective or module in WAITING
