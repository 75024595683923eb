"""RandLoRA: a full-rank update from frozen random bases (Albert et al. 2025, arXiv:2502.00987).

    V  = s Σ_j B_j diag(λ_j) A diag(γ_j)      j = 1 … N,   N = ⌈d / rank⌉,   s = alpha / rank
    W' = W + V, or W + Vᵀ where in > out      d = min(in, out),   D = max(in, out)

    A    (rank, 1, d)    frozen, the first columns of one A for all sites; random, of deviation 1
    B    (D, N, rank)    frozen, the first rows and bases of one B for all sites; random, of deviation 1
    λ    (rank, N)       learned; zeros at the start, so W' = W
    γ    (N, d)          learned; 1 / d at the start

A and B equal PEFT's, see `projections`. As there, column j · rank + i of all B_j side by side is multiplied
by row i · N + j of all diag(λ_j) A diag(γ_j), which is another order of equally random bases.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

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
from lora_lab.errors import IncompatibleError


@dataclass
class RandLoRASpec(ProjectedSpec):
    """RandLoRA's options."""

    method: str = "randlora"

    rank: int = 32
    """Rank of each basis, from 1 to min(in, out) of the smallest map. A smaller one trains more: about d + d²
    / rank numbers per map."""

    alpha: float | None = None
    """Strength of the update, which is scaled by alpha / rank; null means the paper's 20 · rank."""

    sparse: bool = False
    """Draw bases of −1, 0 and 1 with probabilities 1/6, 2/3 and 1/6."""

    very_sparse: bool = False
    """Draw bases of −1, 0 and 1, either sign with probability 1 / (2 √d) for the largest d. This is PEFT's
    code; its documentation and the paper say 1 / √d."""

    @property
    def resolved(self) -> RandLoRASpec:
        return self if self.alpha is not None else replace(self, alpha=20.0 * self.rank)

    def faults(self) -> list[str]:
        found = super().faults() + ([] if self.alpha is None else zero_fault("alpha", self.alpha))
        if self.sparse and self.very_sparse:
            found.append("very_sparse: excludes sparse; keep one of the two")
        return found


class RandLoRA(ProjectedAdapter[RandLoRASpec]):
    """The adapter of one linear map."""

    Spec = RandLoRASpec
    paper = "Albert et al. 2025, arXiv:2502.00987"
    peft = peft_layout(
        "randlora",
        {"lambda": "lambda_", "gamma": "gamma"},
        {"randlora_alpha": "alpha", "sparse": "sparse", "very_sparse": "very_sparse"},
    )

    def __init__(self, base: LinearMap, spec: RandLoRASpec, projections: Projections):
        super().__init__(base, spec, projections)
        self.small, self.large = sorted((self.in_features, self.out_features))
        if spec.rank > self.small:
            raise IncompatibleError(
                f"adapter.rank: a basis of RandLoRA allows at most min(in, out) = {self.small} here; got "
                f"{spec.rank}. Lower the rank, or remove the module from targets."
            )
        self.scale = float(spec.resolved.alpha or 0) / spec.rank
        if base.weight.dtype == torch.float16:
            warnings.warn(
                f"randlora scales random bases by alpha / rank = {self.scale:g}, and on this float16 base "
                "outputs above 65504 are infinite: load the base in bfloat16, or lower alpha.",
                stacklevel=2,
            )
        bases = math.ceil(self.small / spec.rank)
        self.lambda_ = nn.Parameter(torch.zeros(spec.rank, bases, dtype=self.dtype))
        self.gamma = nn.Parameter(torch.full((bases, self.small), 1 / self.small, dtype=self.dtype))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: RandLoRASpec) -> int:
        small = min(sizes(module))
        return math.ceil(small / spec.rank) * (spec.rank + small)

    @classmethod
    def draw(
        cls, rows: int, columns: int, spec: RandLoRASpec, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draws A first, then B basis by basis, in bfloat16 unless sparse."""
        small, large = sorted((rows, columns))
        bases = math.ceil(small / spec.rank)
        tail = 1 / (2 * (math.sqrt(small) if spec.very_sparse else 3))

        def ternary(*shape: int) -> Tensor:
            drawn = torch.rand(shape, generator=generator)
            return (drawn > 1 - tail).float() - (drawn < tail).float()

        def uniform(*shape: int) -> Tensor:
            empty = torch.empty(shape, dtype=torch.bfloat16)
            return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

        if spec.sparse or spec.very_sparse:
            A, B = ternary(spec.rank, 1, small), ternary(large, bases, spec.rank)
        else:
            A = uniform(spec.rank, 1, small)
            B = torch.cat([uniform(large, 1, spec.rank) for _ in range(bases)], dim=1)
        return A / A.std(), B / B.std()

    @property
    def A(self) -> Float[Tensor, "rank 1 d"]:
        """This map's columns of the shared A."""
        return self.projections.A[:, :, : self.small]

    @property
    def B(self) -> Float[Tensor, "D k"]:
        """This map's rows and bases of the shared B, the bases side by side."""
        return self.projections.B[: self.large, : len(self.gamma)].flatten(1)

    def without_gradient_at_start(self) -> tuple[str, ...]:
        return ("gamma",)

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Returns B and s λ A γ, both transposed where in > out."""
        rows = (self.scale * self.lambda_.unsqueeze(2) * self.A * self.gamma).flatten(0, 1)
        return (self.B, rows) if self.small == self.in_features else (rows.T, self.B.T)

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        # λ A γ can be as large as W, so it is computed again in the backward pass.
        x, scaled = self.dropout(x), self.scale * self.lambda_
        if self.small == self.in_features:
            return F.linear(scaled_linear(x, scaled.unsqueeze(2), self.A, self.gamma), self.B)
        hidden = F.linear(x, self.B.T)
        return scaled_linear(hidden, self.gamma.T.unsqueeze(1), self.A.permute(2, 0, 1), scaled)
