"""GOFT: a rotation of few numbers, a tree of Givens rotations (Ma et al. 2024, arXiv:2404.04316).

    W' = W Rᵀ,   R = P_L … P_2 P_1                     y = base(x R), x a row
    P_i rotates pairs of inputs by G = [[cos α, −sin α], [sin α, cos α]],  α = π tanh θ

P_1 rotates neighbours; each further stage rotates neighbours among every second one of the stage before, so L
= ⌈log₂ in⌉ stages have in − 1 pairs. qGOFT (`strict_oft: false`) trains the blocks G directly.

    θ   (in − 1,)        learned, without qGOFT; zeros at the start
    G   (in − 1, 2, 2)   learned, with qGOFT; I at the start. In either case W' = W bitwise

qGOFT's penalty keeps the columns of every block nearly orthogonal: soft_reg Σ (g₀₀ g₀₁ + g₁₀ g₁₁)².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, InputAdapter, PeftLayout
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.orthogonal import givens, givens_tree


@dataclass
class GOFTSpec(AdapterSpec):
    """GOFT's options; the paper adapts all linear maps."""

    method: str = "goft"

    removed_fields = {"topology": "tree", "scaling": False, "angle_param": "tanh_pi"}

    strict_oft: bool = True
    """Train angles, which give rotations; false is the paper's qGOFT, which trains four numbers per pair."""

    soft_reg: float = 0.01
    """Weight of qGOFT's penalty in the loss, at least 0; in the paper 0.01 for LLaMA and 0.001
    to 0.05 for GLUE."""

    def faults(self) -> list[str]:
        found = super().faults()
        if not (math.isfinite(self.soft_reg) and self.soft_reg >= 0):
            found.append(f"soft_reg: must be finite and at least 0; got {self.soft_reg}")
        return found


class GOFT(InputAdapter[GOFTSpec]):
    """The rotated input of one linear map."""

    theta: nn.Parameter | None
    G: nn.Parameter | None

    Spec = GOFTSpec
    family = "orthogonal"
    paper = "Ma et al. 2024, arXiv:2404.04316"
    peft = PeftLayout(None, {"givens_hard": "theta", "givens_soft": "G"})

    def __init__(self, base: LinearMap, spec: GOFTSpec):
        super().__init__(base)
        self.spec = spec
        pairs = self.in_features - 1
        identities = torch.eye(2, dtype=self.dtype).repeat(pairs, 1, 1)
        self.theta = nn.Parameter(torch.zeros(pairs, dtype=self.dtype)) if spec.strict_oft else None
        self.G = None if spec.strict_oft else nn.Parameter(identities)

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: GOFTSpec) -> int:
        return (sizes(module)[1] - 1) * (1 if spec.strict_oft else 4)

    @classmethod
    def build(cls, sites: list[Site], spec: GOFTSpec) -> dict[str, Adapter]:
        """Makes the adapters.

        Raises:
            IncompatibleError: if a site has a single input.
        """
        for site in sites:
            if sizes(site.module)[1] < 2:
                raise IncompatibleError(
                    f"adapter.targets: {site.path} has one input, which cannot be rotated; remove it."
                )
        return super().build(sites, spec)

    def pair_blocks(self) -> Float[Tensor, "pairs 2 2"]:
        """Returns the G of all pairs."""
        if self.G is not None:
            return self.G
        assert self.theta is not None  # exactly one of the two exists
        return givens(math.pi * self.theta.tanh())

    def rotated(self, x: Tensor, inverse: bool = False) -> Tensor:
        """Returns x P_L … P_1, or x P_1ᵀ … P_Lᵀ."""
        return givens_tree(x, self.pair_blocks(), inverse)

    def transform_input(self, x: Tensor) -> Tensor:
        return self.rotated(x)

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """Returns W Rᵀ: the inverse order, with transposed blocks, on the rows of W."""
        return self.rotated(weight, inverse=True)

    def penalty(self) -> Tensor | float:
        """Returns qGOFT's penalty, 0 for GOFT."""
        if self.G is None or not self.spec.soft_reg:
            return 0.0
        return self.spec.soft_reg * (self.G[:, :, 0] * self.G[:, :, 1]).sum(1).square().sum()

    def decay_exempt(self) -> list[nn.Parameter]:
        """Returns everything except angles."""
        return [] if self.G is None else [self.G]
