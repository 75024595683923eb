"""The rank of the adapters, how much of it they use, and how much of them is switched off.

    rank/mean                     mean rank, over the adapters that have a rank
    rank/<module path>            rank of one of them: the components in its weights at this moment
    rank/total                    sum of the ranks, components that several adapters share counted once
    rank/effective_mean           mean effective rank of W' − W (Roy and Vetterli 2007), of edited matrices
    rank/effective/<module path>  that of one of them
    rank/stable_mean              mean stable rank of W' − W, ‖·‖²_F / ‖·‖²_2
    rank/stable/<module path>     that of one of them
    sparsity/mean                 mean share of the initial components that are no longer in the weights, in
                                  [0, 1], 1 for dropped adapters and those that use another's tensors; for
                                  adapters without components the share of trained numbers that are zero
    sparsity/<module path>        that of one of them
    sparsity/dropped_layers       number of adapters that are switched off
    sparsity/shared_layers        number of adapters that use another's tensors, where there are any

All are counted from the tensors at the time of the row, not from an earlier decision: between two decisions
of importance pruning a step fills silenced components again, and they count until they are silenced again. A
validation's row has the ranks that were validated. A kept component counts from the start, although its
product is zero until the first step.

Names that have no meaning for a method do not appear. Controllers add `budget/…` and `importance/…`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import WandbLogger

from lora_lab.adapters import AdapterSet
from lora_lab.callbacks.adapter_rows import AdapterRow, adapter_rows
from lora_lab.callbacks.controllers.base import Controller
from lora_lab.callbacks.heatmaps import history_heatmap, rank_heatmap
from lora_lab.callbacks.step_rows import StepRows


def final_statistics(rows: list[AdapterRow]) -> dict[str, float | None]:
    """Returns the means for a run's record; None for what has no meaning for the method."""
    means = _means(rows)
    return {
        "final_rank_mean": means.get("rank/mean"),
        "effective_rank_mean": means.get("rank/effective_mean"),
        "sparsity_mean": means.get("sparsity/mean"),
    }


class AdapterStatistics(StepRows):
    """Logs the statistics at the start, with every validation, and at the end with a table and pictures.

    The rows of start and end are labelled as Lightning labels its rows: row s is the state after s + 1 steps,
    and the start also has label 0. A resumed run logs no start. This callback comes after those that change
    the adapters, at a step's end or when training ends, so that a row describes the result. With controllers,
    the rows of `train/loss` also have the controllers' statistics, ranks and sparsity.

    Args:
        adapters: the run's adapters.
        controllers: the run's controllers.
    """

    def __init__(self, adapters: AdapterSet, controllers: Sequence[Controller] = ()):
        self.adapters = adapters
        self.controllers = controllers
        self.rows: list[AdapterRow] = []
        """The adapters' numbers at the end of training, in the first process; empty before."""
        self._ranks: dict[int, list[float]] = {}
        """Steps done → rank of each adapter at that time."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the start."""
        if trainer.is_global_zero and trainer.global_step == 0:
            self._log(trainer, adapter_rows(self.adapters))

    def numbers(self, trainer: L.Trainer) -> dict[str, float]:
        """Returns ranks, sparsity and the controllers' statistics; nothing without controllers."""
        if not self.controllers:
            return {}
        rows = adapter_rows(self.adapters, spectra=False)
        self._remember(trainer.global_step, rows)
        found = _scalars(rows)
        for controller in self.controllers:
            found |= controller.statistics()
        return found

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the statistics to the row of the validation's metrics."""
        if trainer.is_global_zero:
            rows = adapter_rows(self.adapters)
            # All processes have equal adapters. Without sync_dist Lightning would warn.
            pl_module.log_dict(_scalars(rows), rank_zero_only=True, sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the end, and to W&B `rank/table`, `rank/heatmap` and where ranks changed `rank/history`."""
        if not trainer.is_global_zero:
            return
        self.rows = rows = adapter_rows(self.adapters)
        self._log(trainer, rows)
        columns, table = [column.name for column in fields(AdapterRow)], [list(astuple(row)) for row in rows]
        importance: dict[str, float] = {}
        for controller in self.controllers:
            importance |= controller.statistics()
        if any(f"importance/{row.path}" in importance for row in rows):
            columns.append("importance")
            for cells, row in zip(table, rows, strict=True):
                cells.append(importance.get(f"importance/{row.path}"))
        places = [(row.layer, row.role, row.path, row.effective_rank) for row in rows]
        ranks = np.array(list(self._ranks.values()), dtype=float)
        pictures = {
            "rank/heatmap": rank_heatmap(places),
            "rank/history": history_heatmap(places, list(self._ranks), ranks),
        }
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and rows:
                logger.log_table("rank/table", columns, table, step=_step(trainer))
                for name, picture in pictures.items():
                    if picture is not None:
                        logger.log_image(name, [picture], step=_step(trainer))

    def state_dict(self) -> dict[str, object]:
        """Returns the ranks so far, which a resumed run needs for its picture."""
        return {"ranks": self._ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._ranks = state_dict["ranks"]

    def _log(self, trainer: L.Trainer, rows: list[AdapterRow]) -> None:
        self._remember(trainer.global_step, rows)
        if scalars := _scalars(rows):
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=_step(trainer))

    def _remember(self, step: int, rows: list[AdapterRow]) -> None:
        self._ranks[step] = [float("nan") if row.rank is None else float(row.rank) for row in rows]


def _means(rows: list[AdapterRow]) -> dict[str, float]:
    measured: dict[str, list[float]] = {
        "rank/mean": [row.rank for row in rows if row.rank is not None],
        "rank/effective_mean": [row.effective_rank for row in rows if row.effective_rank is not None],
        "rank/stable_mean": [row.stable_rank for row in rows if row.stable_rank is not None],
        "sparsity/mean": [row.sparsity for row in rows if row.sparsity is not None],
    }
    means = {name: sum(values) / len(values) for name, values in measured.items() if values}
    if "rank/mean" in means:
        means["rank/total"] = float(sum(row.rank for row in rows if row.rank is not None and not row.shared))
    return means


def _scalars(rows: list[AdapterRow]) -> dict[str, float]:
    found = _means(rows)
    for row in rows:
        known = {
            f"rank/{row.path}": row.rank,
            f"rank/effective/{row.path}": row.effective_rank,
            f"rank/stable/{row.path}": row.stable_rank,
            f"sparsity/{row.path}": row.sparsity,
        }
        found |= {name: float(value) for name, value in known.items() if value is not None}
    dropped = [row.dropped for row in rows if row.dropped is not None]
    if dropped:
        found["sparsity/dropped_layers"] = float(sum(dropped))
    if shared := sum(row.shared for row in rows):
        found["sparsity/shared_layers"] = float(shared)
    return found


def _step(trainer: L.Trainer) -> int:
    return max(trainer.global_step - 1, 0)
