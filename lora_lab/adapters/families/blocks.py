"""What methods share that rotate the inputs of a map block by block: how many blocks, of which size."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.adapters.base import Adapter
from lora_lab.adapters.maps import sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import IncompatibleError


def block_faults(spec: AdapterSpec, size: str, count: str) -> list[str]:
    """Returns the faults of the two fields; exactly one of them must be given, the other 0."""
    values = {name: getattr(spec, name) for name in (size, count)}
    found = [f"{name}: must be at least 0; got {value}" for name, value in values.items() if value < 0]
    if all(values.values()) or not any(values.values()):
        given = " and ".join(f"{name}: {value}" for name, value in values.items())
        found.append(f"{size}: give it or {count}, and 0 for the other; got {given}")
    elif values[size] == 1:
        found.append(f"{size}: must be at least 2, as a single number cannot be rotated; got 1")
    return found


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of `number` that is nearest to `wanted`; of two, the lower."""
    divisors = (divisor for divisor in range(1, number + 1) if number % divisor == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))


def check_blocks(sites: list[Site], spec: AdapterSpec, size: str, count: str, adjust: bool = False) -> None:
    """Checks that the inputs of every site can be divided into blocks as the spec says.

    Args:
        sites: where the adapters will be placed.
        spec: the method's spec.
        size: its field of the inputs in a block.
        count: its field of the number of blocks.
        adjust: whether the nearest number that divides the inputs is taken.

    Raises:
        IncompatibleError: if they cannot.
    """
    name = size if getattr(spec, size) else count
    wanted = getattr(spec, name)
    for site in sites:
        inputs = sizes(site.module)[1]
        nearest = nearest_divisor(inputs, wanted)
        if nearest != wanted and not adjust:
            raise IncompatibleError(
                f"adapter.{name}: {wanted} does not divide the {inputs} inputs of {site.path}. "
                f"Use {nearest}, the nearest that does, or remove the module from targets."
            )
        if (nearest if name == size else inputs // nearest) < 2:
            raise IncompatibleError(
                f"adapter.{name}: {wanted} gives blocks of one input at {site.path}, of {inputs}; a single "
                "number cannot be rotated. Use other blocks, or remove the module from targets."
            )


def with_identities(R: Float[Tensor, "blocks b b"], dropout: float) -> Float[Tensor, "blocks b b"]:
    """Replaces a share of the blocks, rounded down and drawn in each call, by the identity."""
    blocks, size, _ = R.shape
    dropped = torch.randperm(blocks, device=R.device) < int(dropout * blocks)
    identity = torch.eye(size, dtype=R.dtype, device=R.device)
    return torch.where(dropped[:, None, None], identity, R)


def warn_of_dropouts(adapters: Mapping[str, Adapter], dropout: float) -> None:
    """Warns once of adapters with so few blocks that the share of them is less than one."""
    whole = [path for path, adapter in adapters.items() if dropout * adapter.blocks < 1]
    if dropout and whole:
        warnings.warn(
            f"adapter.dropout: {dropout} of the blocks is less than one at {', '.join(whole[:3])}: it does "
            "nothing there. Use more blocks, or a larger dropout.",
            stacklevel=4,
        )
