"""The bootstrap of a study (Efron 1979): its means and ranks with other seeds and test examples.

Test examples are a second source of chance besides seeds. If all seeds are tested on the same examples, all
seeds of a replicate use the same draw of examples: an example that is hard is hard for every seed, and
separate draws for each seed would average out this chance. If the seed also chooses the split, each seed has
its own draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from lora_lab.statistics.intervals import Interval

DRAWS = 9999
"""Number of replicates; with 30 comparisons, 8 of them are outside each end of a corrected interval."""
CHUNK = 4_000_000
"""Number of random numbers drawn at a time."""


@dataclass(frozen=True)
class Resampled:
    """Replicates of every run's metric under draws of test examples."""

    values: Mapping[tuple[str, int], NDArray[np.float64]]
    """(cell, seed) → shape (draws)."""

    @classmethod
    def draw(cls, examples: Mapping[tuple[str, int], pd.Series], draws: int = DRAWS) -> Resampled | None:
        """Draws test examples, the same ones for all cells.

        Args:
            examples: (cell, seed) → the metric of every test example, indexed by the example's id.
            draws: number of replicates.

        Returns:
            None if cells of one seed were tested on different examples, which cannot be paired.
        """
        generator = np.random.default_rng(0)
        by_seed: dict[int, list[tuple[str, int]]] = {}
        for key in examples:
            by_seed.setdefault(key[1], []).append(key)
        groups: dict[tuple[object, ...], list[tuple[str, int]]] = {}
        for keys in by_seed.values():
            found = {tuple(examples[key].index.sort_values()) for key in keys}
            if len(found) > 1:
                return None
            groups.setdefault(found.pop(), []).extend(keys)
        values: dict[tuple[str, int], NDArray[np.float64]] = {}
        for ids, keys in groups.items():
            table = np.stack([examples[key].reindex(list(ids)).to_numpy(dtype=float) for key in keys], 1)
            means = _example_means(table, draws, generator)
            values |= {key: means[:, column] for column, key in enumerate(keys)}
        return cls(values)

    def difference(self, cell: str, baseline: str, seeds: Sequence[int]) -> NDArray[np.float64]:
        """Returns replicates of two cells' mean difference over seeds drawn from these, shape (draws)."""
        pairs = [self.values[cell, seed] - self.values[baseline, seed] for seed in seeds]
        return resample_seeds(np.stack(pairs, 1))


def resample_seeds(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns means over seeds drawn with replacement, the same ones for the same number of seeds.

    Args:
        values: shape (draws, seeds), or (seeds) for the same values in each of `DRAWS` replicates.

    Returns:
        Shape (draws).
    """
    draws = len(values) if values.ndim == 2 else DRAWS
    seeds = values.shape[-1]
    places = np.random.default_rng(seeds).integers(seeds, size=(draws, seeds))
    return np.take_along_axis(np.broadcast_to(values, (draws, seeds)), places, 1).mean(1)


def rank_interval(
    means: NDArray[np.float64], descending: bool, level: float = 0.95
) -> tuple[NDArray[np.int64], list[Interval]]:
    """Ranks cells, 1 for the best; equal means share the better rank.

    Args:
        means: shape (1 + draws, cells): the means, then their replicates.
        descending: whether the largest mean is the best.
        level: of the intervals.

    Returns:
        Ranks of the means, shape (cells), and for each cell the interval of its ranks in the replicates.
    """
    # Rounding, since sums in another order would break ties.
    ranks = stats.rankdata(np.round(-means if descending else means, 12), method="min", axis=1)
    ends = np.quantile(ranks[1:], [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")
    return ranks[0].astype(int), [Interval(float(low), float(high), level) for low, high in ends.T]


def _example_means(
    table: NDArray[np.float64], draws: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Returns means over drawn examples: (examples, runs) → (draws, runs)."""
    count = len(table)
    means = np.empty((draws, table.shape[1]))
    step = max(1, CHUNK // count)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        places = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(places.ravel(), minlength=size * count).reshape(size, count)
        means[start : start + size] = weights @ table / count
    return means
