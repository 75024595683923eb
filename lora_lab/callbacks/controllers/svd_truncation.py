"""SVD truncation: after the last step every update becomes its best approximation of a lower rank.

    s B A = U diag(S) Vᵀ,  S falling        kept: U_k diag(S_k) V_kᵀ, the closest matrix of rank k to s B A

The error ‖s B A − U_k diag(S_k) V_kᵀ‖_F is the root of the sum of the other S² (Eckart and Young 1936). QR of
the factors and an SVD of (rank, rank) numbers find it; the (out, in) update is never formed.

Nothing trains after the cut. The validation after the last step, the folder and tests are those of the cut
adapters, whose scale stays that of the rank before. A run answers so whether cutting an adapter of a high
rank is as good as training one of a low rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.protocols import Truncatable
from lora_lab.adapters.spec import least_fault
from lora_lab.callbacks.controllers.base import (
    Controller,
    ControllerSpec,
    from_first_process,
    require_below_components,
)
from lora_lab.callbacks.controllers.structure import select_components, structure_changed


@dataclass
class SVDTruncationSpec(ControllerSpec):
    """The options of SVD truncation."""

    rank: int = 1
    """Rank k that every adapter ends with, at least 1 and below the rank that is trained; an adapter with
    fewer components (rank_pattern) keeps its own."""

    def faults(self) -> list[str]:
        return super().faults() + least_fault("rank", self.rank, 1)

    def needs(self) -> type:
        return Truncatable

    def decides(self) -> str:
        return "which components are kept"


class SVDTruncation(Controller):
    """Cuts the adapters of a run when its last step is done.

    Logs `budget/kept`, the number of components, and after the cut `importance/lost`, the mean over the
    adapters of ‖ΔW − ΔW_k‖_F / ‖ΔW‖_F.
    """

    Spec = SVDTruncationSpec
    name = "svd_truncation"
    paper = "-"
    trials = {"": {"rank": 1}}
    spec: SVDTruncationSpec

    def __init__(self, spec: SVDTruncationSpec, adapters: AdapterSet, seed: int = 0):
        super().__init__(spec, adapters, seed)
        require_below_components(
            "controllers.svd_truncation.rank", spec.rank, self.controlled.values(), "nothing is cut"
        )
        self._lost: float | None = None

    @property
    def settled(self) -> bool:
        return self._lost is not None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        # A run that has diverged has no SVD, and ends as diverged later.
        if (
            self.step_ended(trainer)
            and trainer.global_step == self.total_steps
            and not self.adapters.nonfinite()
        ):
            self.cut(trainer)

    @torch.no_grad()
    def cut(self, trainer: L.Trainer) -> None:
        """Replaces the updates, and removes the components that are left over."""
        lost = []
        for adapter in self.controlled.values():
            update, error = adapter.update().truncated(self.spec.rank)
            adapter.take_update(update)
            lost.append(error)
            for tensor, _ in adapter.rank_components():
                tensor.copy_(from_first_process(tensor.detach()))
        for adapter in self.controlled.values():
            index = torch.arange(min(self.spec.rank, len(adapter.kept)), device=adapter.kept.device)
            select_components(trainer, adapter, index)
        structure_changed(trainer, self.adapters)
        self._lost = sum(lost) / len(lost)

    def statistics(self) -> dict[str, float]:
        found: dict[str, float] = {
            "budget/kept": sum(len(adapter.kept) for adapter in self.controlled.values())
        }
        return found if self._lost is None else found | {"importance/lost": self._lost}

    def state_dict(self) -> dict[str, object]:
        return {"lost": self._lost}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._lost = state_dict["lost"]
