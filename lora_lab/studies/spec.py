"""The settings of a study's file.

extends: [../../configs/models/minilm.yaml, ../../configs/data/movie_reviews.yaml]
question: Does DoRA beat LoRA at rank 4?
experiment: {adapter: {rank: 4}, trainer: {max_epochs: 1}}
grid: {adapter.method: [lora, dora]}
seeds: [0, 1, 2]
metric: test/accuracy
baseline: lora
tune: {key: optimization.learning_rate, values: [1.0e-3, 2.0e-3, 4.0e-3], seeds: [100]}
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class StudySpec:
    """A question, and the runs that answer it."""

    name: str | None = None
    """Name of the study; its folder is `<output>/<name>/`. Null means the name of the file, or of its folder
    if the file is called study.yaml."""

    question: str = MISSING
    """The question, in a sentence."""

    experiment: Any = None
    """Settings of every run, which override the files in `extends`; as in the file of an experiment."""

    grid: Any = None
    """Dotted key → its values. Each combination of values is a cell."""

    list: Any = None
    """Name of a cell → its settings, a whole `adapter:` for example. They come in addition to those of the
    grid."""

    seeds: builtins.list[int] = field(default_factory=builtins.list)
    """Seeds of the comparison; every cell has a run for each."""

    metric: str = MISSING
    """What is compared, for example `test/accuracy`."""

    baseline: str = MISSING
    """Name of the cell that the others are compared with."""

    equivalence: float | None = None
    """Largest difference in the metric, above 0, that counts as none; null tests no equivalence."""

    tune: Any = None
    """Search on validation that each cell makes before the comparison; see `TuneSpec`."""

    match_parameters: int | None = None
    """Number of parameters that every method should train, without task heads; each gets the nearest size."""


@dataclass
class TuneSpec:
    """A search for the best value of one key, on validation data and with other seeds."""

    key: str = MISSING
    """What is tuned, for example `optimization.learning_rate`."""

    values: Any = None
    """The values to try; or null if `low`, `high` and `trials` give a range."""

    low: float | None = None
    """Lower end of the range that Optuna searches."""

    high: float | None = None
    """Its upper end."""

    trials: int | None = None
    """Number of values to try in the range; at least 1."""

    log: bool = True
    """Whether the range is searched on a logarithmic scale."""

    by: str | None = None
    """Validation metric that decides; null means the task's own."""

    seeds: builtins.list[int] = field(default_factory=list)
    """Seeds of the search, other than those of the comparison."""
