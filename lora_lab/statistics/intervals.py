"""Intervals of a mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """Two ends, and the share of cases in which such intervals contain the true value."""

    low: float
    high: float
    level: float

    def excludes(self, value: float) -> bool:
        """Whether a value is outside."""
        return not self.low <= value <= self.high

    def within(self, margin: float) -> bool:
        """Whether it is completely between -margin and margin."""
        return -margin < self.low and self.high < margin


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval | None:
    """Returns Student's t interval of a mean; None for fewer than two values, which have no spread.

    Args:
        values: one number for each seed.
        level: share of cases, between 0 and 1.
    """
    numbers = np.asarray(values, dtype=float)
    if len(numbers) < 2:
        return None
    half = stats.sem(numbers) * stats.t.isf((1 - level) / 2, len(numbers) - 1)
    return Interval(numbers.mean() - half, numbers.mean() + half, level)
