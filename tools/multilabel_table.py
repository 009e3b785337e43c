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

from modsquad_ds.config import load_recipe
from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import Results
from modsquad_ds.files import write_atomic
from modsquad_ds.targets import METRICS
from modsquad_ds.tasks import higher_is_better, metrics_of

MODELS = ("dense", "sparse")


def evaluation(run: Path) -> Results:
    """The metrics that `evaluate` left in a run."""
    path = run / "evaluation.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run bash tools/multilabel.sh, which trains what is missing")
    results: Results = json.loads(path.read_bytes())
    return results


def delta_m(results: Results, single: Results) -> float:
    """Mean relative gain over the models of one task, headline metric of each task, in percent (arXiv 2004.13379, equation 1)."""
    gains = []
    for task, spec in load_recipe("photo_scenes").tasks.items():
        metric = metrics_of(spec)[0]
        found, alone = results[task][metric], single[task][metric]
        assert found is not None and alone is not None
        gains.append((1 if higher_is_better(spec, metric) else -1) * (found - alone) / alone)
    return 100 * fmean(gains)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and in brackets least and most."""
    text = f"{fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def rows(single: Results, runs: Mapping[str, Sequence[Results]]) -> Iterator[str]:
    """Lines of the Markdown table."""
    seeds = {model: len(of_model) for model, of_model in runs.items()}
    yield f"| task | metric | one model per task | {' | '.join(f'{m}, {n} seeds' for m, n in seeds.items())} |"
    yield "|---|---|--:" + "|--:" * len(runs) + "|"
    for task, spec in load_recipe("photo_scenes").tasks.items():
        for metric in metrics_of(spec):
            row = METRICS[metric]
            name = f"{metric} ({row.unit}) " if row.unit else f"{metric} "
            arrow = "higher is better" if row.higher_is_better else "lower is better"
            found = [spread([results[task][metric] or 0.0 for results in of_model], 3) for of_model in runs.values()]
            yield f"| {task} | {name}{arrow} | {single[task][metric]:.3f} | {' | '.join(found)} |"
    gains = [spread([delta_m(results, single) for results in of_model], 2) for of_model in runs.values()]
    yield f"| **delta-m** | % | 0 | {' | '.join(gains)} |"


def main() -> int:
    """Print and write the table; the exit code says whether the sparse model is ahead."""
    if len(sys.argv) != 2:
        print("usage: python tools/multilabel_table.py RUNS", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        single = {task: evaluation(folder / f"single-{task}")[task] for task in load_recipe("photo_scenes").tasks}
        found = {m: sorted(run.name for run in folder.glob(f"{m}-*") if run.is_dir()) for m in MODELS}
        if not all(found.values()):
            raise UserError(f"{folder}: has no runs {' or no runs '.join(f'{m}-SEED' for m in MODELS if not found[m])}")
        runs = {m: [evaluation(folder / name) for name in names] for m, names in found.items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = "\n".join(rows(single, runs))
    print(table)
    gains = {m: [delta_m(results, single) for results in of_model] for m, of_model in runs.items()}
    content = {"single": single, "runs": {m: dict(zip(found[m], runs[m], strict=True)) for m in MODELS}, "delta_m": gains}
    write_atomic(folder / "table.md", f"{table}\n".encode())
    write_atomic(folder / "table.json", json.dumps(content, indent=1).encode())
    return 0 if fmean(gains["sparse"]) > fmean(gains["dense"]) else 1


if __name__ == "__main__":
    sys.exit(main())
