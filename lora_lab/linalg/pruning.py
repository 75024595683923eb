"""Which components of a sum are worth keeping. Pure functions of tensors."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@torch.no_grad()
def l1_importance(components: Sequence[tuple[Tensor, int]], mean: bool = False) -> Float[Tensor, " rank"]:
    """Returns how large each component of a sum is: the product of the L1 norms of its parts.

    Args:
        components: tensors that each hold one part of every component, with the axis that counts them.
        mean: whether to divide by the parts' lengths, for components of different lengths.
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
    """Returns flags of the components that survive a pruning: those above a share of the largest importance.

    Args:
        importance: of each component, 0 or more.
        kept: flags of those alive so far; the others stay dead.
        threshold: the share, in [0, 1).
        largest: the largest importance among the components that are compared, of one adapter or of a model.
            If it is 0 (nothing has been learned) or not finite (nothing can be compared), nothing dies.
        min_rank: how many of those alive always stay, the most important first.
    """
    largest = torch.as_tensor(largest)
    strongest = importance.where(kept, -1).argsort(descending=True, stable=True)[:min_rank]
    flags = importance > threshold * largest
    flags[strongest] = True
    return (flags | ~((largest > 0) & largest.isfinite())) & kept


def strongest(scores: Float[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Returns flags of exactly `count` components, those with the largest scores; of equal ones the first."""
    flags = torch.zeros_like(scores, dtype=torch.bool)
    flags[scores.argsort(descending=True, stable=True)[:count]] = True
    return flags


def smoothed(
    sensitivity: Float[Tensor, " n"],
    uncertainty: Float[Tensor, " n"],
    measured: Float[Tensor, " n"],
    beta1: float,
    beta2: float,
    valid: Bool[Tensor, ""] | bool = True,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Adds one measurement to AdaLoRA's averages, a sensitivity I and its uncertainty U.

    I ← β1 I + (1 − β1) x, then U ← β2 U + (1 − β2) |x − I|.

    Args:
        sensitivity: I, zeros before the first measurement.
        uncertainty: U, likewise.
        measured: x, the |p g| of every number p with gradient g.
        beta1: share of the old I.
        beta2: share of the old U.
        valid: whether the measurement counts; if not, both averages stay. A tensor is not read back from the
            device.
    """
    valid = torch.as_tensor(valid, device=measured.device)
    sensitivity = torch.where(valid, sensitivity.lerp(measured, 1 - beta1), sensitivity)
    deviation = (measured - sensitivity).abs_()
    return sensitivity, torch.where(valid, uncertainty.lerp(deviation, 1 - beta2), uncertainty)


def largest_share(values: Float[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """Returns flags of the fewest values, from the largest down, that make up a share of their sum.

    Args:
        values: 0 or more, with a sum above 0; of equal ones the first come first.
        share: the share, in (0, 1]; 1 takes all, including zeros.
    """
    if share == 1:
        return torch.ones_like(values, dtype=torch.bool)
    order = values.argsort(descending=True, stable=True)
    # The tolerance allows for sums like .4 + .3 + .2, which is just below .9.
    reached = values[order].cumsum(0) / values.sum() >= share - 1e-9
    flags = torch.zeros_like(reached)
    flags[order[: len(reached) - int(reached.sum()) + 1]] = True
    return flags
