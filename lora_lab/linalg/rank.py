"""How much of its rank a matrix uses. Pure functions of tensors, computed in float32 or wider."""

import torch
from jaxtyping import Float
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """Casts half precision to float32 and keeps wider types: there is no decomposition for bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def narrows(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether a cast would turn numbers of float32 or wider into half precision."""
    floats = old.is_floating_point and new.is_floating_point
    return floats and new.itemsize < torch.float32.itemsize <= old.itemsize


def singular_values(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " least"]:
    """Returns the singular values of a matrix in descending order."""
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


def product_singular_values(
    left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]
) -> Float[Tensor, " least"]:
    """Singular values of `left @ right` from two thin QRs and one small SVD: the product is never formed.

    Args:
        left: factor of shape (out, k).
        right: factor of shape (k, in).

    Returns:
        min(out, in, k) values in descending order.
    """
    left_core = torch.linalg.qr(widened(left), mode="r").R  # (min(out, k), k)
    right_core = torch.linalg.qr(widened(right).T, mode="r").R  # (min(in, k), k)
    return torch.linalg.svdvals(left_core @ right_core.T)


def effective_rank(singular_values: Float[Tensor, " k"]) -> float:
    """Returns exp of the entropy of the normalised values (Roy and Vetterli 2007); 0 for a zero matrix.

    r equal singular values give exactly r; one dominating value gives close to 1.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    share = singular_values[singular_values > 0] / total
    return float(torch.exp(-(share * share.log()).sum()))


def stable_rank(singular_values: Float[Tensor, " k"]) -> float:
    """‖M‖_F² / ‖M‖₂² (Rudelson and Vershynin 2007); 0 for a zero matrix."""
    largest = singular_values.max() if singular_values.numel() else singular_values.sum()
    return 0.0 if largest == 0 else float((singular_values / largest).square().sum())


def zero_fraction(*tensors: Tensor) -> float:
    """Returns the share of entries that are exactly zero over all tensors, in [0, 1]; 0 if there are none."""
    entries = sum(tensor.numel() for tensor in tensors)
    return sum(int((tensor == 0).sum()) for tensor in tensors) / entries if entries else 0.0
