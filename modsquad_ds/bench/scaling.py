"""The training step of a recipe at several world sizes, weak and strong. Called by cli_bench.py; each rank runs scaling_step.py.

    OUT/scaling.json  OUT/scaling.csv  OUT/scaling.png   after every size, so whatever ends the sweep leaves the rows so far
    OUT/sizes/        what each size was asked for and its rows, by which the same sweep goes on

Weak scaling: images per rank stay those of the smallest size. Strong: images of all ranks together do. The smallest size is both.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from modsquad_ds.bench import slurm
from modsquad_ds.bench.jobs import JobError, run_job
from modsquad_ds.bench.measure import Row, environment, write_rows
from modsquad_ds.config import Recipe, recipe_from_tree, recipe_to_tree
from modsquad_ds.errors import UserError
from modsquad_ds.files import write_atomic, write_json
from modsquad_ds.parallel.experts import check_parallel
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.plan import loader_plan
from modsquad_ds.tasks import streams_of

Tree = dict[str, Any]
MODES = ("weak", "strong")


class Sweep(NamedTuple):
    """What is asked for."""

    recipe: Recipe
    ranks: tuple[int, ...]
    """Ascending."""
    modes: tuple[str, ...]
    growing: bool
    """EP size = ranks; else the largest divisor of the recipe's that the ranks allow."""
    steps: int
    trained: str | None
    """Name of the checkpoint, the run folder's newest, whose weights are taken; None: fresh weights."""
    out: Path


class Size(NamedTuple):
    """One job to run."""

    ranks: int
    modes: tuple[str, ...]
    """Whose row it gives; the smallest size's images are the same in both."""
    arguments: dict[str, Any]
    """Of scaling_step.measure."""
    refused: str | None = None
    """Why it cannot run."""


# ---------------------------------------------------------------- sizes


def sizes_of(sweep: Sweep) -> list[Size]:
    """The jobs of a sweep, smallest first."""
    sizes: list[Size] = []
    for ranks in sweep.ranks:
        here: list[Size] = []
        for mode in sweep.modes:
            size = _size(sweep, ranks, mode)
            twin = next((other for other in here if other[2:] == size[2:]), None)
            if twin is None:
                here.append(size)
            else:
                here[here.index(twin)] = twin._replace(modes=(*twin.modes, mode))
        sizes += here
    return sizes


def _size(sweep: Sweep, ranks: int, mode: str) -> Size:
    try:
        tree = tree_at(sweep.recipe, ranks, sweep.ranks[0], mode, sweep.growing)
    except UserError as error:
        return Size(ranks, (mode,), {}, str(error))
    return Size(ranks, (mode,), {"tree": tree, "ranks": ranks, "steps": sweep.steps, "trained": sweep.trained})


def tree_at(recipe: Recipe, ranks: int, smallest: int, mode: str, growing: bool) -> Tree:
    """The recipe as a tree, with its images and groups at a number of ranks. UserError where they cannot be divided.

    A `batch_size` is that of the smallest size; so is a `batch_size_per_rank`, times its ranks and micro-batches.
    """
    tree = recipe_to_tree(recipe)
    for stream, tasks in streams_of(recipe.active).items():
        images = loader_plan(recipe, Ranks(0, smallest)).step_images(tasks[0])
        if mode == "weak":
            if images * ranks % smallest:
                raise UserError(
                    f"{stream}: batch_size: {images} images on {smallest} ranks do not grow to whole images on {ranks}; "
                    f"take a multiple of {smallest}"
                )
            images = images * ranks // smallest
        section = tree["sets"][stream] if stream in tree["sets"] else tree["tasks"][stream]
        section |= {"batch_size": images, "batch_size_per_rank": None}
    parallel = tree["parallel"]
    parallel["ep_size"] = ranks if growing else math.gcd(ranks, parallel["ep_size"])
    parallel["attention_ep_size"] = math.gcd(ranks, parallel["attention_ep_size"])
    # Ranks of a Slurm job start in another folder than this one.
    for key, place in (("run", recipe.run), ("data_root", recipe.data_root)):
        tree[key] = str(place.resolve() if isinstance(place, Path) else place)
    if recipe.cache.folder is not None:
        tree["cache"]["folder"] = str(recipe.cache.folder.resolve())
    if recipe.deepspeed_config.endswith(".json"):
        tree["deepspeed_config"] = str(Path(recipe.deepspeed_config).resolve())
    sized = recipe_from_tree(deepcopy(tree), f"{recipe.name} on {ranks} ranks")
    check_parallel(sized.parallel, ranks)
    for name in sized.active:
        loader_plan(sized, Ranks(0, ranks)).rank_images(name)
    return tree


# ---------------------------------------------------------------- the sweep


class Store:
    """Rows of sizes on disk, found again by what they were measured with."""

    def __init__(self, out: Path, surroundings: Row) -> None:
        self.folder, self.surroundings = out / "sizes", surroundings

    def path(self, size: Size, kind: str) -> Path:
        """File of a size: its `arguments` or its `rows`. Its name tells arguments, versions and commit apart."""
        key = json.dumps([size.arguments, size.refused, self.surroundings], sort_keys=True)
        return self.folder / f"{size.ranks}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.{kind}.json"

    def rows(self, size: Size) -> list[Row] | None:
        """Rows of a size that has been measured."""
        path = self.path(size, "rows")
        return json.loads(path.read_text()) if path.is_file() else None


def run_local(sweep: Sweep, timeout: float, tell: Callable[[str], None]) -> list[Row]:
    """Rows of all sizes on ranks of this machine, one size after the other; `timeout` is in seconds, for one size."""
    store, sizes = Store(sweep.out, environment()), sizes_of(sweep)
    results: dict[int, list[Row]] = {}
    for place, size in enumerate(sizes):
        found = None if size.refused else store.rows(size)
        if found is None and not size.refused:
            tell(f"[{place + 1}/{len(sizes)}] {size.ranks} rank(s), {' and '.join(size.modes)} ...")
        results[place] = _labelled(size, sweep, found or _measured(size, store, timeout))
        rows = write_results(sweep.out, [row for done in results.values() for row in done])
        tell(f"[{place + 1}/{len(sizes)}] {told(size, results[place], reused=found is not None)}")
    return rows


def run_slurm(sweep: Sweep, cluster: slurm.Cluster, tell: Callable[[str], None], **waiting: float) -> list[Row]:
    """Rows of all sizes, whose ranks are whole nodes, from one job per number of nodes. `waiting` goes to slurm.wait."""
    e = environment()
    versions = {key: e[key] for key in ("modsquad_ds", "commit", "torch", "deepspeed", "python")}  # the nodes tell the rest
    store, sizes = Store(sweep.out, {**versions, "cluster": cluster.options}), sizes_of(sweep)
    results: dict[Path, list[Row]] = {}
    by_path = {store.path(size, "arguments"): size for size in sizes}

    def arrived(path: Path, failure: str | None, reused: bool = False) -> None:
        size = by_path[path]
        rows = [{"error": reason(failure)}] if failure else store.rows(size) or []
        results[path] = [{"nodes": size.ranks // cluster.ranks, **row} for row in _labelled(size, sweep, rows)]
        write_results(sweep.out, [row for done in results.values() for row in done])
        tell(f"[{len(results)}/{len(sizes)}] {told(size, results[path], reused)}")

    todo: dict[int, list[Path]] = {}
    for path, size in by_path.items():
        if size.refused or store.rows(size):
            arrived(path, size.refused, reused=True)
        else:
            write_json(path, size.arguments)
            todo.setdefault(size.ranks // cluster.ranks, []).append(path)
    jobs = []
    for nodes, paths in todo.items():
        try:
            jobs.append(slurm.submit(cluster, nodes, paths))
        except UserError as error:
            for path in paths:
                arrived(path, str(error))
    try:
        slurm.wait(jobs, arrived, tell, **waiting)
    except KeyboardInterrupt:
        numbers = " ".join(job.number for job in jobs)
        tell(f"jobs {numbers} go on: the same command gathers their rows, scancel {numbers} ends them")
        raise
    return with_efficiency(row for done in results.values() for row in done)


def _measured(size: Size, store: Store, timeout: float) -> list[Row]:
    if size.refused:
        return [{"error": size.refused}]
    try:
        rows = run_job("scaling", size.arguments, size.ranks, timeout)
    except JobError as error:
        return [{"error": reason(str(error))}]
    write_json(store.path(size, "rows"), rows)
    return rows


def reason(text: str) -> str:
    """One line of a failed job's message and last lines: the user's mistake where it tells one, else first and last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told_by_rank = [line.partition("error: ")[2] for line in lines[1:] if line.startswith(("error: ", "rank "))]
    mistakes = [line for line in told_by_rank if line]
    return mistakes[0] if mistakes else " ".join(dict.fromkeys((lines[0], lines[-1])))


def _labelled(size: Size, sweep: Sweep, rows: Sequence[Row]) -> list[Row]:
    """A size's rows, once for each mode that it is the size of."""
    ep = "growing" if sweep.growing else "fixed"
    return [
        {"mode": mode, "ep": ep, "ranks": size.ranks, "recipe": sweep.recipe.name, "error": None, **row}
        for mode in size.modes
        for row in rows
    ]


def told(size: Size, rows: Sequence[Row], reused: bool) -> str:
    """One line about a size that is done."""
    what = f"{size.ranks} rank(s), {' and '.join(size.modes)}: "
    if rows[0]["error"]:
        return f"{what}{rows[0]['error']}"
    text = f"{what}{rows[0]['seconds']:.3g} s a step, {rows[0]['images_per_s']:.4g} images/s"
    return text + (", as measured before" if reused else "")


# ---------------------------------------------------------------- results


def with_efficiency(rows: Iterable[Row]) -> list[Row]:
    """Rows with `efficiency`: images/s per rank over those of the smallest measured size of the same mode and routing."""
    rows, base = list(rows), dict[tuple[str, str], Row]()
    for row in sorted((row for row in rows if not row["error"]), key=lambda row: row["ranks"]):
        base.setdefault((row["mode"], row["routing"]), row)
    result = []
    for row in rows:
        if not row["error"]:
            peer = base[row["mode"], row["routing"]]
            gain = row["images_per_s_per_rank"] / peer["images_per_s_per_rank"]
            row = {**row, "efficiency": gain, "efficiency_base_ranks": peer["ranks"]}
        result.append(row)
    return sorted(result, key=lambda row: (MODES.index(row["mode"]), row["ranks"]))


def write_results(out: Path, rows: Iterable[Row]) -> list[Row]:
    """Rows as OUT/scaling.json, .csv and .png; returns them with their efficiency, by mode and ranks."""
    from modsquad_ds.bench.scaling_plot import scaling_png

    rows = with_efficiency(rows)
    write_rows(out / "scaling.json", "scaling", rows, surroundings={})  # each row has that of its own ranks
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(out / "scaling.csv", text.getvalue().encode())
    if any(not row["error"] for row in rows):
        write_atomic(out / "scaling.png", scaling_png(rows))
    return rows
