"""LoRA whose weak rank units are pruned for good (hybrid LoRA with pruning; no paper).

    W' = W + s B diag(kept) A            s = alpha / rank, of the rank at the start
    importance_i = (Σ_j |A_ij|) (Σ_k |B_ki|)

    A      (rank, in)    learned; U(±1/√in) at the start
    B      (out, rank)   learned; zeros at the start, hence W' = W
    kept   (rank,)       flags of the units alive; a dead one never comes back

`linalg.pruning.alive` is the rule by which units die. The row of A and the column of B of a dead unit are
zero, have no gradient, and no step moves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lora_lab.adapters.low_rank import LowRankAdapter, ScaledSpec, in_pefts_shapes
from lora_lab.adapters.protocols import Prunable


@dataclass
class LoRAPruneSpec(ScaledSpec):
    """The options of LoRA."""

    method: str = "lora_prune"


class LoRAPrune(LowRankAdapter, Prunable):
    """The adapter of one linear map."""

    convolves = True

    Spec = LoRAPruneSpec
    paper = "-"

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """See `LowRankAdapter.factors`: flags in B leave a dead unit of either factor without gradient."""
        return self.B * self.kept, self.A

    @torch.no_grad()
    def importance(self) -> Float[Tensor, " rank"]:
        return self.A.abs().sum(1) * self.B.abs().sum(0)

    @torch.no_grad()
    def keep_components(self, keep: Bool[Tensor, " rank"]) -> None:
        super().keep_components(keep & self.kept)
        self.A[~self.kept] = 0

    def frozen_parts(self) -> list[tuple[nn.Parameter, Bool[Tensor, ...]]]:
        """See `Adapter.frozen_parts`: the dead units. Their moments stay as they were, unused."""
        return [] if self.kept.all() else [(self.A, ~self.kept.unsqueeze(1)), (self.B, ~self.kept)]

    def _stored(self) -> Bool[Tensor, " rank"]:
        """Flags of what files hold: the units alive, or the zeros of a dead one, for PEFT has no rank 0."""
        flags = self.kept.clone()
        flags[0] |= ~self.kept.any()
        return flags

    @property
    def stored_spec(self) -> LoRAPruneSpec:
        """See `Adapter.stored_spec`: alpha falls with the rank, so that the scale stays."""
        stored = replace(self.spec, rank=int(self._stored().sum()))
        return replace(stored, alpha=self.spec.alpha * (self.scale / stored.scale))

    def peft_tensors(self) -> dict[str, Tensor]:
        """See `Adapter.peft_tensors`: the dead units are left out."""
        flags, (left, right) = self._stored(), self.factors()
        tensors = {"lora_A.weight": right[flags], "lora_B.weight": left[:, flags] * self.active}
        return in_pefts_shapes(self.base, tensors)

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Adapter.complete_peft_tensors`: dead units are put behind those alive."""
        A, B = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
        if A is None or B is None or len(A) >= self.spec.rank or B.shape[1] != len(A):
            return tensors
        dead = self.spec.rank - len(A)
        A = torch.cat([A, A.new_zeros(dead, *A.shape[1:])])
        B = torch.cat([B, B.new_zeros(len(B), dead, *B.shape[2:])], dim=1)
        return {**tensors, "lora_A.weight": A, "lora_B.weight": B}

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Adapter.load_peft_tensors`: a unit of zeros is a dead one."""
        super().load_peft_tensors(tensors)
        self.kept.copy_(self.A.any(1) | self.B.any(0))
