"""Which components of a sum are worth keeping. Pure functions of tensors."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@torch.no_grad()
def l1_importance(components: Sequence[tuple[Tensor, int]], mean: bool = False) -> Float[Tensor, " rank"]:
    """Returns how large each component of a sum is: the product of the L1 norms of its parts.

    Args:
        components: tensors that hold one part of every component each, with the axis that counts them.
        mean: whether to divide by the parts' lengths, for components of different ones.
    """
    # Each (rank, numbers).
    parts = [tensor.movedim(axis, 0).unsqueeze(-1).flatten(1).abs() for tensor, axis in components]
    return torch.stack([part.mean(1) if mean else part.sum(1) for part in parts]).prod(0)


def alive(
    importance: Float[Tensor, " rank"],
    kept: Bool[Tensor, " rank"],
    threshold: float,
    largest: Float[Tensor, ""] | float,
    min_rank: int = 1,
) -> Bool[Tensor, " rank"]:
    """Returns flags of the components that outlive a pruning: those above a share of the largest importance.

    Args:
        importance: of each component, 0 or more.
        kept: flags of those alive until now; no other comes back.
        threshold: the share, in [0, 1).
        largest: the greatest importance among the components that are compared, of one adapter or of a model.
            Where it is 0 nothing has been learned, where it is not finite nothing can be compared: nothing
            dies then.
        min_rank: how many of those alive stay in any case, the most important first.
    """
    largest = torch.as_tensor(largest)
    strongest = importance.where(kept, -1).argsort(descending=True, stable=True)[:min_rank]
    flags = importance > threshold * largest
    flags[strongest] = True
    return (flags | ~((largest > 0) & largest.isfinite())) & kept
