"""Dropout schedule: how the probability of random dropping changes from step to step (no paper).

For methods that drop parts of their update at random while training, such as `lora_drop`, with probability p:

    linear   p = p₀ + (p₁ − p₀) s      s: from 0 at `start` to 1 at `end`
    cosine   p = p₁ + (p₀ − p₁) (1 + cos πs) / 2
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import lightning as L

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.protocols import RandomlyDropped
from lora_lab.adapters.spec import least_fault, probability_fault
from lora_lab.callbacks.controllers.base import Controller, ControllerSpec, in_steps
from lora_lab.errors import ConfigError


@dataclass
class DropoutScheduleSpec(ControllerSpec):
    """The options of a dropout schedule."""

    start_prob: float | None = None
    """Probability p₀ until `start`, in [0, 1); null means the adapter's own `drop_prob`."""

    end_prob: float = 0.0
    """Probability p₁ from `end` on, in [0, 1)."""

    course: Literal["constant", "linear", "cosine"] = "linear"
    """How the probability changes from p₀ to p₁; `constant` stays at p₀."""

    start: float = 0.0
    """Optimizer steps before the probability changes; below 1 a share of all steps."""

    end: float | None = None
    """Optimizer steps until the probability is p₁; below 1 a share of all steps, null means the last step."""

    def faults(self) -> list[str]:
        found = super().faults()
        if self.course == "constant" and (self.end_prob, self.start, self.end) != (0.0, 0.0, None):
            found.append("course: constant has no end_prob, start and end; remove them")
        for name in ("start_prob", "end_prob"):
            if getattr(self, name) is not None:
                found += probability_fault(name, getattr(self, name))
        return found + least_fault("start", self.start, 0)

    def needs(self) -> type:
        return RandomlyDropped

    def decides(self) -> str:
        return "the drop probability"


class DropoutSchedule(Controller):
    """Sets, in every step, the probability with which adapters drop their parts.

    Logs `budget/drop_prob`, the probability of the last step.
    """

    Spec = DropoutScheduleSpec
    name = "dropout_schedule"
    # Masks are drawn for every batch, so they depend on how a step is split into batches.
    trials = {"": {"start_prob": 0.0, "end_prob": 0.0}}
    spec: DropoutScheduleSpec

    def __init__(self, spec: DropoutScheduleSpec, adapters: AdapterSet, seed: int = 0):
        super().__init__(spec, adapters, seed)
        first = next(iter(self.controlled.values()))
        self.first_prob: float = first.drop_prob if spec.start_prob is None else spec.start_prob

    def plan(self, total_steps: int) -> None:
        super().plan(total_steps)
        spec = self.spec
        self.start = in_steps(spec.start, total_steps)
        # The last step has this number, counted from 0.
        self.end = total_steps - 1 if spec.end is None else in_steps(spec.end, total_steps)
        if spec.course != "constant" and not self.start < self.end < total_steps:
            raise ConfigError(
                f"controllers.dropout_schedule: the probability goes from step {self.start} to step "
                f"{self.end} of a run of {total_steps}; start must lie before end, and end before the run's."
            )

    def probability(self, step: int) -> float:
        """Returns p for a step, counted from 0."""
        if self.spec.course == "constant":
            return self.first_prob
        share = min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))
        if self.spec.course == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return (1 - share) * self.first_prob + share * self.spec.end_prob

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self.step_begins(trainer, batch_idx):
            for adapter in self.controlled.values():
                adapter.drop_prob = self.probability(trainer.global_step)

    def statistics(self) -> dict[str, float]:
        return {"budget/drop_prob": next(iter(self.controlled.values())).drop_prob}
