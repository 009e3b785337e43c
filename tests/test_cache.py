"""Files from URLs: whole and verified whatever the source does, fetched once for a node, within a bound."""

import hashlib
import io
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modsquad_ds.data import fetch as fetching
from modsquad_ds.data.cache import FileCache, NoRoomError, cache_folder
from modsquad_ds.data.fetch import Wanted, fetch
from modsquad_ds.errors import UserError
from modsquad_ds.location import Url, data_option, location
from web import Fault, Web, cache, serve

SIZE = 200_000


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    folder = tmp_path / "web"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.tar").write_bytes(content(number))
    with serve(folder) as server:
        yield server


def content(number: int) -> bytes:
    return hashlib.shake_128(bytes([number])).digest(SIZE)


def wanted(web: Web, number: int) -> Wanted:
    return Wanted(f"{web.url}/{number}.tar", SIZE, hashlib.sha256(content(number)).hexdigest())


def read(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "room.lock")


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def children() -> set[str]:
    return {number for task in Path("/proc/self/task").iterdir() for number in (task / "children").read_text().split()}


# ---------------------------------------------------------------- locations


def test_places_and_what_lies_below_them() -> None:
    web, pipe = location("https://host/shards/"), location("pipe:ssh h cat /s/{}")
    assert str(web / Path("digits") / "train") == "https://host/shards/digits/train"
    assert (web / "digits/train").file("a.tar") == "https://host/shards/digits/train/a.tar"  # type: ignore[union-attr]
    assert str(pipe / Path("digits") / "train") == "pipe:ssh h cat /s/digits/train/{}"
    assert (pipe / "digits" / "train").file("a.tar") == "pipe:ssh h cat /s/digits/train/a.tar"  # type: ignore[union-attr]
    assert web / Path("/local/digits") == Path("/local/digits") and web / Path() == web
    assert Path("/shards") / Url("s3://b/x") == Url("s3://b/x") == web / Url("s3://b/x")
    assert location("data/shards") == Path("data/shards") and location("a b:c") == Path("a b:c")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://host/x", "expected a folder, http://, https://, s3://, or a command"),
        ("pipe:cat /shards", "{} is missing"),
        ("https://host/x?key=1", "a host and a path alone"),
        ("https://host/a b", "a host and a path alone"),
        ("https://me:secret@host/x", "~/.netrc"),
    ],
)
def test_wrong_places_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match="--data") as caught:
        data_option(text)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "a/../b", "-rf", "x;touch y", "x y", "$(x)", "'", ".x", "{}", "x\n", "%2e"])
@pytest.mark.parametrize("place", ["https://host/x", "pipe:cat /x/{}"])
def test_names_that_mean_something_else_are_refused(place: str, name: str) -> None:
    with pytest.raises(UserError, match="cannot be fetched from there"):
        location(place) / name  # type: ignore[operator]
    with pytest.raises(UserError, match="cannot be fetched from there"):
        Url(place).file(name)


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("fault", [500, 503, 429, 404, "stall", "trickle", "drop", "short", "long", "corrupt"])
def test_what_fails_once_is_had_by_trying_again(web: Web, fault: Fault, tmp_path: Path) -> None:
    web.faults["0.tar"] = [fault]
    with (tmp_path / "file").open("w+b") as file:
        file.write(bytes(2 * SIZE))  # what was there before does not remain
        fetch(wanted(web, 0), file, cache(tmp_path))
    assert (tmp_path / "file").read_bytes() == content(0)
    assert web.requests["0.tar"] == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (404, "exit code 22, curl: (22) The requested URL returned error: 404"),
        (500, "exit code 22, curl: (22) The requested URL returned error: 500"),
        ("stall", "stalled: 0 bytes in 1 s, "),
        ("drop", "exit code 18, curl: (18) "),
        ("short", f"it ended after {SIZE // 2} of {SIZE} bytes"),
        ("long", f"it goes on after {SIZE} bytes"),
        ("corrupt", "its content is not what the index describes (sha256 "),
    ],
)
def test_what_fails_for_good_is_told_in_one_line(web: Web, fault: Fault, words: str) -> None:
    web.always["1.tar"] = fault
    started, before = time.monotonic(), children()
    with pytest.raises(UserError) as caught:
        fetch(wanted(web, 1), io.BytesIO(), cache(Path(), tries=2))
    message = str(caught.value)
    assert message.startswith(f"{web.url}/1.tar: cannot be fetched (2 tries in ") and words in message and "\n" not in message
    assert "cache.tries" in message and time.monotonic() - started < 8
    assert web.requests["1.tar"] == 2
    assert children() == before  # no transfer is left


def test_no_file_is_asked_for_a_third_time_only(web: Web) -> None:
    with pytest.raises(UserError, match=r"\(3 tries in .*returned error: 404"):
        fetch(Wanted(f"{web.url}/none.tar"), io.BytesIO(), cache(Path(), tries=50))
    assert web.requests["none.tar"] == 3


def test_waits_double_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FIRST_WAIT", 1.0)
    before = random.getstate()
    for tried, most in ((1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (50, 60)):
        waits = [fetching.wait_before(tried) for _ in range(200)]
        assert most / 2 <= min(waits) < 0.6 * most and 0.9 * most < max(waits) <= most
    assert random.getstate() == before  # augmentation's, which a thread that fetches ahead must not disturb


def test_commands(web: Web, tmp_path: Path) -> None:
    place = location(f"pipe:cat {web.folder}/{{}} && echo done >&2")
    assert isinstance(place, Url)
    buffer = io.BytesIO()
    fetch(wanted(web, 2)._replace(url=place.file("2.tar")), buffer, cache(tmp_path))
    assert buffer.getvalue() == content(2)
    with pytest.raises(UserError, match=r"9.tar && .* \(3 tries in .*exit code 1, cat: .*9.tar: No such file"):
        fetch(Wanted(place.file("9.tar")), io.BytesIO(), cache(tmp_path))


def test_a_command_that_stalls_ends_with_all_it_started(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stalled: 0 bytes in 0\.5 s"):
        command = f"pipe:sleep 1000 & echo $! > {tmp_path}/number; wait"
        fetch(Wanted(command), io.BytesIO(), cache(tmp_path, tries=1, stall_seconds=0.5))
    status = Path(f"/proc/{int((tmp_path / 'number').read_text())}/stat")
    deadline = time.monotonic() + 5
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.02)


def test_s3_is_fetched_by_aws(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Wanted("s3://bucket/x/3.tar", SIZE, wanted(web, 3).sha256)
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(UserError, match=r"s3://bucket/x/3.tar: needs the program aws, which is not on the PATH; .*pipe:COMM"):
        fetch(place, io.BytesIO(), cache(tmp_path))
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    aws = tools / "aws"
    aws.write_text(f'#!/bin/sh\n[ "$*" = "s3 cp --only-show-errors s3://bucket/x/3.tar -" ] && cat {web.folder}/3.tar\n')
    aws.chmod(0o755)
    buffer = io.BytesIO()
    fetch(place, buffer, cache(tmp_path))
    assert buffer.getvalue() == content(3)
    aws.write_text("#!/bin/sh\necho 'fatal error: An error occurred (404) when calling HeadObject: no such key' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"\(3 tries in .*exit code 1, fatal error: .*\(404\)"):
        fetch(place, io.BytesIO(), cache(tmp_path, tries=9))


# ---------------------------------------------------------------- the cache


def fetch_all(folder: Path, files: list[Wanted], ready: "multiprocessing.synchronize.Barrier") -> None:
    found = FileCache(cache(folder))
    ready.wait()
    for file in files:
        assert hashlib.sha256(read(found.open(file))).hexdigest() == file.sha256


def test_processes_share_what_one_of_them_fetched(web: Web, tmp_path: Path) -> None:
    web.always = {f"{number}.tar": "slow" for number in range(6)}
    files = [wanted(web, number) for number in range(6)]
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(3)
    others = [context.Process(target=fetch_all, args=(tmp_path / "c", files, ready)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert web.requests == {f"{number}.tar": 1 for number in range(6)}
    assert names(tmp_path / "c") == sorted(f"{file.sha256}.data" for file in files)


def test_threads_share_too(web: Web, tmp_path: Path) -> None:
    web.always["0.tar"] = "slow"
    found = FileCache(cache(tmp_path / "c"))
    with ThreadPoolExecutor(6) as threads:
        assert set(threads.map(lambda _: read(found.open(wanted(web, 0))), range(12))) == {content(0)}
    assert web.requests["0.tar"] == 1


def test_the_bound_holds_and_the_longest_unused_goes(web: Web, tmp_path: Path) -> None:
    found = FileCache(cache(tmp_path / "c", gigabytes=2.5 * SIZE / 1e9))
    for number, left in ((0, {0}), (1, {0, 1}), (0, {0, 1}), (2, {0, 2}), (3, {2, 3}), (2, {2, 3}), (4, {2, 4})):
        assert read(found.open(wanted(web, number))) == content(number)
        assert names(tmp_path / "c") == sorted(f"{wanted(web, one).sha256}.data" for one in left)
        time.sleep(0.02)  # file times are as coarse as the kernel's clock ticks
    assert held(tmp_path / "c") <= 2.5 * SIZE
    assert web.requests == {f"{number}.tar": 1 for number in range(5)}


def test_a_file_in_use_goes_last_and_its_reader_keeps_it(web: Web, tmp_path: Path) -> None:
    found = FileCache(cache(tmp_path / "c", gigabytes=2.5 * SIZE / 1e9))
    first = found.open(wanted(web, 0))
    time.sleep(0.02)
    os.close(found.open(wanted(web, 1)))
    second = found.open(wanted(web, 2))
    assert names(tmp_path / "c") == sorted(f"{wanted(web, number).sha256}.data" for number in (0, 2))
    os.close(found.open(wanted(web, 3)))  # both are in use
    assert names(tmp_path / "c") == sorted(f"{wanted(web, number).sha256}.data" for number in (2, 3))
    assert (read(first), read(second)) == (content(0), content(2))


def test_fetching_ahead_takes_nothing_from_readers(web: Web, tmp_path: Path) -> None:
    found = FileCache(cache(tmp_path / "c", gigabytes=2.5 * SIZE / 1e9))
    reader = found.open(wanted(web, 0))
    found.bring(wanted(web, 1), ())
    with pytest.raises(NoRoomError):
        found.bring(wanted(web, 2), {str(wanted(web, 1).sha256)})
    assert names(tmp_path / "c") == sorted(f"{wanted(web, number).sha256}.data" for number in (0, 1))
    found.bring(wanted(web, 2), ())
    assert names(tmp_path / "c") == sorted(f"{wanted(web, number).sha256}.data" for number in (0, 2))
    os.close(reader)
    web.faults["3.tar"] = ["stall"]
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(found.open, wanted(web, 3))
        while not web.requests["3.tar"]:
            time.sleep(0.01)
        started = time.monotonic()
        found.bring(wanted(web, 3), ())  # somebody is at it
        assert time.monotonic() - started < 0.5 and not slow.done()
        assert read(slow.result()) == content(3)


def kill_in_the_middle(web: Web, folder: Path, number: int) -> None:
    """Kill a process that has written half of a file and waits for the rest."""
    file = wanted(web, number)
    web.faults[f"{number}.tar"] = ["stall"]
    job = multiprocessing.get_context("fork").Process(target=FileCache(cache(folder, stall_seconds=60)).open, args=(file,))
    job.start()
    partial = folder / f"{file.sha256}.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_blocks * 512 >= SIZE // 4):  # curl holds back some of it
        assert job.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    job.kill()
    job.join()
    assert names(folder) == [f"{file.sha256}.lock", f"{file.sha256}.partial"]


def test_what_a_killed_process_left_is_fetched_anew(web: Web, tmp_path: Path) -> None:
    found = FileCache(cache(tmp_path / "c"))
    kill_in_the_middle(web, tmp_path / "c", 0)
    assert read(found.open(wanted(web, 0))) == content(0)
    assert names(tmp_path / "c") == [f"{wanted(web, 0).sha256}.data"]


def test_what_a_killed_process_left_takes_no_room(web: Web, tmp_path: Path) -> None:
    found = FileCache(cache(tmp_path / "c", gigabytes=1.5 * SIZE / 1e9))
    kill_in_the_middle(web, tmp_path / "c", 0)
    assert read(found.open(wanted(web, 1))) == content(1)
    assert names(tmp_path / "c") == [f"{wanted(web, 1).sha256}.data"]


def test_corrupt_content_is_never_handed_out(web: Web, tmp_path: Path) -> None:
    web.always["0.tar"] = "corrupt"
    found = FileCache(cache(tmp_path / "c"))
    with pytest.raises(UserError, match="its content is not what the index describes"):
        found.open(wanted(web, 0))
    assert names(tmp_path / "c") == []
    del web.always["0.tar"]
    assert read(found.open(wanted(web, 0))) == content(0)


def test_a_cached_file_that_was_cut_off_is_fetched_anew(web: Web, tmp_path: Path) -> None:
    found = FileCache(cache(tmp_path / "c"))
    os.close(found.open(wanted(web, 0)))
    os.truncate(tmp_path / "c" / f"{wanted(web, 0).sha256}.data", 1000)
    assert read(found.open(wanted(web, 0))) == content(0)


def test_where_the_cache_cannot_be(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cache.gigabytes: 0.0001 GB hold no file of 0.0002 GB, which http.*0.tar is; raise it"):
        FileCache(cache(tmp_path / "c", gigabytes=1e-4)).open(wanted(web, 0))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache.folder .*file: cannot be written to"):
        FileCache(cache(tmp_path / "file"))
    found = FileCache(cache(tmp_path / "c"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(UserError, match=r"cache.folder .*c: No space left on device; lower cache.gigabytes"):
        found.open(wanted(web, 0))
    monkeypatch.undo()
    assert names(tmp_path / "c") == []
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UserError, match=r"belongs to another user"):
        FileCache(cache(tmp_path / "c"))


def test_a_disk_that_others_fill_bounds_the_cache(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = FileCache(cache(tmp_path / "c"))
    os.close(found.open(wanted(web, 0)))
    nothing = type("Usage", (), {"free": SIZE // 10})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: nothing)
    os.close(found.open(wanted(web, 1)))
    assert names(tmp_path / "c") == [f"{wanted(web, 1).sha256}.data"]
    nothing.free = -2 * SIZE
    with pytest.raises(UserError, match=r"cache.folder .*c: no room for 0.0002 GB \(http.*2.tar\): the disk has .*; make room"):
        found.open(wanted(web, 2))
    assert not any(path.endswith((".partial", ".lock")) for path in names(tmp_path / "c"))


def test_what_is_being_fetched_is_waited_for(web: Web, tmp_path: Path) -> None:
    web.always = {f"{number}.tar": "slow" for number in range(4)}
    found = FileCache(cache(tmp_path / "c", gigabytes=1.5 * SIZE / 1e9))
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda number: found.open(wanted(web, number)), range(4)))
    assert [read(descriptor) for descriptor in opened] == [content(number) for number in range(4)]
    assert len(names(tmp_path / "c")) == 1


def test_folder_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(cache(tmp_path / "c")) == tmp_path / "c"
    monkeypatch.setenv("MODSQUAD_SCRATCH", str(tmp_path / "scratch"))
    found = FileCache(cache(None))  # type: ignore[arg-type]
    assert found.folder == tmp_path / "scratch/shard-cache" and found.folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("MODSQUAD_SCRATCH")
    assert cache_folder(cache(None)).name == f"modsquad-shards-{os.getuid()}"  # type: ignore[arg-type]
