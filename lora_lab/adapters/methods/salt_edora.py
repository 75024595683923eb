"""SALT on the greatest singular values and a core of EDoRA's on the smallest ones (no paper).

    W  = U diag(S) Vᵀ,   head: the `rank` greatest values,   tail: the smallest ones, apart from the head
    W' = W + U_head diag(S_head α + β) V_headᵀ + U_tail C V_tailᵀ

    tail_mode    C
    free         R
    polar        (diag(1 + μ) G(θ) − I) diag(S_tail)    G = (I + K)(I − K)⁻¹, K the skew matrix of θ

    α, β       (rank,)               learned; zeros at the start
    R          (tail, tail)          learned; zeros at the start
    μ          (tail,)               learned with polar instead: sizes; zeros at the start
    θ          (tail·(tail−1)/2,)    learned with polar instead: directions; zeros, hence W' = W
    U, S, Vh                         frozen; singular vectors and values of head, then tail

The tail has `r_tail` values, or as many as the head leaves. `polar` is experimental.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.families.singular_basis import (
    BasisSpec,
    BasisUpdate,
    checked_rank,
    singular_basis,
)
from lora_lab.adapters.maps import sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import least_fault
from lora_lab.linalg.orthogonal import cayley, skew

log = logging.getLogger(__name__)


@dataclass
class SaltEDoRASpec(BasisSpec):
    """Options of SALT and EDoRA in one."""

    method: str = "salt_edora"

    rank: int = 8
    """How many of the greatest singular values are scaled and shifted; at least 1."""

    r_tail: int | None = None
    """How many of the smallest ones the core mixes, at least 1; null means as many as the rank."""

    tail_mode: Literal["free", "polar"] = "free"
    """The core: any matrix (`free`), or a rotation of the tail's vectors and a change of their sizes
    (`polar`)."""

    @property
    def size_field(self) -> str | None:
        return "rank"

    def faults(self) -> list[str]:
        found = super().faults() + least_fault("rank", self.rank, 1)
        return found if self.r_tail is None else found + least_fault("r_tail", self.r_tail, 1)


def tail_of(spec: SaltEDoRASpec, values: int) -> int:
    """Returns how many of a map's singular values the core mixes."""
    return min(spec.rank if spec.r_tail is None else spec.r_tail, values - spec.rank)


class SaltEDoRA(BasisUpdate):
    """The adapter of one linear map."""

    Spec = SaltEDoRASpec
    paper = "-"
    peft = PeftLayout(
        None,
        {
            "salt_alpha": "alpha",
            "salt_beta": "beta",
            "edora_R": "R",
            "edora_mu": "mu",
            "edora_theta": "theta",
        },
    )

    def __init__(self, base: Any, spec: SaltEDoRASpec):
        values = checked_rank(base, spec.rank)
        tail = tail_of(spec, values)
        index = torch.cat([torch.arange(spec.rank), torch.arange(values - tail, values)])
        super().__init__(base, spec, singular_basis(base, spec, index))
        self.alpha, self.beta = self._zeros(spec.rank), self._zeros(spec.rank)
        polar = spec.tail_mode == "polar"
        self.R = None if polar or not tail else self._zeros(tail, tail)
        self.mu = self._zeros(tail) if polar and tail else None
        self.theta = self._zeros(tail * (tail - 1) // 2) if polar and tail else None

    @classmethod
    def site_parameter_count(cls, module: Any, spec: Any) -> int:
        tail = tail_of(spec, min(sizes(module)))
        return 2 * spec.rank + (tail * (tail + 1) // 2 if spec.tail_mode == "polar" else tail**2)

    def _zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype))

    @classmethod
    def build(cls, sites: list[Site], spec: SaltEDoRASpec) -> dict[str, Adapter]:
        adapters: dict[str, Any] = super().build(sites, spec)
        whole = [path for path, adapter in adapters.items() if adapter.core() is None]
        if whole:
            log.info("adapter.rank: leaves no singular value for a tail in %s", ", ".join(whole))
        return adapters

    def core(self) -> Float[Tensor, "tail tail"] | None:
        """Returns C; None where the head has all singular values."""
        if self.mu is None or self.theta is None:
            return self.R
        rotation = cayley(-skew(self.theta, len(self.mu)))
        identity = torch.eye(len(self.mu), dtype=rotation.dtype, device=rotation.device)
        return ((1 + self.mu).unsqueeze(1) * rotation - identity) * self.S[self.spec.rank :]

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        rank, core = self.spec.rank, self.core()
        head = self.U[:, :rank] * (self.S[:rank] * self.alpha + self.beta)
        return head if core is None else torch.cat([head, self.U[:, rank:] @ core], dim=1), self.Vh
