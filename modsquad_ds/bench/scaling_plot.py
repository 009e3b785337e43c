"""The picture of scaling.py's rows: efficiency, images per second and shares of a step's time over ranks."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modsquad_ds import draw
from modsquad_ds.bench.measure import Row

SHARES = {
    "compute": "compute", "all_to_all": "all-to-all", "reduction": "gradient reduction", "sums": "loss sums", "data": "data",
}  # fmt: skip
STYLES = {"learned": ("o", "-"), "balanced": ("s", "--")}


def scaling_png(rows: Sequence[Row]) -> bytes:
    """PNG of the rows without an error; there must be one. A row of panels per mode."""
    rows = [row for row in rows if not row["error"]]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(15, 4.2 * len(modes) + 0.4), dpi=100, layout="constrained")
    figure.suptitle(f"{rows[0]['recipe']}, EP {rows[0]['ep']}, {rows[0]['device']}")
    panels = figure.subplots(len(modes), 3, squeeze=False)
    for mode, (efficiency, rate, time) in zip(modes, panels, strict=True):
        here = [row for row in rows if row["mode"] == mode]
        ranks = sorted({row["ranks"] for row in here})
        _lines(efficiency, here, "efficiency", "images/s per rank, over the smallest size's")
        efficiency.axhline(1.0, color="grey", linewidth=1, linestyle=":")
        _lines(rate, here, "images_per_s", "images/s")
        first = next(row for row in here if row["ranks"] == ranks[0])
        ideal = [first["images_per_s"] * r / ranks[0] for r in ranks]
        rate.plot(ranks, ideal, color="grey", linewidth=1, linestyle=":", label="ideal")
        for axes in (efficiency, rate):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [str(r) for r in ranks], minor=False)
            axes.set_xlabel("ranks")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        _bars(time, here, ranks)
        efficiency.set_title(f"{mode} scaling")
    return draw.figure_png(figure)


def _lines(axes: Axes, rows: Sequence[Row], key: str, label: str) -> None:
    for place, (routing, (marker, line)) in enumerate(STYLES.items()):
        points = sorted((row["ranks"], row[key]) for row in rows if row["routing"] == routing)
        colour = _colour(place)
        axes.plot(*zip(*points, strict=True), marker=marker, linestyle=line, color=colour, label=f"{routing} routing")
    axes.set_ylabel(label)


def _bars(axes: Axes, rows: Sequence[Row], ranks: Sequence[int]) -> None:
    """Two bars per size, learned and balanced, stacked to 1."""
    ticks = []
    for routing in STYLES:
        for row in (row for row in rows if row["routing"] == routing):
            x = ranks.index(row["ranks"]) + (-0.2 if routing == "learned" else 0.2)
            ticks.append((x, f"{row['ranks']}\n{routing}"))
            bottom = 0.0
            for place, share in enumerate(SHARES):
                height = row[f"share_{share}"]
                axes.bar(x, height, 0.36, bottom, color=_colour(place))
                bottom += height
    axes.set_xticks(*zip(*ticks, strict=True), fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of a step's time")
    handles = [axes.bar(0, 0, color=_colour(number)) for number in range(len(SHARES))]
    above = (0.5, 1.14)
    axes.legend(
        handles, list(SHARES.values()), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=above, ncols=len(SHARES)
    )


def _colour(place: int) -> tuple[float, float, float]:
    red, green, blue = draw.colour_of(place)
    return red / 255, green / 255, blue / 255
