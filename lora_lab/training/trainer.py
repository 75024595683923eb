"""The length of a run, its intervals and devices: the Lightning Trainer's part of the config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.strategies import DDPStrategy


@dataclass
class TrainerConfig:
    """Length, devices and intervals of a run."""

    max_epochs: int = 3
    """Passes over the training data; at least 1."""

    max_steps: int = -1
    """Optimizer steps after which training ends, if before `max_epochs`; -1 means no such limit."""

    accumulate: int = 1
    """Batches per optimizer step, with the same result as one batch of all their examples; at least 1."""

    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Types of activations; trained tensors stay in float32."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train."""

    devices: int = 1
    """Number of processes, with one device each; more than 1 trains with DDP."""

    validate_every: float = 1.0
    """Share of an epoch between validations, in (0, 1]."""

    log_every: int = 10
    """Optimizer steps between logged rows; at least 1."""

    checkpoint_every: int = 50
    """Smallest number of optimizer steps between checkpoints to resume from; at least 1."""

    keep: Literal["last", "best"] = "last"
    """Which adapters the run ends with: those of the last step, or of the best validation."""

    monitor: str | None = None
    """Validation metric that decides which validation is the best: `loss` or one of the task's metrics, such
    as `f1`. Null means the one by which the task's runs are compared."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens at an optimizer step with a loss or gradient norm that is not finite: it ends the run as
    diverged, or it changes neither weights nor moments and is counted in `train/skipped_steps`. If trained
    weights are not finite, both end the run. A diverged run can be continued with `skip`."""

    max_skipped_steps: int = 10
    """With `on_nonfinite: skip`, the run ends as diverged after this many skipped steps in a row; at least
    1."""

    gradient_checkpointing: bool = False
    """Recompute activations of each block in the backward pass (non-reentrant): less memory, more time."""

    compile: bool = False
    """Compile the model with torch.compile."""

    progress_bar: bool = True
    """Show a progress bar."""

    def faults(self) -> list[str]:
        """Returns every fault, as `field: what is wrong and what is allowed`."""
        found = [
            f"{name}: must be at least 1; got {getattr(self, name)}"
            for name in (
                "max_epochs",
                "accumulate",
                "devices",
                "log_every",
                "checkpoint_every",
                "max_skipped_steps",
            )
            if getattr(self, name) < 1
        ]
        if self.max_steps < 1 and self.max_steps != -1:
            found.append(f"max_steps: must be at least 1, or -1 for no limit; got {self.max_steps}")
        if not 0 < self.validate_every <= 1:
            found.append(f"validate_every: must lie in (0, 1]; got {self.validate_every}")
        if self.precision == "16-mixed" and self.accelerator == "cpu":
            found.append("precision: 16-mixed needs a GPU; use bf16-mixed or 32-true on a CPU")
        return found


def planned_steps(config: TrainerConfig, batches: int) -> int:
    """Returns how many optimizer steps a run makes, from the number of batches in an epoch of one process."""
    steps = config.max_epochs * math.ceil(batches / config.accumulate)
    return steps if config.max_steps == -1 else min(steps, config.max_steps)


def logging_due(trainer: Any) -> bool:
    """Whether the current optimizer step is logged, by `log_every_n_steps`."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0


def trainer_arguments(config: TrainerConfig, gradient_clip: float | None) -> dict[str, Any]:
    """Returns the arguments of `lightning.Trainer` that the config decides."""
    return {
        "max_epochs": config.max_epochs,
        "max_steps": config.max_steps,
        "accumulate_grad_batches": config.accumulate,
        "precision": config.precision,
        "accelerator": config.accelerator,
        "devices": config.devices,
        # All processes have the same buffers. Sending them with every batch would need equally many
        # validation batches in each process.
        "strategy": DDPStrategy(broadcast_buffers=False) if config.devices > 1 else "auto",
        "val_check_interval": config.validate_every,
        "log_every_n_steps": config.log_every,
        "gradient_clip_val": gradient_clip,
        "enable_progress_bar": config.progress_bar,
        # Our callbacks and samplers do these, since exact resumption needs to know when and in which order.
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    }
