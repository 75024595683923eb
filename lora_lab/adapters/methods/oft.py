"""OFT: rotate the inputs of a frozen map block by block (Qiu et al. 2023, arXiv:2306.07280).

    W' = W Rᵀ,   R = blkdiag(R_1, …, R_blocks)        y = base(x R), x a row
    R_i = (I − Q_i)(I + Q_i)⁻¹                         Q_i = −Q_iᵀ, of b = oft_block_size rows
    R_i ≈ (I + Q_i)(I − Q_i)⁻¹, a polynomial           with use_cayley_neumann (Qiu et al. 2025)

    q   (blocks, b(b−1)/2)   the Q_i above their diagonals, learned; zeros at the start, so W' = W bitwise
        (1, b(b−1)/2)        with block_share

R is orthogonal, so the rows of W' keep their lengths and angles. The two forms rotate in opposite directions,
as in PEFT; the polynomial has the paper's direction.

With `coft` every ‖Q_i‖_F is kept within eps / √(rows of q), by shrinking q before each training pass.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, InputAdapter, PeftLayout
from lora_lab.adapters.families.blocks import (
    block_faults,
    check_blocks,
    nearest_divisor,
    warn_of_dropouts,
    with_identities,
)
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec, least_fault, probability_fault
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.orthogonal import cayley, cayley_neumann, rotate_blocks, skew


@dataclass
class OFTSpec(AdapterSpec):
    """OFT's options; the second paper uses blocks of 32 on all linear maps."""

    method: str = "oft"

    removed_fields = {"cayley_sign": "peft"}

    oft_block_size: int = 32
    """Inputs in a block, b; at least 2, and a divisor of the number of inputs. 0 where `r` is given."""

    r: int = 0
    """Number of blocks, instead of their size; 0 if `oft_block_size` is given."""

    auto_adjust: bool = False
    """If that does not divide the inputs, use the nearest number that does, as PEFT does."""

    use_cayley_neumann: bool = True
    """Compute R_i by a polynomial instead of a linear solve; orthogonal only if ‖Q_i‖ is well below 1."""

    num_cayley_neumann_terms: int = 5
    """Length of the polynomial, at least 2. 5 is PEFT's; 4 and 6 are closer to orthogonal: for ‖Q_i‖ = 0.2
    they are off by 6e-5 and 1e-7, 5 by 3e-3."""

    block_share: bool = False
    """One R_i for all blocks of a map."""

    coft: bool = False
    """Keep the rotation near the identity."""

    eps: float = 6e-5
    """How near, with `coft`; above 0."""

    dropout: float = 0.0
    """Share of the blocks, rounded down, that are the identity in a training pass, in [0, 1); PEFT calls
    it module_dropout, and ignores it."""

    @property
    def size_field(self) -> str | None:
        return "oft_block_size" if self.oft_block_size else "r"

    def faults(self) -> list[str]:
        found = super().faults() + block_faults(self, "oft_block_size", "r")
        found += least_fault("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 2)
        if self.coft and not (math.isfinite(self.eps) and self.eps > 0):
            found.append(f"eps: must be finite and above 0; got {self.eps}")
        if self.dropout and self.block_share:
            found.append("dropout: drops single blocks, and block_share has only one; use one of the two")
        return found + probability_fault("dropout", self.dropout)


SAME = ("oft_block_size", "r", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms")
"""PEFT fields with the same names."""


def _write_config(spec: OFTSpec) -> dict[str, Any]:
    # PEFT warns of files without a version: before 0.18 it had another polynomial.
    return {"peft_version": "0.21.2"}


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    if "oft_block_size" not in config:
        raise IncompatibleError(
            "oft_block_size: is missing: the file is of PEFT before 0.14, which had another OFT. Train again."
        )
    version = str(config.get("peft_version") or "0.17")
    if config.get("use_cayley_neumann") and tuple(map(int, version.split(".")[:2])) < (0, 18):
        warnings.warn(
            "use_cayley_neumann: the file is of PEFT before 0.18, which had another polynomial; the "
            "adapter will not compute what it did in training.",
            stacklevel=2,
        )
    shared = config.get("block_share", False)
    return {"auto_adjust": True, "dropout": 0.0 if shared else config.get("module_dropout", 0.0)}


def block_size(inputs: int, spec: OFTSpec) -> int:
    """Returns b for a map with this many inputs."""
    given = nearest_divisor(inputs, spec.oft_block_size or spec.r)
    return given if spec.oft_block_size else inputs // given


class OFT(InputAdapter[OFTSpec]):
    """The rotated input of one linear map."""

    Spec = OFTSpec
    family = "orthogonal"
    paper = "Qiu et al. 2023, arXiv:2306.07280; Qiu et al. 2025, arXiv:2506.19847"
    peft = PeftLayout(
        "OFT",
        tensors={"oft_R.weight": "q"},
        fields={name: name for name in SAME} | {"module_dropout": "dropout"},
        config=_write_config,
        spec=_read_config,
    )

    def __init__(self, base: LinearMap, spec: OFTSpec):
        super().__init__(base)
        self.spec = spec
        self.block_size = block_size(self.in_features, spec)
        self.blocks = self.in_features // self.block_size
        pairs = self.block_size * (self.block_size - 1) // 2
        rows = 1 if spec.block_share else self.blocks
        self.q = nn.Parameter(torch.zeros(rows, pairs, dtype=self.dtype))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: OFTSpec) -> int:
        inputs = sizes(module)[1]
        size = block_size(inputs, spec)
        return (1 if spec.block_share else inputs // size) * (size * (size - 1) // 2)

    @classmethod
    def build(cls, sites: list[Site], spec: OFTSpec) -> dict[str, Adapter]:
        """Makes the adapters."""
        check_blocks(sites, spec, "oft_block_size", "r", spec.auto_adjust)
        adapters = super().build(sites, spec)
        warn_of_dropouts(adapters, spec.dropout)
        return adapters

    @torch.no_grad()
    def shrinkage(self) -> Float[Tensor, "rows 1"]:
        """Returns the factors that bring every ‖Q_i‖_F within its bound; 1 if it is."""
        bound = self.spec.eps / math.sqrt(len(self.q))
        norm = math.sqrt(2) * torch.linalg.vector_norm(self.q, dim=1, keepdim=True)
        # By rounding, a norm may still be above the bound after shrinking; it must not shrink again.
        return torch.where(norm > bound * (1 + 1e-5), bound / norm, 1.0)

    def blocks_of_Q(self) -> Float[Tensor, "rows b b"]:
        """Returns the Q_i."""
        return skew(self.q * self.shrinkage() if self.spec.coft else self.q, self.block_size)

    def rotation(self) -> Float[Tensor, "rows b b"]:
        """Returns the R_i."""
        Q = self.blocks_of_Q()
        if self.spec.use_cayley_neumann:
            return cayley_neumann(Q, self.spec.num_cayley_neumann_terms)
        return cayley(Q)

    def transform_input(self, x: Tensor) -> Tensor:
        R = self.rotation()
        dropout = self.spec.dropout if self.training else 0.0
        return rotate_blocks(x, with_identities(R, dropout) if dropout else R)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the adapted map; the rotation is cast to the input's type."""
        if self.spec.coft and self.training:
            with torch.no_grad():
                self.q.mul_(self.shrinkage())
        return self.base(self.transform_input(x))

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """Returns W Rᵀ: the transposed blocks on the rows of W."""
        if self.spec.use_cayley_neumann and torch.linalg.matrix_norm(self.blocks_of_Q()).max() > 1:
            warnings.warn(
                "oft: a block has ‖Q‖ > 1, for which the polynomial of use_cayley_neumann is not a "
                "rotation. Train with a smaller learning rate, or use_cayley_neumann: false.",
                stacklevel=2,
            )
        return rotate_blocks(weight, self.rotation().mT)
