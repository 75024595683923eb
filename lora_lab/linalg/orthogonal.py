"""Orthogonal maps from free parameters. Pure functions; computed in float32 or wider, also under autocast."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lab.linalg.autograd import Context, TensorFunction
from lora_lab.linalg.rank import widened
from lora_lab.linalg.rebuild import Build, in_pieces, rows_of_pieces, source


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
    """‖I − ÛᵀÛ‖_F: how far the columns are from orthogonal, for any lengths; 0 if they are."""
    with torch.autocast(u.device.type, enabled=False):
        unit = unit_columns(widened(u))
        return torch.linalg.matrix_norm(torch.eye(u.shape[1], device=u.device) - unit.T @ unit)


def row_overlaps(matrices: Iterable[Float[Tensor, "_ _"]]) -> Float[Tensor, " count"]:
    """‖R Rᵀ − I‖_F of every matrix R: how far its rows are from orthonormal; 0, with gradient 0, if they are.

    Matrices of one shape are multiplied in one batch, so the norms may be in another order.

    Args:
        matrices: any number of them, with types of the same width.
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
    """Gram-Schmidt of the columns: smooth; leaves orthonormal `u` alone.

    Args:
        u: linearly independent columns, k ≤ n.

    Returns:
        Q with QᵀQ = I, whose first i columns span what u's first i columns span; float32 or wider.
    """
    with torch.autocast(u.device.type, enabled=False):
        return positive_qr(widened(u))[0]


def positive_qr(
    A: Float[Tensor, "*batch n k"],
) -> tuple[Float[Tensor, "*batch n k"], Float[Tensor, "*batch k k"]]:
    """Returns Q and R with A = Q R, QᵀQ = I and R upper triangular, its diagonal not negative.

    With that sign the decomposition is unique if the columns are linearly independent.

    Args:
        A: k columns, k ≤ n.
    """
    Q, R = torch.linalg.qr(A)
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(R).unsqueeze(-2)  # (*batch, 1, k)
    return Q * signs, signs.mT * R


def skew(upper: Float[Tensor, "*batch pairs"], size: int) -> Float[Tensor, "*batch {size} {size}"]:
    """Skew-symmetric matrices Q = −Qᵀ from their entries above the diagonal, row by row.

    Args:
        upper: size · (size − 1) / 2 entries each.
        size: number of rows.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    flat = upper.new_zeros(*upper.shape[:-1], size * size)
    Q = flat.index_copy_(-1, rows * size + columns, upper).unflatten(-1, (size, size))
    return Q - Q.mT


def cayley(Q: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    """Cayley's rotation R = (I − Q)(I + Q)⁻¹ of skew-symmetric Q; `cayley(-Q)` is its inverse Rᵀ.

    det R = 1, and no eigenvalue is −1. For Q = [[0, q], [−q, 0]] it turns by 2 arctan q. I + Q is always
    invertible.

    Returns:
        R, in float32 or wider.
    """
    return _identity(change := cayley_change(-Q)) + change


def cayley_neumann(Q: Float[Tensor, "*batch b b"], terms: int) -> Float[Tensor, "*batch b b"]:
    """PEFT's polynomial for `cayley(-Q)`, the inverse of `cayley(Q)`: (I + Q)(I + Q + … + Q^{k−1}).

    k = max(terms − 1, 3), so that 3 and 4 terms are the same; 2 terms are I + 2 Q, and 1 is I. It needs no
    linear solve, but is orthogonal only for small Q: R Rᵀ − I has the norm ‖Q‖^{2k} for odd k and 2 ‖Q‖^k for
    even k, which makes 4 and 6 terms better than 5.

    Returns:
        R, in float32 or wider.
    """
    with torch.autocast(Q.device.type, enabled=False):
        Q = widened(Q)
        if terms <= 2:
            return torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + 2 * (terms - 1) * Q
        R = _CayleyNeumann.apply(Q.reshape(-1, *Q.shape[-2:]), max(terms - 1, 3))
        return R.reshape(Q.shape)


class _Terms(Context):
    k: int


class _CayleyNeumann(TensorFunction):
    """Keeps only Q for the backward pass, and sums the series again there.

    k = 4 is PEFT's default: R = S (S + 2 Q) with S = I + Q² takes half the products.
    """

    @staticmethod
    def forward(ctx: _Terms, Q: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(Q)
        ctx.k = k
        if k == 4:
            S = torch.baddbmm(_identity(Q), Q, Q)
            return torch.bmm(S, S.add(Q, alpha=2))
        total = _geometric_sums(Q, k)[-1]
        return total + Q @ total

    @staticmethod
    def backward(ctx: _Terms, gradient: Tensor) -> tuple[Tensor, None]:
        (Q,) = ctx.saved_tensors
        if ctx.k == 4:
            S = torch.baddbmm(_identity(Q), Q, Q)
            by_second = torch.bmm(S.mT, gradient)
            by_S = torch.baddbmm(by_second, gradient, S.add(Q, alpha=2).mT)
            by_Q = torch.baddbmm(by_second, by_S, Q.mT, beta=2)
            return torch.baddbmm(by_Q, Q.mT, by_S), None
        *sums, total = _geometric_sums(Q, ctx.k)
        found = gradient @ total.mT
        gradient = gradient + Q.mT @ gradient
        for total in reversed(sums):
            found = found + gradient @ total.mT
            gradient = Q.mT @ gradient
        return found + gradient, None


def _identity(Q: Tensor) -> Tensor:
    return torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)


def _geometric_sums(Q: Tensor, k: int) -> list[Tensor]:
    """Returns I + Q, I + Q + Q², … up to Q^{k−1}."""
    identity = _identity(Q)
    sums = [identity + Q]
    for _ in range(k - 2):
        sums.append(identity + Q @ sums[-1])
    return sums


# R − I instead of R: exactly zero for Q = 0, and nothing large cancels for a small Q.


def cayley_change(Q: Float[Tensor, "*blocks n n"]) -> Float[Tensor, "*blocks n n"]:
    """R − I for R = (I + Q)(I − Q)⁻¹, which is orthogonal if Qᵀ = −Q; R of −Q is R's inverse.

    Turns by 2·atan(q) in the plane of a 2 × 2 block; half a turn cannot be reached. Float32 or wider.
    """
    with torch.autocast(Q.device.type, enabled=False):
        return _CayleyChange.apply(widened(Q))


class _CayleyChange(TensorFunction):
    """dR = ½ (I + R) dQ (I + R), so the backward pass needs only R − I and solves nothing."""

    @staticmethod
    def forward(ctx: Context, Q: Tensor) -> Tensor:
        change = torch.linalg.solve(_identity(Q) - Q, 2 * Q)
        ctx.save_for_backward(change)
        return change

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        (change,) = ctx.saved_tensors
        sides = (change + 2 * _identity(change)).mT
        return 0.5 * (sides @ gradient @ sides)


def neumann_change(Q: Float[Tensor, "n n"], terms: int) -> Float[Tensor, "n n"]:
    """R − I for PEFT's polynomial instead of the Cayley map: 2 Q + 2 Q² + … + 2 Q^(k−1) + Q^k.

    The last coefficient is 1, so that R = (I + Q)(I + Q + … + Q^(k−1)), which is far closer to orthogonal for
    odd k. It is of no use if the norm of Q is 1 or more. Float32 or wider.

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


def rotate_blocks(x: Float[Tensor, "*rows n"], R: Float[Tensor, "blocks b b"]) -> Float[Tensor, "*rows n"]:
    """Returns x · blkdiag(R_1, R_2, …) for every row of x; a single block is used for all blocks of x.

    Args:
        x: rows of n = blocks · b numbers, or any multiple of b for a single block.
        R: the blocks; cast to x's type.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))  # what `bmm` does, but not in the backward pass
    R = R.to(x.dtype)
    blocks, size, _ = R.shape
    together = next((k for k in range(SMALLEST_BLOCK // size, 1, -1) if blocks % k == 0), 1)
    if together > 1:
        R = _beside_each_other(R, together)
    return _RotateBlocks.apply(x, R)


class _Rebuilt(Context):
    build: Build


class _RotateBlocks(TensorFunction):
    """Keeps R and what x can be computed from, see `rebuild`."""

    @staticmethod
    def forward(ctx: _Rebuilt, x: Tensor, R: Tensor) -> Tensor:
        tensors: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            ctx.build, tensors = source(x)
        ctx.save_for_backward(R, *tensors)
        rows = x.reshape(-1, x.shape[-1])
        y, count = rows.new_empty(rows.shape), rows_of_pieces(rows)
        for piece, out in zip(rows.split(count), y.split(count), strict=True):
            _by_block(out, R).copy_(torch.bmm(_by_block(piece, R), R))
        return y.reshape(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Rebuilt, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (R, *tensors), (for_x, for_R) = ctx.saved_tensors, ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        by_x, by_R, count = rows.new_empty(rows.shape), R.new_zeros(R.shape), rows_of_pieces(rows)
        pieces = in_pieces(ctx.build, tensors, gradient.shape[:-1], count) if for_R else repeat(None)
        for x, piece, out in zip(pieces, rows.split(count), by_x.split(count), strict=False):
            blocks = _by_block(piece, R)
            if x is not None:
                by_R.baddbmm_(_by_block(x, R).mT, blocks)
            if for_x:
                _by_block(out, R).copy_(torch.bmm(blocks, R.mT))
        return by_x.reshape(gradient.shape) if for_x else None, by_R if for_R else None


def _by_block(x: Tensor, R: Tensor) -> Float[Tensor, "blocks rows b"]:
    """Returns views of the parts of x that each block rotates; `bmm` needs no copies of them."""
    return x.reshape(-1, *R.shape[:2]).transpose(0, 1)


SMALLEST_BLOCK = 16
"""Size of blocks up to which neighbours are joined: products of smaller ones take twice the time."""


def _beside_each_other(R: Tensor, count: int) -> Tensor:
    """Joins each `count` neighbours of (blocks, b, b) into one block-diagonal block."""
    blocks, size, _ = R.shape
    wide = R.new_zeros(blocks // count, count, size, count, size)
    each = torch.arange(count, device=R.device)
    wide[:, each, :, each] = R.unflatten(0, (-1, count)).transpose(0, 1)
    return wide.reshape(blocks // count, count * size, count * size)


def butterfly(
    x: Float[Tensor, "*rows n"], R: Float[Tensor, "stages blocks b b"], inverse: bool = False
) -> Float[Tensor, "*rows n"]:
    """Returns x B_{stages−1} … B_1 B_0 for every row of x, without an (n, n) matrix (arXiv:2311.06243).

    B_0 is blkdiag(R_{0,1}, R_{0,2}, …). B_i is the same for R_i, after a permutation that brings together
    half-blocks that are 2^i half-blocks apart: with b = 4, stage 1 has the blocks [0 1 4 5], [2 3 6 7], ….

    Args:
        x: rows of n = blocks · b numbers.
        R: the blocks of each stage; with more than one stage b is even, and 2^(stages − 1) divides `blocks`.
        inverse: whether to return x B_0ᵀ B_1ᵀ …, which is the inverse if the blocks are orthogonal.
    """
    stages, _, size, _ = R.shape
    joined = 1 + sum(size << stage <= WIDEST_JOINED for stage in range(1, stages))
    first, others = _join_stages(R[:joined]), range(joined, stages)
    if inverse:
        x = rotate_blocks(x, first.mT)
        for stage in others:
            x = _butterfly_stage(x, R[stage].mT, stage)
        return x
    for stage in reversed(others):
        x = _butterfly_stage(x, R[stage], stage)
    return rotate_blocks(x, first)


WIDEST_JOINED = 64
"""Size of blocks up to which stages are multiplied into one: a stage costs two copies of x besides its
own."""


def _join_stages(R: Tensor) -> Tensor:
    """Returns the product of the first stages, which is blkdiag of blocks of b · 2^(stages − 1) rows."""
    stages, blocks, size, _ = R.shape
    if stages == 1:
        return R[0]
    width = size << (stages - 1)
    rows = torch.eye(width, dtype=R.dtype, device=R.device).repeat(1, blocks * size // width)  # (width, n)
    with torch.autocast(R.device.type, enabled=False):
        for stage in reversed(range(stages)):
            rows = _butterfly_stage(rows, R[stage], stage)
    return rows.unflatten(1, (-1, width)).transpose(0, 1)


def _butterfly_stage(x: Tensor, R: Tensor, stage: int) -> Tensor:
    """Returns x B_stage."""
    if stage == 0:
        return rotate_blocks(x, R)
    apart, half = 2**stage, R.shape[-1] // 2
    paired = x.unflatten(-1, (-1, 2, apart, half)).transpose(-3, -2)  # (..., groups, apart, 2, half)
    rotated = rotate_blocks(paired.flatten(-4), R).unflatten(-1, (-1, apart, 2, half))
    return rotated.transpose(-3, -2).flatten(-4)


def givens(angles: Float[Tensor, " pairs"]) -> Float[Tensor, "pairs 2 2"]:
    """Returns [[cos, −sin], [sin, cos]] of every angle."""
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([cosine, -sine, sine, cosine], dim=-1).unflatten(-1, (2, 2))


def givens_tree(
    x: Float[Tensor, "*rows n"], G: Float[Tensor, "pairs 2 2"], inverse: bool = False
) -> Float[Tensor, "*rows n"]:
    """Returns x P_L … P_2 P_1 for every row of x, without an (n, n) matrix (arXiv:2404.04316).

    P_1 acts on the pairs (0, 1), (2, 3), …; P_2 on those of every second number, (0, 2), (4, 6), …; and so on
    until one number is left: n − 1 pairs in all. Works for any n; costs about as much memory as 2 x.

    Args:
        x: rows of n numbers.
        G: the blocks of the pairs, the first stage's first; rotations or not.
        inverse: whether to return x P_1ᵀ P_2ᵀ … P_Lᵀ, which is the inverse if the blocks are rotations.
    """
    pairs = x.shape[-1] // 2
    if not pairs:
        return x
    own, others = G[:pairs], G[pairs:]
    even, odd = x[..., 0::2], x[..., 1::2]
    if inverse:
        first, odd = _turn(even[..., :pairs], odd, own.mT)
        even = givens_tree(torch.cat([first, even[..., pairs:]], dim=-1), others, inverse)
        first = even[..., :pairs]
    else:
        even = givens_tree(even, others)
        first, odd = _turn(even[..., :pairs], odd, own)
    both = torch.stack([first, odd], dim=-1).flatten(-2)
    return torch.cat([both, even[..., pairs:]], dim=-1) if x.shape[-1] % 2 else both


def _turn(first: Tensor, second: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [first second] G for each pair."""
    return first * G[:, 0, 0] + second * G[:, 1, 0], first * G[:, 0, 1] + second * G[:, 1, 1]
