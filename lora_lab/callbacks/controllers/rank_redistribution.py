"""Rank redistribution: a pass over data before training sets ranks and A (EVA, Paischer et al. 2024).

From the inputs x of each adapter, for the real tokens of a sample of the training data,

    C = Σ_x x xᵀ = V diag(λ) Vᵀ,  λ falling        share of direction i = λ_i / Σ_j λ_j

Of the rank · adapters largest shares in the model, an adapter gets one component for each share of its
inputs, at least `min_rank` and at most `rho` times as many as at the start. Its rows of A are those
directions, B is zero. The scale stays that of the rank at the start.

C takes in² numbers for each adapter while it is measured; the paper (arXiv:2410.07170) needs fewer: it finds
the singular vectors batch by batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as distributed
from jaxtyping import Float
from torch import Tensor

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.maps import is_linear
from lora_lab.adapters.protocols import Growable
from lora_lab.adapters.spec import least_fault
from lora_lab.callbacks.controllers.base import Controller, ControllerSpec, from_first_process
from lora_lab.callbacks.controllers.output_energy import over_inputs, training_sample
from lora_lab.callbacks.controllers.structure import (
    extend_components,
    select_components,
    structure_changed,
)
from lora_lab.errors import IncompatibleError
from lora_lab.training.module import FineTuner


@dataclass
class RankRedistributionSpec(ControllerSpec):
    """The options of rank redistribution."""

    sample_ratio: float = 0.1
    """Share of the training data whose inputs are measured, in (0, 1]; at least one batch is."""

    rho: float = 2.0
    """Largest rank of an adapter divided by its rank at the start, at least 1; 2 is PEFT's default."""

    min_rank: int = 1
    """Components that every adapter gets; at least 1."""

    def faults(self) -> list[str]:
        found = super().faults() + least_fault("min_rank", self.min_rank, 1)
        if not 0 < self.sample_ratio <= 1:
            found.append(f"sample_ratio: must lie in (0, 1]; got {self.sample_ratio}")
        if not (math.isfinite(self.rho) and self.rho >= 1):
            found.append(f"rho: must be finite and at least 1; got {self.rho}")
        return found

    def needs(self) -> type:
        return Growable

    def decides(self) -> str:
        return "which components are kept"


class RankRedistribution(Controller):
    """Sets the ranks of a run before its first step.

    Logs `budget/kept`, the number of components, which does not change.
    """

    Spec = RankRedistributionSpec
    name = "rank_redistribution"
    paper = "Paischer et al. 2024, arXiv:2410.07170"
    trials = {"": {"sample_ratio": 1.0}}
    spec: RankRedistributionSpec

    def __init__(self, spec: RankRedistributionSpec, adapters: AdapterSet, seed: int = 0):
        super().__init__(spec, adapters, seed)
        for path, adapter in self.controlled.items():
            if not is_linear(adapter.base):
                raise IncompatibleError(
                    f"controllers.rank_redistribution: {path} does not adapt a linear layer, so its inputs "
                    "cannot be compared; remove it from targets."
                )
            if adapter.start_A is not None:
                raise IncompatibleError(
                    f"controllers.rank_redistribution: {path} subtracts its start, which would be lost. "
                    "Choose a start of zero (adapter.init: default)."
                )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plans, and checks that there are data to sample."""
        super().on_fit_start(trainer, pl_module)
        training_sample(trainer, self.spec.sample_ratio, self.name)

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FineTuner)
        sample = training_sample(trainer, self.spec.sample_ratio, self.name)
        products: dict[str, Tensor] = {}

        def measure(path: str, adapter: object, x: Tensor, mask: Tensor | None) -> None:
            # In double precision, since sums in another order (with more processes) would otherwise rotate
            # the directions.
            rows = (x.flatten(0, -2) if mask is None else x[mask.bool()]).double()
            product = rows.T @ rows
            products[path] = products[path] + product if path in products else product

        over_inputs(pl_module, self.controlled, sample, measure)
        shares, directions = {}, {}
        for path, product in products.items():
            if distributed.is_initialized():
                distributed.all_reduce(product)
            values, vectors = torch.linalg.eigh(product)
            shares[path] = from_first_process(values.flip(0).clamp(min=0) / values.sum()).cpu()
            directions[path] = vectors.T.flip(0)
        ranks = self.ranks(shares)
        for path, adapter in self.controlled.items():
            self._set(trainer, adapter, directions[path][: ranks[path]])
        structure_changed(trainer, self.adapters)

    def ranks(self, shares: dict[str, Float[Tensor, " in"]]) -> dict[str, int]:
        """Returns the rank of each adapter, from the shares of its inputs' directions in descending order."""
        sizes = {path: len(adapter.kept) for path, adapter in self.controlled.items()}
        most = {
            path: min(len(shares[path]), math.floor(self.spec.rho * size)) for path, size in sizes.items()
        }
        ranks = {path: min(self.spec.min_rank, size) for path, size in sizes.items()}
        others = [
            (-float(share), place, path)
            for place, path in enumerate(sizes)
            for share in shares[path][ranks[path] : most[path]]
        ]
        for _, _, path in sorted(others)[: sum(sizes.values()) - sum(ranks.values())]:
            ranks[path] += 1
        return ranks

    @torch.no_grad()
    def _set(self, trainer: L.Trainer, adapter: Any, directions: Float[Tensor, "rank in"]) -> None:
        rank, held = len(directions), len(adapter.kept)
        if rank < held:
            select_components(trainer, adapter, torch.arange(rank, device=adapter.kept.device))
        elif rank > held:
            new = {"A": directions[held:], "B": adapter.B.new_zeros(len(adapter.B), rank - held)}
            extend_components(trainer, adapter, rank - held, new)
        adapter.A.copy_(from_first_process(directions))
        adapter.B.zero_()

    def statistics(self) -> dict[str, float]:
        return {"budget/kept": sum(len(adapter.kept) for adapter in self.controlled.values())}
