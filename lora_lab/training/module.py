"""The LightningModule: a frozen model, its adapters and a task. It knows no method by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lora_lab.adapters import AdapterSet
from lora_lab.tasks import TASKS, MeanLoss
from lora_lab.training.optimization import (
    OptimizationConfig,
    build_optimizer,
    build_schedule,
    keep_frozen_parts,
    parameter_groups,
)
from lora_lab.training.trainer import logging_due


class FineTuner(L.LightningModule):
    """Trains adapters on a task.

    Checkpoints hold what training changes and nothing of the frozen base: `state_dict` is the adapters'.

    Args:
        model: the adapted model; called with a batch's tensors by name, it returns an output with `logits`.
        adapters: its adapters.
        task: a key of TASKS.
        num_labels: classes of a classification task.
        optimization: optimizer and schedule.

    The loss of an optimizer step is one number: the sum of the losses of all labels in its batches, on all
    processes, divided by the number of these labels, plus the adapters' penalty. It does not depend on how
    the examples are spread over batches, accumulated batches and processes, nor on padding.

    Logs `train/loss` (the task's part of that number), `train/penalty` (the adapters' part),
    `train/learning_rate`, and under `validation/` and `test/` the loss and the task's metrics.
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
        # Of each of this process's batches in the step under way: sum of losses, and number of labels.
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._step_loss = self._step_penalty = torch.tensor(math.nan)

    @property
    def monitor(self) -> str:
        """Name of the validation metric by which runs and checkpoints are compared."""
        return f"validation/{self.task.monitor}"

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Returns the batch with every text's padding behind it, whichever side it came on.

        Most models count positions from the left, so that padding there would move a text by the length of
        its neighbours, and padding would have to predict the first token. Models that read the class at the
        end of a text, as XLNet does, count from neither side.
        """
        config = getattr(self.model, "config", None)
        reads_end = not self.task.causal and getattr(config, "summary_type", None) == "last"
        return batch if reads_end or "attention_mask" not in batch else padded_behind(batch)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits for a batch; its labels are not shown to the model."""
        return self.model(
            **{name: tensor for name, tensor in batch.items() if name not in self._hidden}
        ).logits

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Returns this batch's part of the step's loss; the gradients of the parts add up to the whole one.

        The number of labels in a step is known when its last batch comes. Until then losses are divided by
        that of the first batch, which keeps them in half precision's range; then the gradients so far are
        corrected.
        """
        predictions, labels = self.task.align(self(batch), batch["labels"])
        total = self.task.total(predictions, labels)
        self._losses.append(total.detach())
        self._counts.append(self.task.count(labels))
        first_count = self._counts[0].clamp(min=1)
        trainer: Any = self.trainer
        if trainer.fit_loop.epoch_loop._should_accumulate():
            part = total / first_count
        else:
            sums = torch.stack([torch.stack(self._losses).sum(), torch.stack(self._counts).sum()])
            losses, count = trainer.strategy.reduce(sums, reduce_op="sum")
            penalty = self.adapters.penalty()
            self._step_loss = losses / count.clamp(min=1)
            self._step_penalty = torch.as_tensor(penalty, device=total.device).detach()
            share = trainer.world_size / count.clamp(min=1)  # DDP takes the mean over processes
            if len(self._losses) > 1:
                for parameter in self.adapters.trainable_parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(first_count * share)
            part = total * share + penalty
        # Lightning divides each part by this, in a shorter last window too.
        return part * trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step's loss."""
        if logging_due(self.trainer):
            # Equal on all processes already.
            self.log("train/loss", self._step_loss, prog_bar=True)
            self.log("train/penalty", self._step_penalty)
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        self._losses.clear()
        self._counts.clear()

    def step_loss(self) -> Tensor:
        """Returns the task's mean loss over all labels of the step whose gradients are complete, a scalar."""
        return self._step_loss

    def new_metrics(self) -> nn.ModuleDict:
        """Returns the task's loss and metrics, for `evaluate` to fill."""
        return nn.ModuleDict({"loss": MeanLoss(), "metrics": self.task.metrics(self.num_labels)})

    def evaluate(self, batch: Mapping[str, Tensor], metrics: Any) -> None:
        """Adds a batch to metrics that `new_metrics` returned."""
        predictions, labels = self.task.align(self(batch), batch["labels"])
        metrics["loss"].update(self.task.total(predictions, labels), self.task.count(labels))
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


def padded_behind(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moves the padding in front of each text behind it.

    Args:
        batch: has `attention_mask` (batch, time), 1 for tokens, 0 for padding; all tensors of this shape are
            changed alike.
    """
    mask = batch["attention_mask"]
    first = mask.argmax(1, keepdim=True)  # (batch, 1)
    places = (torch.arange(mask.shape[1], device=mask.device) + first) % mask.shape[1]
    return {name: x.gather(1, places) if x.shape == mask.shape else x for name, x in batch.items()}
