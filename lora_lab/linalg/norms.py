"""Norms of sums and products that are never formed. Pure functions of tensors."""

import torch
from jaxtyping import Float
from torch import Tensor


def squared_row_norms(
    weight: Float[Tensor, "rows columns"],
    weight_square: Float[Tensor, " rows"],
    left: Float[Tensor, "rows rank"],
    right: Float[Tensor, "rank columns"],
) -> Float[Tensor, " rows"]:
    """Returns ‖W_i + L_i R‖² for every row i without forming the sum.

    ‖W_i + L_i R‖² = ‖W_i‖² + ⟨L_i, 2 W_i Rᵀ + L_i R Rᵀ⟩

    Args:
        weight: W.
        weight_square: ‖W_i‖².
        left: L.
        right: R.
    """
    return weight_square + (left * (2 * (weight @ right.T) + left @ (right @ right.T))).sum(1)


def product_norm(left: Float[Tensor, "rows rank"], right: Float[Tensor, "rank columns"]) -> Float[Tensor, ""]:
    """‖L R‖_F without forming the product, from ‖L R‖² = ⟨LᵀL, R Rᵀ⟩; its gradient is 0 where the norm is."""
    square = ((left.T @ left) * (right @ right.T)).sum()
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt() * (square > 0)
