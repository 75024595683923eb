"""The progress bar of a run."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

BAR_WIDTH = 10
"""Characters; together with batches, time and two numbers the line fits into 80 columns."""


class ProgressBar(RichProgressBar):
    """Lightning's bar, with the training loss and the metric by which runs are compared.

    With all validation metrics the line would not fit into 80 columns; they are in `metrics.csv`.
    """

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Returns description, a short bar, batches and time."""
        description, bar, batches, time, *_ = super().configure_columns(trainer)
        bar.bar_width = BAR_WIDTH
        return [description, bar, batches, time]

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Returns at most two numbers, named by the last part of their names."""
        metrics = super().get_metrics(trainer, pl_module)
        shown = [name for name in ("train/loss", getattr(pl_module, "monitor", "")) if name in metrics]
        return {name.rpartition("/")[2]: metrics[name] for name in shown}
