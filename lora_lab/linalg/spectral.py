"""Singular value decompositions, and edits of singular values. Pure functions of tensors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_lab.linalg.rank import widened


def principal_part(
    weight: Float[Tensor, "out in"], rank: int, niter: int | None = None
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"], Float[Tensor, "rank in"]]:
    """Returns U_r, S_r and V_rᵀ: exactly, or by a randomised range finder (Halko et al. 2011).

    Args:
        weight: the matrix, in float32 or wider.
        rank: how many of the largest singular values, at most min(out, in).
        niter: power iterations of the range finder, whose start comes from torch's global CPU generator,
            for weights on any device; None decomposes exactly.
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


def singular_triplets(
    weight: Float[Tensor, "out in"], index: Int[Tensor, " k"]
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
    """Returns U_k, S_k and V_kᵀ, exactly, in float32 or wider, also under autocast.

    Their signs are those of `fixed_signs`.

    Args:
        weight: the matrix.
        index: which triplets, counted from 0 in descending order of their values, below min(out, in).
    """
    with torch.autocast(weight.device.type, enabled=False):
        U, S, Vh = torch.linalg.svd(widened(weight), full_matrices=False)
        index = index.to(weight.device)
        U, S, Vh = U[:, index], S[index], Vh[index]  # copies, so that what is left out can be freed
        U, Vh = fixed_signs(U, Vh)
        return U, S, Vh


def rectified(change: Float[Tensor, "*shape"], start: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns max(start + change, 0) − start for start ≥ 0, without rounding: exactly 0 if change is 0."""
    return torch.where(change > -start, change, -start)


def paired_svd(
    A: Float[Tensor, "*heads a d"], B: Float[Tensor, "*heads b d"]
) -> tuple[Float[Tensor, "*heads a d"], Float[Tensor, "*heads d d"], Tensor, Float[Tensor, "*heads d d"]]:
    """Decomposes A Bᵀ = U diag(S) Vᵀ by two thin QRs and an SVD of (d, d): the product is never formed.

    Args:
        A: d columns, a ≥ d.
        B: d columns, b ≥ d.

    Returns:
        U, M, V, N in float64, with A = U M, B = V N, UᵀU = VᵀV = I and M Nᵀ = diag(S), S falling; with the
        signs of `fixed_signs`, which do not depend on the library.
    """
    # With triangular factors of condition 1e5, float32 has too few digits.
    (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(A.double()), torch.linalg.qr(B.double())
    u, _, vh = torch.linalg.svd(R_A @ R_B.mT)
    Vh = vh @ Q_B.mT
    signs = _signs(Vh)
    u, vh = u * signs.mT, vh * signs
    return Q_A @ u, u.mT @ R_A, (Vh * signs).mT, vh @ R_B


def fixed_signs(
    U: Float[Tensor, "*batch out k"], Vh: Float[Tensor, "*batch k in"]
) -> tuple[Float[Tensor, "*batch out k"], Float[Tensor, "*batch k in"]]:
    """Returns singular vectors with signs such that the largest number of every v_i is positive.

    Pairs u_i, v_i are unique up to a common sign; sums of u_i v_jᵀ with i ≠ j depend on it.
    """
    signs = _signs(Vh)
    return U * signs.mT, Vh * signs


def _signs(Vh: Float[Tensor, "*batch k in"]) -> Float[Tensor, "*batch k 1"]:
    """Returns the sign of the largest number of every row."""
    largest = Vh.gather(-1, Vh.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(Vh)


def contrastive_directions(
    chosen: Float[Tensor, " k"], rejected: Float[Tensor, " k"], difference: Float[Tensor, " k"], count: int
) -> Int[Tensor, " count"]:
    """Chooses directions that matter to either of two kinds of inputs, or to the difference between them.

    One third of `count` has the highest scores in `chosen`, one third in `rejected`, the rest in
    `difference`. If they overlap, others with the highest score of any kind are added.

    Args:
        chosen: score of every direction on the one kind of inputs.
        rejected: score on the other kind.
        difference: score of the difference between the kinds.
        count: how many to choose, at most k.

    Returns:
        Their indices in ascending order.
    """
    third = count // 3
    found = torch.zeros_like(chosen, dtype=torch.bool)
    for scores, share in ((chosen, third), (rejected, third), (difference, count - 2 * third)):
        found[scores.topk(share).indices] = True
    best = torch.stack([chosen, rejected, difference]).amax(0).where(~found, -torch.inf)
    found[best.topk(count - int(found.sum())).indices] = True
    return found.nonzero().squeeze(1)
