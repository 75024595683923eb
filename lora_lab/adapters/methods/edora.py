"""EDoRA: magnitudes, and a core between singular vectors (Nasiri and Garraghan 2025, arXiv:2501.12067).

    W  = U diag(S) Vᵀ,   A = diag(S_r) V_rᵀ,   B = U_r           s = alpha / rank
    V  = W + s B R A
    W' = diag(g) V,  g = m / ‖V‖       one magnitude per row of W, as in DoRA; ‖V‖ counts as a constant

    R          (rank, rank)   learned; N(0, init_sigma²) at the start, hence W' ≈ W, or exactly W with 0
    m          (out,)         learned; ‖W‖ at the start; absent without use_magnitude: W' = V
    U, S, Vh                  frozen; the `rank` greatest singular vectors and values, or the smallest (tail)

Without fold_sigma A = V_rᵀ. The bias is never scaled. `EDoRASpec.tail_core` is the core alone on the smallest
values, W' = W + U R Vᵀ, exactly W at the start.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.families.magnitude import MagnitudeAdapter, gains
from lora_lab.adapters.families.singular_basis import BasisAdapter, BasisSpec, checked_rank, singular_basis
from lora_lab.adapters.maps import matrix, sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import LowRankSpec
from lora_lab.linalg.norms import SMALLEST_NORM, edited_row_norms
from lora_lab.linalg.rank import widened

log = logging.getLogger(__name__)


@dataclass
class EDoRASpec(BasisSpec, LowRankSpec):
    """EDoRA's options; its authors use alpha 16 with ranks from 4 to 32."""

    method: str = "edora"

    rank: int = 8
    """How many singular vectors of either side the core mixes; at least 1."""

    alpha: float = 16.0
    """Strength of the update: it is scaled by alpha / rank."""

    init_sigma: float = 1e-5
    """Standard deviation of R at the start, at least 0; 0 starts exactly at W, and R learns from it."""

    use_magnitude: bool = True
    """Learn a magnitude for each output."""

    subspace: Literal["top", "tail"] = "top"
    """Which singular vectors: those of the greatest values, or of the smallest."""

    fold_sigma: bool = True
    """Scale the right vectors by their singular values."""

    @classmethod
    def tail_core(cls, rank: int = 8) -> Self:
        """Returns the spec of the core alone, on the smallest singular values."""
        options: Any = {"init_sigma": 0.0, "use_magnitude": False, "subspace": "tail", "fold_sigma": False}
        return cls(rank=rank, alpha=rank, **options)

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / self.rank

    def faults(self) -> list[str]:
        found = super().faults()
        if not (math.isfinite(self.init_sigma) and self.init_sigma >= 0):
            found.append(f"init_sigma: must be finite and at least 0; got {self.init_sigma}")
        return found


class EDoRA(BasisAdapter, MagnitudeAdapter):
    """The adapter of one linear map."""

    Spec = EDoRASpec
    identity_at_start = False
    paper = "Nasiri and Garraghan 2025, arXiv:2501.12067"
    peft = PeftLayout(None, {"edora_R": "R", "edora_magnitude": "m"})

    spared_from_decay = ("m",)

    weight_square: Tensor
    on_basis: Tensor

    def __init__(self, base: Any, spec: EDoRASpec):
        values = checked_rank(base, spec.rank)
        first = 0 if spec.subspace == "top" else values - spec.rank
        super().__init__(base, spec, singular_basis(base, spec, torch.arange(first, first + spec.rank)))
        self.R = nn.Parameter(spec.init_sigma * torch.randn(spec.rank, spec.rank, dtype=self.dtype))
        # Both are of the base, and make a norm cost rank products per row.
        square = widened(matrix(base).detach()).square().sum(1)
        self.register_buffer("weight_square", square, persistent=False)
        self.register_buffer("on_basis", torch.zeros_like(self.U), persistent=False)
        self.tensors_changed()
        start = edited_row_norms(square, self.on_basis, torch.zeros_like(self.U))
        self.m = nn.Parameter(start) if spec.use_magnitude else None
        self.dropout = nn.Dropout(spec.dropout)

    @classmethod
    def site_parameter_count(cls, module: Any, spec: Any) -> int:
        return spec.rank**2 + (sizes(module)[0] if spec.use_magnitude else 0)

    @classmethod
    def build(cls, sites: list[Site], spec: EDoRASpec) -> dict[str, Adapter]:
        adapters: dict[str, Any] = super().build(sites, spec)
        scaled_tail = spec.subspace == "tail" and spec.fold_sigma
        dead = [path for path, own in adapters.items() if scaled_tail and own.tail_share() < 1e-6]
        if dead:
            log.warning(
                "adapter.subspace: tail has no effect with fold_sigma where the smallest singular values are "
                "0, as in %s. Use fold_sigma: false, or take these out of targets.",
                ", ".join(dead),
            )
        return adapters

    def tail_share(self) -> float:
        """Returns the core's greatest singular value as a share of W's greatest."""
        return float(self.S.max() / torch.linalg.matrix_norm(widened(matrix(self.base).detach()), 2))

    def tensors_changed(self) -> None:
        """Computes W V_r, with the base's own W, of which loaded vectors need not be the singular ones."""
        with torch.autocast(self.Vh.device.type, enabled=False):
            weight = widened(matrix(self.base).detach()).to(self.Vh)
            self.on_basis.copy_(weight @ self.Vh.T)

    def left(self) -> Float[Tensor, "out rank"]:
        """Returns L with V = W + L V_rᵀ."""
        with torch.autocast(self.U.device.type, enabled=False):
            core = self.spec.scale * self.R
            return self.U @ (core * self.S if self.spec.fold_sigma else core)

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        edited = torch.addmm(weight, widened(self.left()), widened(self.Vh))
        if self.m is None:
            return edited
        norm = torch.linalg.vector_norm(edited.detach(), dim=1).clamp(min=SMALLEST_NORM)
        return gains(self.m, norm).unsqueeze(1) * edited

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Applies the adapted map; dropout acts on everything but the base's own product."""
        left, gain = self.left(), None
        if self.m is not None:
            norm = edited_row_norms(self.weight_square, self.on_basis, left.detach())
            gain = gains(self.m, norm)
        return self.scaled(x, gain, left, self.Vh)
