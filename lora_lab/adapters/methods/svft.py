"""SVFT: a sparse sum of products of W's own singular vectors (Lingam et al. 2024, arXiv:2405.19597).

    W  = U diag(S) Vᵀ,   ΔW = Σ_t c_t u_i v_jᵀ over the pairs t = (i, j) of a fixed pattern
    y  = base(x) + U (M (Vᵀ x))   M (q, q) holds c; W is not changed

    U, Vh        (out, q), (q, in)   frozen; the first q = rank singular vectors, or all min(in, out)
    rows, cols   (K,)                frozen: i and j of every pair, row by row
    c            (K,)                learned; zeros at the start, so W' = W

    pattern    pairs                                                K
    plain      i = j: S alone changes                               q
    banded     |i − j| ≤ off_diag = d                               q (2 d + 1) − d (d + 1)
    random     drawn from all q², the same ones in every run        k, or as many as banded has
    top_k      those with the largest |u_iᵀ v_j|, for in = out       k, or as many as banded has

Singular vectors are unique only up to signs, so U, Vh and the pattern are stored with c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lora_lab.adapters.base import AdditiveAdapter, PeftLayout
from lora_lab.adapters.maps import LinearMap, finite_matrix, matrix, sizes
from lora_lab.adapters.protocols import RankAllocatable
from lora_lab.adapters.spec import AdapterSpec, least_fault
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.fourier import first_of_permutation
from lora_lab.linalg.rank import singular_values
from lora_lab.linalg.spectral import fixed_signs, principal_part


@dataclass
class SVFTSpec(AdapterSpec):
    """SVFT's options; best in the paper are banded with off_diag 16 on Gemma and 12 on LLaMA-3."""

    method: str = "svft"

    removed_fields = {"pattern_seed": 0, "gate": False, "init": "default"}

    pattern: Literal["plain", "banded", "random", "top_k"] = "banded"
    """Which pairs of singular vectors are learned."""

    off_diag: int = 1
    """Diagonals on either side of the main one, at least 0 and below q; `plain` has none."""

    k: int | None = None
    """Number of pairs for the paper's `random` and `top_k`, at least 1 and at most q²; null means as many as
    banded."""

    rank: int | None = None
    """q, the number of singular directions that may be coupled, from 1 to min(in, out); null means all,
    as in the paper. U and Vh take q (in + out) numbers."""

    @property
    def size_field(self) -> str | None:
        return "rank" if self.pattern == "plain" else "off_diag" if self.pattern == "banded" else "k"

    def faults(self) -> list[str]:
        found = [
            *super().faults(),
            *least_fault("off_diag", self.off_diag, 0),
        ]
        for name in ("k", "rank"):
            value = getattr(self, name)
            found += least_fault(name, 1 if value is None else value, 1)
        if self.k is not None and self.pattern in ("plain", "banded"):
            found.append(f"k: needs pattern: random or top_k; got pattern: {self.pattern}")
        return found


class SVFT(AdditiveAdapter[SVFTSpec], RankAllocatable):
    """The adapter of one linear map. Every pair of the pattern is a component."""

    U: Tensor
    Vh: Tensor
    rows: Tensor
    cols: Tensor
    offsets: Tensor
    components: dict[str, int] = {"c": 0, "rows": 0, "cols": 0, "kept": 0}

    Spec = SVFTSpec
    family = "spectral"
    paper = "Lingam et al. 2024, arXiv:2405.19597"
    peft = PeftLayout(None, {f"svft_{name}": name for name in ("c", "rows", "cols", "U", "Vh")})

    def __init__(self, base: LinearMap, spec: SVFTSpec):
        super().__init__(base)
        self.spec = spec
        least = min(matrix(base).shape)
        q = least if spec.rank is None else spec.rank
        if q > least:
            raise IncompatibleError(f"adapter.rank: must be at most min(in, out) = {least} here; got {q}.")
        U, _, Vh = principal_part(finite_matrix(base, "svft"), q)
        U, Vh = fixed_signs(U, Vh)
        rows, cols = pairs(spec, U, Vh)
        self.c = nn.Parameter(torch.zeros(len(rows), dtype=self.dtype))
        frozen = {"U": U.contiguous(), "Vh": Vh.contiguous(), "rows": rows.int(), "cols": cols.int()}
        for name, tensor in frozen.items():
            self.register_buffer(name, tensor)
        self.register_buffer("kept", torch.ones(len(rows), dtype=torch.bool))
        self.initial_components = len(rows)
        self.tensors_changed()

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: SVFTSpec) -> int:
        q = min(sizes(module)) if spec.rank is None else spec.rank
        return number_of_pairs(spec, q)

    def tensors_changed(self) -> None:
        """Computes where each row of M begins among the pairs."""
        first = torch.arange(len(self.Vh), dtype=torch.int32, device=self.rows.device)
        self.register_buffer(
            "offsets", torch.searchsorted(self.rows, first, out_int32=True), persistent=False
        )

    @property
    def rank(self) -> int:
        """The largest rank that the pairs in use allow."""
        return min(len(self.Vh), int(self.components_in_use().sum()))

    def core(self) -> Float[Tensor, "q q"]:
        """Returns M."""
        q = len(self.Vh)
        return self.c.new_zeros(q, q).index_put((self.rows, self.cols), self.c)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        return self.U @ self.core() @ self.Vh

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if not x.numel():
            return super().delta_output(x)  # torch's sums over bags can fail without tokens
        columns = (self.Vh @ x.reshape(-1, self.in_features).T).to(self.dtype)  # (q, tokens)
        # For each row of M a weighted sum of rows of Vᵀ x, without copying these rows.
        mixed = F.embedding_bag(self.cols, columns, self.offsets, mode="sum", per_sample_weights=self.c)
        return (mixed.T @ self.U.T).reshape(*x.shape[:-1], self.out_features)

    def singular_values(self) -> Float[Tensor, " k"]:
        """Returns the singular values of M, as U and V are orthonormal."""
        return singular_values(self.core())

    @torch.no_grad()
    def keep_components(self, keep: Bool[Tensor, " K"]) -> None:
        self.kept.copy_(keep)
        self.c.masked_fill_(~keep, 0)

    def components_in_use(self) -> Bool[Tensor, " K"]:
        return self.kept | (self.c != 0)

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the pairs in use: those kept, and those that were filled again."""
        held = self.components_in_use()
        pairs = {f"svft_{name}": getattr(self, name)[held] for name in ("c", "rows", "cols")}
        return super().peft_tensors() | pairs

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Makes as many pairs as the file has."""
        c = tensors.get("svft_c")
        if c is not None and len(c) < self.initial_components:
            self.resize_components(len(c))
        return tensors


def width(spec: SVFTSpec) -> int:
    """Returns d, the number of diagonals on either side of the main one."""
    return 0 if spec.pattern == "plain" else spec.off_diag


def number_of_pairs(spec: SVFTSpec, q: int) -> int:
    """Returns K for q singular directions."""
    d = width(spec)
    return q * (2 * d + 1) - d * (d + 1) if spec.k is None else spec.k


def pairs(
    spec: SVFTSpec, U: Float[Tensor, "out q"], Vh: Float[Tensor, "q in"]
) -> tuple[Int[Tensor, " K"], Int[Tensor, " K"]]:
    """Returns the rows and columns of the pattern, row by row.

    Raises:
        IncompatibleError: if the pattern does not fit the map.
    """
    q, d = len(Vh), width(spec)
    if spec.k is None and d >= q:
        raise IncompatibleError(f"adapter.off_diag: must be below q = {q} here; got {d}.")
    count = number_of_pairs(spec, q)
    if count > q * q:
        raise IncompatibleError(f"adapter.k: must be at most q² = {q * q} here; got {count}.")
    if spec.pattern in ("plain", "banded"):
        index = torch.arange(q, device=U.device)
        flat = ((index - index.unsqueeze(1)).abs() <= d).flatten().nonzero().flatten()
    elif spec.pattern == "random":
        flat = first_of_permutation(count, q * q, 0).to(U.device)
    elif U.shape[0] != Vh.shape[1]:
        raise IncompatibleError(
            f"adapter.pattern: top_k needs as many outputs as inputs for u_iᵀ v_j; here {U.shape[0]} and "
            f"{Vh.shape[1]}. Use another pattern, or remove this map from targets."
        )
    else:
        flat = (U.T @ Vh.T).abs().flatten().topk(count).indices
    flat = flat.sort().values
    return flat // q, flat % q
