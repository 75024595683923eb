"""Singular value decompositions. Pure functions of tensors."""

import torch
from jaxtyping import Float
from torch import Tensor


def principal_part(
    weight: Float[Tensor, "out in"], rank: int, niter: int | None = None
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"], Float[Tensor, "rank in"]]:
    """Returns U_r, S_r and V_rᵀ: exactly, or by a randomised range finder (Halko et al. 2011).

    Args:
        weight: the matrix, in float32 or wider.
        rank: how many of the greatest singular values, at most min(out, in).
        niter: power iterations of the range finder, whose start comes from torch's global CPU generator,
            whatever device the weight is on; None decomposes exactly.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    directions = torch.randn(weight.shape[1], rank, dtype=weight.dtype).to(weight.device)  # (in, rank)
    Q = torch.linalg.qr(weight @ directions).Q  # (out, rank)
    for _ in range(niter):
        Q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ weight, full_matrices=False)
    return Q @ U, S, Vh


def paired_svd(
    A: Float[Tensor, "*heads a d"], B: Float[Tensor, "*heads b d"]
) -> tuple[Float[Tensor, "*heads a d"], Float[Tensor, "*heads d d"], Tensor, Float[Tensor, "*heads d d"]]:
    """Decomposes A Bᵀ = U diag(S) Vᵀ by two thin QRs and an SVD of (d, d): the product is never formed.

    Args:
        A: d columns, a ≥ d.
        B: d columns, b ≥ d.

    Returns:
        U, M, V, N in float64, with A = U M, B = V N, UᵀU = VᵀV = I and M Nᵀ = diag(S), S falling. The
        greatest entry of each column of V is positive, so that no sign is left to the library.
    """
    # Triangular factors of condition 1e5 leave float32 too few digits.
    (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(A.double()), torch.linalg.qr(B.double())
    u, _, vh = torch.linalg.svd(R_A @ R_B.mT)
    U, V = Q_A @ u, Q_B @ vh.mT
    greatest = V.gather(-2, V.abs().argmax(-2, keepdim=True))  # (*heads, 1, d)
    sign = torch.where(greatest < 0, -1.0, 1.0).to(V)
    return U * sign, (u * sign).mT @ R_A, V * sign, (vh.mT * sign).mT @ R_B


def positive_qr(A: Float[Tensor, "*heads a d"]) -> tuple[Tensor, Tensor]:
    """Returns Q and R in float64 with A = Q R, QᵀQ = I and R upper triangular, its diagonal not negative.

    Args:
        A: d columns, a ≥ d.
    """
    Q, R = torch.linalg.qr(A.double())
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(R).unsqueeze(-2)  # (*heads, 1, d)
    return Q * sign, sign.mT * R
