"""The table at the end of tools/multilabel.sh: delta-m by hand, seeds and their spread, an exit code that says who is ahead."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "tools" / "multilabel_table.py"
SPEC = importlib.util.spec_from_file_location("multilabel_table", PATH)
assert SPEC is not None and SPEC.loader is not None
TABLE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TABLE)


def evaluated(run: Path, **tasks: dict[str, float]) -> None:
    run.mkdir(parents=True)
    untrained = {task: dict.fromkeys(metrics, 0.5) for task, metrics in tasks.items()}
    (run / "evaluation.json").write_text(json.dumps({**tasks, "untrained": untrained}))


def both(mErr: float, pair_acc: float) -> dict[str, dict[str, float]]:
    return {"normal": {"mErr": mErr}, "segment_unsup2d": {"pair_acc": pair_acc}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    evaluated(tmp_path / "single-normal", normal={"mErr": 50.0})
    evaluated(tmp_path / "single-segment_unsup2d", segment_unsup2d={"pair_acc": 0.5})
    evaluated(tmp_path / "dense-0", **both(45.0, 0.5))
    evaluated(tmp_path / "sparse-0", **both(40.0, 0.5))
    evaluated(tmp_path / "sparse-1", **both(50.0, 0.6))
    return tmp_path


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["multilabel_table.py", *map(str, arguments)])
    return int(TABLE.main())


def test_delta_m_by_hand(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, runs) == 0
    printed = capsys.readouterr().out
    # Angles: 45 is 10 % better than 50, 40 is 20 %. Pairs: 0.6 is 20 % better than 0.5. Two tasks, so half of the sum.
    assert json.loads((runs / "table.json").read_text())["delta_m"] == {"dense": [5.0], "sparse": [10.0, pytest.approx(10.0)]}
    assert printed.splitlines() == [
        "| task | metric | better | one model per task | dense, 1 seed | sparse, 2 seeds |",
        "|---|---|---|--:|--:|--:|",
        "| normal | mErr, degrees | less | 50.000 | 45.000 | 45.000 (40.000 to 50.000) |",
        "| segment_unsup2d | pair_acc | more | 0.500 | 0.500 | 0.550 (0.500 to 0.600) |",
        "| **delta-m** | % | more | 0 | 5.00 | 10.00 (10.00 to 10.00) |",
    ]
    assert (runs / "table.md").read_text() == printed


def test_exit_code_says_when_the_dense_model_is_ahead(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated(runs / "dense-1", **both(25.0, 0.6))
    assert called(monkeypatch, runs) == 1


def test_what_is_missing_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch) == called(monkeypatch, runs / "none") == 2
    (runs / "dense-0" / "evaluation.json").unlink()
    assert called(monkeypatch, runs) == 2
    (runs / "sparse-0").rename(runs / "other-0")
    (runs / "sparse-1").rename(runs / "other-1")
    assert called(monkeypatch, runs) == 2
    usage, none, unevaluated, unnamed = capsys.readouterr().err.splitlines()
    assert "usage" in usage and "has no run single-..." in none
    assert "dense-0" in unevaluated and "evaluate" in unevaluated and "has no run sparse-..." in unnamed
    assert not (runs / "table.md").exists()
