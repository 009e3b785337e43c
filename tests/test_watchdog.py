"""Who is to blame: the verdict on tables of beats, then real jobs of three ranks in which one dies, hangs or fails."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from modsquad_ds.parallel import watchdog
from modsquad_ds.parallel.launch import group_timeout
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.watchdog import Beat, Seen, Verdict, verdict

# ---------------------------------------------------------------- the verdict


def seen(rank: int, silent: float = 0.5, still: float = 0.0, **beat: Any) -> Seen:
    return Seen(rank, Beat(node=f"node{rank}", **{"step": 7, "phase": "computing", **beat}), silent, still)


def still(rank: int, **beat: Any) -> Seen:
    return seen(rank, still=601.0, **beat)


NAMED = "rank {0} on node{0} (step 7, {1})".format
GONE = "killed, out of memory, or the node is down or cut off"
CASES: dict[str, tuple[list[Seen], str | None]] = {
    "all is well": ([seen(0), seen(1)], None),
    "a minute without a beat": ([seen(0), seen(1, silent=60.0)], None),
    "more than a minute": (
        [seen(0), seen(1, silent=61.0)],
        f"error: {NAMED(1, 'computing')}: no sign of life for 61 s; {GONE}",
    ),
    "short silence without a failed collective": ([seen(0), seen(1, silent=4.0)], None),
    "short silence with one": (
        [seen(0), seen(1, silent=4.0, place="modsquad_ds.train:9 save"), seen(2, broken=True)],
        f"error: rank 1 on node1 (step 7, computing, at modsquad_ds.train:9 save): no sign of life for 4 s; {GONE}",
    ),
    "the longest silence comes first, and three are named": (
        [seen(0, broken=True), *(seen(r, silent=3.6 + r) for r in range(1, 6))],
        f"error: {', '.join(NAMED(r, 'computing') for r in (5, 4, 3))} and 2 more: no sign of life for 9 s; {GONE}",
    ),
    "a failed collective with all alive": ([seen(0, broken=True), seen(1, broken=True)], None),
    "the same for long: they are about to speak": ([still(0, broken=True), still(1)], None),
    "one is slow, another gets on": ([still(0), seen(1, still=599.0)], None),
    "an earlier step": (
        [still(0), still(1, step=6, phase="saving")],
        "error: rank 1 on node1 (step 6, saving): no progress for 601 s (parallel.collective_timeout 600); 1 other rank waits",
    ),
    "an earlier phase": (
        [still(0), still(1, phase="loading data"), still(2)],
        f"error: {NAMED(1, 'loading data')}: no progress for 601 s (parallel.collective_timeout 600); 2 other ranks wait",
    ),
    "the same place, but not in a collective": (
        [still(0, waits=True), still(1), still(2, waits=True)],
        f"error: {NAMED(1, 'computing')}: no progress for 601 s (parallel.collective_timeout 600); 2 other ranks wait",
    ),
    "all at the same place": (
        [still(0), still(1)],
        f"error: {NAMED(0, 'computing')}, {NAMED(1, 'computing')}: no progress for 601 s (parallel.collective_timeout 600); "
        "none is behind the others",
    ),
    "nothing moves because one is gone, which is later than its last progress": (
        [still(0, waits=True), seen(1, silent=5.0, still=601.0, step=8)],
        f"error: rank 1 on node1 (step 8, computing): no sign of life for 5 s; {GONE}",
    ),
    "all through": ([still(0, code=0), still(1, code=0)], None),
    "one is through, the other at work": ([seen(0), seen(1, silent=70.0, code=0)], None),
    "one is through, the other waits": (
        [still(0), still(1, code=0)], f"error: {NAMED(1, 'computing')}: left the job while others were at work",
    ),
    "one is through, the other's collective fails": (
        [seen(0, broken=True), seen(1, code=0)], f"error: {NAMED(1, 'computing')}: left the job while others were at work",
    ),
    "one failed by itself": (
        [seen(0, broken=True), seen(1, silent=9.0, code=2, place="modsquad_ds.cli:1 _leave"), seen(2)],
        f"ends with {NAMED(1, 'computing')}, which failed and says itself why",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_verdict(case: str) -> None:
    ranks, message = CASES[case]
    assert verdict(ranks, 600.0) == (None if message is None else Verdict(message, 2 if "itself why" in message else 1))


def test_a_short_limit_holds_for_silence_too() -> None:
    assert verdict([seen(0), seen(1, silent=6.0)], 6.0) is None
    assert verdict([seen(0), seen(1, silent=6.1)], 6.0) is not None
    assert verdict([seen(0, broken=True), seen(1, silent=2.5)], 2.0) is not None


def test_a_job_in_which_nothing_moves_ends_wherever_its_ranks_are() -> None:
    for phase in watchdog.PHASES:
        for waits in (False, True):
            assert verdict([still(0, waits=True), still(1, phase=phase, waits=waits)], 600.0) is not None


def test_process_groups_wait_longer_than_the_watchdog() -> None:
    """Its verdict comes after the limit, a beat, and where rank 0 is gone some seconds for the ranks' turns."""
    for limit in (2.0, 600.0):
        assert group_timeout(limit).total_seconds() > limit + 2 * watchdog.BEAT + watchdog.PATIENCE + 3.0


def test_beats_survive_the_store() -> None:
    beat = Beat(3, "node1", 5, 7, "saving", "modsquad_ds.x:1 f", True, False, 2)
    assert Beat(*json.loads(json.dumps(beat))) == beat


def test_telling_counts_and_keeps_what_is_left_out() -> None:
    watchdog.tell(3, "saving")
    before = watchdog._where
    watchdog.tell()
    watchdog.tell(4)
    watchdog.tell(phase="loading data")
    assert watchdog._where == (before.progress + 3, 4, "loading data")


def test_the_clock_stands_still_while_its_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((100.0, 100.5, 101.5, 500.0, 500.5))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(moments))
    clock, since = watchdog._Clock(), watchdog._Since()
    assert [since(number, clock()) for number in (1, 1, 1, 2)] == [0.0, 1.0, 3.0, 0.0]


def test_one_process_is_not_watched() -> None:
    watchdog.start(Ranks(), 2.0)
    assert watchdog._active is None and not [t for t in threading.enumerate() if t.name == "watchdog"]
    watchdog.suspect()
    watchdog.leave(1)
    watchdog.stop()


@pytest.mark.parametrize(
    ("module", "shown", "waits"),
    [
        ("torch.distributed.c10d_logger", "test_watchdog", True),
        ("torch.distributedness", "test_watchdog", False),
        ("modsquad_ds.data.loader", "modsquad_ds.data.loader", False),
        ("modsquad_ds.parallel.collectives", "modsquad_ds.parallel.collectives", True),
    ],
)
def test_place_of_a_rank(module: str, shown: str, waits: bool) -> None:
    """Of a function of that module that calls us, as the innermost frame of ours."""
    space: dict[str, Any] = {"__name__": module}
    exec("def called(by):\n    return by()", space)
    place, found = space["called"](lambda: watchdog._place_of(threading.get_ident()))
    assert place.split(":")[0] == shown and found is waits
    assert shown == "test_watchdog" or place == f"{module}:2 called"


def test_place_of_no_thread() -> None:
    assert watchdog._place_of(None) == ("", False)


# ---------------------------------------------------------------- jobs

JOBS = [
    "killed:1:40", "killed:0:40", "stopped:1:6", "stopped:0:6", "loops:1:10", "refuses:1:40", "refuses:0:40", "all:0:40",
    "fails:2:40", "leaves:1:40", "ends:0:6", "paused:0:6",
]  # fmt: skip
AT = "rank {0} on node{0} (step 5, loading data, at ".format


OF_TORCH = re.compile(r"^(\[[WE]\d|Exception raised from |frame #\d).*\n*", re.MULTILINE)
"""Warnings of torch's C++ part: a store that is gone, or that was not there at the first try on a busy machine."""


class Job(NamedTuple):
    """What came of a job, by rank."""

    codes: list[int]
    seconds: list[float]
    """From the culprit's deed to the end of a rank."""
    said: list[str]

    @property
    def lines(self) -> list[str]:
        """Of all ranks."""
        return [line for text in self.said for line in text.splitlines() if line.startswith(("rank", "error", "Trace"))]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All jobs, which run side by side."""
    folder = tmp_path_factory.mktemp("jobs")
    root = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(root.parent), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(root / "watched.py"), str(folder), *JOBS]
    subprocess.run(program, env=environment, check=True, timeout=200)
    codes = json.loads((folder / "codes.json").read_text())
    found = {}
    for job in JOBS:
        names = [f"{job.split(':')[0]}.{job.split(':')[1]}.{rank}" for rank in range(3)]
        ends = [codes[name] for name in names]
        said = [OF_TORCH.sub("", (folder / name).read_text()) for name in names]
        found[job] = Job([code for code, _ in ends], [seconds for _, seconds in ends], said)
    return found


@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("job", "culprit", "limit", "what"),
    [
        # Connections of gloo break at once: long before the limit of 40 s.
        ("killed:1:40", 1, 30.0, "no sign of life"),
        ("killed:0:40", 0, 30.0, "no sign of life"),
        # No connection breaks: the limit of 6 s, beats, turns; a busy machine may double it.
        ("stopped:1:6", 1, 30.0, "no sign of life"),
        ("stopped:0:6", 0, 30.0, "no sign of life"),
        ("loops:1:10", 1, 30.0, "no progress for 10 s (parallel.collective_timeout 10); 2 other ranks wait"),
    ],
)
def test_a_rank_that_dies_or_hangs_is_named(job: str, culprit: int, limit: float, what: str, jobs: dict[str, Job]) -> None:
    found = jobs[job]
    others = [rank for rank in range(3) if rank != culprit]
    assert [found.codes[rank] for rank in others] == [1, 1] and max(found.seconds[rank] for rank in others) < limit
    speaker = others[0]
    assert found.lines[0].startswith(f"rank {speaker}: error: {AT(culprit)}") and what in found.lines[0]
    # Rank 0 speaks for all. Where it is gone itself, others speak in turn if no launcher ends them before.
    assert len(found.lines) == 1 or culprit == 0
    assert all(AT(culprit) in line for line in found.lines)


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_rank_that_fails_by_itself_speaks_for_itself(jobs: dict[str, Job]) -> None:
    first, last = jobs["refuses:0:40"], jobs["refuses:1:40"]
    assert first.lines == ["error: this sample is damaged"]
    ended = "rank 0: ends with rank 1 on node1 (step 5, loading data), which failed and says itself why"
    assert last.lines == [ended, "rank 1: error: this sample is damaged"]
    assert first.codes == last.codes == [2, 2, 2], "a user's mistake, whichever rank a launcher asks first"
    assert jobs["all:0:40"] == ([2, 2, 2], [0.0] * 3, ["error: a mistake that all ranks meet\n", "", ""])


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_bug_keeps_its_trace(jobs: dict[str, Job]) -> None:
    found = jobs["fails:2:40"]
    assert found.codes == [1, 1, 1] and found.said[1] == ""
    assert found.said[2].startswith("rank 2: Traceback") and found.said[2].rstrip().endswith("ZeroDivisionError")
    assert found.said[0] == "rank 0: ends with rank 2 on node2 (step 5, loading data), which failed and says itself why\n"


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_rank_that_leaves_early_is_named(jobs: dict[str, Job]) -> None:
    found = jobs["leaves:1:40"]
    assert found.codes == [1, 0, 1]
    assert found.lines == ["rank 0: error: rank 1 on node1 (step 5, loading data): left the job while others were at work"]


@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize("job", ["ends:0:6", "paused:0:6"])
def test_a_job_that_ends_well_says_nothing(job: str, jobs: dict[str, Job]) -> None:
    """Also one that was stopped as a whole for longer than its limit, as by a batch system that suspends it."""
    found = jobs[job]
    assert found.codes == [0, 0, 0] and found.said == ["", "", ""]
