"""How much rank the adapters have, how much of it they use, and how much of them is switched off.

    rank/mean             mean rank in use, over the adapters for which the word has a meaning
    rank/<module path>    rank in use of one of them
    rank/effective_mean   mean effective rank of W' − W (Roy and Vetterli 2007), where a matrix is edited
    sparsity/mean         mean share of rank units silenced, in [0, 1]; for adapters without units of rank the
                          share of trained numbers that are exactly zero

Names without a meaning for a method do not appear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger

from lora_lab.adapters import AdapterSet
from lora_lab.callbacks.adapter_rows import AdapterRow, adapter_rows
from lora_lab.callbacks.controller import Controller
from lora_lab.callbacks.rank_heatmap import rank_heatmap


def final_statistics(rows: list[AdapterRow]) -> dict[str, float | None]:
    """Returns the means that a run's record keeps; None where a word has no meaning for the method."""
    means = _means(rows)
    return {
        "final_rank_mean": means.get("rank/mean"),
        "effective_rank_mean": means.get("rank/effective_mean"),
        "sparsity_mean": means.get("sparsity/mean"),
    }


class AdapterStatistics(L.Callback):
    """Logs the statistics at the start, with every validation, and at the end with a table and a picture.

    The rows of start and end are labelled as Lightning labels its own: row s is of the state after s + 1
    steps, and the start shares label 0. A resumed run logs no start. This callback stands behind those that
    change the adapters when training ends, so that the last row describes what the run keeps.

    Args:
        adapters: the run's adapters.
        controllers: the run's controllers, whose own statistics stand in the rows of `train/loss`.
    """

    def __init__(self, adapters: AdapterSet, controllers: Sequence[Controller] = ()):
        self.adapters = adapters
        self.controllers = controllers
        self._due = False
        self.rows: list[AdapterRow] = []
        """What the adapters had become when training ended, in the first process; empty before."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the start."""
        if trainer.is_global_zero and trainer.global_step == 0:
            self._log(trainer, adapter_rows(self.adapters))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Asks whether this step's numbers are logged."""
        self._due = bool(self.controllers) and pl_module.logging_due()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what the controllers have to tell."""
        if self._due:
            self._due = False
            for controller in self.controllers:
                pl_module.log_dict(controller.statistics())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the statistics to the row of the validation's metrics."""
        if trainer.is_global_zero:
            # All processes' adapters are equal. Without sync_dist Lightning warns that this is not known.
            scalars = _scalars(adapter_rows(self.adapters))
            pl_module.log_dict(scalars, rank_zero_only=True, sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the end, and to W&B the table `rank/table` and the picture `rank/heatmap`."""
        if not trainer.is_global_zero:
            return
        self.rows = rows = adapter_rows(self.adapters)
        self._log(trainer, rows)
        picture = rank_heatmap([(row.layer, row.role, row.path, row.effective_rank) for row in rows])
        columns, table = [column.name for column in fields(AdapterRow)], [list(astuple(row)) for row in rows]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and rows:
                logger.log_table("rank/table", columns, table, step=_step(trainer))
                if picture is not None:
                    logger.log_image("rank/heatmap", [picture], step=_step(trainer))

    def _log(self, trainer: L.Trainer, rows: list[AdapterRow]) -> None:
        if scalars := _scalars(rows):
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=_step(trainer))


def _means(rows: list[AdapterRow]) -> dict[str, float]:
    measured: dict[str, list[float]] = {
        "rank/mean": [row.rank for row in rows if row.rank is not None],
        "rank/effective_mean": [row.effective_rank for row in rows if row.effective_rank is not None],
        "sparsity/mean": [row.sparsity for row in rows if row.sparsity is not None],
    }
    return {name: sum(values) / len(values) for name, values in measured.items() if values}


def _scalars(rows: list[AdapterRow]) -> dict[str, float]:
    return _means(rows) | {f"rank/{row.path}": float(row.rank) for row in rows if row.rank is not None}


def _step(trainer: L.Trainer) -> int:
    return max(trainer.global_step - 1, 0)
