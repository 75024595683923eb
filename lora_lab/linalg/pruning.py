"""Which components of a sum are worth keeping. Pure functions of tensors."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@torch.no_grad()
def l1_importance(components: Sequence[tuple[Tensor, int]]) -> Float[Tensor, " rank"]:
    """Returns how large each component of a sum is: the product of the L1 norms of its parts.

    Args:
        components: tensors that hold one part of every component each, with the axis that counts them.
    """
    # Each (rank, numbers).
    parts = [tensor.movedim(axis, 0).unsqueeze(-1).flatten(1) for tensor, axis in components]
    return torch.stack([part.abs().sum(1) for part in parts]).prod(0)


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
            Where it is 0 nothing has been learned, and nothing dies.
        min_rank: how many of those alive stay in any case, the most important first.
    """
    if largest == 0:
        return kept.clone()
    strongest = importance.where(kept, -1).argsort(descending=True, stable=True)[:min_rank]
    flags = importance > threshold * largest
    flags[strongest] = True
    return flags & kept


def largest_share(values: Float[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """Returns flags of the fewest values, from the largest down, that make up a share of their sum.

    Args:
        values: 0 or more, with a sum above 0; of equal ones the first come first.
        share: the share, in (0, 1]; 1 takes all, those of 0 too.
    """
    if share == 1:
        return torch.ones_like(values, dtype=torch.bool)
    order = values.argsort(descending=True, stable=True)
    # The tolerance makes up for sums like .4 + .3 + .2, which is just below .9.
    reached = values[order].cumsum(0) / values.sum() >= share - 1e-9
    flags = torch.zeros_like(reached)
    flags[order[: len(reached) - int(reached.sum()) + 1]] = True
    return flags
