"""Singular value decompositions, and rotations inside their subspaces. Pure functions of tensors."""

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


def with_fixed_signs(
    U: Float[Tensor, "out k"], Vh: Float[Tensor, "k in"]
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
    """Flips pairs of singular vectors so that the largest entry of each v_i is positive.

    A decomposition leaves the common sign of u_i and v_i open, and libraries choose it differently.
    """
    largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))  # (k, 1)
    signs = torch.where(largest < 0, -1.0, 1.0).to(Vh.dtype)
    return U * signs.T, Vh * signs


def contrastive_directions(
    chosen: Float[Tensor, " k"], rejected: Float[Tensor, " k"], difference: Float[Tensor, " k"], count: int
) -> Int[Tensor, " count"]:
    """Chooses directions that matter to either of two kinds of inputs, or that tell them apart.

    A third of `count` each has the highest scores by `chosen` and by `rejected`, the rest by `difference`.
    Where they overlap, the remaining ones of the highest score of any kind fill up.

    Args:
        chosen: score of every direction on the one kind of inputs.
        rejected: score on the other kind.
        difference: score of the difference between the kinds.
        count: how many to choose, at most k.

    Returns:
        Their indices in rising order.
    """
    third = count // 3
    found = torch.zeros_like(chosen, dtype=torch.bool)
    for scores, share in ((chosen, third), (rejected, third), (difference, count - 2 * third)):
        found[scores.topk(share).indices] = True
    best = torch.stack([chosen, rejected, difference]).amax(0).where(~found, -torch.inf)
    found[best.topk(count - int(found.sum())).indices] = True
    return found.nonzero().squeeze(1)


# Small rotations. All return R − I: it is exactly zero for Q = 0, and nothing large cancels for a small Q.


def skew(upper: Float[Tensor, "*blocks entries"], size: int) -> Float[Tensor, "*blocks size size"]:
    """Returns Q with Qᵀ = −Q from its strict upper triangle by rows, of size · (size − 1) / 2 entries."""
    Q = upper.new_zeros(*upper.shape[:-1], size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    Q[..., rows, columns] = upper
    return Q - Q.mT


def cayley_change(Q: Float[Tensor, "*blocks n n"]) -> Float[Tensor, "*blocks n n"]:
    """R − I for R = (I + Q)(I − Q)⁻¹, which is orthogonal where Qᵀ = −Q; R of −Q is R's inverse.

    Turns by 2·atan(q) in the plane of a 2 × 2 block; half a turn is out of reach. Float32 or wider.
    """
    with torch.autocast(Q.device.type, enabled=False):
        Q = widened(Q)
        identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(identity - Q, 2 * Q)


def neumann_change(Q: Float[Tensor, "n n"], terms: int) -> Float[Tensor, "n n"]:
    """R − I for PEFT's polynomial in place of the Cayley map: 2 Q + 2 Q² + … + 2 Q^(k−1) + Q^k.

    The last coefficient is 1, so that R = (I + Q)(I + Q + … + Q^(k−1)), which is far closer to orthogonal for
    odd k. It means little where the norm of Q is 1 or more. Float32 or wider.

    Args:
        Q: the matrix.
        terms: PEFT's count t, at least 1: k = max(t − 1, 3) from 3 on, 2 Q for 2, and nothing for 1.
    """
    with torch.autocast(Q.device.type, enabled=False):
        Q = widened(Q)
        if terms < 3:
            return 2.0 * (terms - 1) * Q
        twice = 2 * torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        total = twice + Q
        for _ in range(max(terms - 1, 3) - 2):
            total = twice + Q @ total
        return Q @ total
