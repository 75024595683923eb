"""The LightningModule: a frozen model, its adapters and a task. It knows no method by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from lora_lab.adapters import AdapterSet
from lora_lab.errors import DivergenceError
from lora_lab.tasks import TASKS, MeanLoss, divisor
from lora_lab.training.optimization import (
    OptimizationConfig,
    build_optimizer,
    build_schedule,
    keep_frozen_parts,
    parameter_groups,
)
from lora_lab.training.trainer import logging_due

SHOWN_ROWS = 32
"""Most rows that the message for a diverged step names."""


class _SkippedStep(Exception):
    """Ends an optimizer's step before it changes anything."""


class FineTuner(L.LightningModule):
    """Trains adapters on a task.

    Checkpoints hold what training changes, and not the frozen base: `state_dict` is that of the adapters.

    Args:
        model: the adapted model; called with a batch's tensors by name, it returns an output with `logits`.
        adapters: its adapters.
        task: a key of TASKS.
        num_labels: classes of a classification task.
        optimization: optimizer and schedule.
        on_nonfinite: whether a step with a loss or gradient norm that is not finite ends training or is
            skipped.
        monitor: the validation metric by which runs and checkpoints are compared; None means that of the
            task.
        class_weights: weight of each class in every loss, of training and evaluation.
        max_skipped_steps: training ends after this many skipped steps in a row.

    The loss of an optimizer step is one number: the sum of the losses of all labels in its batches, on all
    processes, divided by the number of these labels (with class weights, by the sum of their weights), plus
    the adapters' penalty. It does not depend on how the examples are divided into batches, accumulated
    batches and processes, nor on padding.

    Attributes:
        mode: whether less ("min") or more ("max") of the monitored metric is better.

    Logs `train/loss` (the task's part of that number), `train/penalty` (the adapters' part),
    `train/learning_rate`, with `on_nonfinite="skip"` `train/skipped_steps` (so far), and under `validation/`
    and `test/` the loss and the task's metrics.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: AdapterSet,
        task: str,
        num_labels: int = 1,
        optimization: OptimizationConfig | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        monitor: str | None = None,
        class_weights: Sequence[float] | None = None,
        max_skipped_steps: int = 10,
    ):
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.task = TASKS[task]
        self.optimization = optimization or OptimizationConfig()
        self.on_nonfinite = on_nonfinite
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        """Number of optimizer steps so far that were skipped because they were not finite."""
        self._skipped_in_a_row = 0
        self.num_labels = num_labels
        self._monitor = monitor or self.task.monitor
        self.mode = self.task.better(self._monitor)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights))
        self.evaluation = nn.ModuleDict({stage: self.new_metrics() for stage in ("validation", "test")})
        prompts = any(adapter.reads_prompt_lengths for adapter in adapters)
        self._hidden = {"labels"} if prompts else {"labels", "prompt_lengths"}
        # Grouped here too, so that errors are found before anything is trained or written.
        parameter_groups(adapters, self.optimization)
        # For each of this process's batches in the current step: sum of losses, and number of labels.
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._step_loss = self._step_penalty = torch.tensor(math.nan)

    @property
    def monitor(self) -> str:
        """Name of the validation metric by which runs and checkpoints are compared."""
        return f"validation/{self._monitor}"

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Returns the batch with the padding moved behind every text.

        Most models count positions from the left, so padding there would shift a text by the length of its
        neighbours, and padding would have to predict the first token. Models that read the class at the end
        of a text, such as XLNet, count from neither side.
        """
        config = getattr(self.model, "config", None)
        reads_end = not self.task.causal and getattr(config, "summary_type", None) == "last"
        return batch if reads_end or "attention_mask" not in batch else padded_behind(batch)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits for a batch; the model does not get the labels."""
        return self.model(
            **{name: tensor for name, tensor in batch.items() if name not in self._hidden}
        ).logits

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Returns this batch's part of the step's loss; the parts' gradients add up to those of the loss.

        The number of labels in a step is only known at its last batch. Until then losses are divided by the
        number in the first batch, which keeps them in the range of half precision; then the gradients so far
        are corrected.

        Raises:
            TargetError: if the model's output depends on nothing that is trained.
        """
        predictions, labels = self.task.align(self(batch), batch["labels"])
        self.adapters.check_reached(predictions)
        total, count = self.task.sums(predictions, labels, self.class_weights)
        self._losses.append(total.detach())
        self._counts.append(count)
        first_count = divisor(self._counts[0])
        trainer: Any = self.trainer
        if trainer.fit_loop.epoch_loop._should_accumulate():
            part = total / first_count
        else:
            sums = torch.stack([torch.stack(self._losses).sum(), torch.stack(self._counts).sum()])
            losses, count = trainer.strategy.reduce(sums, reduce_op="sum")
            penalty = self.adapters.penalty()
            self._step_loss = losses / divisor(count)
            self._step_penalty = torch.as_tensor(penalty, device=total.device).detach()
            share = trainer.world_size / divisor(count)  # DDP takes the mean over processes
            if len(self._losses) > 1:
                for parameter in self.adapters.trainable_parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(first_count * share)
            part = total * share + penalty
        # Lightning divides each part by this, also in a shorter last window.
        return part * trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Checks the step, and logs its loss.

        Raises:
            DivergenceError: if the step is not finite and cannot be skipped.
        """
        fault = self._fault(optimizer)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if fault else 0
        if fault and (reason := self._cannot_skip()) is not None:
            error = DivergenceError(self._divergence(fault, reason, optimizer))
            error.skipping = self.on_nonfinite == "skip"
            raise error
        self.skipped_steps += bool(fault)
        if logging_due(self.trainer):
            # Already equal on all processes.
            self.log("train/loss", self._step_loss, prog_bar=True)
            self.log("train/penalty", self._step_penalty)
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
            if self.on_nonfinite == "skip":
                self.log("train/skipped_steps", float(self.skipped_steps))
        self._losses.clear()
        self._counts.clear()
        if fault:
            raise _SkippedStep

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Makes the step, unless it is skipped: then weights and moments do not change."""
        try:
            super().optimizer_step(*arguments, **options)
        except _SkippedStep:
            if scaler := self._scaler():
                scaler.update()  # as after every step: it knows that the gradients were unscaled

    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _fault(self, optimizer: torch.optim.Optimizer) -> str | None:
        """Returns what is not finite in the step; equal in all processes, as loss and gradients are."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss = self._step_loss + self._step_penalty
        if (loss + norm.to(loss.device)).isfinite():
            return None
        if not loss.isfinite():
            return f"the loss is {loss.item()}"
        if not norm.isfinite():
            scaler = self._scaler()
            # Scaled gradients may leave the range of half precision; then the scaler itself skips the step
            # and reduces the scale. At a scale of 1 the gradients themselves are not finite.
            if scaler is None or scaler.get_scale() <= 1:
                return f"the norm of the gradients is {norm.item()}"
        return None

    def _cannot_skip(self) -> str | None:
        """Returns why a step that is not finite cannot be skipped, None if it can; equal in all processes."""
        if self.on_nonfinite == "stop":
            return ""
        if self.adapters.nonfinite():
            return " Weights are not finite, so no later step can be finite."
        if self._skipped_in_a_row >= self.max_skipped_steps:
            return (
                f" So were all of the last {self._skipped_in_a_row} steps (trainer.max_skipped_steps: "
                f"{self.max_skipped_steps})."
            )
        return None

    def _divergence(self, fault: str, reason: str, optimizer: torch.optim.Optimizer) -> str:
        trainer: Any = self.trainer
        batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        sampler: Any = getattr(trainer.train_dataloader, "batches", None)
        rows = sampler.rows(batch - len(self._losses) + 1, batch) if hasattr(sampler, "rows") else []
        shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", …" if len(rows) > SHOWN_ROWS else "")
        where = f" The step's rows in the training split, counted from 0: {shown}." if rows else ""
        return (
            f"training diverged in optimizer step {trainer.global_step + 1} (batch {batch + 1} of epoch "
            f"{trainer.current_epoch + 1}): {fault}, at a learning rate of "
            f"{optimizer.param_groups[0]['lr']:g}.{reason}{where} Lower optimization.learning_rate, or check "
            "these data."
        )

    def step_loss(self) -> Tensor:
        """Returns the task's mean loss over all labels of the completed step, a scalar."""
        return self._step_loss

    def new_metrics(self) -> nn.ModuleDict:
        """Returns the task's loss and metrics, for `evaluate` to fill."""
        loss = MeanLoss(weighted=self.class_weights is not None)
        return nn.ModuleDict({"loss": loss, "metrics": self.task.metrics(self.num_labels)})

    def evaluate(self, batch: Mapping[str, Tensor], metrics: Any) -> tuple[Tensor, Tensor]:
        """Adds a batch to metrics that `new_metrics` returned.

        Returns:
            Predictions and labels, as the task aligns them.
        """
        predictions, labels = self.task.align(self(batch), batch["labels"])
        metrics["loss"].update(*self.task.sums(predictions, labels, self.class_weights))
        metrics["metrics"].update(predictions, labels)
        return predictions, labels

    def results(self, metrics: Any) -> dict[str, Tensor]:
        """Returns the values of filled metrics by name, over the batches of all processes."""
        return {"loss": metrics["loss"].compute(), **metrics["metrics"].compute()}

    def _log_evaluation(self, stage: str) -> None:
        parts: Any = self.evaluation[stage]
        # torchmetrics has already joined the processes' counts; sync_dist only avoids Lightning's warning.
        logged = {f"{stage}/{name}": value for name, value in self.results(parts).items()}
        self.log_dict(logged, prog_bar=stage == "validation", sync_dist=True)
        parts["loss"].reset()
        parts["metrics"].reset()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self.evaluate(batch, self.evaluation["validation"])

    def on_train_end(self) -> None:
        """Fails a run in which an adapter never learned, also a short one, or whose last step diverged.

        Raises:
            TargetError: if an adapter never learned.
            DivergenceError: if trained weights are not finite.
        """
        if found := self.adapters.nonfinite():
            raise DivergenceError(
                f"training diverged: after its last step {found[0]} is not finite. Lower "
                "optimization.learning_rate."
            )
        self.adapters.check_alive()

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._log_evaluation("validation")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Adds a batch to the test metrics; returns a row of each example, see `Task.examples`."""
        return self.task.examples(*self.evaluate(batch, self.evaluation["test"]))

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._log_evaluation("test")

    def configure_optimizers(self) -> Any:
        """Returns AdamW and its schedule, stepped once per optimizer step."""
        # Built again, since a loaded checkpoint may have made adapters share tensors.
        groups = parameter_groups(self.adapters, self.optimization)
        # Lightning does not clip gradients before a fused step under mixed precision, and under 16-mixed such
        # a step leaves gradients scaled, which controllers read.
        precision = self.trainer.precision
        clips = self.optimization.gradient_clip is not None
        fused = precision == "32-true" or (precision == "bf16-mixed" and not clips)
        optimizer = build_optimizer(groups, self.optimization, fused)
        keep_frozen_parts(optimizer, self.adapters)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, self.optimization, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the numbers of skipped steps."""
        checkpoint["skipped_steps"] = self.skipped_steps
        checkpoint["skipped_in_a_row"] = self._skipped_in_a_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the numbers of skipped steps."""
        self.skipped_steps = checkpoint.get("skipped_steps", 0)
        self._skipped_in_a_row = checkpoint.get("skipped_in_a_row", 0)

    def state_dict(self, *arguments: object, **options: object) -> dict[str, Tensor]:  # type: ignore[override]
        """Returns only the adapters' tensors."""
        return self.adapters.state_dict()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Loads the adapters' tensors; names and shapes must always match."""
        self.adapters.load_state_dict(state_dict)


def padded_behind(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moves the padding in front of each text behind it.

    Args:
        batch: has `attention_mask` (batch, time), 1 for tokens, 0 for padding; all tensors of this shape are
            changed in the same way.
    """
    mask = batch["attention_mask"]
    first = mask.argmax(1, keepdim=True)  # (batch, 1)
    places = (torch.arange(mask.shape[1], device=mask.device) + first) % mask.shape[1]
    return {name: x.gather(1, places) if x.shape == mask.shape else x for name, x in batch.items()}
