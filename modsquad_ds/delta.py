"""Delta-m: how much better a multi-task model is than single-task ones, in one number. Reads what `evaluate` wrote, and tables.

Delta-m (arXiv 1904.08918) is the mean over the tasks of the relative difference to a baseline, each with the sign that makes
better positive. A baseline is a table of single-task results or the runs themselves. A table is a JSON file
{"source": ..., "rows": [{"task": ..., "metric": ..., "value": ...}, ...]} or a CSV file with the columns task, metric and
value, one row per task; numbers are as in evaluation.json: shares in [0, 1], degrees, metres.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from modsquad_ds.errors import UserError
from modsquad_ds.targets import METRICS, MetricRow
from modsquad_ds.tasks import KINDS

PUBLISHED = Path(__file__).parent / "tables_published"

MEANINGS: dict[str, MetricRow] = {
    **{name: MetricRow("", True, f"as {kind.name} has it") for kind in KINDS.values() for name in kind.metrics},
    **METRICS,
}
"""What the numbers of every task's metrics mean."""

Results = dict[str, dict[str, float | None]]
"""Task -> metric, the headline first -> value; None where there was nothing to measure."""


class Gain(NamedTuple):
    """One task of a comparison."""

    task: str
    metric: str
    baseline: float
    value: float
    gain: float
    """Relative difference, positive where the value is the better one."""


def relative_gain(value: float, baseline: float, higher_is_better: bool) -> float:
    """(value - baseline) / baseline, with the opposite sign where less is better. `baseline` is positive."""
    return (value - baseline if higher_is_better else baseline - value) / baseline


def delta_m(values: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: Mapping[str, bool]) -> float:
    """Mean of the tasks' relative gains, in percent (arXiv 1904.08918, eq. 1).

    Args:
        values: task -> value of its metric; at least one task.
        baseline: the same of single-task models, positive.
        higher_is_better: task -> whether a larger value of its metric is the better one.
    """
    gains = [relative_gain(value, baseline[task], higher_is_better[task]) for task, value in values.items()]
    return 100 * math.fsum(gains) / len(gains)


# ---------------------------------------------------------------- comparing


def compare(results: Results, baseline: Results, place: str, against: str) -> list[Gain]:
    """The tasks of `baseline` with its headline metrics, and what `results` has of them.

    Args:
        place: where the results are from, `against`: where the baseline is from; for messages.

    Raises UserError unless both have the same tasks, and a number for each.
    """
    for here, there, first, second in ((results, baseline, place, against), (baseline, results, against, place)):
        if missing := [task for task in here if task not in there]:
            tasks = ", ".join(there) or "no task"
            raise UserError(f"{second}: no task {missing[0]}, which {first} has, only {tasks}; choose with --task")
    gains = []
    for task, metrics in baseline.items():
        metric = next(iter(metrics))
        if metric not in results[task]:
            raise UserError(f"{place}: task {task} has {', '.join(results[task])}, expected {metric} as {against} has")
        value, old = (_number(table[task][metric], task, metric, at) for table, at in ((results, place), (baseline, against)))
        if old == 0:
            raise UserError(f"{against}: {metric} of task {task} is 0, to which nothing can be relative; leave it out (--task)")
        gains.append(Gain(task, metric, old, value, relative_gain(value, old, MEANINGS[metric].higher_is_better)))
    return gains


def _number(value: float | None, task: str, metric: str, place: str) -> float:
    if value is None:
        raise UserError(f"{place}: no {metric} of task {task}: its data held nothing to measure; leave it out (--task)")
    return value


# ---------------------------------------------------------------- reading


def read_baseline(sources: Sequence[str]) -> Results:
    """All tasks of several tables and runs; raises UserError where two of them have the same task."""
    found: Results = {}
    origin: dict[str, str] = {}
    for source in sources:
        for task, metrics in read_results(source).items():
            if task in found:
                raise UserError(f"--against {source}: has task {task}, as {origin[task]} has; give one baseline for each task")
            found[task], origin[task] = metrics, source
    return found


def read_results(source: str) -> Results:
    """What a run's evaluation.json or a table says.

    Args:
        source: a run folder, a model file, a table (.json or .csv), or the name of a published table.

    Raises UserError for what is none of these, and for numbers that cannot be its metrics'.
    """
    path = Path(source)
    published = PUBLISHED / f"{source}.json"
    if path.is_dir() or path.suffix == ".safetensors":
        results = _of_run(path)
    elif path.suffix in (".json", ".csv"):
        results = _of_table(path)
    elif published.is_file():
        results = _of_table(published)
    else:
        names = ", ".join(sorted(file.stem for file in PUBLISHED.glob("*.json")))
        raise UserError(f"{source}: expected a run folder, a model file, a table (.json, .csv) or a published one: {names}")
    for task, metrics in results.items():
        for metric, value in metrics.items():
            _check(metric, value, f"{source}: task {task}")
    return results


def _of_run(path: Path) -> Results:
    written = path / "evaluation.json" if path.is_dir() else path.with_name("evaluation.json")
    if not written.is_file():
        raise UserError(f"run {path}: no {written}; run `modsquad-ds evaluate {path}` first")
    content = _json(written)
    results = {task: metrics for task, metrics in content.items() if task != "untrained"} if isinstance(content, dict) else {}
    if not results or not all(isinstance(metrics, dict) and metrics for metrics in results.values()):
        raise UserError(f"{written}: is not what `modsquad-ds evaluate` writes; run it again")
    return results


def _of_table(path: Path) -> Results:
    if not path.is_file():
        raise UserError(f"table {path}: no such file")
    results: Results = {}
    for number, row in enumerate(_rows(path), 1):
        if not isinstance(row, dict) or any(row.get(name) in (None, "") for name in ("task", "metric", "value")):
            raise UserError(f"table {path}: row {number}: expected task, metric and value, found {row}")
        task, metric = str(row["task"]).strip(), str(row["metric"]).strip()
        if task in results:
            raise UserError(f"table {path}: row {number}: a second row of task {task}; keep the metric to compare")
        try:
            value = float(row["value"])
        except (TypeError, ValueError):
            raise UserError(f"table {path}: row {number}: value {row['value']!r}; expected a number") from None
        results[task] = {metric: value}
    if not results:
        raise UserError(f"table {path}: has no rows")
    return results


def _rows(path: Path) -> list[Any]:
    if path.suffix == ".csv":
        try:
            return list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"table {path}: is no CSV file ({error})") from None
    content = _json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f'table {path}: expected {{"rows": [{{"task": ..., "metric": ..., "value": ...}}, ...]}}')
    return rows


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is no JSON file ({error})") from None


def _check(metric: str, value: Any, place: str) -> None:
    if metric not in MEANINGS:
        raise UserError(f"{place}: unknown metric {metric}; known are {', '.join(MEANINGS)}")
    if value is None:
        return
    row = MEANINGS[metric]
    share = row.higher_is_better  # all of these are shares
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= (1 if share else math.inf):
        wanted = "a share in [0, 1] (percent / 100)" if share else f"a number{f' of {row.unit}' if row.unit else ''}, at least 0"
        raise UserError(f"{place}: {metric} {value}; expected {wanted}")
    if math.isinf(value):
        raise UserError(f"{place}: {metric} {value}; expected a finite number")


# ---------------------------------------------------------------- the command


def print_delta_m(sources: Sequence[str], against: Sequence[str], tasks: Sequence[str] = ()) -> None:
    """Print a table for each of `sources` and its delta-m, in at most 80 columns.

    Args:
        sources: runs or tables, each compared on its own.
        against: tables and runs that together are the baseline.
        tasks: the tasks to compare; default all, which both must have.

    Raises UserError before anything is printed.
    """
    place = ", ".join(against)
    baseline = _chosen(read_baseline(against), tasks, place)
    compared = [compare(_chosen(read_results(source), tasks, source), baseline, source, place) for source in sources]
    console = Console()
    console = console if console.width <= 80 else Console(width=80)
    for source, gains in zip(sources, compared, strict=True):
        console.print(_table(gains, f"{source} against {place}"))


def _chosen(results: Results, tasks: Sequence[str], place: str) -> Results:
    for task in tasks:
        if task not in results:
            raise UserError(f"--task {task}: {place} has {', '.join(results)}")
    return {task: results[task] for task in tasks or results}


def _table(gains: Sequence[Gain], title: str) -> Table:
    values, baseline = {one.task: one.value for one in gains}, {one.task: one.baseline for one in gains}
    mean = delta_m(values, baseline, {one.task: MEANINGS[one.metric].higher_is_better for one in gains})
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("task", overflow="fold", footer="delta-m")
    table.add_column("metric")
    for name in ("baseline", "value"):
        table.add_column(name, justify="right")
    table.add_column("better by", justify="right", footer=f"{mean:+.2f} %")
    for one in gains:
        table.add_row(one.task, one.metric, f"{one.baseline:.4g}", f"{one.value:.4g}", f"{100 * one.gain:+.2f} %")
    return table
