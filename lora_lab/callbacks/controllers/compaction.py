"""Compaction: frees the memory of silenced components, once no other controller will change the structure.

Parameters, gradients and the optimizer's moments are sliced in place, at the end of the optimizer step after
which all other controllers have settled. A dropped adapter keeps no components. The model computes the same
before and after: the scale stays that of the rank at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor

from lora_lab.adapters.protocols import Droppable, Prunable
from lora_lab.callbacks.controllers.base import Controller, ControllerSpec, controllers_of
from lora_lab.callbacks.controllers.structure import select_components, structure_changed


@dataclass
class CompactionSpec(ControllerSpec):
    """Compaction has no options."""

    def faults_beside(self, others: Mapping[str, ControllerSpec]) -> list[str]:
        alone = (
            "has nothing to compact: no other controller of this run silences components or drops adapters; "
            "add one that does (importance_pruning, rank_pruning, output_evaluation with share: false), or "
            "remove it"
        )
        return [] if any(other.silences() for other in others.values()) else [alone]

    def needs(self) -> type:
        return Prunable


class Compaction(Controller):
    """Slices the adapters of a run."""

    Spec = CompactionSpec
    name = "compaction"
    trials = {}  # it needs another controller

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._done = False

    @property
    def settled(self) -> bool:
        return self._done

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self.step_ended(trainer) or self._done:
            return
        if all(other.settled for other in controllers_of(trainer) if other is not self):
            self.compact(trainer)
            self._done = True

    @torch.no_grad()
    def compact(self, trainer: L.Trainer) -> None:
        """Slices all adapters and their optimizer state."""
        for path, index in self._left().items():
            select_components(trainer, self.controlled[path], index)
        structure_changed(trainer, self.adapters)

    def _left(self) -> dict[str, Int[Tensor, " k"]]:
        """Returns, by path, the components to keep: those that any adapter with the same tensors uses."""
        owners = self.adapters.owners
        used: dict[str, Tensor] = {}
        for path, adapter in self.controlled.items():
            dropped = isinstance(adapter, Droppable) and adapter.dropped
            flags = torch.zeros_like(adapter.kept) if dropped else adapter.kept_components()
            owner = owners.get(path, path)
            used[owner] = used[owner] | flags if owner in used else flags
        return {path: used[owners.get(path, path)].nonzero().flatten() for path in self.controlled}

    def state_dict(self) -> dict[str, object]:
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]
