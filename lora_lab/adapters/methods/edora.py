"""EDoRA: magnitudes, and a core between singular vectors (Nasiri and Garraghan 2025, arXiv:2501.12067).

    W  = U diag(S) Vᵀ,   A = diag(S_r) V_rᵀ,   B = U_r           s = alpha / rank
    V  = W + s B R A
    W' = diag(g) V,  g = m / ‖V‖       one magnitude per row of W, as in DoRA; ‖V‖ counts as a constant

    R          (rank, rank)   learned; N(0, init_sigma²) at the start, so W' ≈ W, or exactly W with 0
    m          (out,)         learned; ‖W‖ at the start
    U, S, Vh                  frozen; the `rank` largest singular vectors and values

The bias is never scaled. A core on the smallest singular values, without magnitudes, is part of `salt_edora`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import PeftLayout
from lora_lab.adapters.families.magnitude import MagnitudeAdapter, gains
from lora_lab.adapters.families.singular_basis import BasisAdapter, BasisSpec, checked_rank, singular_basis
from lora_lab.adapters.maps import LinearMap, matrix, sizes
from lora_lab.adapters.spec import LowRankSpec
from lora_lab.linalg.norms import SMALLEST_NORM, edited_row_norms
from lora_lab.linalg.rank import widened


@dataclass
class EDoRASpec(BasisSpec, LowRankSpec):
    """EDoRA's options; its authors use alpha 16 with ranks from 4 to 32."""

    method: str = "edora"

    removed_fields = {"use_magnitude": True, "subspace": "top", "fold_sigma": True}

    rank: int = 8
    """How many singular vectors of each side the core mixes; at least 1."""

    alpha: float = 16.0
    """Strength of the update: it is scaled by alpha / rank."""

    init_sigma: float = 1e-5
    """Standard deviation of R at the start, at least 0; 1e-5 in the authors' code. 0 starts exactly at W; R
    still has a gradient."""

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / self.rank

    def faults(self) -> list[str]:
        found = super().faults()
        if not (math.isfinite(self.init_sigma) and self.init_sigma >= 0):
            found.append(f"init_sigma: must be finite and at least 0; got {self.init_sigma}")
        return found


class EDoRA(BasisAdapter[EDoRASpec], MagnitudeAdapter[EDoRASpec]):
    """The adapter of one linear map."""

    Spec = EDoRASpec
    identity_at_start = False
    paper = "Nasiri and Garraghan 2025, arXiv:2501.12067"
    peft = PeftLayout(None, {"edora_R": "R", "edora_magnitude": "m"})

    spared_from_decay = ("m",)

    weight_square: Tensor
    on_basis: Tensor

    def __init__(self, base: LinearMap, spec: EDoRASpec):
        checked_rank(base, spec.rank)
        super().__init__(base, spec, singular_basis(base, spec, torch.arange(spec.rank)))
        self.R = nn.Parameter(spec.init_sigma * torch.randn(spec.rank, spec.rank, dtype=self.dtype))
        # With both, which depend only on the base, a norm costs rank products per row.
        square = widened(matrix(base).detach()).square().sum(1)
        self.register_buffer("weight_square", square, persistent=False)
        self.register_buffer("on_basis", torch.zeros_like(self.U), persistent=False)
        self.tensors_changed()
        self.m = nn.Parameter(edited_row_norms(square, self.on_basis, torch.zeros_like(self.U)))
        self.dropout = nn.Dropout(spec.dropout)

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: EDoRASpec) -> int:
        return spec.rank**2 + sizes(module)[0]

    def tensors_changed(self) -> None:
        """Computes W V_r with the base's W, since loaded vectors may not be its singular vectors."""
        with torch.autocast(self.Vh.device.type, enabled=False):
            weight = widened(matrix(self.base).detach()).to(self.Vh)
            self.on_basis.copy_(weight @ self.Vh.T)

    def left(self) -> Float[Tensor, "out rank"]:
        """Returns L with V = W + L V_rᵀ."""
        with torch.autocast(self.U.device.type, enabled=False):
            return self.U @ (self.spec.scale * self.R * self.S)

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        edited = torch.addmm(weight, widened(self.left()), widened(self.Vh))
        norm = torch.linalg.vector_norm(edited.detach(), dim=1).clamp(min=SMALLEST_NORM)
        return gains(self.m, norm).unsqueeze(1) * edited

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Applies the adapted map; dropout acts on everything except the base's product."""
        left = self.left()
        norm = edited_row_norms(self.weight_square, self.on_basis, left.detach())
        return self.scaled(x, gains(self.m, norm), left, self.Vh)
