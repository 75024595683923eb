"""From a table of runs to statistics of cells and their comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lora_lab.errors import ConfigError, suggest
from lora_lab.statistics.intervals import Interval, mean_interval
from lora_lab.statistics.metrics import example_values, higher_is_better
from lora_lab.statistics.paired import Comparison, compare_paired
from lora_lab.statistics.resampling import Resampled, rank_interval, resample_seeds

FINISHED = "finished"


@dataclass(frozen=True)
class CellSummary:
    """All runs of one cell."""

    name: str
    values: Mapping[int, float]
    """seed → metric, of the runs that finished."""
    mean: float | None
    interval: Interval | None
    """None for fewer than two seeds."""
    statuses: Mapping[str, int]
    """Number of runs that finished, failed, diverged, …"""
    rank: int | None = None
    """1 for the best; equal means share the better rank; None for fewer than two seeds."""
    rank_interval: Interval | None = None

    @property
    def unfinished(self) -> int:
        """Number of runs without a result."""
        return sum(count for status, count in self.statuses.items() if status != FINISHED)


@dataclass(frozen=True)
class Analysis:
    """What the runs of a study say about one metric."""

    metric: str
    higher_is_better: bool
    baseline: str | None
    margin: float | None
    level: float
    cells: tuple[CellSummary, ...]
    comparisons: Mapping[str, Comparison]
    """Cell → its comparison with the baseline, or with its own one."""
    examples: int | None
    """Number of test examples for the bootstrap; None without any."""
    notes: tuple[str, ...]
    """What could not be used in the analysis, and why."""

    def cell(self, name: str) -> CellSummary:
        """Returns a cell by its name."""
        return next(cell for cell in self.cells if cell.name == name)

    def is_better(self, cell: str) -> bool:
        """Whether a cell's difference from the baseline is an improvement."""
        mean = self.comparisons[cell].mean
        return mean is not None and (mean > 0) == self.higher_is_better


def analyse(
    results: pd.DataFrame,
    metric: str,
    baseline: str | Mapping[str, str] | None = None,
    margin: float | None = None,
    examples: Mapping[tuple[str, int], pd.DataFrame] | None = None,
    level: float = 0.95,
) -> Analysis:
    """Analyses the runs of a study.

    Args:
        results: one row for each run: columns cell, seed, status and the metric.
        metric: the column that is compared; its name says whether more of it is better.
        baseline: the cell that the others are compared with; or for some cells the one that each is compared
            with, corrected for the number of these pairs; None compares nothing.
        margin: smaller differences count as none; None tests no equivalence.
        examples: (cell, seed) → rows of the run's test examples (columns id, label, prediction, loss).
        level: level of the intervals; effects are claimed at 1 - level.

    Raises:
        ConfigError: if the metric or a compared cell is not in the table, a cell has two runs of one seed, or
            the margin is not positive.
    """
    better = higher_is_better(metric)
    if isinstance(baseline, str):
        against = {cell: baseline for cell in results["cell"].astype(str) if cell != baseline}
    else:
        against = dict(baseline or {})
    _check(results, metric, {*against, *against.values()}, margin)
    finite = pd.to_numeric(results[metric], errors="coerce")
    finished = results.assign(value=finite)[(results["status"] == FINISHED) & np.isfinite(finite)]
    notes = []
    missing = int((results["status"] == FINISHED).sum()) - len(finished)
    if missing:
        notes.append(f"{missing} finished runs have no finite {metric} and are not compared.")
    values = {
        str(cell): dict(zip(rows["seed"].astype(int), rows["value"].astype(float), strict=True))
        for cell, rows in finished.sort_values("seed").groupby("cell", sort=False)
    }
    resampled: Resampled | None = None
    count = None
    if examples:
        found = _example_table(values, metric, examples)
        if isinstance(found, str):
            notes.append(f"Test examples are not resampled: {found}.")
        elif (resampled := Resampled.draw(found)) is None:
            notes.append("Test examples are not resampled: cells were tested on different ones.")
        else:
            count = max((len(rows) for rows in found.values()), default=None)
    cells = []
    for name, rows in results.groupby("cell", sort=False):
        own = values.get(str(name), {})
        mean = float(np.mean(list(own.values()))) if own else None
        statuses = Counter(str(status) for status in rows["status"])
        cells.append(CellSummary(str(name), own, mean, mean_interval(list(own.values()), level), statuses))
    differences, replicates = [], []
    for name, other in against.items():
        seeds = sorted(set(values.get(name, {})) & set(values.get(other, {})))
        differences.append(np.array([values[name][seed] - values[other][seed] for seed in seeds]))
        replicates.append(resampled.difference(name, other, seeds) if resampled and len(seeds) > 1 else None)
    compared = compare_paired(differences, replicates, margin, level)
    comparisons = dict(zip(against, compared, strict=True))
    ranked = _with_ranks(cells, resampled, better, level)
    common = baseline if isinstance(baseline, str) else None
    return Analysis(metric, better, common, margin, level, tuple(ranked), comparisons, count, tuple(notes))


def _check(results: pd.DataFrame, metric: str, compared: set[str], margin: float | None) -> None:
    faults = []
    if metric not in results:
        faults.append(f"metric: no run logged '{metric}'{suggest(metric, map(str, results.columns))}")
    cells = {str(cell) for cell in results["cell"]}
    for name in sorted(compared - cells):
        faults.append(f"baseline: no cell '{name}'{suggest(name, cells)}")
    if margin is not None and not margin > 0:
        faults.append(f"margin: must be above 0; got {margin}")
    for _, row in results[results.duplicated(["cell", "seed"])].iterrows():
        faults.append(f"cell '{row['cell']}': has two runs of seed {row['seed']}; leave out one of them")
    if faults:
        raise ConfigError("\n".join(faults))


def _example_table(
    values: Mapping[str, Mapping[int, float]],
    metric: str,
    examples: Mapping[tuple[str, int], pd.DataFrame],
) -> dict[tuple[str, int], pd.Series] | str:
    """Returns the metric of every example of every finished run, or why there are none."""
    if not metric.startswith("test/"):
        return f"{metric} is not of the test split"
    table = {}
    for cell, seeds in values.items():
        for seed, value in seeds.items():
            rows = examples.get((cell, seed))
            if rows is None:
                return f"{cell}, seed {seed}, has none"
            found = example_values(rows, metric)
            if found is None:
                return f"{metric} is not a mean over examples"
            if not np.isclose(found.mean(), value, rtol=1e-4, atol=1e-6):
                return (
                    f"the examples of {cell}, seed {seed}, have a mean of {found.mean():.6g}, not {value:.6g}"
                )
            # Ids are places in the split: of another split, other rows have the same.
            names = rows["id"].astype(str)
            if "label" in rows:
                names += " " + rows["label"].astype(str)
            table[cell, seed] = pd.Series(found, index=pd.Index(names))
    return table


def _with_ranks(
    cells: list[CellSummary], resampled: Resampled | None, descending: bool, level: float
) -> list[CellSummary]:
    ranked = [cell for cell in cells if len(cell.values) > 1]
    if len(ranked) < 2:
        return cells
    columns = []
    for cell in ranked:
        drawn = (
            np.stack([resampled.values[cell.name, seed] for seed in cell.values], 1)
            if resampled
            else np.array(list(cell.values.values()))
        )
        columns.append(np.concatenate([[cell.mean], resample_seeds(drawn)]))
    ranks, intervals = rank_interval(np.stack(columns, 1), descending, level)
    found = {
        cell.name: (int(rank), interval)
        for cell, rank, interval in zip(ranked, ranks, intervals, strict=True)
    }
    return [
        CellSummary(
            cell.name, cell.values, cell.mean, cell.interval, cell.statuses, *found.get(cell.name, ())
        )
        for cell in cells
    ]
