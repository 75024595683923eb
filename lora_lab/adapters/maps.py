"""The modules that are linear maps, and how a matrix is applied the way such a module applies its own.

A convolution is a linear map of patches: its weight (out, in, *kernel), flattened to (out, in · kernel), is
the matrix W of every formula, and its outputs are the channels. So a low-rank update L R of it is a
convolution with the rows of R followed by a 1 × 1 convolution with L, without extra code in a method.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.errors import IncompatibleError
from lora_lab.linalg.rank import widened

Convolution = nn.Conv1d | nn.Conv2d
CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}


class LinearMap(nn.Module):
    """A module for which `is_linear` or `is_convolution` is true, of any class; for annotations."""

    weight: Tensor
    bias: Tensor | None
    in_features: int
    """Not of convolutions; `out_features` neither."""
    out_features: int
    __call__: Callable[..., Tensor]


def is_linear(module: nn.Module) -> TypeGuard[LinearMap]:
    """Whether a module is a linear map: y = x Wᵀ + b with a floating (out, in) `weight`.

    A quantised map returns its weight dequantised. Other classes must compute x Wᵀ + b: some use the weight
    of an `nn.Linear` in groups.
    """
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and weight.shape == (cast(LinearMap, module).out_features, cast(LinearMap, module).in_features)
        and (type(module).forward is nn.Linear.forward or _computes(module, weight))
    )


@torch.no_grad()
def _computes(module: nn.Module, weight: Tensor) -> bool:
    """Whether a module applies its weight to a row, up to the rounding of half precision."""
    if weight.is_meta:
        return True
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    bias = getattr(module, "bias", None)
    try:
        y = module.forward(x)  # without hooks that others may have registered on it
    except (RuntimeError, TypeError, ValueError):
        return False
    expected = F.linear(x, weight, bias if isinstance(bias, Tensor) else None)
    same = isinstance(y, Tensor) and y.shape == expected.shape
    return same and torch.allclose(y.to(expected), expected, rtol=0.05, atol=0.05, equal_nan=True)


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the matrices that a module of experts holds as parameters, by name.

    Those are (experts, …, …) in a module of experts, and the (experts, in) weight of a router, whose
    module is not a linear map. Any other module has none.
    """
    own = dict(module.named_parameters(recurse=False))
    if is_router(module):
        return {"weight": own["weight"]}
    if not (hasattr(module, "num_experts") or re.search("Expert", type(module).__name__)):
        return {}
    return {name: p for name, p in own.items() if p.ndim == 3 and len(p) > 1 and p.is_floating_point()}


def is_router(module: nn.Module) -> bool:
    """Whether a module has a matrix with which it chooses the experts of each token."""
    weight = getattr(module, "weight", None)
    matrix = isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point()
    return matrix and re.search("Top[Kk]Router", type(module).__name__) is not None


def is_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Whether a module is a convolution of one group with zeros around its input."""
    return (
        isinstance(module, Convolution)
        and type(module) in CONVOLUTIONS
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def matrix(base: nn.Module) -> Float[Tensor, "out in"]:
    """Returns a map's weight as a matrix; a convolution's kernel is in the columns."""
    return cast(LinearMap, base).weight.flatten(1)


def sizes(base: nn.Module) -> tuple[int, int]:
    """Returns the shape (out, in) of `matrix` without dequantising the weight."""
    if isinstance(base, Convolution):
        return len(base.weight), base.weight[0].numel()
    linear = cast(LinearMap, base)
    return linear.out_features, linear.in_features


def finite_matrix(base: nn.Module, what: str) -> Float[Tensor, "out in"]:
    """Returns W in float32 or wider, for a decomposition.

    Raises:
        IncompatibleError: if a number of it is not finite.
    """
    weight = widened(matrix(base).detach())
    if not weight.isfinite().all():
        raise IncompatibleError(
            f"{what}: the base's weight has numbers that are not finite; load the model again."
        )
    return weight


def project(base: nn.Module, x: Tensor, rows: Float[Tensor, "k in"], bias: Tensor | None = None) -> Tensor:
    """Applies a matrix to x as the map applies its weight, to (..., in) or (batch, in, *size).

    Returns:
        (..., k), or (batch, k, *size of the map's outputs). x may have other channels than the base's, if the
        matrix has as many.
    """
    if not isinstance(base, Convolution):
        return F.linear(x, rows, bias)
    if not len(rows):  # torch needs at least one output channel
        return project(base, x, F.pad(rows, (0, 0, 0, 1))).narrow(1 - base.weight.ndim, 0, 0)
    kernel = rows.reshape(len(rows), -1, *base.weight.shape[2:])
    return CONVOLUTIONS[type(base)](x, kernel, bias, base.stride, base.padding, base.dilation)


def mix(base: nn.Module, y: Tensor, rows: Float[Tensor, "out k"], bias: Tensor | None = None) -> Tensor:
    """Applies a matrix to the channels of what `project` returned, at each position separately."""
    if not isinstance(base, Convolution):
        return F.linear(y, rows, bias)
    if not rows.shape[1]:  # and at least one input channel
        y, rows = F.pad(y, (0, 0) * (base.weight.ndim - 2) + (0, 1)), F.pad(rows, (0, 1))
    return CONVOLUTIONS[type(base)](y, pointwise(base, rows), bias)


def pointwise(base: nn.Module, values: Tensor) -> Tensor:
    """Appends an axis of length 1 for each axis of a convolution's kernel; a linear map needs none."""
    if not isinstance(base, Convolution):
        return values
    return values.reshape(*values.shape, *[1] * (base.weight.ndim - 2))


def with_weight(
    base: LinearMap, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> nn.Module:
    """Returns a plain, frozen module like the base with these values, of the base's dtype."""
    new: nn.Module
    if isinstance(base, Convolution):
        shape = (base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding)
        make: Callable[..., nn.Module] = type(base)
        new = make(*shape, base.dilation, bias=bias is not None, device="meta")
    else:
        new = nn.Linear(base.in_features, base.out_features, bias is not None, device="meta")
    dtype = base.weight.dtype
    new.weight = nn.Parameter(weight.reshape(base.weight.shape).to(dtype), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return new.train(base.training)
