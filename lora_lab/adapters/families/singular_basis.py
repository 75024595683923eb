"""What adapters in the singular basis of a weight W = U diag(S) Vᵀ share: the basis, and how it is stored.

    W' = W + L R        L (out, k) and R (k, in) made of singular vectors and of what is learned
    W' = W + U C Vᵀ     C (k, k) made of what is learned: `CoreUpdate`

    U    (out, k)   frozen; k left singular vectors of W
    S    (k,)       frozen; their values
    Vh   (k, in)    frozen; the right singular vectors, rows of Vᵀ

A pair of singular vectors is unique only up to a common sign, which differs between machines. Trained with
one basis, the same numbers mean another edit with another basis, so the basis is part of every checkpoint and
is not computed again when training resumes. The base is not changed, which makes the start exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import TypeVar

from lora_lab.adapters.base import AdditiveAdapter, LinearAdapter
from lora_lab.adapters.maps import LinearMap, finite_matrix, matrix, mix, project
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import CheckpointError, IncompatibleError
from lora_lab.linalg.rank import product_singular_values, singular_values, widened
from lora_lab.linalg.spectral import singular_triplets

Basis = tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]
"""U, S and Vᵀ."""

SAME = 1e-3
"""Largest difference between stored and recomputed numbers of one basis, as a share of the largest."""


@dataclass
class BasisSpec(AdapterSpec):
    """Adds the option to store singular vectors."""

    save_basis: bool = True
    """Whether adapter folders hold U and Vh, k · (in + out) numbers a map. PEFT's files of PSOFT do not: then
    loading decomposes W again, takes the signs from 2 · k numbers of the folder, and refuses a base with
    other singular vectors."""


def checked_rank(base: nn.Module, rank: int) -> int:
    """Returns how many singular values a map has.

    Raises:
        IncompatibleError: if the rank is above that.
    """
    most = min(matrix(base).shape)
    if rank > most:
        raise IncompatibleError(
            f"adapter.rank: a map from {base.in_features} to {base.out_features} has {most} singular values; "
            f"got rank {rank}. Lower the rank, or remove the map from targets."
        )
    return most


def singular_basis(base: nn.Module, spec: AdapterSpec, index: Int[Tensor, " k"]) -> Basis:
    """Returns the singular triplets of W of these indices, in float32 or wider and with fixed signs.

    Raises:
        IncompatibleError: if W is not finite.
    """
    return singular_triplets(finite_matrix(base, spec.method), index)


BasisT = TypeVar("BasisT", bound=BasisSpec, default=Any)


class BasisAdapter(LinearAdapter[BasisT]):
    """Edits a linear map in a part of its singular basis.

    Attributes:
        U: (out, k), frozen, with orthonormal columns.
        S: (k,), frozen.
        Vh: (k, in), frozen, with orthonormal rows.
    """

    family = "spectral"

    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(self, base: LinearMap, spec: BasisT, basis: Basis):
        super().__init__(base)
        self.spec = spec
        for name, tensor in zip(("U", "S", "Vh"), basis, strict=True):
            self.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))

    def stored_basis(self) -> dict[str, Tensor]:
        """Returns the basis as files hold it: whole, or S and products of U and Vh with random vectors."""
        found = {"U": self.U, "S": self.S, "Vh": self.Vh}
        if not self.spec.save_basis:
            generator = torch.Generator().manual_seed(0)
            left, right = (torch.randn(n, generator=generator).to(self.S) for n in matrix(self.base).shape)
            found = {"S": self.S, "probe": torch.stack([left @ self.U, self.Vh @ right])}  # (2, k)
        return {f"{self.spec.method}_basis_{name}": tensor for name, tensor in found.items()}

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the learned tensors, and the basis as it is stored."""
        return super().peft_tensors() | self.stored_basis()

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a file's tensors in today's form: earlier folders hold two rows of the probe apart."""
        rows = [tensors.pop(f"{self.spec.method}_probe_{name}", None) for name in ("U", "Vh")]
        probe = [row for row in rows if row is not None]
        return tensors | ({f"{self.spec.method}_basis_probe": torch.stack(probe)} if len(probe) == 2 else {})

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads a file's tensors.

        Raises:
            CheckpointError: if the file has no basis, and was made with a different one.
        """
        basis = self.stored_basis()
        given = {name: tensors[name].to(self.S) for name in basis}
        if self.spec.save_basis:
            for name, own in basis.items():
                own.copy_(given[name])
        else:
            self._take_signs(given[f"{self.spec.method}_basis_probe"])
            for name, own in self.stored_basis().items():
                # Relative to the largest: the smallest values and their vectors have the fewest digits.
                if not (given[name] - own).abs().max() <= SAME * own.abs().max():
                    raise CheckpointError(
                        f"{self.spec.method}: the folder holds no singular vectors (save_basis: false), and "
                        f"the singular basis of this base differs from the one trained in ({name}). Load the "
                        "base that it was trained on, in the same dtype; where that works, save "
                        "the adapter again with save_basis: true."
                    )
        super().load_peft_tensors({name: t for name, t in tensors.items() if name not in basis})

    def _take_signs(self, probe: Float[Tensor, "2 k"]) -> None:
        """Gives each pair of singular vectors the sign that reproduces these numbers of the probe."""
        own = self.stored_basis()[f"{self.spec.method}_basis_probe"]
        signs = torch.where((own * probe).sum(0) < 0, -1.0, 1.0).to(self.S)
        self.U.mul_(signs)
        self.Vh.mul_(signs.unsqueeze(1))


class BasisUpdate(BasisAdapter[BasisT], AdditiveAdapter[BasisT]):
    """W' = W + L R, with thin factors made from the basis."""

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Returns L and R."""
        raise NotImplementedError

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """Returns L R."""
        left, right = self.factors()
        return widened(left) @ widened(right)

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Returns W + L R in one pass over W."""
        return torch.addmm(weight, *(widened(factor) for factor in self.factors()))

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Returns x Rᵀ Lᵀ."""
        left, right = self.factors()
        return mix(self.base, project(self.base, x, right), left)

    def singular_values(self) -> Float[Tensor, " k"]:
        """Returns the singular values of L R."""
        return product_singular_values(*self.factors())


class CoreUpdate(BasisUpdate[BasisT]):
    """W' = W + U C Vᵀ, so y = base(x) + ((x V) Cᵀ) Uᵀ. A method defines `core`, which is C.

    k may be nearly the whole rank of W: the frozen vectors are applied one after the other, and nothing of
    W's size is computed in a step. The backward pass keeps only x V, (..., k).
    """

    def core(self) -> Float[Tensor, "k k"]:
        """Returns C, in float32 or wider, also under autocast."""
        raise NotImplementedError

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Returns U C and Vᵀ."""
        return self.U @ self.core(), self.Vh

    def turned(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... k"]:
        """Returns x V Cᵀ."""
        return mix(self.base, project(self.base, x, self.Vh), self.core())

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Returns x V Cᵀ Uᵀ."""
        return mix(self.base, self.turned(x), self.U)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Applies base and update side by side."""
        y, turned = self.base(x), self.turned(self.cast(x))
        if y.dtype != turned.dtype:
            return (y + mix(self.base, turned, self.U)).to(y.dtype)
        # The last product is added to the base's output in place, which saves a pass over (..., out).
        rows = turned.reshape(-1, turned.shape[-1])
        return torch.addmm(y.reshape(-1, y.shape[-1]), rows, self.U.T).reshape(y.shape)

    def singular_values(self) -> Float[Tensor, " k"]:
        """Returns the singular values of C, as the vectors on both sides are orthonormal."""
        return singular_values(self.core())
