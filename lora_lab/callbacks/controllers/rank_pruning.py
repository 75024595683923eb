"""Rank pruning: weak components are removed permanently (hybrid LoRA with pruning).

    importance_i = Π over the component's parts of their L1 norms      (Σ_j |A_ij|) (Σ_k |B_ki|) for LoRA
    alive_i      = alive_i and importance_i > threshold · max importance

Every `period` optimizer steps from `start` to `end`. Nothing dies while all importance is 0, as at the start
of a run. A dead component has no gradient (clipping would count it) and stays exactly zero: changes by
momentum and weight decay are undone after every step. The scale stays that of the rank at the start.

`scope: model` compares components of different lengths, so it uses means instead of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.protocols import Prunable
from lora_lab.adapters.spec import least_fault, probability_fault
from lora_lab.callbacks.controllers.base import (
    Controller,
    ControllerSpec,
    from_first_process,
    in_steps,
    require_below_components,
)
from lora_lab.errors import ConfigError
from lora_lab.linalg.pruning import alive, l1_importance


@dataclass
class RankPruningSpec(ControllerSpec):
    """The options of rank pruning."""

    threshold: float = 0.6
    """Share of the largest importance at or below which a component dies, in [0, 1). LoRA's components rarely
    differ by more than a factor of two; AdaLoRA's differ far more, so 0.1 is enough for them."""

    scope: Literal["layer", "model"] = "layer"
    """Where the largest importance is taken: in the same adapter, or in all adapters."""

    start: float = 0.2
    """Optimizer steps before the first pruning; below 1 a share of all steps."""

    period: float = 0.1
    """Optimizer steps from one pruning to the next, at least one; below 1 a share of all steps."""

    end: float = 0.8
    """Optimizer steps after which nothing dies; below 1 a share of all steps."""

    min_rank: int = 1
    """Components that every adapter keeps, however weak; 0 or more."""

    def faults(self) -> list[str]:
        found = super().faults() + probability_fault("threshold", self.threshold)
        for name in ("start", "end", "min_rank"):
            found += least_fault(name, getattr(self, name), 0)
        if self.period <= 0:
            found.append(f"period: must be above 0; got {self.period}")
        return found

    def needs(self) -> type:
        return Prunable

    def silences(self) -> bool:
        return True

    def decides(self) -> str:
        return "which components are kept"


class RankPruning(Controller):
    """Prunes every adapter of a run by the size of its components.

    Logs `budget/kept`, the number of components alive, and `importance/threshold`, the smallest importance
    that survived the last pruning, over all adapters.
    """

    Spec = RankPruningSpec
    name = "rank_pruning"
    trials = {"": {"threshold": 0.7}, "of the model": {"threshold": 0.5, "scope": "model", "min_rank": 0}}
    spec: RankPruningSpec

    def __init__(self, spec: RankPruningSpec, adapters: AdapterSet, seed: int = 0):
        super().__init__(spec, adapters, seed)
        require_below_components(
            "controllers.rank_pruning.min_rank", spec.min_rank, self.controlled.values(), "nothing can die"
        )
        self._done = 0
        self._threshold = 0.0
        self._alive: dict[str, int] = {}

    def plan(self, total_steps: int) -> None:
        super().plan(total_steps)
        self.start, end = (in_steps(value, total_steps) for value in (self.spec.start, self.spec.end))
        self.period = max(1, in_steps(self.spec.period, total_steps))
        self.last = self.start + (end - self.start) // self.period * self.period
        """The step of the last pruning."""
        if not self.start <= end < total_steps or self.last < 1:
            raise ConfigError(
                f"controllers.rank_pruning: prunes every {self.period} steps from step {self.start} to step "
                f"{end} of a run of {total_steps}; start must not be after end, end must be before the end "
                "of the run, and there must be a pruning between them."
            )

    @property
    def settled(self) -> bool:
        return self._done >= self.last

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._count()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for adapter in self._pruned():
            dead = ~adapter.kept_components()
            for tensor, axis in adapter.rank_components():
                if tensor.grad is not None:
                    tensor.grad.movedim(axis, -1).masked_fill_(dead, 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self.step_ended(trainer):
            return
        self._done = trainer.global_step
        for adapter in self._pruned():
            adapter.keep_components(adapter.kept_components())
        if self.start <= self._done <= self.last and (self._done - self.start) % self.period == 0:
            self.prune()

    def prune(self) -> None:
        """Prunes the weak components of all adapters."""
        of_model = self.spec.scope == "model"
        adapters = self.controlled.values()
        importance = [l1_importance(adapter.rank_components(), mean=of_model) for adapter in adapters]
        kept = [adapter.kept_components() for adapter in adapters]
        largest = [values.max() if len(values) else values.sum() for values in importance]
        if of_model:
            largest = [torch.stack(largest).max()] * len(largest)
        alive_now = [
            alive(values, flags, self.spec.threshold, most, self.spec.min_rank)
            for values, flags, most in zip(importance, kept, largest, strict=True)
        ]
        agreed = from_first_process(torch.cat(alive_now))
        for adapter, flags in zip(adapters, agreed.split([len(flags) for flags in kept]), strict=True):
            adapter.keep_components(flags)
        outlived = torch.cat(importance)[agreed]
        self._threshold = float(outlived.min()) if len(outlived) else 0.0
        self._count()

    def _count(self) -> None:
        counts = torch.stack([adapter.kept_components().sum() for adapter in self.controlled.values()])
        self._alive = dict(zip(self.controlled, counts.tolist(), strict=True))

    def _pruned(self) -> list[Any]:
        """Returns the adapters with dead components; there are none after compaction."""
        return [own for path, own in self.controlled.items() if len(own.kept) > self._alive[path]]

    def statistics(self) -> dict[str, float]:
        return {"budget/kept": sum(self._alive.values()), "importance/threshold": self._threshold}

    def state_dict(self) -> dict[str, object]:
        return {"done": self._done, "threshold": self._threshold}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done, self._threshold = state_dict["done"], state_dict["threshold"]
