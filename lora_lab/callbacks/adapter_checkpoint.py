"""Which adapters a run ends with: those of the last step, or of the best validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch

from lora_lab.adapters import AdapterSet
from lora_lab.callbacks.controllers.base import Controller, require
from lora_lab.training.module import FineTuner


class AdapterCheckpoint(L.Callback):
    """Remembers the best validation, and with `keep="best"` restores its adapters when training ends.

    Args:
        adapters: the run's adapters.
        keep: which adapters the run ends with.
        controllers: the run's controllers. With `keep="best"` a validation only counts after they have
            settled, so that the final rank is kept.

    A validation with a loss or adapters that are not finite is never the best.
    """

    def __init__(
        self, adapters: AdapterSet, keep: Literal["last", "best"], controllers: Sequence[Controller] = ()
    ):
        self.adapters = adapters
        self.keep = keep
        self.controllers = controllers
        self.best_value: float | None = None
        """The monitored metric at its best."""
        self.best_step: int | None = None
        """Optimizer steps done at that time."""
        self._best: dict[str, torch.Tensor] = {}
        self._validated_step: int | None = None

    def metrics_are_old(self, trainer: L.Trainer) -> bool:
        """Whether the last validation used other adapters than those the run ends with."""
        ends_with = self.best_step if self._best else trainer.global_step
        return self._validated_step != ends_with

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks that the module names its deciding metric."""
        if stage == "fit":
            require(pl_module, "AdapterCheckpoint", ("monitor", "mode"), "use Lightning's ModelCheckpoint")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares the validation that just finished with the best so far."""
        if not isinstance(pl_module, FineTuner) or trainer.state.fn != "fit":
            return
        self._validated_step = trainer.global_step
        value = float(trainer.callback_metrics[pl_module.monitor])
        loss = float(trainer.callback_metrics.get("validation/loss", value))
        if not (math.isfinite(value) and math.isfinite(loss)) or self.adapters.nonfinite():
            return
        if self.keep == "best" and not all(controller.settled for controller in self.controllers):
            return
        best = self.best_value
        if best is None or (value > best if pl_module.mode == "max" else value < best):
            self.best_value, self.best_step = value, trainer.global_step
            if self.keep == "best":
                self._best = {
                    name: tensor.cpu().clone() for name, tensor in self.adapters.state_dict().items()
                }

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores the best adapters, if `keep` is `best`."""
        if self._best:
            self.adapters.load_state_dict(self._best)

    def state_dict(self) -> dict[str, object]:
        """Returns the best validation so far, with its adapters if `keep` is `best`."""
        names = ("best_value", "best_step", "_best", "_validated_step")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, value in state_dict.items():
            setattr(self, name, value)
