"""PSOFT: a rotation inside the principal subspace of a weight (Wu et al. 2025, arXiv:2505.11235).

    W  = U diag(S) Vᵀ + rest,   R = (I + Q)(I − Q)⁻¹,   Qᵀ = −Q
    W' = W + U diag(S) (diag(b) R diag(a) − I) Vᵀ                            ab_svd_init: psoft_init
    W' = W + U diag(√S) (diag(b) R diag(a) − I) diag(√S) Vᵀ                  ab_svd_init: pissa_init

    U, S, V   (out, rank), (rank,), (in, rank)   frozen, see `singular_basis`
    q         (rank · (rank − 1) / 2,)           learned; strict upper triangle of Q by rows, from zeros
    q         (rank, rank)                       instead, with psoft_orth: false; R itself, from I
    a, b      (rank,)                            learned; ones at the start, so W' = W

While a and b are ones, W' W'ᵀ = W Wᵀ: the rows of W keep their lengths and angles (with psoft_init). The
paper writes U R diag(S) Vᵀ for the transpose of torch's W. PEFT's psoft_alpha cancels out, so it does not
exist here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import PeftLayout
from lora_lab.adapters.families.singular_basis import Basis, BasisSpec, CoreUpdate, checked_rank
from lora_lab.adapters.maps import LinearMap, finite_matrix
from lora_lab.adapters.spec import least_fault, probability_fault
from lora_lab.linalg.orthogonal import cayley_change, neumann_change, skew
from lora_lab.linalg.spectral import principal_part


@dataclass
class PSOFTSpec(BasisSpec):
    """PSOFT's options; the paper uses rank 32 to 128, up to 256 for hard tasks."""

    method: str = "psoft"

    removed_fields = {"rotation_side": "input"}

    rank: int = 32
    """Number of singular directions that are rotated, from 1 to min(in, out) of the smallest map."""

    dropout: float = 0.0
    """Probability of zeroing an input of the adapter's branch while training, in [0, 1)."""

    init: Literal["identity", "random"] = "identity"
    """`random` draws Q (or R − I) from N(0, 0.01), as PEFT's init_weights: false does."""

    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    """Where S is: left of the rotation, or its root on both sides, which does not keep lengths and angles."""

    psoft_orth: bool = True
    """Whether R is a rotation; if not, it is a free matrix."""

    psoft_mag_a: bool = True
    """Learn a, the scales on the input's side of R."""

    psoft_mag_b: bool = True
    """Learn b, the scales on the output's side of R."""

    use_cayley_neumann: bool = False
    """Replace the inverse in R by a polynomial, for Q of norm below 1."""

    num_cayley_neumann_terms: int = 5
    """PEFT's number of terms of the polynomial, at least 1. With 4 or 6, R is much closer to a rotation than
    with PEFT's 5: for a norm of 0.2 it is off by 6e-5 and 1e-7, with 5 by 3e-3."""

    cayley_neumann_eps: float | None = None
    """Largest norm of Q for the polynomial, in (0, 1): Q is shrunk to it; null does not change Q."""

    niter: int | None = None
    """Power iterations of PEFT's randomised SVD of W, 10 there; null decomposes exactly."""

    random_seed: int = 0
    """Seed of the randomised SVD."""

    @property
    def size_field(self) -> str | None:
        return "rank"

    def faults(self) -> list[str]:
        found = super().faults() + least_fault("rank", self.rank, 1)
        found += probability_fault("dropout", self.dropout)
        eps, terms = self.cayley_neumann_eps, self.num_cayley_neumann_terms
        if self.use_cayley_neumann:
            found += least_fault("num_cayley_neumann_terms", terms, 1)
        if eps is not None and not 0 < eps < 1:
            found.append(f"cayley_neumann_eps: must lie in (0, 1), or null; got {eps}")
        if eps is not None and not (self.use_cayley_neumann and self.psoft_orth):
            found.append("cayley_neumann_eps: needs use_cayley_neumann: true and psoft_orth: true")
        if self.niter is not None and self.niter < 0:
            found.append(f"niter: must be at least 0, or null for an exact SVD; got {self.niter}")
        if self.rank == 1 and self.psoft_orth and not (self.psoft_mag_a or self.psoft_mag_b):
            found.append("rank: must be at least 2 without psoft_mag_a and psoft_mag_b, to rotate; got 1")
        return found


SAME_FIELDS = {"r": "rank", "psoft_dropout": "dropout"} | {
    name: name
    for name in (
        "ab_svd_init psoft_orth psoft_mag_a psoft_mag_b use_cayley_neumann num_cayley_neumann_terms "
        "cayley_neumann_eps random_seed"
    ).split()
}
"""PEFT's fields that hold the same as ours."""


def _write_config(spec: PSOFTSpec) -> dict[str, Any]:
    randomised = {} if spec.niter is None else {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": spec.niter}
    return {"psoft_alpha": spec.rank, "init_weights": spec.init == "identity", **randomised}


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    lowrank = config.get("psoft_svd") == "lowrank"
    neumann = config.get("use_cayley_neumann") and config.get("psoft_orth", True)
    return {
        "init": "identity" if config.get("init_weights", True) else "random",
        "niter": config.get("psoft_svd_lowrank_niter", 10) if lowrank else None,
        "cayley_neumann_eps": config.get("cayley_neumann_eps") if neumann else None,
    }


def _basis(base: LinearMap, spec: PSOFTSpec) -> Basis:
    """Returns U, S and Vᵀ with PEFT's signs; its files hold none of the three."""
    checked_rank(base, spec.rank)
    weight = finite_matrix(base, spec.method)
    if spec.niter is None:
        return principal_part(weight, spec.rank)
    device = weight.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(spec.random_seed)
        U, S, V = torch.svd_lowrank(weight, q=spec.rank, niter=spec.niter)
    return U, S, V.T


class PSOFT(CoreUpdate[PSOFTSpec]):
    """The adapter of one linear map."""

    Spec = PSOFTSpec
    family = "orthogonal"
    paper = "Wu et al. 2025, arXiv:2505.11235"
    peft = PeftLayout(
        "PSOFT",
        tensors={"psoft_R.weight": "q", "psoft_R.vector_a": "a", "psoft_R.vector_b": "b"},
        fields=SAME_FIELDS,
        config=_write_config,
        spec=_read_config,
    )

    def __init__(self, base: LinearMap, spec: PSOFTSpec):
        super().__init__(base, spec, _basis(base, spec))
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()
        rank = spec.rank
        q = torch.zeros(rank * (rank - 1) // 2) if spec.psoft_orth else torch.eye(rank)
        if spec.init == "random":
            q = q + 0.1 * torch.randn(q.shape)
        self.q = nn.Parameter(q.to(self.dtype))
        self.a, self.b = (
            nn.Parameter(torch.ones(rank, dtype=self.dtype)) if learned else None
            for learned in (spec.psoft_mag_a, spec.psoft_mag_b)
        )

    def turned(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... rank"]:
        return super().turned(self.dropout(x))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: PSOFTSpec) -> int:
        rank = spec.rank
        rotation = rank * (rank - 1) // 2 if spec.psoft_orth else rank**2
        return rotation + rank * (spec.psoft_mag_a + spec.psoft_mag_b)

    def _rotation_change(self) -> Float[Tensor, "rank rank"]:
        """Returns R − I."""
        spec, rank = self.spec, self.spec.rank
        if not spec.psoft_orth:
            return self.q - torch.eye(rank, dtype=self.q.dtype, device=self.q.device)
        Q = skew(self.q, rank)
        if not spec.use_cayley_neumann:
            return cayley_change(Q)
        if spec.cayley_neumann_eps is not None:
            norm = math.sqrt(2) * torch.linalg.vector_norm(self.q)
            Q = Q * (spec.cayley_neumann_eps / norm.clamp(min=spec.cayley_neumann_eps))
        return neumann_change(Q, spec.num_cayley_neumann_terms)

    def core(self) -> Float[Tensor, "rank rank"]:
        change = self._rotation_change()
        if self.a is not None or self.b is not None:
            one = torch.ones_like(self.S)
            a, b = (one if vector is None else vector for vector in (self.a, self.b))
            change = b.unsqueeze(1) * change * a + torch.diag(a * b - 1)
        if self.spec.ab_svd_init == "psoft_init":
            return self.S.unsqueeze(1) * change
        root = self.S.sqrt()
        return root.unsqueeze(1) * change * root

    def decay_exempt(self) -> list[nn.Parameter]:
        """No change is a = b = 1, and R = I."""
        free = [] if self.spec.psoft_orth else [self.q]
        return free + [vector for vector in (self.a, self.b) if vector is not None]

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the basis, which follows from W: PEFT's file has none."""
        tensors = super().complete_peft_tensors(tensors)
        whole = any("_basis_" in name for name in tensors)
        return tensors if whole else self.stored_basis() | tensors
