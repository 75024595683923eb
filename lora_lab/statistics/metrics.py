"""What a metric's name implies: whether more of it is better, and its value for one example."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lora_lab.errors import ConfigError, suggest
from lora_lab.tasks import TASKS


def higher_is_better(metric: str) -> bool:
    """Returns whether more of a metric is better, as its torchmetrics class says; less of a loss always is.

    Args:
        metric: its name with or without the split, `test/accuracy`.

    Raises:
        ConfigError: if no task has such a metric.
    """
    known = {"loss": False}
    for task in TASKS.values():
        # torchmetrics does not say it for correlations; between predictions and labels, more is better.
        known |= {str(name): kind.higher_is_better is not False for name, kind in task.metrics(2).items()}
    name = metric.rpartition("/")[2]
    if name not in known:
        raise ConfigError(f"metric: no task has a metric '{metric}'{suggest(name, known)}")
    return known[name]


def example_values(rows: pd.DataFrame, metric: str) -> NDArray[np.float64] | None:
    """Returns a metric for each example, if the metric of a data set is their mean.

    Args:
        rows: one row for each example: label, loss, and prediction (classes) or score (numbers).
        metric: its name with or without the split.

    Returns:
        Shape (examples); None for metrics that are no mean over examples, such as F1.
    """
    name = metric.rpartition("/")[2]
    if name == "loss":
        return rows["loss"].to_numpy(dtype=float)
    if name == "accuracy":
        return np.asarray(rows["label"] == rows["prediction"], dtype=float)
    if name in ("mse", "mae"):
        errors = rows["score"].to_numpy(dtype=float) - rows["label"].to_numpy(dtype=float)
        return errors**2 if name == "mse" else abs(errors)
    return None
