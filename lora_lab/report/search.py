"""Which values of a search are as good as its best one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NEAR = 0.01
"""Share of the best score within which a value is as good, without a margin."""


def search_margin(by: str, metric: str, equivalence: float | None) -> float | None:
    """Returns the study's margin of equivalence where the search goes by the metric that it is about."""
    return equivalence if by.rpartition("/")[2] == metric.rpartition("/")[2] else None


def good_values(tried: Mapping[Any, float | None], best: Any, margin: float | None) -> list[Any]:
    """Returns the values whose scores are within the margin of the best value's; without one, within 1 %.

    Args:
        tried: value → score.
        best: the best value; without a score, none is good.
        margin: as `search_margin` returns it.
    """
    scores = {value: score for value, score in tried.items() if score is not None and math.isfinite(score)}
    if best not in scores:
        return []
    room = NEAR * abs(scores[best]) if margin is None else margin
    return [value for value, score in scores.items() if abs(score - scores[best]) <= room]
