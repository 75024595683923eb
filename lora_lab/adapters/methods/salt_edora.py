"""SALT on the largest singular values and EDoRA's core on the smallest ones (no paper).

    W  = U diag(S) Vᵀ,   head: the `rank` largest values,   tail: the smallest ones, apart from the head
    W' = W + U_head diag(S_head α + β) V_headᵀ + U_tail R V_tailᵀ

    α, β       (rank,)         learned; zeros at the start
    R          (tail, tail)    learned; zeros at the start, so W' = W
    U, S, Vh                   frozen; singular vectors and values of head, then tail

The tail has as many values as the head, or as many as are left.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

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
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import least_fault

log = logging.getLogger(__name__)


@dataclass
class SaltEDoRASpec(BasisSpec):
    """Options of SALT with EDoRA's core."""

    method: str = "salt_edora"

    removed_fields = {"r_tail": None, "tail_mode": "free"}

    rank: int = 8
    """How many of the largest singular values are scaled and shifted, and of the smallest ones mixed by the
    core; at least 1."""

    @property
    def size_field(self) -> str | None:
        return "rank"

    def faults(self) -> list[str]:
        return super().faults() + least_fault("rank", self.rank, 1)


def tail_of(spec: SaltEDoRASpec, values: int) -> int:
    """Returns how many of a map's singular values the core mixes."""
    return min(spec.rank, values - spec.rank)


class SaltEDoRA(BasisUpdate[SaltEDoRASpec]):
    """The adapter of one linear map."""

    Spec = SaltEDoRASpec
    paper = "-"
    peft = PeftLayout(None, {"salt_alpha": "alpha", "salt_beta": "beta", "edora_R": "R"})

    def __init__(self, base: LinearMap, spec: SaltEDoRASpec):
        values = checked_rank(base, spec.rank)
        tail = tail_of(spec, values)
        index = torch.cat([torch.arange(spec.rank), torch.arange(values - tail, values)])
        super().__init__(base, spec, singular_basis(base, spec, index))
        self.alpha, self.beta = self._zeros(spec.rank), self._zeros(spec.rank)
        self.R = self._zeros(tail, tail) if tail else None  # None if the head has all singular values

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: SaltEDoRASpec) -> int:
        return 2 * spec.rank + tail_of(spec, min(sizes(module))) ** 2

    def _zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype))

    @classmethod
    def build(cls, sites: list[Site], spec: SaltEDoRASpec) -> dict[str, Adapter]:
        adapters = super().build(sites, spec)
        whole = [path for path, adapter in adapters.items() if adapter.R is None]
        if whole:
            log.info("adapter.rank: leaves no singular value for a tail in %s", ", ".join(whole))
        return adapters

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        rank = self.spec.rank
        head = self.U[:, :rank] * (self.S[:rank] * self.alpha + self.beta)
        return head if self.R is None else torch.cat([head, self.U[:, rank:] @ self.R], dim=1), self.Vh
