"""Comparing cells with a baseline, seed by seed.

The same seed gives two cells the same data in the same order, so their difference varies less by chance than
either value. Student's t tests the differences over seeds; if there are rows of single test examples, a
bootstrap over seeds and examples tests them a second time.

Several comparisons of one study are corrected by Holm's procedure (1979): p-values, from the smallest on, are
compared with α/m, α/(m-1), …, until one is larger. **A corrected interval is the interval at the level at
which the procedure tested that comparison**: 1 - α/(m-j) for the j-th rejected one, and for all others the
level at which the procedure stopped. So a corrected interval excludes 0 exactly when the corrected p-value is
below α.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from lora_lab.statistics.intervals import Interval

POWER = 0.8
"""Share of studies that find a difference of the size that is called detectable."""

Outcome = Literal["greater", "less", "equivalent", "undecided", "untested"]
"""The result for a cell: its metric is greater or less than the baseline's, equivalent, cannot be told apart
from it, or was not tested: too few seeds, or the same difference in all of them."""


@dataclass(frozen=True)
class Comparison:
    """A cell against the baseline; differences are cell - baseline."""

    differences: tuple[float, ...]
    """One for each seed that both have finished."""
    mean: float | None
    """None without a common seed."""
    interval: Interval | None
    """Student's t; None if the seeds have no spread."""
    p: float | None
    corrected_interval: Interval | None
    """At the level at which Holm's procedure tested this comparison."""
    corrected_p: float | None
    resampled: Interval | None
    """Bootstrap over seeds and test examples; None without rows of examples."""
    corrected_resampled: Interval | None
    """The same, at the level of the corrected interval."""
    detectable: float | None
    """Smallest true difference that `POWER` of such studies would find."""
    equivalence_p: float | None
    """Two one-sided tests, corrected; None without a margin."""
    equivalent: bool
    """Whether the true difference is smaller than the margin, by the tests and by the bootstrap."""

    @property
    def outcome(self) -> Outcome:
        """The result; an effect only if each corrected interval excludes 0 on the same side."""
        if self.corrected_interval is None or self.mean is None:
            return "untested"
        found = [self.corrected_interval, self.corrected_resampled or self.corrected_interval]
        if all(interval.excludes(0) and (interval.low > 0) == (self.mean > 0) for interval in found):
            return "greater" if self.mean > 0 else "less"
        return "equivalent" if self.equivalent else "undecided"

    @property
    def depends_on_examples(self) -> bool:
        """Whether the seeds agree on an effect that other test examples might not have."""
        seeds = self.corrected_interval is not None and self.corrected_interval.excludes(0)
        return seeds and self.outcome not in ("greater", "less")


def compare_paired(
    differences: Sequence[ArrayLike],
    replicates: Sequence[NDArray[np.float64] | None] | None = None,
    margin: float | None = None,
    level: float = 0.95,
) -> list[Comparison]:
    """Tests all comparisons of a study together.

    Args:
        differences: for each comparison, the differences by seed, shape (seeds).
        replicates: for each comparison, the mean differences of a bootstrap over seeds and test examples,
            shape (draws); None if there are no rows of examples.
        margin: smaller differences count as none; None tests no equivalence.
        level: level of the intervals; effects are claimed at 1 - level.
    """
    seeds = [np.asarray(values, dtype=float) for values in differences]
    drawn = list(replicates) if replicates is not None else [None] * len(seeds)
    tested = [place for place, values in enumerate(seeds) if len(values) > 1 and not _constant(values)]
    tests = _Tests.of([seeds[place] for place in tested])
    p = tests.p_values()
    corrected, alphas = holm(p, 1 - level)
    usual, at_alpha = tests.intervals(np.full(len(tested), 1 - level)), tests.intervals(alphas)
    equivalence, equivalence_alphas = holm(tests.equivalence_p_values(margin or 0.0), 1 - level)
    comparisons = [_untested(values) for values in seeds]
    for index, place in enumerate(tested):
        values, draws, alpha = seeds[place], drawn[place], float(alphas[index])
        detectable = detectable_difference(values, alpha) if tests.error[index] else None
        if detectable is not None and draws is not None:
            normal = special.ndtri(1 - alpha / 2) + special.ndtri(POWER)
            detectable = max(detectable, float(normal * draws.std(ddof=1)))
        equal = margin is not None and bool(equivalence[index] < 1 - level)
        if equal and margin is not None and draws is not None:
            equal = _quantiles(draws, 1 - 2 * equivalence_alphas[index]).within(margin)
        comparisons[place] = Comparison(
            differences=tuple(values),
            mean=float(tests.mean[index]),
            interval=usual[index],
            p=float(p[index]),
            corrected_interval=at_alpha[index],
            corrected_p=float(corrected[index]),
            resampled=None if draws is None else _quantiles(draws, level),
            corrected_resampled=None if draws is None else _quantiles(draws, 1 - alpha),
            detectable=detectable,
            equivalence_p=None if margin is None else float(equivalence[index]),
            equivalent=equal,
        )
    return comparisons


def holm(p: NDArray[np.float64], alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corrects p-values by Holm's procedure.

    (Own code: statsmodels' `multipletests` does not return the levels, and collects the garbage of the whole
    process in every call. The tests compare with it.)

    Args:
        p: shape (comparisons).
        alpha: probability that a study without any effect claims one.

    Returns:
        Corrected p-values, and the α at which each comparison was tested; both of shape (comparisons).
    """
    order = np.argsort(p, kind="stable")
    left = np.arange(len(p), 0, -1)
    corrected, levels = np.empty(len(p)), np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * left), 1)
    rejected = int(np.logical_and.accumulate(p[order] * left <= alpha).sum())
    levels[order] = alpha / np.maximum(left, len(p) - rejected)
    return corrected, levels


def detectable_difference(differences: ArrayLike, alpha: float = 0.05) -> float:
    """Returns the true difference that `POWER` of such studies would find, in the metric's unit.

    The standard deviation is estimated without bias from the differences (the sample deviation of three seeds
    is 11 % too small).

    Args:
        differences: one for each seed, at least two.
        alpha: level of the two-sided test.
    """
    values = np.asarray(differences, dtype=float)
    freedom = len(values) - 1
    bias = np.sqrt(2 / freedom) * np.exp(special.gammaln((freedom + 1) / 2) - special.gammaln(freedom / 2))
    return float(values.std(ddof=1) / bias * _detectable_effect(len(values), alpha))


@lru_cache(maxsize=1024)
def _detectable_effect(seeds: int, alpha: float) -> float:
    """Returns the detectable difference in standard deviations, from the noncentral t distribution.

    (statsmodels' `TTestPower.solve_power` returns wrong numbers for few seeds without a warning.)
    """
    freedom = seeds - 1
    critical = stats.t.isf(alpha / 2, freedom)
    top = critical * np.sqrt(stats.chi2.ppf(POWER, freedom) / freedom) + 3  # more than enough power
    root = optimize.brentq(lambda shift: stats.nct.sf(critical, freedom, shift) - POWER, 0, top)
    return float(root / np.sqrt(seeds))


@dataclass(frozen=True)
class _Tests:
    """Student's paired t tests, all at once; each array has the shape (comparisons)."""

    mean: NDArray[np.float64]
    error: NDArray[np.float64]
    """Standard error; 0 if the seeds differ only by rounding, so their spread is unknown."""
    freedom: NDArray[np.float64]

    @classmethod
    def of(cls, differences: Sequence[NDArray[np.float64]]) -> _Tests:
        alike = [_alike(values) for values in differences]
        errors = [values.std(ddof=1) / len(values) ** 0.5 for values in differences]
        return cls(
            np.array([values.mean() for values in differences]),
            np.where(np.array(alike, dtype=bool), 0.0, errors),
            np.array([len(values) - 1.0 for values in differences]),
        )

    def p_values(self) -> NDArray[np.float64]:
        """Returns two-sided p-values; 1 without spread."""
        return np.where(self.error > 0, 2 * special.stdtr(self.freedom, -abs(self._over_error(self.mean))), 1)

    def equivalence_p_values(self, margin: float) -> NDArray[np.float64]:
        """Returns the larger p-value of two one-sided tests, one against each end of the margin."""
        nearest = margin - abs(self.mean)
        return np.where(self.error > 0, special.stdtr(self.freedom, -self._over_error(nearest)), 1)

    def intervals(self, alphas: NDArray[np.float64]) -> list[Interval]:
        """Returns the interval of each mean at its level 1 - α."""
        half = -special.stdtrit(self.freedom, alphas / 2) * self.error
        ends = zip(self.mean - half, self.mean + half, 1 - alphas, strict=True)
        return [Interval(float(low), float(high), float(level)) for low, high, level in ends]

    def _over_error(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values / np.where(self.error > 0, self.error, 1)


def _constant(values: NDArray[np.float64]) -> bool:
    """Whether all seeds have the same difference, which is not 0: without spread there is no test."""
    return bool(_alike(values) and values.mean())


def _alike(values: NDArray[np.float64]) -> bool:
    """Whether the seeds differ only by rounding."""
    return bool(np.ptp(values) <= 1e-9 * abs(values).max())


def _untested(values: NDArray[np.float64]) -> Comparison:
    mean = float(values.mean()) if len(values) else None
    nothing = (None,) * 8
    return Comparison(tuple(values), mean, *nothing, equivalent=False)


def _quantiles(drawn: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)
