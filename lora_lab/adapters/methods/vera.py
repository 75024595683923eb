"""VeRA: vectors that scale one random projection shared by all maps (Kopiczko et al. 2023, arXiv:2310.11454).

    W' = W + diag(λ_b) B diag(λ_d) A
    y  = base(x) + λ_b ⊙ (B (λ_d ⊙ (A drop(x))))

    A     (rank, in)    frozen, the first columns of one A for all sites; U(±√(6 / largest in))
    B     (out, rank)   frozen, the first rows of one B for all sites; U(±√(6 / rank))
    λ_b   (out,)        learned; zeros at the start, so W' = W
    λ_d   (rank,)       learned; d_initial at the start

A and B equal PEFT's, see `projections`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.families.projections import (
    ProjectedAdapter,
    ProjectedSpec,
    Projections,
    peft_layout,
    scaled_linear,
)
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.spec import zero_fault


@dataclass
class VeRASpec(ProjectedSpec):
    """VeRA's options; the paper's learning rate is about ten times that of LoRA."""

    method: str = "vera"

    rank: int = 256
    """Number of rows of A; at least 1, 256 to 1024 in the paper. Each map trains this many numbers, and one
    per output."""

    d_initial: float = 0.1
    """Start of every number of λ_d, not 0; 0.1 in the paper, in which 1.0 and 1e-7 were worse."""

    def faults(self) -> list[str]:
        return super().faults() + zero_fault("d_initial", self.d_initial)


class VeRA(ProjectedAdapter[VeRASpec]):
    """The adapter of one linear map."""

    Spec = VeRASpec
    paper = "Kopiczko et al. 2023, arXiv:2310.11454"
    peft = peft_layout("vera", {name: name for name in ("lambda_b", "lambda_d")}, {"d_initial": "d_initial"})

    def __init__(self, base: LinearMap, spec: VeRASpec, projections: Projections):
        super().__init__(base, spec, projections)
        self.lambda_b = nn.Parameter(torch.zeros(self.out_features, dtype=self.dtype))
        self.lambda_d = nn.Parameter(torch.full((spec.rank,), spec.d_initial, dtype=self.dtype))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: VeRASpec) -> int:
        return sizes(module)[0] + spec.rank

    @classmethod
    def draw(
        cls, rows: int, columns: int, spec: VeRASpec, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draws A first, then B, in float32 for any type of the model."""

        def uniform(height: int, width: int) -> Tensor:
            bound = math.sqrt(6 / width)
            return torch.empty(height, width).uniform_(-bound, bound, generator=generator)

        return uniform(spec.rank, columns), uniform(rows, spec.rank)

    @property
    def A(self) -> Float[Tensor, "rank in"]:
        """This map's columns of the shared A."""
        return self.projections.A[:, : self.in_features]

    @property
    def B(self) -> Float[Tensor, "out rank"]:
        """This map's rows of the shared B."""
        return self.projections.B[: self.out_features]

    def without_gradient_at_start(self) -> tuple[str, ...]:
        return ("lambda_d",)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Returns diag(λ_b) B and diag(λ_d) A."""
        return self.lambda_b.unsqueeze(1) * self.B, self.lambda_d.unsqueeze(1) * self.A

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        # Both vectors scale B, so the backward pass needs only A drop(x), (..., rank), not x or y.
        hidden = F.linear(self.dropout(x), self.A)
        return scaled_linear(hidden, self.lambda_b.unsqueeze(1), self.B, self.lambda_d)
