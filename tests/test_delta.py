"""Delta-m: the published rows from their metrics, runs and tables, and one line for what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import run_command
from modsquad_ds.delta import PUBLISHED, compare, delta_m, print_delta_m, read_baseline, read_results
from modsquad_ds.errors import UserError
from modsquad_ds.targets import PASCAL_CONTEXT

TASKS = (("semseg", "mIoU"), ("normals", "mErr"), ("human_parts", "mIoU"), ("sal", "mIoU"), ("edge", "odsF"))
PERCENT = {"mIoU", "odsF"}


def table(folder: Path, name: str, rows: list[tuple[str, str, Any]]) -> str:
    """A CSV or JSON table, by the name's end."""
    path = folder / name
    if path.suffix == ".csv":
        path.write_text("\n".join(["task,metric,value", *(",".join(map(str, row)) for row in rows)]) + "\n")
    else:
        path.write_text(json.dumps({"rows": [dict(zip(("task", "metric", "value"), row, strict=True)) for row in rows]}))
    return str(path)


def pascal(folder: Path, name: str, *values: float) -> str:
    """A table of PASCAL-Context's five figures, as papers print them."""
    shares = [value / 100 if metric in PERCENT else value for (_, metric), value in zip(TASKS, values, strict=True)]
    return table(folder, name, [(*task, value) for task, value in zip(TASKS, shares, strict=True)])


def run_of(folder: Path, name: str, results: dict[str, dict[str, float | None]]) -> str:
    """A run folder with its evaluation only."""
    (folder / name).mkdir()
    (folder / name / "evaluation.json").write_text(json.dumps({**results, "untrained": {task: {} for task in results}}))
    return str(folder / name)


def test_delta_m_by_hand() -> None:
    values, baseline = {"a": 0.6, "b": 9.0, "c": 1.0}, {"a": 0.5, "b": 10.0, "c": 0.8}
    # +20 %, 10 % less where less is better, 25 % more where less is better.
    assert delta_m(values, baseline, {"a": True, "b": False, "c": False}) == pytest.approx((20 + 10 - 25) / 3)
    assert delta_m(baseline, baseline, dict.fromkeys("abc", True)) == 0


@pytest.mark.parametrize(("name", "row", "published"), [
    ("m3vit.csv", (72.8, 14.5, 62.1, 66.3, 71.7), "+2.71 %"), ("modsquad.json", (74.1, 13.7, 62.7, 66.9, 72.0), "+4.72 %"),
])  # fmt: skip
def test_the_command_gives_the_published_rows(name: str, row: tuple[float, ...], published: str, tmp_path: Path) -> None:
    found = run_command("delta-m", pascal(tmp_path, name, *row), "--against", "pascal_context", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line for line in lines if "delta-m" in line and published in line]
    assert all(any(task in line for line in lines) for task, _ in TASKS)
    assert max(map(len, lines)) <= 80


def test_the_published_table_has_the_tasks_headlines() -> None:
    results = read_results("pascal_context")
    assert {task: next(iter(metrics)) for task, metrics in results.items()} == {t.name: t.metrics[0] for t in PASCAL_CONTEXT}
    for path in PUBLISHED.glob("*.json"):
        assert "arXiv" in json.loads(path.read_text())["source"]


def test_gains_have_the_sign_that_makes_better_positive(tmp_path: Path) -> None:
    source = pascal(tmp_path, "all.csv", 66.2, 12.51, 59.9, 66.3, 34.4)
    gains = {one.task: one.gain for one in compare(read_results(source), read_results("pascal_context"), "a", "b")}
    assert gains == pytest.approx({"semseg": 0, "human_parts": 0, "sal": 0, "normals": 0.1, "edge": -0.5})


def test_single_task_runs_together_are_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = run_of(tmp_path, "both", {"depth": {"rmse": 0.9, "delta1": 0.5}, "digits": {"top1": 0.8, "top5": 1.0}})
    depth = run_of(tmp_path, "depth", {"depth": {"rmse": 1.0, "delta1": 0.9}})
    digits = run_of(tmp_path, "digits", {"digits": {"top1": 0.64}})
    assert list(read_baseline([depth, digits])) == ["depth", "digits"]
    print_delta_m([both, both], [depth, str(Path(digits) / "model.safetensors")])
    assert capsys.readouterr().out.count("+17.50 %") == 2  # (10 + 25) / 2, for each of the two
    print_delta_m([both], [depth], ["depth"])
    assert "+10.00 %" in capsys.readouterr().out


def test_a_runs_other_metrics_meet_a_tables(tmp_path: Path) -> None:
    run = run_of(tmp_path, "run", {"sal": {"mIoU": 0.6, "maxF": 0.88}})
    gains = compare(read_results(run), read_results(table(tmp_path, "t.csv", [("sal", "maxF", 0.8)])), "a", "b")
    assert [(one.metric, one.gain) for one in gains] == [("maxF", pytest.approx(0.1))]


@pytest.mark.parametrize(("results", "against", "message"), [
    ([("a", "mIoU", 0.5)], [("a", "mIoU", 0.5), ("b", "mIoU", 0.5)], "new.csv: no task b, which old.csv has, only a; choose"),
    ([("a", "mIoU", 0.5), ("b", "mIoU", 0.5)], [("a", "mIoU", 0.5)], "old.csv: no task b, which new.csv has, only a"),
    ([("a", "maxF", 0.5)], [("a", "mIoU", 0.5)], "new.csv: task a has maxF, expected mIoU as old.csv has"),
    ([("a", "mIoU", 0.5)], [("a", "mIoU", 0.0)], "old.csv: mIoU of task a is 0"),
    ([("a", "mAP", 0.5)], [("a", "mIoU", 0.5)], "new.csv: task a: unknown metric mAP; known are top1, "),
    ([("a", "mIoU", 66.2)], [("a", "mIoU", 0.5)], "new.csv: task a: mIoU 66.2; expected a share in [0, 1] (percent / 100)"),
    ([("a", "mErr", -1)], [("a", "mErr", 2)], "new.csv: task a: mErr -1.0; expected a number of degrees, at least 0"),
    ([("a", "L1", "nan")], [("a", "L1", 2)], "new.csv: task a: L1 nan; expected a number, at least 0"),
    ([("a", "L1", "inf")], [("a", "L1", 2)], "new.csv: task a: L1 inf; expected a finite number"),
    ([("a", "L1", "much")], [("a", "L1", 2)], "table new.csv: row 1: value 'much'; expected a number"),
    ([("a", "L1", 1), ("a", "L1", 2)], [("a", "L1", 2)], "table new.csv: row 2: a second row of task a"),
    ([("a", "L1")], [("a", "L1", 2)], "table new.csv: row 1: expected task, metric and value, found {"),
    ([], [("a", "L1", 2)], "table new.csv: has no rows"),
])  # fmt: skip
def test_what_cannot_be_compared(
    results: list[Any], against: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path, "new.csv", results), table(tmp_path, "old.csv", against)
    with pytest.raises(UserError) as caught:
        print_delta_m(["new.csv"], ["old.csv"])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path, "run", {"a": {"AP": None}}), (tmp_path / "empty").mkdir(), (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "evaluation.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff")
    table(tmp_path, "t.csv", [("a", "AP", 0.5)])
    for arguments, message in [
        ((["nowhere"], ["t.csv"]), "nowhere: expected a run folder, a model file, a table"),
        ((["no.csv"], ["t.csv"]), "table no.csv: no such file"),
        ((["empty"], ["t.csv"]), "run empty: no empty/evaluation.json; run `modsquad-ds evaluate empty` first"),
        ((["odd"], ["t.csv"]), "odd/evaluation.json: is not what `modsquad-ds evaluate` writes"),
        ((["bad.json"], ["t.csv"]), "bad.json: is no JSON file"),
        ((["list.json"], ["t.csv"]), "table list.json: expected {"),
        ((["picture.csv"], ["t.csv"]), "table picture.csv: is no CSV file"),
        ((["run"], ["t.csv"]), "run: no AP of task a: its data held nothing to measure"),
        ((["t.csv"], ["t.csv", "run"]), "--against run: has task a, as t.csv has; give one baseline for each task"),
        ((["t.csv"], ["t.csv"], ["b"]), "--task b: t.csv has a"),
    ]:
        with pytest.raises(UserError) as caught:
            print_delta_m(*arguments)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value), message


def test_a_mistake_is_exit_code_2(tmp_path: Path) -> None:
    found = run_command("delta-m", "pascal_context", "--against", "nowhere", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "") and found.stderr.startswith("error: nowhere: expected a run folder")
