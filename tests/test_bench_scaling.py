"""The scaling benchmark: sizes and rows by hand, a real sweep on 1 and 2 ranks, and jobs of a stand-in for Slurm."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from layouts import made
from modsquad_ds.bench import options, scaling, scaling_table, slurm
from modsquad_ds.bench.jobs import JobError
from modsquad_ds.bench.routing import Load
from modsquad_ds.bench.scaling_step import like_steps, rows_of
from modsquad_ds.data.order import TaskSchedule
from modsquad_ds.data.transforms import TRANSFORMS
from modsquad_ds.errors import UserError
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from small import small_recipe, small_tree


def sweep_of(out: Path, ranks: tuple[int, ...] = (1, 2), **changes: Any) -> scaling.Sweep:
    modes = ("weak", "strong")
    return scaling.Sweep(small_recipe(**changes), ranks, modes, growing=False, steps=3, trained=None, out=out)


# ---------------------------------------------------------------- sizes


def test_weak_keeps_images_per_rank_and_strong_images_in_all() -> None:
    per_rank = {"tasks.scenes.batch_size": None, "tasks.scenes.batch_size_per_rank": 6, "train.accumulation": 2}
    recipe = small_recipe(**per_rank, **{"parallel.ep_size": 4, "tasks.textures.batch_size": 12, "tasks.digits.batch_size": 24})
    images = {}
    for mode in ("weak", "strong"):
        tree = scaling.tree_at(recipe, 6, 2, mode, growing=False)
        images[mode] = [tree["tasks"][task]["batch_size"] for task in ("digits", "scenes", "textures")]
        assert tree["parallel"]["ep_size"] == 2  # the largest divisor of 4 that divides 6
    # scenes: 6 a rank and micro-batch, on the smallest 2 ranks.
    assert images == {"weak": [72, 72, 36], "strong": [24, 24, 12]}
    assert scaling.tree_at(recipe, 4, 2, "weak", growing=True)["parallel"]["ep_size"] == 4


@pytest.mark.parametrize(
    ("ranks", "smallest", "mode", "growing", "changes", "message"),
    [
        (3, 1, "strong", False, {}, "tasks.digits.batch_size: 8 images cannot be divided over 3 ranks"),
        (3, 2, "weak", False, {"tasks.digits.batch_size": 9}, "9 images on 2 ranks do not grow to whole images on 3"),
        (3, 1, "weak", True, {}, "parallel.ep_size 3 does not divide the 4 experts"),
    ],
)
def test_size_that_cannot_be_divided_is_refused(
    ranks: int, smallest: int, mode: str, growing: bool, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        scaling.tree_at(small_recipe(**changes), ranks, smallest, mode, growing)


def test_smallest_size_is_one_job_for_both_modes(tmp_path: Path) -> None:
    sizes = scaling.sizes_of(sweep_of(tmp_path, (1, 2, 3)))
    assert [(size.ranks, size.modes, bool(size.refused)) for size in sizes] == [
        (1, ("weak", "strong"), False), (2, ("weak",), False), (2, ("strong",), False),
        (3, ("weak",), False), (3, ("strong",), True),
    ]  # fmt: skip


def test_steps_of_a_round_have_the_same_tasks_and_canvases() -> None:
    weights = {"tasks.digits.sampling_weight": 3.0, "tasks.scenes.transform.canvases": [[32, 48], [48, 32]]}
    plan = loader_plan(small_recipe(**weights, **{"train.sampling": "weighted"}), Ranks())
    steps = like_steps(plan, rounds=100, cases=4)
    assert len(set(steps)) == len(steps) == 400
    schedule = TaskSchedule("weighted", plan.seed, {name: spec.sampling_weight for name, spec in plan.tasks.items()})
    active = [schedule.active(step) for step in steps]
    assert all(len(set(active[i : i + 4])) == 1 for i in range(0, 400, 4))
    # As often as the recipe draws them: 3 of 5.
    assert 0.5 < [tuple(tasks) for tasks in active].count(("digits",)) / 400 < 0.7
    canvas = TRANSFORMS["detection"].canvas
    spec = plan.tasks["scenes"].transform
    rounds = [{canvas(spec, plan.seed, "scenes", step) for step in steps[i : i + 4]} for i in range(0, 400, 4)]
    assert {len(found) for place, found in enumerate(rounds) if tuple(active[4 * place]) == ("scenes",)} == {1}


# ---------------------------------------------------------------- rows


def steps_of(seconds: float, images: int = 8, slower: float = 1.0) -> dict[str, list[dict[str, float]]]:
    """One rank's measurements: 3 steps of each kind."""
    timed = [{"seconds": seconds * f, "waited": 0.1, "images": images, "tokens": 16 * images} for f in (1.0, 1.2, 0.9)]
    parts = {"waited": 0.2, "all_to_all": 0.1, "reduction": 0.3, "sums": 0.05, "all_to_all_bytes": 64, "reduction_bytes": 32}
    counted = [step | parts | {"seconds": 2.0} for step in timed]
    learned = [step | {"seconds": step["seconds"] * slower} for step in timed]
    return {"learned timed": learned, "learned counted": counted, "balanced timed": timed, "balanced counted": counted}


def test_rows_are_those_worked_out_by_hand() -> None:
    by_rank = [steps_of(1.0, slower=1.5), steps_of(2.0, slower=1.5)]
    learned, balanced = rows_of(by_rank, {"learned": Load(1.3, 1.6), "balanced": None})
    assert (learned["routing"], balanced["routing"]) == ("learned", "balanced")
    assert balanced["seconds"] == pytest.approx(1.5)  # ranks' steps take 1.5, 1.8 and 1.35 s on average
    assert (balanced["seconds_min"], balanced["seconds_max"]) == pytest.approx((1.35, 1.8))
    assert balanced["images_per_s"] == pytest.approx(16 / 1.5) and balanced["tokens_per_s_per_rank"] == pytest.approx(128 / 1.5)
    assert learned["ratio_to_balanced"] == pytest.approx(1.5) and learned["images_per_s"] == pytest.approx(16 / 2.25)
    assert (learned["rows_max_mean"], learned["rows_max_mean_worst"], balanced["rows_max_mean"]) == (1.3, 1.6, None)
    names = ("data", "all_to_all", "reduction", "sums", "compute")
    assert [learned[f"share_{name}"] for name in names] == pytest.approx([0.1, 0.05, 0.15, 0.025, 0.675])
    assert (learned["all_to_all_bytes"], learned["reduction_bytes"]) == (64, 32)


def test_rates_of_uneven_steps_are_all_work_over_all_time() -> None:
    steps = steps_of(1.0)
    steps["balanced timed"][0] = {"seconds": 10.0, "waited": 0.0, "images": 2, "tokens": 2}
    row = rows_of([steps], {"learned": None, "balanced": None})[1]
    assert row["images_per_s"] == pytest.approx((2 + 8 + 8) / (10.0 + 1.2 + 0.9))


def test_efficiency_is_against_the_smallest_size_that_was_measured() -> None:
    def row(ranks: int, rate: float, error: str | None = None) -> dict[str, Any]:
        kept = {"images_per_s_per_rank": rate, "routing": "learned"} if error is None else {}
        return {"mode": "weak", "ranks": ranks, "error": error, **kept}

    rows = scaling.with_efficiency([row(4, 6.0), row(2, 8.0), row(1, 0.0, "broken")])
    assert [(r["ranks"], r.get("efficiency"), r.get("efficiency_base_ranks")) for r in rows] == [
        (1, None, None), (2, 1.0, 2), (4, 0.75, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("bench scaling ended:\n  rank 1: error: no shard\n  error: no shard\n", "no shard"),
        ("job ended:\n  Traceback\n  RuntimeError: out of memory\n", "job ended: RuntimeError: out of memory"),
        ("sbatch: no such partition", "sbatch: no such partition"),
    ],
)
def test_reason_is_one_line(text: str, line: str) -> None:
    assert scaling.reason(text) == line


# ---------------------------------------------------------------- whole sweeps


def classification_recipe(folder: Path) -> str:
    """YAML of a small recipe on 8 images of two classes."""
    data = made("imagenet", folder).parent
    tree = small_tree()
    task = tree["tasks"]["digits"] | {"data": str(data), "num_classes": 2, "batch_size": 4}
    tree |= {"tasks": {"digits": task}, "parallel": {"ep_size": 2}, "loss": {}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.dist
def test_sweep_on_1_and_2_ranks_and_its_second_life(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = classification_recipe(tmp_path), tmp_path / "out"

    def run(steps: int = 2) -> list[dict[str, Any]]:
        scaling_table.run(recipe, [], "3,1,2", "", "strong", "fixed", steps, False, 3.0, out, tmp_path / "rows.json")
        return json.loads((out / "scaling.json").read_text())

    rows = run()
    assert [(r["ranks"], r.get("routing"), r.get("ep_size"), r.get("images")) for r in rows] == [
        (1, "learned", 1, 4), (1, "balanced", 1, 4), (2, "learned", 2, 4), (2, "balanced", 2, 4), (3, None, None, None),
    ]  # fmt: skip
    assert "4 images cannot be divided over 3 ranks" in rows[-1]["error"]
    for row in rows[:-1]:
        shares = [value for key, value in row.items() if key.startswith("share_")]
        assert len(shares) == 5 and sum(shares) == pytest.approx(1) and min(shares) >= 0
        assert row["images_per_s"] == pytest.approx(row["images"] / row["seconds"])
        assert row["images_per_s_per_rank"] == pytest.approx(row["images_per_s"] / row["ranks"])
        assert row["tokens"] == 4 * 16
    assert rows[0]["efficiency"] == rows[1]["efficiency"] == 1 and rows[0]["share_all_to_all"] == 0
    assert rows[2]["share_all_to_all"] > 0 and rows[2]["rows_max_mean"] >= 1 and rows[3]["rows_max_mean"] == 1
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert len((out / "scaling.csv").read_text().splitlines()) == 1 + len(rows)
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert sum(" learned " in line for line in lines) == sum(" balanced " in line for line in lines) == 2 * 2
    assert max(len(line) for line in lines if " learned " in line) <= 100

    def no_job(*_: Any) -> Any:
        raise JobError("bench scaling ended:\n  error: the machine is gone")

    monkeypatch.setattr(scaling, "run_job", no_job)
    assert run() == rows
    assert "as measured before" in capsys.readouterr().out
    with pytest.raises(UserError, match="no size could be measured"):
        run(steps=3)  # another measurement, whose jobs fail


def test_size_whose_job_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_job(_: str, arguments: dict[str, Any], ranks: int, __: float) -> list[dict[str, Any]]:
        if ranks == 2:
            raise JobError("bench scaling on 2 rank(s) took longer than 5 s; its last lines:\n  waiting")
        return fake_rows(ranks)

    monkeypatch.setattr(scaling, "run_job", run_job)
    rows = scaling.run_local(sweep_of(tmp_path, (1, 2, 4)), 5.0, lambda _: None)
    found = [(r["mode"], r["ranks"], r["error"]) for r in rows if r.get("routing") != "balanced"]
    late = "bench scaling on 2 rank(s) took longer than 5 s; its last lines: waiting"
    assert found == [(mode, ranks, late if ranks == 2 else None) for mode in ("weak", "strong") for ranks in (1, 2, 4)]


def fake_rows(ranks: int) -> list[dict[str, Any]]:
    """Rows as scaling_step.measure leaves them, as far as tables and plots read them."""
    rows = rows_of([steps_of(1.0)] * ranks, {"learned": None, "balanced": None})
    return [{**row, "ranks": ranks, "ep_size": 1, "device": "a device", "steps": 3} for row in rows]


# ---------------------------------------------------------------- Slurm

SBATCH = """#!/bin/bash
echo "sbatch $*" >>"$CALLS"
[[ $* == *--nodes=4* ]] && { echo "sbatch: error: Node count specification invalid" >&2; exit 1; }
for last; do [[ $last == *.arguments.json ]] && files+=("$last"); done
ranks="$(basename "${files[0]}" | cut -d- -f1)"
# The first size of a job gets its rows; of two nodes the second fails.
cp "$ROWS/$ranks.json" "${files[0]%.arguments.json}.rows.json"
[[ ${#files[@]} == 1 ]] || echo "error: out of memory" >"${files[1]%.arguments.json}.log"
echo "1$ranks;cluster"
"""
SCONTROL = """#!/bin/bash
echo "JobId=$4 JobName=modsquad-bench JobState=$([[ $4 == 11 ]] && echo COMPLETED || echo FAILED) Reason=None"
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's programs; the file tells their calls."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for ranks in (1, 2):
        (tmp_path / f"{ranks}.json").write_text(json.dumps(fake_rows(ranks)))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("ROWS", str(tmp_path))
    return tmp_path / "calls"


def test_slurm_gets_a_job_per_number_of_nodes_and_each_size_its_rows_or_reason(tmp_path: Path, calls: Path) -> None:
    cluster, told = slurm.cluster_of("--ntasks-per-node=1 --time=5"), list[str]()
    sweep = sweep_of(tmp_path / "out", (1, 2, 4))
    rows = scaling.run_slurm(sweep, cluster, told.append, every=0.01, patience=0.0)
    errors = {(row["mode"], row["nodes"]): row["error"] for row in rows}
    refused = "sbatch with 4 node(s): sbatch: error: Node count specification invalid"
    assert errors == {
        ("weak", 1): None, ("weak", 2): None, ("weak", 4): refused,
        ("strong", 1): None, ("strong", 2): "out of memory", ("strong", 4): refused,
    }  # fmt: skip
    (one, two, four) = calls.read_text().splitlines()
    sizes = tmp_path / "out/sizes"
    first = f"sbatch --parsable --ntasks-per-node=1 --time=5 --nodes=1 --output={sizes}/nodes-1-%j.log slurm/bench.sbatch scaling"
    assert one.startswith(f"{first} {sizes}/1-") and len(two.split()) == len(one.split()) + 1 == len(four.split())
    assert any(line.startswith("job 11, 1 node(s): completed") for line in told)

    # Again: only what has no rows is submitted.
    calls.write_text("")
    scaling.run_slurm(sweep, cluster, told.append, every=0.01, patience=0.0)
    assert ["--nodes=2" in line for line in calls.read_text().splitlines()] == [True, False]


def test_job_that_still_runs_is_not_submitted_twice(tmp_path: Path, calls: Path) -> None:
    cluster, files = slurm.cluster_of("--ntasks-per-node 2"), [tmp_path / "2-a.arguments.json"]
    assert cluster.ranks == 2
    running = tmp_path / "programs/scontrol"
    running.write_text(SCONTROL.replace("COMPLETED", "RUNNING").replace("FAILED", "RUNNING"))
    first = slurm.submit(cluster, 1, files)
    assert slurm.submit(cluster, 1, files) == first == slurm.Job("12", 1, tuple(files))
    assert len(calls.read_text().splitlines()) == 1
    running.write_text("#!/bin/bash\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    assert slurm.state_of("12") == "COMPLETED"
    running.write_text("#!/bin/bash\necho 'slurm_load_jobs error: Socket timed out' >&2; exit 1\n")
    assert slurm.state_of("12") == "UNKNOWN"


@pytest.mark.parametrize("options", ["--gpus-per-node=8", "--ntasks-per-node=0", "--ntasks-per-node"])
def test_cluster_without_a_number_of_tasks_is_refused(options: str) -> None:
    with pytest.raises(UserError, match="no --ntasks-per-node"):
        slurm.cluster_of(options)


@pytest.mark.parametrize("text", ["", "0", "1,x", "1.5", "-1"])
def test_sizes_are_whole_numbers(text: str) -> None:
    with pytest.raises(UserError, match="expected whole numbers"):
        options.numbers("--ranks", text)
    assert options.numbers("--ranks", "4, 1,2,1") == (1, 2, 4)


def test_refused_sizes_of_the_same_ranks_are_told_apart(tmp_path: Path) -> None:
    """Weak and strong may be refused for different reasons, and neither may take the other's place on disk."""
    store = scaling.Store(tmp_path, {})
    weak, strong = (scaling.Size(3, (mode,), {}, f"{mode} does not divide") for mode in scaling.MODES)
    assert store.path(weak, "arguments") != store.path(strong, "arguments")
