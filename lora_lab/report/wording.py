"""The verdict of a study, worded by rules from its statistics and not stronger than they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_lab.statistics import Analysis, Comparison, Interval

OUTCOMES = ("better", "worse", "equivalent", "cannot be told apart", "not tested")
NAMED = 4
"""Most cells that a sentence names; more are counted."""
ROUNDING = 1e-12
"""Share of a metric's typical value that sums of floating-point numbers may be off."""


class Numbers:
    """Writes a metric's values, with digits that depend on its size.

    Args:
        scale: a typical value; 0.85 is written with four decimals, 23.4 with two.
    """

    def __init__(self, scale: float):
        usable = scale > 0 and math.isfinite(scale)
        size = math.floor(math.log10(scale)) if usable else 0
        self.noise = ROUNDING * scale if usable else 0.0
        self.form = ".3e" if size < -5 else f".{max(3 - size, 0)}f"

    @classmethod
    def of(cls, analysis: Analysis) -> Numbers:
        """Returns the writer for an analysis's metric."""
        return cls(max((abs(cell.mean) for cell in analysis.cells if cell.mean is not None), default=1.0))

    def value(self, number: float | None) -> str:
        """Writes a value; a dash for none."""
        return "–" if number is None else self._written(number, "")

    def difference(self, number: float | None) -> str:
        """Writes a difference with its sign."""
        return "–" if number is None else self._written(number, "+")

    def exact(self, number: float) -> str:
        """Writes a number above 0 that was chosen, such as a margin, with the digits that it has."""
        text = self.value(number)
        return text if float(text) == number else f"{number:g}"

    def _written(self, number: float, sign: str) -> str:
        if abs(number) <= self.noise:
            return f"{0:{self.form}}".partition("e")[0]
        text = f"{number:{sign}{self.form}}"
        if not text.strip("+-0."):  # it would seem to be 0
            text = f"{number:{sign}.2g}"
        return text.replace("-", "−", 1) if text.startswith("-") else text

    def range(self, interval: Interval | None, signed: bool = False) -> str:
        """Writes an interval as `low to high`; `no interval` for none."""
        if interval is None:
            return "no interval"
        write = self.difference if signed else self.value
        return f"{write(interval.low)} to {write(interval.high)}"


def outcome(analysis: Analysis, cell: str) -> str:
    """Returns which of `OUTCOMES` a cell's comparison with the baseline has."""
    found = analysis.comparisons[cell].outcome
    if found in ("greater", "less"):
        return "better" if analysis.is_better(cell) else "worse"
    return {"equivalent": "equivalent", "undecided": "cannot be told apart"}.get(found, "not tested")


def verdict(analysis: Analysis) -> str:
    """Returns what a study has found, in one sentence."""
    if analysis.baseline is None:
        return _without_baseline(analysis)
    groups: dict[str, list[str]] = {name: [] for name in OUTCOMES}
    for cell in analysis.comparisons:
        groups[outcome(analysis, cell)].append(cell)
    parts = []
    for name, cells in groups.items():
        # Two reasons for no test, and a sentence for each.
        few = [cell for cell in cells if len(analysis.comparisons[cell].differences) < 2]
        split = [few, [cell for cell in cells if cell not in few]] if name == "not tested" else [cells]
        parts += [_clause(analysis, name, some) for some in split if some]
    if not parts:
        return f"Only the baseline {analysis.baseline} has runs, so nothing can be compared."
    found = "; ".join(parts)
    unfinished = sum(cell.unfinished for cell in analysis.cells)
    if unfinished:
        total = sum(sum(cell.statuses.values()) for cell in analysis.cells)
        found += f"; {unfinished} of {total} runs did not finish and are in no mean"
    return f"In {analysis.metric}, {found}."


def _clause(analysis: Analysis, name: str, cells: Sequence[str]) -> str:
    write = Numbers.of(analysis)
    who, plural = names(cells), len(cells) > 1
    baseline, found = analysis.baseline, [analysis.comparisons[cell] for cell in cells]
    if name in ("better", "worse"):
        by = ", ".join(_amount(write, one) for one in found) if len(cells) <= NAMED else _most(write, found)
        return f"{who} {'are' if plural else 'is'} {name} than {baseline} ({by})"
    if name == "equivalent":
        margin = write.exact(analysis.margin or 0.0)
        return f"{who} {'are' if plural else 'is'} as good as {baseline} within {margin}"
    if name == "not tested" and len(found[0].differences) > 1:
        by = _most(write, found) if plural else write.difference(found[0].mean)
        return (
            f"{who} {'differ' if plural else 'differs'} from {baseline} by the same amount with every seed "
            f"({by}), so that no test is possible"
        )
    if name == "not tested":
        return (
            f"{who} {'have' if plural else 'has'} too few finished seeds in common with {baseline} for a test"
        )
    detectable = [one.detectable for one in found if one.detectable is not None]
    power = ""
    if detectable:
        low, high = write.value(min(detectable)), write.value(max(detectable))
        size = low if low == high else f"{low} to {high}, by cell"
        power = f" (a true difference that four of five such studies would find: {size})"
    return f"{who} cannot be told apart from {baseline}{power}"


def names(cells: Sequence[str]) -> str:
    """Lists cells in words; many are counted."""
    if len(cells) > NAMED:
        return f"{len(cells)} cells"
    return cells[0] if len(cells) == 1 else f"{', '.join(cells[:-1])} and {cells[-1]}"


def _amount(write: Numbers, one: Comparison) -> str:
    return f"{write.difference(one.mean)}, interval {write.range(one.corrected_interval, signed=True)}"


def _most(write: Numbers, found: Sequence[Comparison]) -> str:
    means = sorted(one.mean for one in found if one.mean is not None)
    return f"{write.difference(means[0])} to {write.difference(means[-1])}"


def _without_baseline(analysis: Analysis) -> str:
    done = [cell for cell in analysis.cells if cell.mean is not None]
    if not done:
        return f"No run has finished with a {analysis.metric}, so nothing can be said."
    sign = -1 if analysis.higher_is_better else 1
    best = min(done, key=lambda cell: sign * (cell.mean or 0.0))
    write = Numbers.of(analysis)
    kind = "highest" if analysis.higher_is_better else "lowest"
    seeds = f"{len(best.values)} seed{'s' if len(best.values) > 1 else ''}"
    found = (
        f"{best.name} has the {kind} mean {analysis.metric}, {write.value(best.mean)} "
        f"({seeds}, {write.range(best.interval)})"
    )
    if len(done) == 1:
        return f"{found}."
    rivals = [
        cell.name
        for cell in done
        if cell is not best and (cell.rank_interval is None or cell.rank_interval.low <= 1)
    ]
    if rivals:
        found += f", but with other seeds {names(rivals)} could have it"
    return f"{found}; without a baseline no difference is tested."
