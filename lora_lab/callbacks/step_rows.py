"""What callbacks have in common that add numbers to the rows of `train/loss`."""

from __future__ import annotations

import lightning as L
import torch

from lora_lab.training.trainer import logging_due


class StepRows(L.Callback):
    """Asks before each step whether it is logged, and logs numbers once the step is made."""

    _due = False

    def numbers(self, trainer: L.Trainer) -> dict[str, float]:
        """Returns the numbers of the step just made, by name."""
        raise NotImplementedError

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: object, optimizer: torch.optim.Optimizer
    ) -> None:
        """Asks whether this step's numbers are logged."""
        self._due = logging_due(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Logs, when due."""
        if self._due:
            self._due = False
            pl_module.log_dict(self.numbers(trainer))
