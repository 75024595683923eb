"""The base class of callbacks that add numbers to the rows of `train/loss`."""

from __future__ import annotations

import lightning as L
import torch

from lora_lab.training.trainer import logging_due


class StepRows(L.Callback):
    """Checks before each step whether it is logged, and logs numbers after it."""

    _due = False

    def numbers(self, trainer: L.Trainer) -> dict[str, float]:
        """Returns the numbers of the step just made, by name."""
        raise NotImplementedError

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: object, optimizer: torch.optim.Optimizer
    ) -> None:
        """Checks whether this step is logged."""
        self._due = logging_due(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Logs, when due."""
        if self._due:
            self._due = False
            pl_module.log_dict(self.numbers(trainer))
