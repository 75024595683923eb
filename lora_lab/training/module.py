"""The LightningModule: a frozen model, its adapters and a task. It knows no method by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lora_lab.adapters import AdapterSet
from lora_lab.tasks import TASKS
from lora_lab.training.optimization import (
    OptimizationConfig,
    build_optimizer,
    build_schedule,
    keep_frozen_parts,
    parameter_groups,
)


class FineTuner(L.LightningModule):
    """Trains adapters on a task.

    Checkpoints hold what training changes and nothing of the frozen base: `state_dict` is the adapters'.

    Args:
        model: the adapted model; called with a batch's tensors by name, it returns an output with `logits`.
        adapters: its adapters.
        task: a key of TASKS.
        num_labels: classes of a classification task.
        optimization: optimizer and schedule.

    Logs `train/loss` (the task's), `train/penalty` (the adapters'), `train/learning_rate`, and under
    `validation/` and `test/` the loss and the task's metrics.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: AdapterSet,
        task: str,
        num_labels: int = 1,
        optimization: OptimizationConfig | None = None,
    ):
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.task = TASKS[task]
        self.optimization = optimization or OptimizationConfig()
        self.num_labels = num_labels
        self.evaluation = nn.ModuleDict({stage: self.new_metrics() for stage in ("validation", "test")})
        prompts = any(adapter.reads_prompt_lengths for adapter in adapters)
        self._hidden = {"labels"} if prompts else {"labels", "prompt_lengths"}
        # Grouped here too, so that what does not fit is told before anything is trained or written.
        parameter_groups(adapters, self.optimization)
        self._losses: list[Tensor] = []
        self._penalties: list[Tensor] = []

    @property
    def monitor(self) -> str:
        """Name of the validation metric by which runs and checkpoints are compared."""
        return f"validation/{self.task.monitor}"

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits for a batch; its labels are not shown to the model."""
        return self.model(
            **{name: tensor for name, tensor in batch.items() if name not in self._hidden}
        ).logits

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the task's loss plus the adapters' penalty."""
        loss = self.task.loss(*self.task.align(self(batch), batch["labels"]))
        penalty = self.adapters.penalty()
        self._losses.append(loss.detach())
        self._penalties.append(torch.as_tensor(penalty, device=loss.device).detach())
        return loss + penalty

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the means over the batches of this step."""
        if self.logging_due():
            self.log("train/loss", self.step_loss(), prog_bar=True, sync_dist=True)
            self.log("train/penalty", torch.stack(self._penalties).mean(), sync_dist=True)
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        self._losses.clear()
        self._penalties.clear()

    def step_loss(self) -> Tensor:
        """Returns the task's mean loss over this process's batches of the step now under way."""
        return torch.stack(self._losses).mean()

    def logging_due(self) -> bool:
        """Whether the optimizer step now under way is one whose numbers are logged."""
        trainer: Any = self.trainer
        return (trainer.global_step + 1) % trainer.log_every_n_steps == 0

    def new_metrics(self) -> nn.ModuleDict:
        """Returns the task's loss and metrics, for `evaluate` to fill."""
        return nn.ModuleDict({"loss": MeanMetric(), "metrics": self.task.metrics(self.num_labels)})

    def evaluate(self, batch: Mapping[str, Tensor], metrics: Any) -> None:
        """Adds a batch to metrics that `new_metrics` returned."""
        predictions, labels = self.task.align(self(batch), batch["labels"])
        metrics["loss"].update(self.task.loss(predictions, labels), weight=self.task.count(labels))
        metrics["metrics"].update(predictions, labels)

    def results(self, metrics: Any) -> dict[str, Tensor]:
        """Returns what filled metrics have come to by name, over the batches of all processes."""
        return {"loss": metrics["loss"].compute(), **metrics["metrics"].compute()}

    def _log_evaluation(self, stage: str) -> None:
        parts: Any = self.evaluation[stage]
        # torchmetrics has joined the processes' counts already; sync_dist only spares Lightning's warning.
        told = {f"{stage}/{name}": value for name, value in self.results(parts).items()}
        self.log_dict(told, prog_bar=stage == "validation", sync_dist=True)
        parts["loss"].reset()
        parts["metrics"].reset()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self.evaluate(batch, self.evaluation["validation"])

    def on_train_end(self) -> None:
        """Stops a run in which an adapter never learned, however short it was."""
        self.adapters.check_alive()

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._log_evaluation("validation")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to the test metrics."""
        self.evaluate(batch, self.evaluation["test"])

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._log_evaluation("test")

    def configure_optimizers(self) -> Any:
        """Returns AdamW and its schedule, stepped once per optimizer step."""
        # Anew: a checkpoint may have shown in the meantime that adapters share tensors.
        groups = parameter_groups(self.adapters, self.optimization)
        # Lightning clips no gradients before a fused step under mixed precision, and under 16-mixed such a
        # step leaves gradients scaled, which controllers read.
        precision = self.trainer.precision
        clips = self.optimization.gradient_clip is not None
        fused = precision == "32-true" or (precision == "bf16-mixed" and not clips)
        optimizer = build_optimizer(groups, self.optimization, fused)
        keep_frozen_parts(optimizer, self.adapters)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, self.optimization, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Returns the adapters' tensors alone."""
        return self.adapters.state_dict()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Takes over adapters' tensors; always strict about our own names and shapes."""
        self.adapters.load_state_dict(state_dict)
