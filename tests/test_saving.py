"""Checkpoints beside training: what is written is the moment it was asked for, failures are told, any topology goes on."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lives import resume, save
from modsquad_ds import checkpoint
from modsquad_ds.checkpoint import Progress, Written, complete_checkpoints, folder_of
from modsquad_ds.config import Recipe, recipe_from_tree, recipe_to_tree
from modsquad_ds.errors import Stopped, UserError
from modsquad_ds.parallel import launch, watchdog
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.resume import with_same_batch
from modsquad_ds.saving import Saver
from modsquad_ds.signals import StopSignal
from modsquad_ds.train import stopped
from modsquad_ds.trainer import Trainer, Votes, build_trainer
from ranks import run_ranks
from small import small_recipe
from test_topology import config_file, one_step

SPLIT, STEPS = 5, 25
TOPOLOGIES = {
    "2 ranks, EP 2, ZeRO 2": (2, 2, 2),
    "1 rank": (1, 1, 2),
    "4 ranks, EP 4, ZeRO 1": (4, 4, 1),
    "4 ranks, EP 2, ZeRO 2": (4, 2, 2),
}
HOME = next(iter(TOPOLOGIES))


def recipe_of(folder: Path, name: str, saved_by: str) -> Recipe:
    """The small recipe on one topology, in the run folder of the one that saved."""
    _, ep, stage = TOPOLOGIES[name]
    return small_recipe(**{
        "run": str(folder / saved_by), "parallel.ep_size": ep, "deepspeed_config": config_file(folder, stage),
        "train.optimizer.clip": 1.0, "train.steps": STEPS, "train.ema": 0.5,
    })  # fmt: skip


def losses(trainer: Trainer, first: int) -> list[list[float]]:
    """Total, tasks' losses and information of the steps that are left; gradient norms are not held to as much."""
    return [one_step(trainer, step)[:-1] for step in range(first, STEPS)]


def through(rank: int, world: int, recipe: Recipe) -> list[list[float]]:
    """One life, which leaves a checkpoint of step SPLIT behind."""
    trainer = build_trainer(recipe, launch.start())
    for step in range(SPLIT):
        one_step(trainer, step)
    save(trainer, SPLIT)
    return losses(trainer, SPLIT)


def resumed(rank: int, world: int, recipes: list[Recipe]) -> list[list[list[float]]]:
    ranks = launch.start()
    return [losses(trainer := build_trainer(recipe, ranks), resume(trainer)) for recipe in recipes]


@pytest.mark.dist
def test_any_topology_goes_on_from_any_other(tmp_path: Path) -> None:
    """From home to each other and back: within 1e-4 of the life that was not interrupted, over the next twenty steps."""
    whole = {name: run_ranks(TOPOLOGIES[name][0], through, recipe_of(tmp_path, name, name))[0] for name in TOPOLOGIES}
    others = [name for name in TOPOLOGIES if name != HOME]
    moves = [(HOME, [name]) for name in others] + [(name, [HOME]) for name in others]
    for saved_by, (now,) in moves:
        curve = run_ranks(TOPOLOGIES[now][0], resumed, [recipe_of(tmp_path, now, saved_by)])[0][0]
        assert len(curve) == STEPS - SPLIT
        for found, expected in zip(curve, whole[saved_by], strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), f"{saved_by} -> {now}"


def alone(rank: int, world: int, folder: Path) -> None:
    """What needs one process with an engine."""
    ranks = launch.start()
    recipe = small_recipe(**{"run": str(folder / "run"), "deepspeed_config": config_file(folder, 2)})
    trainer = build_trainer(recipe, ranks)
    the_moment_it_was_asked_for(trainer, folder)
    a_damaged_one_gives_way(trainer, folder)


def the_moment_it_was_asked_for(trainer: Trainer, folder: Path) -> None:
    """Training changes the weights while the thread has not begun to write."""
    one_step(trainer, 0)
    saver, may_write = saver_of(trainer), threading.Event()
    write = checkpoint.write_tensors

    def later(path: Path, *rest: Any) -> Written:
        assert may_write.wait(60)
        return write(path, *rest)

    before = {piece.name: piece.tensor.clone() for piece in trainer.state.pieces() if piece.kind == "weight"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", later)
        saver.begin(trainer.state, Progress(1, trainer.usage), {})
        assert saver.writing
        one_step(trainer, 1)
        saver.follow(others_write=True)
        assert not complete_checkpoints(trainer.recipe.run)
        may_write.set()
        final = saver.settle()
    assert final is not None and complete_checkpoints(trainer.recipe.run) == [final] and not saver.writing
    written = load_file(final / "rank-00000.safetensors")
    pieces = trainer.state.pieces()
    for i, piece in enumerate(pieces):
        if piece.kind == "weight":
            assert torch.equal(written[f"{i}"], before[piece.name]), piece.name
    assert any(not torch.equal(p.tensor, before[p.name]) for p in pieces if p.kind == "weight"), "training went on"
    assert len(saver.pauses) == 1 and saver.pauses[0] < 60
    assert saver.summary().startswith("1 checkpoint: training paused 0.")


def a_damaged_one_gives_way(trainer: Trainer, folder: Path) -> None:
    """The newest of two is spoilt: told, put aside, and the one before is used."""
    run = trainer.recipe.run
    save(trainer, 2)
    part = folder_of(run, 2) / "rank-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 16
    part.write_bytes(data)
    assert resume(build_trainer(trainer.recipe, trainer.ranks)) == 1
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["damaged-step-00000002", "step-00000001"]
    assert resume(build_trainer(trainer.recipe, trainer.ranks)) == 1, "it is not looked at again"
    (folder_of(run, 1) / "state.json").unlink()
    for start in ("first", "again"):
        with pytest.raises(UserError, match=r"no checkpoint under .* is whole .*state.json cannot be read \(.*No such file"):
            resume(build_trainer(trainer.recipe, trainer.ranks))
        assert (run / "checkpoints/step-00000001").is_dir(), f"{start}: it does not begin anew"


def test_an_old_one_that_stays_does_not_spoil_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Network file systems refuse to remove a folder while somebody reads in it."""
    old, new = folder_of(tmp_path, 1), folder_of(tmp_path, 2)
    old.mkdir(parents=True)
    (old / "state.json").write_text("{}")
    checkpoint.partial_of(new).mkdir()
    remove = checkpoint._remove

    def busy(folder: Path) -> None:
        if folder == old:
            raise OSError(errno.EBUSY, "Device or resource busy")
        remove(folder)

    monkeypatch.setattr(checkpoint, "_remove", busy)
    checkpoint.publish(new, {}, [], keep=1)
    assert complete_checkpoints(tmp_path) == [old, new]
    assert f"old checkpoint {old} could not be removed ([Errno 16]" in capsys.readouterr().out


def on_a_slow_disk(rank: int, world: int, folder: Path) -> str:
    """Rank 0's two files take longer than the ranks may stand still; neither of them does."""
    recipe = small_recipe(**{"run": str(folder / "run"), "deepspeed_config": config_file(folder, 2), "parallel.ep_size": 2})
    trainer = build_trainer(recipe, launch.start(collective_timeout=5))
    saver, write = saver_of(trainer), checkpoint.write_tensors

    def slowly(path: Path, *rest: Any) -> Written:
        time.sleep(3.5)
        return write(path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", slowly)
        watchdog.tell(1, "saving")
        saver.begin(trainer.state, Progress(1, trainer.usage), {})
        final = saver.settle()
    watchdog.stop()
    return final.name if final is not None else ""


@pytest.mark.dist
def test_a_slow_disk_is_no_rank_that_hangs(tmp_path: Path) -> None:
    assert run_ranks(2, on_a_slow_disk, tmp_path) == ["step-00000001"] * 2


def without_words(rank: int, world: int, folder: Path) -> str:
    """Standard output lies on the disk that is full, too."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    trainer = build_trainer(
        small_recipe(**{"run": str(folder / "run"), "deepspeed_config": config_file(folder, 2)}), launch.start()
    )
    saver = saver_of(trainer)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        saver.begin(trainer.state, Progress(1, trainer.usage), {})
        return str(saver.settle())


@pytest.mark.dist
def test_a_full_disk_that_holds_the_log_too_ends_nothing(tmp_path: Path) -> None:
    assert run_ranks(1, without_words, tmp_path) == ["None"]


def saver_of(trainer: Trainer) -> Saver:
    return Saver(trainer.recipe.run, recipe_to_tree(trainer.recipe), trainer.ranks, keep=2)


@pytest.mark.dist
def test_what_is_written_and_what_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(1, alone, tmp_path)
    told = capfd.readouterr().out
    assert "rank-00000.safetensors differs from its checksum; put aside as " in told and "going on from the one before" in told


def on_a_disk_of_its_own(rank: int, world: int, folder: Path) -> str:
    """Rank 1 writes where rank 0 does not see it."""
    trainer = build_trainer(
        small_recipe(**{"run": str(folder / f"run-{rank}"), "deepspeed_config": config_file(folder, 2)}), launch.start()
    )
    saver = saver_of(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SEEN_SECONDS", 0.5)
        saver.begin(trainer.state, Progress(0, trainer.usage), {})
        return str(saver.settle())


@pytest.mark.dist
def test_ranks_that_do_not_share_the_run_folder_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, on_a_disk_of_its_own, tmp_path) == ["None", "None"]
    told = capfd.readouterr().out
    assert "rank 0 does not see rank-00001.safetensors" in told and "do all nodes share " in told


def on_a_full_disk(rank: int, world: int, folder: Path) -> list[str]:
    """Rank 1's disk is full once; then the folder cannot be given its name once; then all is well."""
    trainer = build_trainer(
        small_recipe(**{"run": str(folder / "run"), "deepspeed_config": config_file(folder, 2), "parallel.ep_size": 2}),
        launch.start(),
    )
    one_step(trainer, 0)
    saver, write, publish = saver_of(trainer), checkpoint.write_tensors, checkpoint.publish
    found = []
    for step, broken in ((1, ""), (2, "write_tensors"), (3, "publish"), (4, "")):

        def full(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            if broken and rank == (1 if broken == "write_tensors" else 0):
                patch.setattr(checkpoint, broken, full)
            saver.begin(trainer.state, Progress(step, trainer.usage), {})
            assert saver._writing is not None
            saver._writing.join()
            saver.follow(others_write=False)
            found.append(str(saver.settle()))
    assert (write, publish) == (checkpoint.write_tensors, checkpoint.publish)
    return [Path(name).name for name in found]


@pytest.mark.dist
def test_a_full_disk_is_told_and_training_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = run_ranks(2, on_a_full_disk, tmp_path)
    assert results == [["step-00000001", "None", "None", "step-00000004"]] * 2
    told = [line for line in capfd.readouterr().out.splitlines() if "could not be written" in line]
    assert len(told) == 2
    assert "rank 1: [Errno 28] No space left on device on " in told[0] and "the last good one is" in told[0]
    assert "step-00000001; going on" in told[0] and "step-00000003 could not be written" in told[1]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000001", "step-00000004"]


def voting(rank: int, world: int, recipe: Recipe) -> list[Votes]:
    """What every rank learns of the others' votes."""
    trainer = build_trainer(recipe, launch.start())
    learned = [trainer.agreed]
    for step, votes in enumerate((Votes(stop=rank == 1), Votes(due=rank == 0, writing=1.0), Votes())):
        trainer.votes = votes
        one_step(trainer, step)
        learned.append(trainer.agreed)
    return learned


@pytest.mark.dist
def test_every_rank_learns_what_one_has_to_say(tmp_path: Path) -> None:
    recipe = small_recipe(**{"deepspeed_config": config_file(tmp_path, 2), "train.accumulation": 2})
    expected = [Votes(), Votes(stop=1.0), Votes(due=1.0, writing=2.0), Votes()]
    assert run_ranks(2, voting, recipe) == [expected, expected]


def test_signals_are_noted_and_then_what_they_were(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with StopSignal() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            assert stop.asked
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)] == before
    early = stopped(7, 9, tmp_path / "step-00000007")
    assert isinstance(early, Stopped) and "after step 7 of 9" in str(early) and "the same command goes on" in str(early)
    assert isinstance(stopped(7, 9, None), UserError)


def test_images_per_step_stay_when_ranks_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks of 4 images were 8 a step: 2 each on four ranks, 4 on two with their own size, and 3 ranks cannot."""
    saved: dict[str, Any] = {"images": {"digits": 8, "scenes": 4, "textures": 4}}
    monkeypatch.setattr(checkpoint, "read_state", lambda folder: saved)
    recipe = small_recipe(**{"tasks.digits.batch_size": None, "tasks.digits.batch_size_per_rank": 4})
    four = with_same_batch(recipe, tmp_path, Ranks(0, 4))
    assert four.tasks["digits"].batch_size == 8 and four.tasks["digits"].batch_size_per_rank is None
    assert four.tasks["scenes"] == recipe.tasks["scenes"]
    assert "digits: 8 images a step as before, so 2 per rank" in capsys.readouterr().out
    assert with_same_batch(recipe, tmp_path, Ranks(0, 2)) == recipe
    with pytest.raises(UserError, match=r"digits had 8 images a step, which 3 ranks x 1 micro-batches cannot share evenly"):
        with_same_batch(recipe, tmp_path, Ranks(0, 3))
    explicit = small_recipe(**{"tasks.digits.batch_size": 12})
    assert with_same_batch(explicit, tmp_path, Ranks(0, 2)) == explicit, "a whole step's images are the user's word"


def test_all_tasks_of_a_set_keep_its_images_per_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those too that do not learn in this run: the recipe, which the model file keeps, can be read again."""
    monkeypatch.setattr(checkpoint, "read_state", lambda folder: {"images": {"normal": 8}})
    sets = {"views": {"data": "v", "batch_size_per_rank": 4, "transform": {"crop": [32, 32]}}}
    recipe = small_recipe(sets=sets, tasks={"sal": {"set": "views"}, "normal": {"set": "views"}}, only=["normal"])
    four = with_same_batch(recipe, tmp_path, Ranks(0, 4))
    assert [one.batch_size for one in (four.sets["views"], *four.tasks.values())] == [8, 8, 8]
    assert recipe_from_tree(recipe_to_tree(four), "again") == four
