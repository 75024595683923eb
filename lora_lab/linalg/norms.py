"""Norms of sums and products that are never formed, and numbers that are not finite. Pure functions."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_NORM = 1e-12
"""Norms are kept at least this large: a row of zeros has no direction."""


def edited_row_norms(
    weight_square: Float[Tensor, " rows"],
    projected: Float[Tensor, "rows rank"],
    left: Float[Tensor, "rows rank"],
    gram: Float[Tensor, "rank rank"] | None = None,
) -> Float[Tensor, " rows"]:
    """Returns ‖W_i + L_i R‖ of every row i without forming the sum; at least `SMALLEST_NORM`.

    ‖W_i + L_i R‖² = ‖W_i‖² + ⟨L_i, 2 W_i Rᵀ + L_i R Rᵀ⟩

    Args:
        weight_square: ‖W_i‖².
        projected: W Rᵀ.
        left: L.
        gram: R Rᵀ; None if the rows of R are orthonormal.
    """
    square = weight_square + (left * (2 * projected + (left if gram is None else left @ gram))).sum(1)
    return square.clamp(min=SMALLEST_NORM**2).sqrt()


def product_norm(left: Float[Tensor, "rows rank"], right: Float[Tensor, "rank columns"]) -> Float[Tensor, ""]:
    """‖L R‖_F without forming the product, from ‖L R‖² = ⟨LᵀL, R Rᵀ⟩; its gradient is 0 if the norm is."""
    square = ((left.T @ left) * (right @ right.T)).sum()
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt() * (square > 0)


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors, of any shapes, that have a number which is not finite."""
    found = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            tensor = tensor.float()  # torch has neither sum nor isfinite for float8
        # A sum is finite only if all its terms are, and is faster to compute than a check of each.
        if not (tensor.sum().isfinite() or tensor.isfinite().all()):
            found.append(name)
    return found
