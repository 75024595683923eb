"""How the factors A (rank, in) and B (out, rank) of a low-rank update start.

    init               A               B              start of s B A
    default            U(±1/√in)       0              0
    gaussian           N(0, 1/rank²)   0              0
    scaled_gaussian    N(0, 1/rank)    0              0
    orthogonal         random          random         0 up to rounding, in two halves of one basis
    olora              R_r             Q_r            the leading part of W = Q R (arXiv:2406.01775)
    pissa              √(S_r/s) V_rᵀ   U_r √(S_r/s)   the leading part of W = U S Vᵀ (arXiv:2404.02948)
    loftq              √(S_r/s) V_rᵀ   U_r √(S_r/s)   of W − dq(Q) = U S Vᵀ, on a quantised base Q
    random             U(±1/√in)       U(±1/√rank)    anything, for comparison

The starts of `olora` and `pissa` are subtracted again, see `low_rank`. LoftQ's is not: dq(Q) + s B A is the
best approximation of W by the codes Q and an update of this rank. This is the first step of the paper (Li et
al. 2023, arXiv:2310.08659); its further steps change Q, but here the base is not changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.families.low_rank import ScaledSpec
from lora_lab.adapters.maps import finite_matrix, matrix
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.kaiming import kaiming_uniform
from lora_lab.linalg.spectral import principal_part

Factors = tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]
"""A and B."""

FROM_ZERO = ("default", "gaussian", "scaled_gaussian")
"""The starts with B = 0."""

SUBTRACTED = ("olora", "pissa")
"""The starts that are not zero and are subtracted again, so that W' = W."""


@dataclass
class StartedSpec(ScaledSpec):
    """Adds the choice of a start."""

    init: Literal[
        "default", "gaussian", "scaled_gaussian", "orthogonal", "olora", "pissa", "loftq", "random"
    ] = "default"
    """Start of A: `default` U(±1/√in), `gaussian` N(0, 1/rank²), `scaled_gaussian` N(0, 1/rank), B = 0 in
    each; `orthogonal` (even rank) starts both with B A = 0 up to rounding; `olora` (QR of W) and `pissa` (SVD
    of W) start both and subtract the start; `loftq` starts with the error of quantisation; `random` is
    not the identity."""

    niter: int | None = None
    """Power iterations of a randomised SVD for init: pissa, 4 to 16 in its paper; null decomposes exactly."""

    def faults(self) -> list[str]:
        found = super().faults()
        if self.init == "orthogonal":
            odd = {name: rank for name, rank in self.ranks().items() if rank % 2}
            found += [f"{name}: must be even for init: orthogonal; got {rank}" for name, rank in odd.items()]
        if self.init == "pissa":
            for name, alpha in self.alphas().items():
                if alpha < 0:
                    found.append(
                        f"{name}: must be above 0 for pissa, whose start takes its root; got {alpha}"
                    )
        elif self.niter is not None:
            found.append(f"niter: needs init: pissa; got init: {self.init}")
        if self.niter is not None and self.niter < 0:
            found.append(f"niter: must be at least 0, or null for an exact SVD; got {self.niter}")
        return found

    @property
    def reads_full_weights(self) -> bool:
        return self.init == "loftq"

    def for_stored(self) -> Self:
        """The W from which LoftQ's factors were made may be gone."""
        return replace(self, init="default") if self.init == "loftq" else self


def start(base: nn.Module, spec: StartedSpec) -> Factors:
    """Returns A and B as the spec says.

    Raises:
        IncompatibleError: if `olora` or `pissa` is asked for a rank above min(in, out), or W is not finite.
    """
    weight = matrix(base)
    (rows, columns), rank = weight.shape, spec.rank
    dtype = torch.promote_types(weight.dtype, torch.float32)
    zeros = torch.zeros(rows, rank, dtype=dtype)
    match spec.init:
        case "default":
            return kaiming_uniform(rank, columns, dtype=dtype), zeros
        case "random":
            return kaiming_uniform(rank, columns, dtype=dtype), kaiming_uniform(rows, rank, dtype=dtype)
        case "gaussian":
            return torch.randn(rank, columns, dtype=dtype) / rank, zeros
        case "scaled_gaussian":
            return torch.randn(rank, columns, dtype=dtype) / math.sqrt(rank), zeros
        case "orthogonal":
            basis = torch.linalg.qr(torch.randn(rank, rank, dtype=dtype)).Q
            A = (torch.randn(columns, rank // 2, dtype=dtype) @ basis[0::2]).T / 10
            return A, torch.randn(rank // 2, rows, dtype=dtype).T @ basis[1::2] / 10
        case "olora":
            Q, R = torch.linalg.qr(_decomposable(base, rank, "init: olora"))
            return R[:rank].contiguous(), Q[:, :rank].contiguous()
        case "pissa":
            return _principal(_decomposable(base, rank, "pissa"), spec)
        case "loftq":
            full = getattr(base, "full_weight", None)
            if full is None:
                raise IncompatibleError(
                    "adapter.init: loftq corrects the error of quantisation, and this base does not keep W "
                    "in addition to its codes. Train with model.quantization: nf4, or build the base with "
                    "build_model(config, keep_weights=True); without codes, choose another init."
                )
            codes = _decomposable(base, rank, "init: loftq")
            return _principal(full.to(codes) - codes, spec)


def _principal(weight: Tensor, spec: StartedSpec) -> Factors:
    """Returns A and B with s B A the best approximation of a matrix."""
    U, S, Vh = principal_part(weight, spec.rank, spec.niter)
    root = (S / abs(spec.scale)).sqrt()
    return root.unsqueeze(1) * Vh, math.copysign(1, spec.scale) * U * root


def _decomposable(base: nn.Module, rank: int, what: str) -> Tensor:
    """Returns W in float32 or wider, if its decomposition has the rank."""
    most = min(matrix(base).shape)
    if rank > most:
        raise IncompatibleError(
            f"adapter.rank: {what} takes its start from W and allows at most min(in, out) = {most} here; "
            f"got {rank}. Lower the rank, or use rank_pattern for this module."
        )
    return finite_matrix(base, what)
