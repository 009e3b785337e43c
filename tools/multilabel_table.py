"""What tools/multilabel.sh has to show: every held-out metric of its models side by side, and delta-m against one model per task.

    python tools/multilabel_table.py runs/multilabel

Prints the table, writes it to table.md and its numbers to table.json; exit code 1 where the sparse model is not ahead of the
dense one. Several seeds: the mean, and in brackets the least and the most.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from modsquad_ds.delta import MEANINGS, Results, compare, read_baseline, read_results
from modsquad_ds.errors import UserError
from modsquad_ds.files import write_atomic

MODELS = ("dense", "sparse")


def runs_of(folder: Path, model: str) -> list[str]:
    """Runs of a model, one per seed. Raises UserError where there is none."""
    runs = sorted(str(run) for run in folder.glob(f"{model}-*") if run.is_dir())
    if not runs:
        raise UserError(f"{folder}: has no run {model}-...; bash tools/multilabel.sh makes them")
    return runs


def delta_m(results: Results, single: Results) -> float:
    """Mean relative gain over the models of one task, in percent."""
    return 100 * fmean(one.gain for one in compare(results, single, "a model of all tasks", "the models of one task"))


def spread(found: Sequence[float | None], digits: int) -> str:
    """Mean, and in brackets least and most; a dash where the data could not say for every seed."""
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        return "-"
    text = f"{fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def rows(single: Results, models: Mapping[str, Sequence[Results]]) -> Iterator[str]:
    """Lines of the Markdown table."""
    heads = [f"{model}, {len(results)} seed{'s' if len(results) > 1 else ''}" for model, results in models.items()]
    yield f"| task | metric | better | one model per task | {' | '.join(heads)} |"
    yield "|---|---|---|--:" + "|--:" * len(models) + "|"
    for task, metrics in single.items():
        for metric, alone in metrics.items():
            row = MEANINGS[metric]
            found = [spread([one[task][metric] for one in results], 3) for results in models.values()]
            name = f"{metric}, {row.unit}" if row.unit else metric
            better = "more" if row.higher_is_better else "less"
            yield f"| {task} | {name} | {better} | {spread([alone], 3)} | {' | '.join(found)} |"
    gains = [spread([delta_m(one, single) for one in results], 2) for results in models.values()]
    yield f"| **delta-m** | % | more | 0 | {' | '.join(gains)} |"


def main() -> int:
    """Print and write the table; the exit code says whether the sparse model is ahead."""
    if len(sys.argv) != 2:
        print("usage: python tools/multilabel_table.py RUNS", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        single = read_baseline(runs_of(folder, "single"))
        runs = {model: runs_of(folder, model) for model in MODELS}
        models = {model: [read_results(run) for run in of_model] for model, of_model in runs.items()}
        table = "\n".join(rows(single, models))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table)
    gains = {model: [delta_m(one, single) for one in results] for model, results in models.items()}
    content = {"single": single, "runs": {m: dict(zip(runs[m], models[m], strict=True)) for m in MODELS}, "delta_m": gains}
    write_atomic(folder / "table.md", f"{table}\n".encode())
    write_atomic(folder / "table.json", json.dumps(content, indent=1).encode())
    return 0 if fmean(gains["sparse"]) > fmean(gains["dense"]) else 1


if __name__ == "__main__":
    sys.exit(main())
