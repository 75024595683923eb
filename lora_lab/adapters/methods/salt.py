"""SALT: singular values scaled and shifted, the rest of the spectrum by low rank (arXiv:2503.16055).

    W  = U diag(S) Vᵀ                       p = min(out, in) singular values, the largest `rank` on top
    Σ' = [ diag((1 + α) S_top + β)    0                   ]
         [ 0                          diag(S_rest) + X Y  ]
    W' = U Σ' Vᵀ,  computed as W + L R with L = [U_top diag(S_top α + β), U_rest X],  R = [V_topᵀ; Y V_restᵀ]
    penalty = reg_multiplier · (‖S_top α + β‖ + ‖X Y‖)

    α, β   (rank,)            learned; zeros at the start
    X      (p − rank, r_lora) learned; U(±√(2/7 / r_lora)) at the start
    Y      (r_lora, p − rank) learned; zeros at the start, so W' = W
    U, S, Vh                  frozen; all p singular vectors and values, or the top ones if r_lora is 0

`r_lora: 0` only scales and shifts. The authors' code clamps all of Σ' at 0 (`relu: all`). This removes every
negative entry of X Y, leaves gradients at the start only on its diagonal, and needs X Y itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import PeftLayout
from lora_lab.adapters.families.singular_basis import (
    BasisSpec,
    BasisUpdate,
    checked_rank,
    singular_basis,
)
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.spec import least_fault
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.kaiming import kaiming_uniform
from lora_lab.linalg.norms import product_norm
from lora_lab.linalg.spectral import rectified


@dataclass
class SALTSpec(BasisSpec):
    """SALT's options."""

    method: str = "salt"

    rank: int | None = 8
    """How many of the largest singular values to scale and shift, at least 1; null if `ratio` is given."""

    ratio: float | None = None
    """Instead, their share of all singular values, in (0, 1], rounded down but at least one, as in the
    authors' code."""

    r_lora: int = 8
    """Rank of the update of the other directions, at most as many as there are; 0 does not change them."""

    relu: Literal["none", "diag", "all"] = "none"
    """Entries of Σ' that are clamped at 0: none, the scaled and shifted values, or all, as in the authors'
    code."""

    reg_multiplier: float = 0.0
    """Weight of the authors' penalty on the size of the edit, at least 0."""

    @property
    def size_field(self) -> str | None:
        return "r_lora"

    def faults(self) -> list[str]:
        found = super().faults() + least_fault("r_lora", self.r_lora, 0)
        if (self.rank is None) == (self.ratio is None):
            found.append(
                f"rank, ratio: exactly one must be given and the other null; got {self.rank}, {self.ratio}"
            )
        if self.rank is not None:
            found += least_fault("rank", self.rank, 1)
        if self.ratio is not None and not 0 < self.ratio <= 1:
            found.append(f"ratio: must lie in (0, 1]; got {self.ratio}")
        if not (math.isfinite(self.reg_multiplier) and self.reg_multiplier >= 0):
            found.append(f"reg_multiplier: must be finite and at least 0; got {self.reg_multiplier}")
        return found


def top(spec: SALTSpec, values: int) -> int:
    """Returns how many of a map's singular values are scaled and shifted."""
    return spec.rank if spec.rank is not None else max(1, int(values * (spec.ratio or 0)))


class SALT(BasisUpdate[SALTSpec]):
    """The adapter of one linear map."""

    Spec = SALTSpec
    paper = "Elsayed et al. 2025, arXiv:2503.16055"
    peft = PeftLayout(None, {"salt_alpha": "alpha", "salt_beta": "beta", "salt_X": "X", "salt_Y": "Y"})

    def __init__(self, base: LinearMap, spec: SALTSpec):
        values = checked_rank(base, spec.rank or 1)
        rank = top(spec, values)
        rest = values - rank
        if spec.r_lora > rest:
            raise IncompatibleError(
                f"adapter.r_lora: {rank} of {values} singular values scaled and shifted leave {rest} "
                f"directions, the maximum here; got {spec.r_lora}. Lower r_lora or the rank."
            )
        super().__init__(
            base, spec, singular_basis(base, spec, torch.arange(values if spec.r_lora else rank))
        )
        self.alpha = nn.Parameter(torch.zeros(rank, dtype=self.dtype))
        self.beta = nn.Parameter(torch.zeros(rank, dtype=self.dtype))
        self.X = self.Y = None
        if spec.r_lora:
            start = kaiming_uniform(rest, spec.r_lora, dtype=self.dtype)
            self.X = nn.Parameter(math.sqrt(2 / 7) * start)
            self.Y = nn.Parameter(torch.zeros(spec.r_lora, rest, dtype=self.dtype))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: SALTSpec) -> int:
        values = min(sizes(module))
        rank = top(spec, values)
        return 2 * rank + 2 * spec.r_lora * (values - rank)

    @property
    def rank(self) -> int:
        return len(self.alpha)

    def without_gradient_at_start(self) -> tuple[str, ...]:
        return ("X",) if self.spec.r_lora else ()

    def shift(self) -> Float[Tensor, " rank"]:
        """Returns S_top α + β."""
        return self.S[: self.rank] * self.alpha + self.beta

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        rank, top, shift = self.rank, self.S[: self.rank], self.shift()
        if self.spec.relu != "none":
            shift = rectified(shift, top)
        left, right = self.U[:, :rank] * shift, self.Vh[:rank]
        if self.X is None or self.Y is None:
            return left, right
        U, S, Vh = self.U[:, rank:], self.S[rank:], self.Vh[rank:]
        if self.spec.relu == "all":
            # (p − rank, p − rank): clamped entries have no factors.
            return torch.cat([left, U @ rectified(self.X @ self.Y, S.diag())], dim=1), self.Vh
        # X and Y are multiplied with the vectors first, which costs r_lora products per token instead of p.
        return torch.cat([left, U @ self.X], dim=1), torch.cat([right, self.Y @ Vh])

    def penalty(self) -> Tensor | float:
        if not self.spec.reg_multiplier:
            return 0.0
        norm: Tensor = torch.linalg.vector_norm(self.shift())
        if self.X is not None and self.Y is not None:
            norm = norm + product_norm(self.X, self.Y)
        return self.spec.reg_multiplier * norm
