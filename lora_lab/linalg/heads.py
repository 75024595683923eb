"""Matrices seen head by head: `heads` groups of outputs, each of them `share` parts of `width` d.

Pure functions of tensors. With grouped queries a group is the queries that share one key; else `share` is 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def stack_heads(rows: Float[Tensor, "out n"], heads: int, width: int) -> Float[Tensor, "heads shared_n d"]:
    """Returns each group's parts transposed, one below the other: (heads, share · n, d)."""
    return rows.unflatten(0, (heads, -1, width)).mT.flatten(1, 2)


def per_head(y: Float[Tensor, "... out"], K: Float[Tensor, "heads d e"]) -> Float[Tensor, "... out_e"]:
    """Multiplies every part of a group by its group's matrix: out = heads · share · d → heads · share · e."""
    parts = y.unflatten(-1, (K.shape[0], -1, K.shape[1]))  # (..., heads, share, d)
    return torch.einsum("...hsd,hde->...hse", parts, K).flatten(-3)
