"""Linear maps of pairs of numbers. Pure functions of tensors; an (n, n) matrix is never formed.

An axis of n numbers is divided into groups, and number j of a group's first half is paired with number j of
its second half. J rotates every pair by 90°: (x₁, x₂) → (−x₂, x₁).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.linalg.autograd import Context, TensorFunction
from lora_lab.linalg.rank import widened


def map_pairs(
    x: Float[Tensor, "..."], own: Float[Tensor, " n"], other: Float[Tensor, " n"], group: int, axis: int = -1
) -> Float[Tensor, "..."]:
    """Returns own ⊙ x + other ⊙ J x along one axis of x.

    Args:
        x: any shape; its axis has n numbers.
        own: what each number is multiplied by.
        other: what its rotated partner is multiplied by.
        group: numbers in a group, even, a divisor of n.
        axis: the axis of x.
    """
    axis %= x.ndim
    trailing = [1] * (x.ndim - 1 - axis)
    y = x * own.reshape(-1, *trailing)
    first, second = halves(x, group, axis)
    other_1, other_2 = halves(other.reshape(-1, *trailing), group, 0)
    # Half by half and in place: stacking the halves would copy all of y again.
    mapped_1, mapped_2 = halves(y, group, axis)
    mapped_1.addcmul_(other_1, second, value=-1)
    mapped_2.addcmul_(other_2, first)
    return y


def rotate_pairs(
    x: Float[Tensor, "*tokens n"], theta: Float[Tensor, " pairs"], alpha: Float[Tensor, " pairs"], group: int
) -> Float[Tensor, "*tokens n"]:
    """Rotates every pair by its angle θ and scales it by its α: y = α cos θ ⊙ x + α sin θ ⊙ J x.

    The backward pass reads y, which the next operation usually keeps anyway, but not x. A pair with α = 0 has
    lost its x, so its gradient is zero.

    Args:
        x: rows of any type; computed in float32 or wider and rounded once.
        theta: one angle a pair, in radians.
        alpha: one factor a pair.
        group: numbers in a group, even, a divisor of n.
    """
    return _RotatePairs.apply(x, theta, alpha, group)


def halves(
    x: Float[Tensor, "..."], group: int, axis: int
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Returns views of the first and of the second numbers of all pairs along one axis.

    The axis of n numbers becomes two, (n / group, group / 2).
    """
    axis %= x.ndim
    pairs = x.unflatten(axis, (x.shape[axis] // group, 2, group // 2))
    return pairs.select(axis + 1, 0), pairs.select(axis + 1, 1)


def paired(x: Float[Tensor, " pairs"], group: int) -> Float[Tensor, " n"]:
    """Returns the pair's value for both numbers of every pair."""
    return x.reshape(-1, 1, group // 2).expand(-1, 2, -1).flatten()


class _Kept(Context):
    group: int


class _RotatePairs(TensorFunction):
    @staticmethod
    def forward(ctx: _Kept, x: Tensor, theta: Tensor, alpha: Tensor, group: int) -> Tensor:
        y = _rotated(x, theta, alpha, group)
        ctx.save_for_backward(y, theta, alpha)
        ctx.group = group
        return y

    @staticmethod
    def backward(ctx: _Kept, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, theta, alpha = ctx.saved_tensors
        rows, width = y.numel() // y.shape[-1], y.shape[-1]
        first, second = halves(widened(y).reshape(rows, width), ctx.group, 1)
        grad_1, grad_2 = halves(widened(grad).reshape(rows, width), ctx.group, 1)
        # ∂y/∂θ = J y and ∂y/∂α = y / α.
        by_theta = torch.addcmul(grad_2 * first, grad_1, second, value=-1).sum(0).flatten()
        by_alpha = torch.addcmul(grad_1 * first, grad_2, second).sum(0).flatten() / alpha
        return _rotated(grad, -theta, alpha, ctx.group), by_theta, by_alpha.where(alpha != 0, 0), None


def _rotated(x: Tensor, theta: Tensor, alpha: Tensor, group: int) -> Tensor:
    own, other = (paired(alpha * part, group) for part in (theta.cos(), theta.sin()))
    return map_pairs(x, own, other, group).to(x.dtype)
