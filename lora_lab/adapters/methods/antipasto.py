"""AntiPaSTO: a signed rotation in singular directions of a weight (Clark 2026, arXiv:2601.07473).

    W     = U diag(S) Vᵀ + rest,   A = L · tanh(skew(θ_v) / L),   L = 2·tan(max_rotation_angle / 2)
    R     = (I − c/2 A)⁻¹ (I + c/2 A)
    W'(c) = W + U (diag(S + c Δ) Rᵀ − diag(S)) Vᵀ                          c is the coefficient

    U, S, V   (out, rank), (rank,), (in, rank)   frozen, see `singular_basis`
    indices   (rank,)                            frozen; which singular directions of W are used
    θ_v       (rank · (rank − 1) / 2,)           learned; N(0, (0.006·√2)²), or zeros with init: identity
    Δ         (rank,)                            learned; N(4e-4, (4e-4)²), or zeros with init: identity

R(−c) is the inverse of R(c): c and −c steer in opposite directions. W'(0) = W bitwise. c is not a tensor and
not stored; `steering.set_coefficient` sets it. The authors' loss, a product over c and −c, has no gradient at
zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_lab.adapters.base import PeftLayout
from lora_lab.adapters.families.singular_basis import (
    Basis,
    BasisSpec,
    CoreUpdate,
    checked_rank,
    singular_basis,
)
from lora_lab.adapters.maps import LinearMap
from lora_lab.adapters.protocols import Selectable, Steerable
from lora_lab.adapters.spec import least_fault
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.orthogonal import cayley_change, skew


@dataclass
class AntiPaSTOSpec(BasisSpec):
    """AntiPaSTO's options; the paper edits the maps that write to the residual stream."""

    method: str = "antipasto"

    removed_fields = {
        "share_rotation": False,
        "seed_form": False,
        "rotate_v": True,
        "rotate_u": False,
        "use_delta_s": True,
        "block_size": None,
        "rotation_method": "cayley",
    }

    rank: int = 64
    """Number of singular directions that are edited, from 1 to min(in, out) of the smallest map; 16 to 256 in
    the paper."""

    coefficient: float = 1.0
    """Initial c, the paper's α. Training uses 1, 0 and −1; merging uses the current one."""

    max_rotation_angle: float = math.pi / 3
    """Soft bound of each entry of A, in radians, above 0; no bound from π on. The paper has π/4 to π/2. It
    bounds the angle of only two directions: 64 with all entries at a bound of π/3 rotate by up to 3.06."""

    dim_select: Literal["top_s", "random", "wanda_trip"] = "top_s"
    """Which singular directions: the largest, random ones, or, as in the paper, those that are important on
    examples. The last needs a call of `steering.calibrate` in Python before training."""

    init: Literal["reference", "identity"] = "reference"
    """`reference` starts with a small random edit; `identity` is for training on an ordinary loss."""

    def for_stored(self) -> Self:
        """The chosen directions are in the folder."""
        return replace(self, dim_select="top_s")

    @property
    def size_field(self) -> str | None:
        return "rank"

    def faults(self) -> list[str]:
        found = super().faults() + least_fault("rank", self.rank, 1)
        if not math.isfinite(self.coefficient):
            found.append(f"coefficient: must be finite; got {self.coefficient}")
        if not self.max_rotation_angle > 0:
            found.append(f"max_rotation_angle: must be above 0; got {self.max_rotation_angle}")
        return found


class AntiPaSTO(CoreUpdate[AntiPaSTOSpec], Steerable, Selectable):
    """The adapter of one linear map."""

    identity_at_start = False
    indices: Tensor

    Spec = AntiPaSTOSpec
    family = "orthogonal"
    paper = "Clark 2026, arXiv:2601.07473"
    peft = PeftLayout(
        None,
        tensors={f"antipasto_{name}": name for name in ("theta_v", "delta_s", "indices")},
    )

    def __init__(self, base: LinearMap, spec: AntiPaSTOSpec):
        rank = spec.rank
        U, S, Vh = _directions(base, spec)
        order = torch.randperm(len(S)) if spec.dim_select == "random" else torch.arange(len(S))
        indices = order[:rank].sort().values.to(S.device)
        super().__init__(base, spec, (U[:, indices], S[indices], Vh[indices]))
        unknown = spec.dim_select == "wanda_trip"
        self.register_buffer("indices", (torch.full_like(indices, -1) if unknown else indices).int())
        mean, spread = (4e-4, 0.006 * math.sqrt(2)) if spec.init == "reference" else (0.0, 0.0)
        self.theta_v = nn.Parameter(spread * torch.randn(rank * (rank - 1) // 2, dtype=self.dtype))
        self.delta_s = nn.Parameter(mean + mean * torch.randn(rank, dtype=self.dtype))
        self.coefficient = spec.coefficient
        self.tensors_changed()

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: AntiPaSTOSpec) -> int:
        return int(spec.rank * (spec.rank + 1) // 2)

    @property
    def coefficient(self) -> float:
        return self._coefficient

    @coefficient.setter
    def coefficient(self, coefficient: float) -> None:
        if not math.isfinite(coefficient):
            raise IncompatibleError(f"coefficient: must be finite; got {coefficient}")
        self._coefficient = float(coefficient)

    def _rotation_change(self) -> Float[Tensor, "rank rank"]:
        """Returns R − I."""
        A = skew(self.theta_v, self.spec.rank)
        if self.spec.max_rotation_angle < math.pi:
            limit = 2 * math.tan(self.spec.max_rotation_angle / 2)
            A = limit * torch.tanh(A / limit)
        return cayley_change(self.coefficient / 2 * A)

    def core(self) -> Float[Tensor, "rank rank"]:
        if self.undecided:
            raise IncompatibleError(
                "adapter.dim_select: wanda_trip chooses directions by examples and has no examples yet. Call "
                "lora_lab.adapters.steering.calibrate(adapters, chosen, rejected) before anything else, or "
                "use top_s."
            )
        shift = self.coefficient * self.delta_s
        # D Rᵀ − diag(S) as D (R − I)ᵀ + diag(c Δ): nothing large cancels.
        return torch.diag(shift) + (self.S + shift).unsqueeze(1) * self._rotation_change().T

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return self.base(x) if self.coefficient == 0 else super().forward(x)

    # Which directions -------------------------------------------------------------------------------------

    def directions(self) -> Basis:
        return _directions(self.base, self.spec)

    @torch.no_grad()
    def choose(self, indices: Int[Tensor, " rank"]) -> None:
        chosen = indices.long().to(self.S.device)
        U, S, Vh = self.directions()
        self.U.copy_(U[:, chosen])
        self.S.copy_(S[chosen])
        self.Vh.copy_(Vh[chosen])
        self.indices.copy_(chosen)
        self.tensors_changed()

    @property
    def undecided(self) -> bool:
        return self._undecided

    def tensors_changed(self) -> None:
        # Also kept as a Python flag: reading the buffer in a forward pass would wait for the device.
        self._undecided = bool((self.indices < 0).any())

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Also loads which directions of W a folder without a basis has."""
        if not self.spec.save_basis:
            self.choose(tensors["antipasto_indices"])
        super().load_peft_tensors(tensors)


def _directions(base: LinearMap, spec: AntiPaSTOSpec) -> Basis:
    """Returns all singular directions of W, from the largest singular value down."""
    return singular_basis(base, spec, torch.arange(checked_rank(base, spec.rank)))
