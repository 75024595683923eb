"""LoRA whose weak rank units are pruned permanently (hybrid LoRA with pruning; no paper).

    W' = W + s B diag(kept) A            s = alpha / rank, of the rank at the start
    importance_i = (Σ_j |A_ij|) (Σ_k |B_ki|)

    A      (rank, in)    learned; U(±1/√in) at the start
    B      (out, rank)   learned; zeros at the start, so W' = W
    kept   (rank,)       flags of the units that are alive; a dead one never comes back

`linalg.pruning.alive` decides which units die. The row of A and the column of B of a dead unit are zero, have
no gradient, and no step changes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lora_lab.adapters.families.low_rank import LowRankAdapter, ScaledSpec
from lora_lab.adapters.protocols import Truncatable


@dataclass
class LoRAPruneSpec(ScaledSpec):
    """The options of LoRA."""

    method: str = "lora_prune"


class LoRAPrune(LowRankAdapter[LoRAPruneSpec], Truncatable):
    """The adapter of one linear map."""

    convolves = True

    Spec = LoRAPruneSpec
    paper = "-"

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Returns the factors; with the flags in B, dead units have no gradient in either."""
        return self.B * self.kept, self.A

    @torch.no_grad()
    def keep_components(self, keep: Bool[Tensor, " rank"]) -> None:
        super().keep_components(keep & self.kept)
        self.A.masked_fill_(~self.kept.unsqueeze(1), 0)

    def frozen_parts(self) -> list[tuple[nn.Parameter, Bool[Tensor, ...]]]:
        """Returns flags of the dead units, whose moments do not change."""
        return [] if self.kept.all() else [(self.A, ~self.kept.unsqueeze(1)), (self.B, ~self.kept)]

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the tensors; a unit of zeros is dead."""
        super().load_peft_tensors(tensors)
        self.kept.copy_(self.A.any(1) | self.B.any(0))
