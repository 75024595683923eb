"""DropLoRA: dropout on the rank units between A and B (Zhang 2025, arXiv:2508.17337).

    z = drop(x) Aᵀ
    y = base(x) + s (z ⊙ M / (1 − p)) Bᵀ       training; M is 0 with probability p = drop_prob, else 1
    W' = W + s B A                             evaluation and merging

    A   (rank, in)    learned; U(±1/√in) at the start
    B   (out, rank)   learned; zeros at the start, so W' = W
    M   (…, rank)     drawn again for every token

A unit is multiplied by 0, never skipped, so every tensor has a gradient in every step and process. Masks come
from torch's global generator, which gradient checkpointing resets when it computes a block again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.adapters.families.low_rank import LowRankAdapter, ScaledSpec
from lora_lab.adapters.maps import LinearMap, mix, project
from lora_lab.adapters.protocols import Growable, RandomlyDropped, RankAllocatable, Shareable, Truncatable
from lora_lab.adapters.spec import probability_fault
from lora_lab.errors import ConfigError


@dataclass
class LoRADropSpec(ScaledSpec):
    """DropLoRA's options; the paper has p = 0.5."""

    method: str = "lora_drop"

    removed_fields = {"drop_unit": "rank", "drop_granularity": "token", "drop_rescale": True}

    drop_prob: float = 0.3
    """Probability p of zeroing a unit in training, in [0, 1); 0.5 in the paper, 0 is LoRA."""

    def faults(self) -> list[str]:
        return super().faults() + probability_fault("drop_prob", self.drop_prob)


class LoRADrop(
    LowRankAdapter[LoRADropSpec], RankAllocatable, Growable, Truncatable, Shareable, RandomlyDropped
):
    """The adapter of one linear map."""

    convolves = True

    Spec = LoRADropSpec
    paper = "Zhang 2025, arXiv:2508.17337"

    def __init__(self, base: LinearMap, spec: LoRADropSpec):
        super().__init__(base, spec)
        self.drop_prob = spec.drop_prob

    @property
    def drop_prob(self) -> float:
        """The probability p, which may change during training.

        Raises:
            ConfigError: if it is set to a number outside [0, 1).
        """
        return self._drop_prob

    @drop_prob.setter
    def drop_prob(self, probability: float) -> None:
        for fault in probability_fault("drop_prob", probability):
            raise ConfigError(f"adapter.{fault}")
        self._drop_prob = probability

    @property
    def rests_by_chance(self) -> bool:
        return self.drop_prob > 0

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if not self.training or not self.drop_prob:
            return super().delta_output(x)
        left, right = self.factors()
        keep = 1 - self.drop_prob
        hidden = project(self.base, self.dropout(x), right) * (self.scale / keep * self.active)
        return mix(self.base, hidden * torch.empty_like(hidden).bernoulli_(keep), left)
