"""The uniform random initialisation of several methods, drawn from torch's global CPU generator."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def kaiming_uniform(*shape: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Draws U(−1/√n, 1/√n) with n the last dimension: PyTorch's initialisation of a linear map (a = √5).

    Raises:
        ValueError: if the last dimension is 0.
    """
    if not shape[-1]:
        raise ValueError(f"kaiming_uniform needs a last dimension of at least 1; got {shape}")
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(*shape, dtype=dtype).uniform_(-bound, bound)
