"""BOFT: a dense rotation as a product of sparse ones, the butterflies (Liu et al. 2023, arXiv:2311.06243).

    W' = diag(s) W Rᵀ,   R = B_{N−1} … B_1 B_0             y = s ⊙ (x R Wᵀ) + bias, x a row
    B_i = P_iᵀ blkdiag(R_{i,1}, …, R_{i,D}) P_i            R_{i,j} = (I − K)(I + K)⁻¹
                                                          K = ½ (A_{i,j} − A_{i,j}ᵀ)

    A   (N, D, b, b)   learned; zeros at the start, so R = I
    s   (out, 1)       learned; ones at the start, so W' = W bitwise

N = boft_n_butterfly_factor, b = boft_block_size, and D blocks of b make up the inputs. P_0 is not a
permutation; P_i brings together half-blocks that are 2^i apart, so N factors mix b · 2^(N−1) inputs.
With N = 1 and without s it is OFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, InputAdapter, PeftLayout
from lora_lab.adapters.families.blocks import block_faults, check_blocks, warn_of_dropouts, with_identities
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec, least_fault, probability_fault
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.orthogonal import butterfly, cayley


@dataclass
class BOFTSpec(AdapterSpec):
    """BOFT's options; the paper uses 2 factors of blocks of 8 on GLUE, on all linear maps."""

    method: str = "boft"

    boft_block_size: int = 4
    """Inputs in a block, b; at least 2, a divisor of the number of inputs, and even for more than one factor.
    0 where `boft_block_num` is given."""

    boft_block_num: int = 0
    """Number of blocks D, instead of their size; 0 if `boft_block_size` is given."""

    boft_n_butterfly_factor: int = 1
    """Number of factors N, the paper's m; at least 1, and 2^(N−1) must divide the number of blocks."""

    train_scale: bool = True
    """Train s, as PEFT does; the paper's formula has R alone."""

    dropout: float = 0.0
    """Share of the blocks of one random factor, rounded down, that are the identity in a training pass, in
    [0, 1); PEFT calls it boft_dropout."""

    @property
    def size_field(self) -> str | None:
        return "boft_block_size" if self.boft_block_size else "boft_block_num"

    def faults(self) -> list[str]:
        found = super().faults() + block_faults(self, "boft_block_size", "boft_block_num")
        found += least_fault("boft_n_butterfly_factor", self.boft_n_butterfly_factor, 1)
        if self.boft_n_butterfly_factor > 1 and self.boft_block_size % 2:
            found.append(
                "boft_block_size: must be even for more than one factor, as these move half-blocks; got "
                f"{self.boft_block_size}"
            )
        return found + probability_fault("dropout", self.dropout)


FIELDS = {name: name for name in ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor")}
"""PEFT fields with the same names."""


def _read_factors(sites: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Counts the factors: without its CUDA extension PEFT makes only one, for any config."""
    counts = {shapes["boft_R"][0] for shapes in sites.values() if len(shapes.get("boft_R", ())) == 4}
    return {"boft_n_butterfly_factor": max(counts)} if counts else {}


class BOFT(InputAdapter[BOFTSpec]):
    """The rotated input and scaled output of one linear map."""

    Spec = BOFTSpec
    family = "orthogonal"
    paper = "Liu et al. 2023, arXiv:2311.06243"
    spared_from_decay = ("s",)
    peft = PeftLayout(
        "BOFT",
        {"boft_R": "A", "boft_s": "s"},
        FIELDS | {"boft_dropout": "dropout"},
        from_shapes=_read_factors,
    )

    def __init__(self, base: LinearMap, spec: BOFTSpec):
        super().__init__(base)
        self.spec = spec
        size = spec.boft_block_size or self.in_features // spec.boft_block_num
        self.blocks = self.in_features // size
        shape = spec.boft_n_butterfly_factor, self.blocks, size, size
        self.A = nn.Parameter(torch.zeros(shape, dtype=self.dtype))
        # It is always stored, because PEFT's modules have it.
        s = torch.ones(self.out_features, 1, dtype=self.dtype)
        self.s = nn.Parameter(s, requires_grad=spec.train_scale)

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: BOFTSpec) -> int:
        out, inputs = sizes(module)
        size = spec.boft_block_size or inputs // spec.boft_block_num
        return spec.boft_n_butterfly_factor * inputs * size + (out if spec.train_scale else 0)

    @classmethod
    def build(cls, sites: list[Site], spec: BOFTSpec) -> dict[str, Adapter]:
        """Makes the adapters.

        Raises:
            IncompatibleError: if the inputs of a site cannot be divided into such blocks and factors.
        """
        check_blocks(sites, spec, "boft_block_size", "boft_block_num")
        factors = spec.boft_n_butterfly_factor
        for site in sites:
            inputs = sizes(site.module)[1]
            size = spec.boft_block_size or inputs // spec.boft_block_num
            blocks = inputs // size
            if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
                most = (blocks & -blocks).bit_length() if size % 2 == 0 else 1
                raise IncompatibleError(
                    f"adapter.boft_n_butterfly_factor: {factors} needs blocks of even size, and "
                    f"2^{factors - 1} must divide their number; {site.path} has {blocks} of {size}, which "
                    f"allow at most {most}. Use fewer factors or other blocks."
                )
        adapters = super().build(sites, spec)
        warn_of_dropouts(adapters, spec.dropout)
        return adapters

    def rotations(self) -> Float[Tensor, "factors blocks b b"]:
        """Returns the R_{i,j}."""
        return cayley((self.A - self.A.mT) / 2)

    def transform_input(self, x: Tensor) -> Tensor:
        R = self.rotations()
        if self.training and self.spec.dropout:
            chosen = int(torch.randint(len(R), ()))
            dropped = with_identities(R[chosen], self.spec.dropout)
            R = torch.cat([R[:chosen], dropped[None], R[chosen + 1 :]])
        return butterfly(x, R)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the adapted map; the rotation is cast to the input's type."""
        y = self.base(self.transform_input(x))
        if not self.spec.train_scale:
            return y
        s = self.s.flatten()
        if self.base.bias is None:
            return (y * s).to(y.dtype)
        return torch.addcmul((1 - s) * self.base.bias, y, s).to(y.dtype)  # the bias in y is not scaled

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """Returns W Rᵀ by the inverse butterfly on the rows of W."""
        return self.s * butterfly(weight, self.rotations(), inverse=True)
