"""The `bench scaling` command between its options and its table: checks what was asked, runs the sweep, prints the rows."""

from collections.abc import Sequence
from pathlib import Path

from modsquad_ds.bench import slurm
from modsquad_ds.bench.measure import Row, print_rows, write_rows
from modsquad_ds.bench.options import numbers
from modsquad_ds.bench.scaling import MODES, Sweep, run_local, run_slurm
from modsquad_ds.checkpoint import complete_checkpoints
from modsquad_ds.config import load_recipe
from modsquad_ds.errors import UserError
from modsquad_ds.files import make_folder

SIZE = {"size": "ranks", "ep_size": "EP", "routing": "routing"}
RATES = {
    **SIZE, "seconds": "s/step", "images_per_s": "images/s", "tokens_per_s": "tokens/s", "efficiency": "effic.",
    "rows_max_mean": "max/mean",
}  # fmt: skip
RATES_NOTE = (
    "effic.: images/s per rank over the smallest size's. max/mean: rows of the busiest rank of an EP group over the group's mean."
)
SHARES = {
    **SIZE, "share_data": "data", "share_all_to_all": "all-to-all", "share_reduction": "gradients", "share_sums": "sums",
    "share_compute": "compute",
}  # fmt: skip
SHARES_NOTE = (
    "Collectives include waiting for slower ranks. gradients: DeepSpeed's reduction, and ZeRO's gathering of weights. "
    "sums: the all-reduce of losses and routing."
)


def run(
    recipe: str, overrides: Sequence[str], ranks: str, nodes: str, mode: str, ep: str, steps: int, trained: bool,
    timeout: float, out: Path, json_file: Path | None,
) -> None:  # fmt: skip
    """Measure the sizes, leave their rows in `out` and print them; see cli_bench.scaling for the arguments."""
    modes = {**{name: (name,) for name in MODES}, "both": MODES}
    for option, value, known in (("--mode", mode, tuple(modes)), ("--ep", ep, ("fixed", "growing"))):
        if value not in known:
            raise UserError(f"{option} {value!r}: expected one of {', '.join(known)}")
    make_folder(out, "--out")
    cluster = slurm.read_cluster() if nodes else None
    sizes = tuple(n * cluster.ranks for n in numbers("--nodes", nodes)) if cluster else numbers("--ranks", ranks)
    loaded = load_recipe(recipe, [*overrides, "resume=must"] if trained else overrides)
    sweep = Sweep(
        loaded, sizes, modes[mode], ep == "growing", steps, newest_checkpoint(loaded.run) if trained else None, out.resolve()
    )

    def tell(line: str) -> None:
        print(line, flush=True)

    try:
        rows = run_slurm(sweep, cluster, tell) if cluster else run_local(sweep, 60 * timeout, tell)
    except KeyboardInterrupt:
        tell(f"interrupted; rows so far: {out}")
        raise
    if json_file is not None:
        write_rows(json_file, "scaling", rows, surroundings={})
    if all(row["error"] for row in rows):
        raise UserError(f"bench scaling: no size could be measured, see above; the first: {rows[0]['error']}")
    print_table(sweep, rows)
    print(f"{out}/scaling.json, .csv, .png")


def newest_checkpoint(run: Path) -> str:
    """Name of the run's newest complete checkpoint."""
    found = complete_checkpoints(run)
    if not found:
        raise UserError(f"--trained: no complete checkpoint under {run / 'checkpoints'}; name the run's folder with run=...")
    return found[-1].name


def print_table(sweep: Sweep, rows: Sequence[Row]) -> None:
    """Measured sizes as two tables, failed ones as a line each. One must have been measured."""
    measured = [row for row in rows if not row["error"]]
    ep = "growing" if sweep.growing else "fixed"
    named = [{key: row[key] for key in (*RATES, *SHARES) if key in row} | {"size": _named(row)} for row in measured]
    print_rows(f"{sweep.recipe.name}: the training step over sizes, EP {ep}", named, RATES, RATES_NOTE)
    percent = [row | {key: f"{100 * row[key]:.1f}%" for key in SHARES if key not in SIZE} for row in named]
    print_rows("Shares of a step's time", percent, SHARES, SHARES_NOTE)
    first = measured[0]
    print(
        f"{first['device']}, {first['cores']} cores, {first['threads']} thread(s) a rank; torch {first['torch']}, "
        f"deepspeed {first['deepspeed']}, commit {first['commit']}; medians of {first['steps']} steps, ranges in the files"
    )
    for row in rows:
        if row["error"]:
            print(f"{row['mode']}, {row['ranks']} rank(s): {row['error']}")


def _named(row: Row) -> str:
    return f"{row['mode']} {row['ranks']}"
