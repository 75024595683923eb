"""Orthogonal maps from free parameters. Pure functions; computed in float32 or wider, autocast or not."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.linalg.rank import widened


def reflect_chain(x: Float[Tensor, "... n"], u: Float[Tensor, "n k"]) -> Float[Tensor, "... n"]:
    """Applies a chain of Householder reflections to every row of `x`, without ever forming an (n, n) matrix.

    x Rᵀ with R = H_1 H_2 … H_k and H_i = I − 2 û_i û_iᵀ, by the compact WY form (Joffrion and Morley 2006):

        R = I − Û T Ûᵀ,    T⁻¹ = ½ I + strict upper triangle of ÛᵀÛ

    Reversing the columns of `u` gives x R.

    Args:
        x: rows of shape (..., n).
        u: the reflections' vectors, one a column, of any length; a zero vector reflects nothing.

    Returns:
        The reflected rows, in x's type.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(u.dtype, torch.promote_types(x.dtype, torch.float32))
        unit = unit_columns(u.to(dtype))  # (n, k)
        half = torch.eye(u.shape[1], dtype=dtype, device=u.device) / 2
        inverse = (unit.T @ unit).triu(1) + half  # (k, k), T⁻¹
        mixed = torch.linalg.solve_triangular(inverse, unit.T, upper=True)  # (k, n), T Ûᵀ
        rows = x.to(dtype)
        return (rows - (rows @ mixed.T) @ unit.T).to(x.dtype)


def unit_columns(u: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Scales every column to length 1; zero columns stay zero instead of becoming NaN."""
    return u / torch.linalg.vector_norm(u, dim=0).clamp_min(1e-12)


def overlap(u: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """‖I − ÛᵀÛ‖_F: how far the columns are from orthogonal, whatever their lengths; 0 if they are."""
    with torch.autocast(u.device.type, enabled=False):
        unit = unit_columns(widened(u))
        return torch.linalg.matrix_norm(torch.eye(u.shape[1], device=u.device) - unit.T @ unit)


def row_overlaps(matrices: Iterable[Float[Tensor, "_ _"]]) -> Float[Tensor, " count"]:
    """‖R Rᵀ − I‖_F of every matrix R: how far its rows are from orthonormal; 0, with gradient 0, if they are.

    Matrices of one shape are multiplied in one batch, so that the order of the norms is not theirs.

    Args:
        matrices: any number of them, in types of one width.
    """
    shaped = defaultdict(list)
    for rows in matrices:
        shaped[rows.shape].append(widened(rows))
    norms = []
    for group in shaped.values():
        rows = torch.stack(group)  # (matrices, k, n)
        with torch.autocast(rows.device.type, enabled=False):
            identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
            norms.append(torch.linalg.matrix_norm(rows @ rows.mT - identity))
    return torch.cat(norms)


def orthonormal_columns(u: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Gram-Schmidt of the columns, by QR with a positive diagonal: smooth; leaves orthonormal `u` alone.

    Args:
        u: linearly independent columns, k ≤ n.

    Returns:
        Q with QᵀQ = I, whose first i columns span what u's first i columns span; float32 or wider.
    """
    with torch.autocast(u.device.type, enabled=False):
        Q, R = torch.linalg.qr(widened(u))
        return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q.dtype)


def skew(upper: Float[Tensor, "*batch pairs"], size: int) -> Float[Tensor, "*batch {size} {size}"]:
    """Skew-symmetric matrices Q = −Qᵀ from their entries above the diagonal, row by row.

    Args:
        upper: size · (size − 1) / 2 entries each.
        size: number of rows.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    Q = upper.new_zeros(*upper.shape[:-1], size, size)
    Q[..., rows, columns] = upper
    return Q - Q.mT


def cayley(Q: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    """Cayley's rotation R = (I − Q)(I + Q)⁻¹ of skew-symmetric Q; `cayley(-Q)` is its inverse Rᵀ.

    det R = 1, and no eigenvalue is −1. For Q = [[0, q], [−q, 0]] it turns by 2 arctan q. I + Q is always
    invertible.

    Returns:
        R, in float32 or wider.
    """
    with torch.autocast(Q.device.type, enabled=False):
        return _Cayley.apply(widened(Q))


class _Cayley(torch.autograd.Function):
    """dR = −½ (I + R) dQ (I + R), so that the backward pass needs R alone and solves nothing."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor) -> Tensor:
        identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        R = torch.linalg.solve(identity + Q, identity - Q, left=False)
        ctx.save_for_backward(R)
        return R

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (R,) = ctx.saved_tensors
        sides = (R + torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).mT
        return -0.5 * (sides @ gradient @ sides)
