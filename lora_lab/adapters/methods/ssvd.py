"""SSVD: right singular vectors rotated, singular values shifted (Wang et al. 2025, arXiv:2509.02830).

    W  = U diag(S) Vᵀ
    W' = W + U_k C V_kᵀ,   C = diag(S_k + Δσ) G − diag(S_k)      k the rank: the largest singular values

    rotation       G
    cayley         (I − K)(I + K)⁻¹, orthogonal; K the skew matrix of θ
    first_order    I − 2 K, near it for small K; what the paper's tables were made with
    free           any matrix

    θ     (k·(k−1)/2,)   learned; zeros at the start, so G = I and W' = W
    G     (k, k)         learned with free instead; I at the start
    Δσ    (k,)           learned; zeros at the start
    U, S, Vh             frozen; the k largest singular values and their vectors

Inputs are rotated and outputs keep their directions U, no matter which are more. With cayley the singular
values of W' are |S_k + Δσ| and the unchanged ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import PeftLayout
from lora_lab.adapters.families.singular_basis import BasisSpec, CoreUpdate, checked_rank, singular_basis
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.spec import least_fault
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.orthogonal import cayley, skew


@dataclass
class SSVDSpec(BasisSpec):
    """SSVD's options; the paper rotates 0.4, 0.6 or 0.8 of the singular vectors."""

    method: str = "ssvd"

    removed_fields = {"gate": False}

    rank: int | None = None
    """How many of the largest singular values, the paper's k, at least 1; null where
    `rotation_ratio` says."""

    rotation_ratio: float | None = 0.4
    """Instead, their share of all singular values, in (0, 1], rounded down; null if `rank` is given."""

    rotation: Literal["cayley", "first_order", "free"] = "cayley"
    """How the right vectors are mixed: by a rotation, by its first-order part, as in the paper's experiments,
    or by any matrix."""

    @property
    def size_field(self) -> str | None:
        return "rotation_ratio" if self.rank is None else "rank"

    def faults(self) -> list[str]:
        found = super().faults()
        if (self.rank is None) == (self.rotation_ratio is None):
            found.append(
                "rank, rotation_ratio: exactly one must be given and the other null; "
                f"got {self.rank}, {self.rotation_ratio}"
            )
        if self.rank is not None:
            found += least_fault("rank", self.rank, 1)
        if self.rotation_ratio is not None and not 0 < self.rotation_ratio <= 1:
            found.append(f"rotation_ratio: must lie in (0, 1]; got {self.rotation_ratio}")
        return found


def rotated_values(spec: SSVDSpec, values: int) -> int:
    """Returns k for a map with this many singular values."""
    return spec.rank or int(values * (spec.rotation_ratio or 0))


class SSVD(CoreUpdate[SSVDSpec]):
    """The adapter of one linear map."""

    Spec = SSVDSpec
    paper = "Wang et al. 2025, arXiv:2509.02830"
    peft = PeftLayout(None, {"ssvd_theta": "theta", "ssvd_G": "G", "ssvd_dsigma": "dsigma"})

    spared_from_decay = ("G",)

    theta: Any

    def __init__(self, base: LinearMap, spec: SSVDSpec):
        values = checked_rank(base, spec.rank or 1)
        rank = rotated_values(spec, values)
        if not rank:
            raise IncompatibleError(
                f"adapter.rotation_ratio: {spec.rotation_ratio} of {values} singular values is less than "
                f"one. Give at least 1 / {values}, or remove the map from {base.in_features} to "
                f"{base.out_features} from targets."
            )
        super().__init__(base, spec, singular_basis(base, spec, torch.arange(rank)))
        free = spec.rotation == "free"
        self.theta = None if free else nn.Parameter(torch.zeros(rank * (rank - 1) // 2, dtype=self.dtype))
        self.G = nn.Parameter(torch.eye(rank, dtype=self.dtype)) if free else None
        self.dsigma = nn.Parameter(torch.zeros(rank, dtype=self.dtype))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: SSVDSpec) -> int:
        k = rotated_values(spec, min(sizes(module)))
        return k + (k**2 if spec.rotation == "free" else k * (k - 1) // 2)

    @property
    def rank(self) -> int:
        return len(self.dsigma)

    def rotated(self) -> Float[Tensor, "k k"]:
        """Returns G."""
        if self.G is not None:
            return self.G
        K = skew(self.theta, self.rank)
        if self.spec.rotation == "cayley":
            return cayley(K)
        return torch.eye(self.rank, dtype=K.dtype, device=K.device) - 2 * K

    def core(self) -> Float[Tensor, "k k"]:
        """Returns C."""
        return (self.S + self.dsigma).unsqueeze(1) * self.rotated() - self.S.diag()
