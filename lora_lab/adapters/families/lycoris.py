"""What LoHa and LoKr share: a large update from small products, as in LyCORIS (Yeh et al., arXiv:2309.14859).

A product L R of one of them has L (rows, rank) and R (rank, columns). With a core T (rank, rank, *kernel) for
a convolution (FedPara's proposition 3), a is Lᵀ (rank, rows) and R[i, (j, κ)] = Σ_h T[i, h, κ] b[h, j].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import TypeVar

from lora_lab.adapters.base import AdditiveAdapter
from lora_lab.adapters.maps import LinearMap, is_convolution
from lora_lab.adapters.spec import RankedSpec, probability_fault
from lora_lab.linalg.kaiming import kaiming_uniform

WORTH_RECOMPUTING = 2**16
"""Size of an input above which memory counts more than the fixed time of a recomputation."""


@dataclass
class LycorisSpec(RankedSpec):
    """Adds what LoHa and LoKr share."""

    removed_fields = {"dropout": 0.0}

    init: Literal["default", "lycoris", "random"] = "default"
    """Which tensor starts at zero: PEFT's (`default`), that of the LyCORIS library, or none (`random`), which
    is not the identity."""

    rank_dropout: float = 0.0
    """Probability of zeroing an output of the update while training, in [0, 1); it has nothing to do with the
    rank; the name is PEFT's."""

    module_dropout: float = 0.0
    """Probability of leaving a module's whole update out of a training step, in [0, 1)."""

    use_effective_conv2d: bool = False
    """Learn a core (rank, rank, *kernel) next to the channels of a convolution, Conv1d too: fewer numbers.
    Linear maps and kernels of size 1 have none."""

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / self.rank

    def faults(self) -> list[str]:
        found = super().faults() + probability_fault("rank_dropout", self.rank_dropout)
        return found + probability_fault("module_dropout", self.module_dropout)


LycorisT = TypeVar("LycorisT", bound=LycorisSpec, default=Any)


class LycorisAdapter(AdditiveAdapter[LycorisT]):
    """An update with dropout of its outputs, and dropout of the whole update."""

    convolves = True
    zeros: tuple[str, ...] = ()
    """Names of the tensors that start at zero, where they exist."""

    def __init__(self, base: LinearMap, spec: LycorisT):
        super().__init__(base)
        self.spec = spec
        self.core = core_shape(base, spec)

    @property
    def rests_by_chance(self) -> bool:
        return self.spec.module_dropout > 0

    def started(self, *shape: int, spread: float | None = None) -> nn.Parameter:
        """Draws a tensor: N(0, spread²), or U(±1/√n) with n numbers for each index of its first axis."""
        if spread is not None:
            return nn.Parameter(torch.randn(shape, dtype=self.dtype) * spread)
        flat = kaiming_uniform(shape[0], math.prod(shape[1:]), dtype=self.dtype)
        return nn.Parameter(flat.reshape(shape))

    def without_gradient_at_start(self) -> tuple[str, ...]:
        """In a product with a factor of zeros only that factor has a gradient."""
        if self.spec.init == "random":
            return ()
        own = dict(self.named_parameters(recurse=False))
        return tuple(name for name in own if name not in self.zeros)

    def kept_outputs(self, x: Tensor, rescale: bool) -> Float[Tensor, " out"] | None:
        """Draws the dropout factors of the update's outputs for one step; None if nothing is dropped.

        Args:
            x: the input, for its device.
            rescale: divide by the share that is kept.
        """
        spec = self.spec
        if not self.training or not (spec.rank_dropout or spec.module_dropout):
            return None
        # A factor, not a branch: a parameter without a gradient stops distributed training.
        called = torch.rand(1, device=x.device) >= spec.module_dropout
        kept = (torch.rand(self.out_features, device=x.device) >= spec.rank_dropout).to(self.dtype)
        if rescale:
            kept = kept / kept.mean().clamp(min=1 / self.out_features)  # 0, not NaN, if all are dropped
        return kept * called


def core_shape(base: nn.Module, spec: LycorisSpec) -> tuple[int, ...] | None:
    """Returns the shape of T, as in PEFT's files: a Conv1d's kernel is (size, 1) there. None without a T."""
    kernel = base.kernel_size if is_convolution(base) else ()
    has_core = spec.use_effective_conv2d and math.prod(kernel) > 1
    return (spec.rank, spec.rank, *kernel, 1)[:4] if has_core else None


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Returns two numbers with the product `dimension`, for W1 and W2 of LoKr.

    If `factor` divides `dimension`, it is used, even above the root; else the first number is the largest
    divisor up to the root and to `factor`; -1 means no bound.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor < 0 else min(factor, math.isqrt(dimension))
    small = next(number for number in range(most, 0, -1) if dimension % number == 0)
    return small, dimension // small


def product(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """Returns L and R of one product."""
    if core is None:
        return a, b
    return a.T, torch.einsum("ihk,hj->ijk", core.flatten(2), b).flatten(1)


def recomputed(function: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """Calls a function without randomness, and again in the backward pass: nothing it computes is kept."""
    if x.numel() < WORTH_RECOMPUTING:
        return function(x, *others)
    result: Tensor = checkpoint(function, x, *others, use_reentrant=False, preserve_rng_state=False)
    return result


# PEFT's config ------------------------------------------------------------------------------------------

FIELDS = {
    "r": "rank",
    "alpha": "alpha",
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "use_effective_conv2d": "use_effective_conv2d",
}
"""PEFT's fields and ours."""

STARTS = {"default": True, "lycoris": "lycoris", "random": False}
"""Our starts by PEFT's names."""


def write_lycoris_config(spec: LycorisSpec) -> dict[str, Any]:
    """Returns PEFT's other fields."""
    return {"init_weights": STARTS[spec.init]}


def read_lycoris_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns our other fields for PEFT's."""
    # In PEFT every other true value starts as `true` does; the file holds the trained result.
    given = config.get("init_weights", True)
    init = next((own for own, name in STARTS.items() if name == given), "default")
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    return {**patterns, "init": init}
