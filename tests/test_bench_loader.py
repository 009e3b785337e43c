"""The loader's benchmark: rows say what was done, the peer decodes the files that the pipeline read, mistakes are one line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from modsquad_ds import cli
from modsquad_ds.bench import loader as bench
from modsquad_ds.bench import loader_profile as profile
from modsquad_ds.bench.photos import LOOKS, write_shards
from modsquad_ds.config import load_recipe
from modsquad_ds.data.decode import decode_rgb
from modsquad_ds.data.loader import StepDataset
from modsquad_ds.data.loader_plan import LoaderPlan
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.errors import UserError
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from test_cli import run

SMALL = ["tasks.imagenet.batch_size_per_rank=2", "tasks.coco.transform.canvases=[[64,96],[96,64]]"]
CASES = ["imagenet, plain", "imagenet", "coco", "ade20k, plain", "ade20k"]
CASES += ["imagenet, plain, worker", "all tasks", "all tasks, worker"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_shards(folder, images=6)
    return folder / "shards"


def plan_of(shards: Path) -> LoaderPlan:
    return loader_plan(load_recipe("heterogeneous", [f"data_root={shards}", *SMALL]), Ranks())


def keys_read(case: bench.Case) -> list[str]:
    """Keys of a case's samples, as its batches name them."""
    dataset = StepDataset(case.plan)
    return [f"{task}/{key}" for step in case.steps for task, sub in dataset[step].items() for key in sub.keys]


def files_by_key(shards: Path) -> dict[str, bytes]:
    found = {}
    for task in LOOKS:
        store = ShardSet(shards / task / "train")
        samples = [store.read(shard, place) for shard, size in enumerate(store.shard_sizes) for place in range(size)]
        found |= {f"{task}/{sample.key}": sample.fields["jpg"] for sample in samples}
    return found


def test_peer_decodes_what_the_pipeline_reads(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def watch(data: Tensor, *_: Any) -> None:
        decoded.append(bytes(data.numpy()))

    files = files_by_key(shards)
    cases = list(bench.cases_of(plan_of(shards), images=3))
    assert [case.name for case in cases] == CASES
    for case in cases:
        bench.record_files(case)
        assert case.files == [files[key] for key in keys_read(case)]
        assert sum(len(sub.images_BCHW) for sub in case.batches) == len(case.files)
        with monkeypatch.context() as patch:
            patch.setattr(bench, "decode_image", watch)
            decoded.clear()
            bench.decoder(case.files)()
        assert decoded == case.files


def test_rows_hold_what_they_claim(shards: Path) -> None:
    rows = bench.measure_loader("heterogeneous", [f"data_root={shards}", *SMALL], images=3, repeat=1, show=False)
    assert [row["case"] for row in rows] == CASES
    for row, case in zip(rows, bench.cases_of(plan_of(shards), images=3), strict=True):
        assert row["images"] == len(keys_read(case)) >= 3 and row["workers"] == ("worker" in row["case"])
        assert row["ratio"] == pytest.approx(row["images_per_s"] / row["peer_images_per_s"])
        assert row["finish_ms"] > 0 and 0 < row["ratio_finished"] < row["ratio"]
        assert row["ratio"] > 0  # a round of three images on a busy machine tells no more
        assert ("RandAugment" in row["beyond"], "distortion" in row["beyond"]) == (
            row["case"] == "imagenet",
            row["case"] == "ade20k",
        )
    assert [rows[0]["pixels"], rows[2]["pixels"], rows[4]["pixels"]] == ["375 x 500", "480 x 640", "512 x 683"]


def test_a_case_that_times_itself_is_believed() -> None:
    seconds = bench.interleave({"told": lambda: bench.Seconds(5.0), "timed": lambda: None}, 2, show=False)
    assert seconds["told"] == [5.0, 5.0] and max(seconds["timed"]) < 1


def test_photographs_have_the_sizes_of_the_sets(shards: Path) -> None:
    for task, look in LOOKS.items():
        files = [data for key, data in files_by_key(shards).items() if key.startswith(task)]
        assert len(set(files)) == 6
        assert {decode_rgb(data).shape for data in files} == {(3, look.height, look.width)}
        assert 0.6 * look.kilobytes < sum(map(len, files)) / 6000 < 1.3 * look.kilobytes


def test_without_a_recipe_photographs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FILES", 4)
    rows = bench.measure_loader(None, SMALL, images=1, repeat=1, show=False)
    assert [row["case"] for row in rows] == CASES


def test_command_prints_and_writes_rows(shards: Path, tmp_path: Path) -> None:
    arguments = ["heterogeneous", f"data_root={shards}", *SMALL, "only=[imagenet]"]
    found = run("bench", "loader", *arguments, "--images", "1", "--repeat", "1", "--json", "rows.json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in rows] == ["imagenet, plain", "imagenet", "imagenet, plain, worker"]
    assert all(row["bench"] == "loader" and row["torch"] for row in rows)
    assert all(row["beyond"] in found.stdout for row in rows)


# ---------------------------------------------------------------- profile


def test_the_clock_splits_time_up_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 11.0, 13.0, 17.0])
    monkeypatch.setattr(profile.time, "process_time", lambda: next(now))
    clock = profile.Clock()
    for part in (profile.READ, profile.DECODED, profile.READ):
        clock.tell(part)
    assert {part: spent for part, spent in clock.spent.items() if spent} == {profile.READ: 1.0 + 4.0, profile.DECODED: 2.0}


def test_rows_of_a_profile_by_hand() -> None:
    rounds = [dict.fromkeys(profile.PARTS, 2e-3) | {profile.WHOLE: whole} for whole in (3e-3, 5e-3, 4e-3)]
    rows = {row["part"]: row for row in profile.rows_of(rounds, images=2)}
    assert tuple(rows) == profile.PARTS
    whole = rows[profile.WHOLE]
    assert [whole[f"microseconds{end}"] for end in ("", "_min", "_max")] == pytest.approx([2000, 1500, 2500])
    assert whole["ratio"] == pytest.approx(2.0) and rows[profile.BARE]["ratio"] == 1.0


def test_profile_command_times_every_part_and_writes_rows(shards: Path, tmp_path: Path) -> None:
    """That the batches whose parts are timed are the loader's is checked by the command itself."""
    file = tmp_path / "rows.json"
    arguments = ["bench", "loader", "heterogeneous", f"data_root={shards}", *SMALL, "--images", "3", "--repeat", "1"]
    found = CliRunner().invoke(cli.app, [*arguments, "--profile", "--json", str(file)])
    assert found.exit_code == 0, found.output
    rows = {row["part"]: row for row in json.loads(file.read_text())}
    assert tuple(rows) == profile.PARTS and all(part in found.output for part in rows)
    assert min(row["microseconds"] for row in rows.values()) > 0
    assert {(row["bench"], row["case"], row["images"]) for row in rows.values()} == {("loader --profile", "imagenet, plain", 4)}
    assert sum(rows[part]["microseconds"] for part in profile.STAGES) == pytest.approx(rows[profile.SUM]["microseconds"])
    assert "--profile" in CliRunner().invoke(cli.app, ["bench", "loader", "--help"], env={"COLUMNS": "200"}).output


def test_profile_of_something_else_than_the_loader_is_noticed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "contiguous", lambda image: image.flip(-1))
    with pytest.raises(AssertionError, match="no longer does what the loader does"):
        profile.profile_loader("heterogeneous", [f"data_root={shards}", *SMALL], images=1, repeat=1)


def test_profile_needs_a_classification_task(shards: Path) -> None:
    with pytest.raises(UserError, match="--profile: takes the loading of a classification task apart, and the recipe has none"):
        profile.profile_loader("heterogeneous", [f"data_root={shards}", "only=[coco]"], images=1, repeat=1)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: recipe nothing: no such file"),
        (["quickstart", "data_root=nowhere"], "error: shard folder nowhere/digits/train does not exist"),
        (["heterogeneous", "tasks.coco.scale=1"], "error: recipe heterogeneous: tasks.coco"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: Sequence[str], message: str, tmp_path: Path) -> None:
    found = run("bench", "loader", *arguments, cwd=tmp_path)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.startswith(message) and len(found.stderr.splitlines()) == 1
