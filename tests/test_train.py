"""The training step: weighted sampling and accumulation over ranks, averaged weights, the stop at a NaN or infinite loss."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modsquad_ds import train
from modsquad_ds.checkpoint import folder_of
from modsquad_ds.config import ParallelSpec, Recipe
from modsquad_ds.errors import UserError
from modsquad_ds.files import make_folder, writing_to
from modsquad_ds.objective import Report
from modsquad_ds.parallel import launch
from modsquad_ds.train import due
from modsquad_ds.trainer import Work, build_trainer, record_of, stop_if_not_finite, train_step
from ranks import run_ranks
from small import small_batch, small_recipe
from test_topology import config_file

TASKS = ("digits", "scenes", "textures")


def one_task_at_a_time(rank: int, world: int, recipe: Recipe) -> list[list[float]]:
    """Losses, information and known tasks over six steps of one task each."""
    trainer = build_trainer(recipe, launch.start())
    values = []
    for step in range(6):
        task = TASKS[(step * 2) % 3]
        batch = {task: small_batch(step, rank, world)[task]}
        report, work = train_step(trainer, iter([batch]), step)
        assert work.images == len(batch[task].keys) and work.tokens == work.images * (24 if task == "scenes" else 16)
        known = sum(row.sum().item() > 0.5 for row in trainer.usage[0].prob_TE)
        values.append([report.total.item(), *report.task_T.tolist(), *report.information_L.tolist(), known])
    return values


@pytest.mark.dist
def test_weighted_sampling_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    """Heads of absent tasks get no gradient on any rank; ZeRO-2 and the joint with remembered rows must bear that."""
    changes = {"train.sampling": "weighted", "deepspeed_config": config_file(tmp_path, 2), "train.optimizer.clip": 1.0}
    alone = run_ranks(1, one_task_at_a_time, small_recipe(**changes))[0]
    spread = small_recipe(**changes, **{"parallel.ep_size": 2, "parallel.attention_ep_size": 2})
    for found, expected in zip(run_ranks(2, one_task_at_a_time, spread)[0], alone, strict=True):
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert [row[-1] for row in alone] == [1, 2, 3, 3, 3, 3]
    assert alone[0][1] > 0 and alone[0][2] == alone[0][3] == 0, "only the step's task has a loss"
    assert alone[0][4] == pytest.approx(0, abs=1e-6), "one known task gives no information"
    assert alone[3][4] > 0


def accumulated(rank: int, world: int, recipe: Recipe, parts: int) -> dict[str, torch.Tensor]:
    """Weights and their average after two steps of classification alone, cut into micro-batches."""
    trainer = build_trainer(recipe, launch.start())
    averages = [{n: a.clone() for n, a in trainer.average.items()}]
    for step in range(2):
        micro = [{"digits": small_batch(step, i, parts)["digits"]} for i in range(parts)]
        train_step(trainer, iter(micro), step)
        averages.append({n: a.clone() for n, a in trainer.average.items()})
        for name, weight in trainer.network.named_parameters():
            by_hand = averages[-2][name] + 0.25 * (weight.detach() - averages[-2][name])
            assert torch.allclose(averages[-1][name], by_hand, atol=1e-7), name
    return {n: p.detach().clone() for n, p in trainer.network.named_parameters()}


def test_accumulation_is_one_large_batch_and_the_average_follows(tmp_path: Path) -> None:
    """With one mean-reduced task and no routing losses, two half micro-batches are one whole batch."""
    changes = {
        "deepspeed_config": config_file(tmp_path, 1), "only": ["digits"], "train.ema": 0.75,
        "loss": {"mutual_information": 0.0},
    }  # fmt: skip
    whole = run_ranks(1, accumulated, small_recipe(**changes), 1)[0]
    halves = run_ranks(1, accumulated, small_recipe(**changes, **{"train.accumulation": 2}), 2)[0]
    for name, weight in whole.items():
        assert torch.allclose(halves[name], weight, atol=2e-6), name


def fake_trainer(run: Path, clip_norm: float = 2.5, capacity_factor: float | None = None) -> Any:
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.125}]), get_global_grad_norm=lambda: torch.tensor(clip_norm)
    )
    return SimpleNamespace(
        recipe=SimpleNamespace(run=run, parallel=ParallelSpec(capacity_factor=capacity_factor)),
        ranks=SimpleNamespace(world=2), network=SimpleNamespace(task_names=TASKS), engine=engine,
    )  # fmt: skip


def report(total: float, per_task: list[float], present: list[float]) -> Report:
    t = torch.tensor
    return Report(t(total), t(per_task), t(present), t([0.25, 0.5]), t([1.0, 1.5]), t([0.125, 0.0, 0.5]))


def test_a_record_holds_what_happened_and_absent_tasks_do_not(tmp_path: Path) -> None:
    record = record_of(fake_trainer(tmp_path), report(3.0, [1.0, 0.0, 2.0], [1, 0, 1]), Work(16, 320, 0.5), 7, 2.0)
    assert record == {
        "step": 7, "loss": 3.0, "loss/digits": 1.0, "loss/textures": 2.0, "information/0": 0.25, "information/1": 0.5,
        "balance/0": 1.0, "balance/1": 1.5, "lr": 0.125, "grad_norm": 2.5, "seconds": 2.0, "data_seconds": 0.5,
        "images_per_s": 16.0, "tokens_per_s": 320.0,
    }  # fmt: skip
    limited = fake_trainer(tmp_path, capacity_factor=1.5)
    again = record_of(limited, report(3.0, [1.0, 0.0, 2.0], [1, 0, 1]), Work(16, 320, 0.5), 7, 2.0)
    assert again == {**record, "dropped/digits": 0.125, "dropped/textures": 0.5}, "only with a capacity, of tasks that are there"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value: float, tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path)
    record = record_of(trainer, report(value, [1.0, value, 2.0], [1, 1, 1]), Work(16, 320, 0.5), 7, 2.0)
    with pytest.raises(UserError, match=r"step 7: .*task scenes.*last good checkpoint: none"):
        stop_if_not_finite(trainer, record)
    good = folder_of(tmp_path, 4)
    good.mkdir(parents=True)
    (good / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"last good checkpoint: .*step-00000004"):
        stop_if_not_finite(trainer, record)
    finite = {**record, "loss": 1.0, "loss/scenes": 1.0}
    stop_if_not_finite(trainer, finite)
    with pytest.raises(UserError, match="gradient norm inf"):
        stop_if_not_finite(trainer, {**finite, "grad_norm": float("inf")})


def test_the_checkpoint_on_its_way_is_finished_before_a_loss_that_is_not_finite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the last good one, and the run's last words name it."""
    trainer = fake_trainer(tmp_path)
    trainer.recipe.train = SimpleNamespace(steps=9, workers=0, checkpoint_minutes=0, accumulation=1)
    trainer.recipe.adapt = SimpleNamespace(prune=None)
    nan = {"step": 5, "loss": float("nan"), "grad_norm": 1.0}
    monkeypatch.setattr(train, "train_loader", lambda *_: [])
    monkeypatch.setattr(train, "train_step", lambda *_: (None, None))
    monkeypatch.setattr(train, "record_of", lambda *_: nan)

    def settle() -> None:
        folder_of(tmp_path, 4).mkdir(parents=True)
        (folder_of(tmp_path, 4) / "state.json").write_text("{}")

    saver: Any = SimpleNamespace(writing=True, pauses=[], settle=settle)
    plan: Any = SimpleNamespace(tasks={})
    with pytest.raises(UserError, match=r"step 5: .*last good checkpoint: .*step-00000004"):
        train.loop(trainer, plan, 4, saver, SimpleNamespace(asked=False), None)  # type: ignore[arg-type]


def test_a_run_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run .*/file: cannot be written to \(File exists\); give another folder"):
        make_folder(tmp_path / "file", "run")
    with pytest.raises(UserError, match=r"run .*/file/run: cannot be written to \(Not a directory\)"):
        make_folder(tmp_path / "file" / "run", "run")
    make_folder(tmp_path / "a" / "b", "run")
    make_folder(tmp_path / "a" / "b", "run")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_disk_that_is_full_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    message = r"model.safetensors: cannot be written \(No space left on device\); make room or give another folder"
    with pytest.raises(UserError, match=message), writing_to(path) as given:
        assert given == path
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_due() -> None:
    assert [due(step, 3, 7) for step in range(1, 8)] == [False, False, True, False, False, True, True]
    assert [due(step, 0, 2) for step in (1, 2)] == [False, True]
