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


def fixed_signs(
    U: Float[Tensor, "out k"], Vh: Float[Tensor, "k in"]
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
    """Returns singular vectors in the signs in which the largest number of every v_i is positive.

    Pairs u_i, v_i are given up to a common sign; sums of u_i v_jᵀ with i ≠ j depend on it.
    """
    largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))  # (k, 1)
    signs = torch.where(largest < 0, -1.0, 1.0).to(Vh)
    return U * signs.T, Vh * signs
