"""The figures of a report. Each returns SVG, or nothing if it would show nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from lora_lab.report.drawing import COLOURS, Drawing, drawing
from lora_lab.report.gathering import Gathered
from lora_lab.report.wording import Numbers, outcome
from lora_lab.statistics import Analysis, CellSummary, higher_is_better

MARKS = {"better": ("good", "^"), "worse": ("bad", "v"), "equivalent": ("even", "s")}
"""Outcome → colour and marker; other marks are open and grey."""
COSTS = {
    "trained_parameters": "trained parameters",
    "peak_megabytes": "peak memory (MB)",
    "step_seconds": "seconds per step",
}
LITERAL: Any = {"parse_math": False}
"""For texts of users, in which `$` is no formula."""
SHOWN = 6
"""Number of cells with a colour; further ones are grey."""
MODULES = 48
"""Most rows of the picture of ranks."""


def by_merit(analysis: Analysis) -> list[CellSummary]:
    """Returns the cells from the best mean to the worst; those without one come last."""
    sign = -1 if analysis.higher_is_better else 1
    return sorted(
        analysis.cells, key=lambda cell: (cell.mean is None, sign * cell.mean if cell.mean is not None else 0)
    )


def forest(analysis: Analysis, width: float = 4.4) -> Drawing | None:
    """Draws differences from the baseline, or means without one, with intervals and every seed."""
    write = Numbers.of(analysis)
    cells = [cell for cell in by_merit(analysis) if cell.mean is not None]
    if analysis.baseline is not None:
        cells = [cell for cell in cells if _compared(analysis, cell.name)]
    if not cells:
        return None
    what = (
        f"{analysis.metric}" if analysis.baseline is None else f"{analysis.metric}, minus {analysis.baseline}"
    )
    with drawing(f"Intervals of {what}", (width, 0.9 + 0.27 * len(cells))) as one:
        axes = one.axes
        if analysis.baseline is not None:
            axes.axvline(0, color=COLOURS["muted"], linewidth=1)
            if analysis.margin:
                axes.axvspan(-analysis.margin, analysis.margin, color=COLOURS["even"], alpha=0.1, linewidth=0)
        for row, cell in enumerate(cells):
            _forest_row(one, analysis, cell, row, write)
        names = [_cut(cell.name, int(width * 5.5)) for cell in cells]
        axes.set_yticks(range(len(cells)), names, **LITERAL)
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
        axes.set_ylim(len(cells) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(5 if width < 5 else 8))
        axes.set_xlabel(what, **LITERAL)
    return one


def _compared(analysis: Analysis, cell: str) -> bool:
    return cell in analysis.comparisons and analysis.comparisons[cell].mean is not None


def _forest_row(one: Drawing, analysis: Analysis, cell: CellSummary, row: int, write: Numbers) -> None:
    axes = one.axes
    if analysis.baseline is None:
        values, mean, thick, thin = list(cell.values.values()), cell.mean or 0.0, cell.interval, None
        colour, marker, filled, text = COLOURS["c0"], "o", True, f"{write.value(mean)}, {write.range(thick)}"
    else:
        found = analysis.comparisons[cell.name]
        values, mean = list(found.differences), found.mean or 0.0
        thick, thin = found.interval, found.corrected_interval
        name = outcome(analysis, cell.name)
        shade, marker = MARKS.get(name, ("muted", "o"))
        colour, filled = COLOURS[shade], name in MARKS
        text = f"{write.difference(mean)}, {write.range(thin, signed=True)}: {name}"
    axes.scatter(values, [row + 0.27] * len(values), s=8, color=colour, alpha=0.6, linewidths=0, zorder=2)
    for interval, line in ((thin, 1.1), (thick, 3.2)):
        if interval is not None:
            axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=line, zorder=3)
    (point,) = axes.plot(
        [mean],
        [row],
        marker,
        color=colour,
        markerfacecolor=colour if filled else COLOURS["paper"],
        markersize=7,
        zorder=4,
    )
    one.tip(point, f"{cell.name}: {text}")


def cost(gathered: Gathered, analysis: Analysis, column: str) -> tuple[Drawing, list[str]] | None:
    """Draws the metric over a cost, with the Pareto front of cells.

    Returns:
        The drawing, and the cells of the front, the cheapest first.
    """
    if column not in gathered.costs:
        return None
    costs = gathered.costs[column]
    points = [
        (float(costs[cell.name]), cell.mean, cell)
        for cell in analysis.cells
        if cell.mean is not None and cell.name in costs and np.isfinite(costs[cell.name])
    ]
    if len(points) < 2:
        return None
    front = pareto([(price, mean) for price, mean, _ in points], analysis.higher_is_better)
    write = Numbers.of(analysis)
    with drawing(f"{analysis.metric} over {COSTS[column]}") as one:
        axes = one.axes
        prices = [price for price, _, _ in points]
        if min(prices) > 0 and max(prices) / min(prices) > 8:
            axes.set_xscale("log")
        else:
            axes.ticklabel_format(axis="x", useOffset=False)
        line = [points[place] for place in front]
        axes.plot(
            [price for price, _, _ in line], [mean for _, mean, _ in line], color=COLOURS["c0"], linewidth=1.1
        )
        for place, (price, mean, cell) in enumerate(points):
            best = place in front
            colour = COLOURS["c0"] if best else COLOURS["muted"]
            if cell.interval:
                ends = [cell.interval.low, cell.interval.high]
                axes.plot([price, price], ends, color=colour, linewidth=0.8, alpha=0.5)
            face = colour if best else COLOURS["paper"]
            (point,) = axes.plot([price], [mean], "o", color=colour, markerfacecolor=face)
            one.tip(point, f"{cell.name}: {write.value(mean)} at {price:,.4g} {COSTS[column]}")
        # Intervals of one cell may be far wider than the range of the points.
        means = [mean for _, mean, _ in points]
        room = 0.25 * (max(means) - min(means)) or 0.01 * abs(means[0]) or 0.01
        axes.set_ylim(min(means) - room, max(means) + room)
        axes.margins(x=0.12)
        axes.grid()
        axes.set(xlabel=COSTS[column], ylabel=analysis.metric)
        _label(one, [(price, mean, cell.name) for price, mean, cell in line])
    return one, [cell.name for _, _, cell in line]


def pareto(points: Sequence[tuple[float, float]], descending: bool) -> list[int]:
    """Returns the indices of the Pareto front of cost and metric, the cheapest first.

    Args:
        points: (cost, metric) of each.
        descending: whether a larger metric is better.
    """
    sign = -1 if descending else 1
    front, best = [], np.inf
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[place][1] < best:
            best = sign * points[place][1]
            front.append(place)
    return front


def _label(one: Drawing, points: Sequence[tuple[float, float, str]]) -> None:
    """Labels points if there is space."""
    renderer = FigureCanvasAgg(one.figure).get_renderer()
    one.lay_out()
    whole, taken = one.axes.get_window_extent(), list[Any]()
    places = (((6, 4), "left"), ((-6, 4), "right"), ((6, -11), "left"), ((-6, -11), "right"))
    for x, y, name in reversed(points):
        for offset, aligned in places:
            text = one.axes.annotate(
                _cut(name, 22),
                (x, y),
                offset,
                textcoords="offset points",
                ha=aligned,
                fontsize=8.5,
                **LITERAL,
            )
            box = text.get_window_extent(renderer)
            fits = whole.x0 <= box.x0 and box.x1 <= whole.x1 + 12
            if fits and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def rates(gathered: Gathered, analysis: Analysis) -> Drawing | None:
    """Draws what the searches found: the validation metric over the tuned value, with the spread of seeds."""
    runs = gathered.runs[(gathered.runs["phase"] == "tune") & (gathered.runs["status"] == "finished")]
    first = next(iter(gathered.tuning.values()), None)
    if first is None or runs.empty or first["key"] not in runs or first.get("by") not in runs:
        return None
    key, by = first["key"], first["by"]
    numbers = pd.to_numeric(runs[key], errors="coerce")
    numeric = bool(numbers.notna().all())
    choices = sorted(numbers.unique()) if numeric else list(dict.fromkeys(runs[key].astype(str)))
    places = {value: value if numeric else place for place, value in enumerate(choices)}
    runs = runs.assign(place=numbers if numeric else runs[key].astype(str).map(places))
    with drawing(f"{by} over {key}") as one:
        axes, named = one.axes, dict[str, Line2D]()
        for cell, colour, strong in _lines(analysis):
            own = runs[(runs["cell"] == cell) & np.isfinite(runs[by])]
            if own.empty:
                continue
            found = own.groupby("place")[by].agg(["mean", "min", "max"])
            (line,) = axes.plot(
                found.index, found["mean"], "o-", color=colour, markersize=3.5,
                linewidth=1.6 if strong else 0.9, zorder=3 if strong else 2,
            )  # fmt: skip
            one.tip(line, cell)
            if strong:
                named[cell] = line
            if strong and len(own) > len(found):
                axes.fill_between(
                    found.index, found["min"], found["max"], color=colour, alpha=0.15, linewidth=0
                )
            chosen = gathered.tuning.get(cell, {}).get("value")
            place = places.get(chosen if numeric else str(chosen))
            if place is not None and place in found.index:
                axes.plot([place], [found["mean"][place]], "o", color=colour, markersize=8, fillstyle="none")
        if numeric and choices[0] > 0 and choices[-1] / choices[0] > 8:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        if len(choices) <= 8:
            axes.set_xticks([places[value] for value in choices], list(map(_plain, choices)), **LITERAL)
        _robust(one, runs[by], higher_is_better(by))
        axes.grid()
        axes.set(xlabel=key, ylabel=by)
        _legend(one, named)
    return one


def curves(rows: pd.DataFrame, metric: str, analysis: Analysis) -> Drawing | None:
    """Draws a logged metric over steps: mean over seeds, band from the lowest to the highest.

    Args:
        rows: columns cell, seed, step, metric, value.
        metric: which.
        analysis: says which cells have a colour.
    """
    rows = rows[(rows["metric"] == metric) & np.isfinite(rows["value"].astype(float))]
    if rows.groupby("cell")["step"].nunique().max() in (np.nan, 0, 1) or rows.empty:
        return None
    with drawing(f"{metric} over steps") as one:
        axes, named = one.axes, dict[str, Line2D]()
        ends = []
        for cell, colour, strong in _lines(analysis):
            own = rows[rows["cell"] == cell]
            if own.empty:
                continue
            found = own.groupby("step")["value"].agg(["mean", "min", "max", "count"]).sort_index()
            # Steps that only some seeds reached would make the mean jump.
            found = found[found["count"] == found["count"].max()]
            if len(found) > 200:
                found = found.iloc[np.unique(np.linspace(0, len(found) - 1, 200).astype(int))]
            (line,) = axes.plot(
                found.index, found["mean"], color=colour,
                linewidth=1.6 if strong else 0.8, alpha=1 if strong else 0.6, zorder=3 if strong else 2,
            )  # fmt: skip
            one.tip(line, cell)
            if strong:
                named[cell] = line
            ends.append(found["mean"])
            if strong and found["count"].max() > 1:
                axes.fill_between(
                    found.index, found["min"], found["max"], color=colour, alpha=0.14, linewidth=0
                )
        if metric.endswith("loss"):
            _robust(one, pd.concat(ends), False)
        axes.grid()
        axes.set(xlabel="optimizer step", ylabel=metric)
        _legend(one, named)
    return one


def moving(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Returns the rows of a metric of the cells in which it changed over steps."""
    rows = rows[rows["metric"] == metric]
    spread = rows.groupby(["cell", "seed"])["value"].agg(lambda values: values.max() - values.min())
    cells = {cell for cell, _ in spread[spread > 1e-9].index}
    return rows[rows["cell"].isin(cells)]


def module_ranks(ranks: pd.DataFrame, cells: Sequence[str]) -> Drawing | None:
    """Draws the final rank of each module, for the cells that changed ranks.

    Args:
        ranks: columns cell, seed, module, rank.
        cells: which to show.
    """
    cells = [cell for cell in cells if cell in set(ranks["cell"])][:SHOWN]
    if not cells:
        return None
    table = ranks.pivot_table(index="module", columns="cell", values="rank", sort=False)[cells]
    table = table.iloc[:MODULES]
    with drawing("Rank of each module at the end", (4.4, 0.9 + 0.17 * len(table))) as one:
        axes = one.axes
        top = max(float(np.nanmax(table.to_numpy())), 1.0)
        for column, cell in enumerate(cells):
            for row, (module, value) in enumerate(table[cell].items()):
                if np.isfinite(value):
                    shade = float(value) / top
                    (bar,) = axes.barh(
                        [row], [0.92 * shade], 0.8, left=column, color=COLOURS["c0"], alpha=0.85
                    )
                    one.tip(bar, f"{cell}, {module}: rank {value:.3g}")
            axes.axvline(column, color=COLOURS["line"], linewidth=0.8)
        axes.set_yticks(range(len(table)), _module_names(list(table.index)), fontsize=7.5, **LITERAL)
        names = [_cut(cell, 44 // len(cells)) for cell in cells]
        axes.set_xticks([place + 0.46 for place in range(len(cells))], names, **LITERAL)
        axes.set_xlabel(f"rank; full width is {top:.3g}")
        axes.set(ylim=(len(table) - 0.4, -0.6), xlim=(0, len(cells)))
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    return one


def _module_names(modules: Sequence[str]) -> list[str]:
    """Shortens paths to what differs: numbers and the last name."""
    short = []
    for module in modules:
        parts = module.split(".")
        short.append(" ".join([*(part for part in parts[:-1] if part.isdigit()), parts[-1]]))
    return short if len(set(short)) == len(short) else list(modules)


def _lines(analysis: Analysis) -> Iterator[tuple[str, str, bool]]:
    """Yields cell, colour and whether it is emphasised: the baseline and the best ones are."""
    order = [cell.name for cell in by_merit(analysis)]
    strong = [name for name in order if name == analysis.baseline]
    strong += [name for name in order if name != analysis.baseline][: SHOWN - len(strong)]
    for name in [name for name in order if name not in strong]:
        yield name, COLOURS["muted"], False
    for place, name in enumerate(strong):
        yield name, COLOURS[f"c{place}"], True


def _robust(one: Drawing, values: pd.Series, higher: bool) -> None:
    """Limits the axis so that very bad values do not compress all others."""
    finite = values[np.isfinite(values)].astype(float)
    low, middle, high = finite.quantile([0.05, 0.5, 0.95])
    room = max(high - low, 1e-12)
    bottom, top = finite.min(), finite.max()
    if higher and middle - bottom > 4 * room:
        one.axes.set_ylim(bottom=low - room)
    if not higher and top - middle > 4 * room:
        one.axes.set_ylim(top=high + room)


def _legend(one: Drawing, named: Mapping[str, Line2D]) -> None:
    if named:
        columns = 2 if max(map(len, named)) <= 24 else 1
        # Matplotlib leaves out labels that start with `_`; the names take their places.
        places = [str(place) for place in range(len(named))]
        legend = one.figure.legend(list(named.values()), places, loc="outside lower center", ncols=columns)
        for text, name in zip(legend.get_texts(), named, strict=True):
            text.set(text=_cut(name, 26 if columns == 2 else 52), **LITERAL)


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
