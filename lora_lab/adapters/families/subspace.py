"""What methods share that edit a weight inside some of its singular directions.

    W  = U diag(S) Vᵀ + rest
    W' = W + U C Vᵀ             C (rank, rank), made of the learned tensors, and zero where nothing is learned
    y  = base(x) + ((x V) Cᵀ) Uᵀ

    U   (out, rank)   frozen
    S   (rank,)       frozen
    V   (in, rank)    frozen

The base stays as it is, which makes the start exact. U, S and V are a part of the adapter's state: singular
vectors are unique up to sign only, and machines choose it differently; on other vectors C means another edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import AdditiveAdapter
from lora_lab.adapters.maps import finite_matrix, is_convolution, matrix, mix, project
from lora_lab.adapters.spec import AdapterSpec, least_fault
from lora_lab.errors import IncompatibleError

SAME = 1e-3
"""How far stored and recomputed numbers of a basis may be apart to count as the same, relatively."""


@dataclass
class SubspaceSpec(AdapterSpec):
    """Adds what all methods in a subspace share."""

    rank: int = 32
    """Number of singular directions that are edited, from 1 to min(in, out) of the smallest map."""

    save_basis: bool = True
    """Whether a folder holds U and V, rank · (in + out) numbers a map. Without, loading decomposes W again,
    takes the signs from 3 · rank numbers of the folder, and refuses directions that were not trained in."""

    def faults(self) -> list[str]:
        """See `AdapterSpec.faults`."""
        return super().faults() + least_fault("rank", self.rank, 1)


def decomposable(base: Any, spec: SubspaceSpec) -> Float[Tensor, "out in"]:
    """Returns W in float32 or wider.

    Raises:
        IncompatibleError: if the rank is above min(in, out), or W is not finite.
    """
    most = min(matrix(base).shape)
    if spec.rank > most:
        raise IncompatibleError(
            f"adapter.rank: {spec.method} edits singular directions of W, of which there are min(in, out) = "
            f"{most} here; got {spec.rank}. Lower the rank, or take the module out of targets."
        )
    return finite_matrix(base, spec.method)


class SubspaceAdapter(AdditiveAdapter):
    """ΔW = U C Vᵀ. A method defines `core`, which is C.

    Attributes:
        U: (out, rank), frozen, with orthonormal columns.
        S: (rank,), frozen.
        Vh: (rank, in), frozen, with orthonormal rows.
    """

    family = "orthogonal"
    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(self, base: Any, spec: Any, basis: tuple[Tensor, Tensor, Tensor]):
        super().__init__(base)
        self.spec = spec
        for name, tensor in zip(("U", "S", "Vh"), basis, strict=True):
            self.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))
        dropout = getattr(spec, "dropout", 0.0)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def core(self) -> Float[Tensor, "rank rank"]:
        """Returns C, in float32 or wider, autocast or not."""
        raise NotImplementedError

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """See `AdditiveAdapter.delta_weight`."""
        return self.U @ self.core() @ self.Vh

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """See `LinearAdapter.adapted_weight`: one pass over W."""
        return torch.addmm(weight, self.U @ self.core(), self.Vh)

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """See `AdditiveAdapter.delta_output`. The backward pass keeps x V alone, (..., rank)."""
        return mix(self.base, self._turned(x), self.U)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """See `AdditiveAdapter.forward`: the last product adds to the base's output itself."""
        y, turned = self.base(x), self._turned(self.cast(x))
        if is_convolution(self.base) or y.dtype != turned.dtype:
            return (y + mix(self.base, turned, self.U)).to(y.dtype)
        rows = turned.reshape(-1, turned.shape[-1])
        return torch.addmm(y.reshape(-1, y.shape[-1]), rows, self.U.T).reshape(y.shape)

    def _turned(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... rank"]:
        """Returns x V Cᵀ."""
        return mix(self.base, project(self.base, self.dropout(x), self.Vh), self.core())

    def singular_values(self) -> Float[Tensor, " rank"]:
        """See `LinearAdapter.singular_values`: those of C, as U and V are orthonormal."""
        return torch.linalg.svdvals(self.core())

    # What is stored ---------------------------------------------------------------------------------------

    def _probes(self) -> dict[str, Tensor]:
        """Returns one number per singular vector, its product with a fixed random one."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(len(self.U), generator=generator).to(self.S)
        columns = torch.randn(self.Vh.shape[1], generator=generator).to(self.S)
        return {"probe_U": rows @ self.U, "probe_Vh": self.Vh @ columns, "basis_S": self.S}

    def _stored_basis(self) -> dict[str, Tensor]:
        kept = {"basis_U": self.U, "basis_S": self.S, "basis_Vh": self.Vh}
        found = kept if self.spec.save_basis else self._probes()
        return {f"{self.spec.method}_{name}": tensor for name, tensor in found.items()}

    def peft_tensors(self) -> dict[str, Tensor]:
        """See `Adapter.peft_tensors`: with the basis, or with the probes that stand for it."""
        return super().peft_tensors() | self._stored_basis()

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Adapter.load_peft_tensors`.

        Raises:
            IncompatibleError: if the folder has no basis, and its probes are not those of W's directions.
        """
        own = self._stored_basis()
        given = {name: tensors[name].to(self.S) for name in own}
        if self.spec.save_basis:
            for name, tensor in own.items():
                tensor.copy_(given[name])
        else:
            agreement = torch.stack([own[name] * given[name] for name in own if "_probe_" in name]).sum(0)
            signs = torch.where(agreement < 0, -1.0, 1.0).to(self.S)
            self.U.mul_(signs)
            self.Vh.mul_(signs.unsqueeze(1))
            turned = self._stored_basis()
            if not all(torch.allclose(turned[name], given[name], rtol=SAME, atol=SAME) for name in own):
                raise IncompatibleError(
                    f"{self.spec.method}: the folder holds no singular vectors (save_basis: false), and this "
                    "base's are not those trained in. Load the base that it was trained on, in the same type "
                    "of numbers; where that works, save the adapter again with save_basis: true."
                )
        super().load_peft_tensors({name: x for name, x in tensors.items() if name not in own})
