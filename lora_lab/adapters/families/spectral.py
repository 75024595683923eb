"""What adapters in the singular basis of a weight W = U diag(S) Vᵀ share: the basis, and how it is stored.

    W' = W + L R       L (out, k) and R (k, in) made of singular vectors and of what is learned

    U    (out, k)   frozen; left singular vectors of W
    S    (k,)       frozen; their values
    Vh   (k, in)    frozen; right singular vectors

Singular vectors are unique up to signs alone, so that what was learned with one basis means nothing with
another: the basis is part of every checkpoint, and is not computed again when training resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_lab.adapters.base import AdditiveAdapter, LinearAdapter
from lora_lab.adapters.maps import finite_matrix, matrix, mix, project
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import CheckpointError, IncompatibleError
from lora_lab.linalg.rank import product_singular_values, widened
from lora_lab.linalg.spectral import singular_triplets


@dataclass
class SpectralSpec(AdapterSpec):
    """Adds what becomes of the singular vectors."""

    save_basis: bool = True
    """Store the singular vectors in adapter folders. Without them files are small, and a base whose own
    vectors differ is refused."""


def check_rank(base: Any, rank: int) -> int:
    """Returns how many singular values a map has.

    Raises:
        IncompatibleError: if the rank is above that.
    """
    most = min(matrix(base).shape)
    if rank > most:
        raise IncompatibleError(
            f"adapter.rank: a map from {base.in_features} to {base.out_features} has {most} singular values; "
            f"got rank {rank}. Lower the rank, or take the map out of targets."
        )
    return most


class SpectralAdapter(LinearAdapter):
    """Edits a linear map in a part of its singular basis."""

    family = "spectral"

    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(self, base: Any, spec: Any, index: Int[Tensor, " k"]):
        super().__init__(base)
        self.spec = spec
        weight = finite_matrix(base, spec.method)
        for name, tensor in zip(("U", "S", "Vh"), singular_triplets(weight, index), strict=True):
            self.register_buffer(name, tensor)

    def stored_basis(self) -> dict[str, Tensor]:
        """Returns the basis as files hold it: whole, or its values and what it makes of one random vector."""
        found = {"U": self.U, "S": self.S, "Vh": self.Vh}
        if not self.spec.save_basis:
            generator = torch.Generator().manual_seed(0)
            left, right = (torch.randn(n, generator=generator).to(self.S) for n in matrix(self.base).shape)
            found = {"S": self.S, "probe": torch.stack([left @ self.U, self.Vh @ right])}  # (2, k)
        return {f"{self.spec.method}_basis_{name}": tensor for name, tensor in found.items()}

    def peft_tensors(self) -> dict[str, Tensor]:
        """See `Adapter.peft_tensors`: the learned tensors, and the basis."""
        return super().peft_tensors() | self.stored_basis()

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Adapter.load_peft_tensors`.

        Raises:
            CheckpointError: if the file has no basis, and was made with another one than this base's.
        """
        basis = self.stored_basis()
        for name, own in basis.items():
            given = tensors[name].to(own)
            if self.spec.save_basis:
                own.copy_(given)
            elif (given - own).abs().max() > 1e-3 * own.abs().max():
                raise CheckpointError(
                    f"{name}: the singular basis of this base differs from the one the adapter was made "
                    "with, which its folder does not hold. Load the base it was made with, or save the "
                    "adapter again with save_basis: true."
                )
        super().load_peft_tensors({name: t for name, t in tensors.items() if name not in basis})


class SpectralUpdate(SpectralAdapter, AdditiveAdapter):
    """W' = W + L R, with thin factors made from the basis."""

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Returns L and R."""
        raise NotImplementedError

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """See `AdditiveAdapter.delta_weight`."""
        left, right = self.factors()
        return widened(left) @ widened(right)

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `LinearAdapter.adapted_weight`: one pass over W."""
        return torch.addmm(weight, *(widened(factor) for factor in self.factors()))

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """See `AdditiveAdapter.delta_output`."""
        left, right = self.factors()
        return mix(self.base, project(self.base, x, right), left)

    def singular_values(self) -> Float[Tensor, " k"]:
        """See `LinearAdapter.singular_values`."""
        return product_singular_values(*self.factors())
