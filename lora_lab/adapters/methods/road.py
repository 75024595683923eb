"""RoAd: rotate and scale pairs of a frozen map's outputs (Liao and Monz 2024, arXiv:2409.00119).

    W' = R W,  b' = R b     y = R base(x)

    R h = c₁ ⊙ h + c₂ ⊙ J h       J rotates a pair by 90°: (h₁, h₂) → (−h₂, h₁)
    c₁  = α cos θ,  c₂ = α sin θ

    θ, α   (n / 2,)   learned, variant road_1: both numbers of a pair share them, which scales and rotates it
    θ, α   (n,)       learned, road_2: one for every number
    θ, α   (2 n,)     learned, road_4: one for every c₁ and every c₂, group by group

n is the number of outputs. θ = 0 and α = 1 at the start, so W' = W bitwise. In each group of `group_size`
numbers, number j of the first half is paired with number j of the second; 2 pairs neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, OutputAdapter, PeftLayout
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.pairs import halves, map_pairs, paired, rotate_pairs


@dataclass
class RoAdSpec(AdapterSpec):
    """RoAd's options; the paper uses road_1 with about ten times LoRA's learning rate."""

    method: str = "road"

    removed_fields = {"side": "output"}

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    """How many parameters are learned: as many as there are outputs, twice, or four times as many."""

    group_size: int = 64
    """Numbers in a group, even, a divisor of the outputs. 2 pairs neighbours
    as in the paper; the choice of pairs hardly matters, and halves of 32 or more are faster."""

    init: Literal["default", "random"] = "default"
    """`default` starts as the identity; `random`, PEFT's init_weights: false, draws θ from N(0, 0.5²)
    and α from N(1, 0.5²)."""

    def faults(self) -> list[str]:
        found = super().faults()
        if self.group_size < 2 or self.group_size % 2:
            found.append(f"group_size: must be even and at least 2; got {self.group_size}")
        return found


def _write_config(spec: RoAdSpec) -> dict[str, Any]:
    return {"init_weights": spec.init == "default"}


class RoAd(OutputAdapter[RoAdSpec]):
    """The rotated output of one linear map."""

    Spec = RoAdSpec
    family = "activation"
    paper = "Liao and Monz 2024, arXiv:2409.00119"
    spared_from_decay = ("alpha",)
    peft = PeftLayout(
        "ROAD",
        {"road_theta": "theta", "road_alpha": "alpha"},
        fields={"variant": "variant", "group_size": "group_size"},
        config=_write_config,
        spec=lambda config: {"init": "default" if config.get("init_weights", True) else "random"},
    )

    def __init__(self, base: LinearMap, spec: RoAdSpec):
        super().__init__(base)
        self.spec = spec
        count = self.site_parameter_count(base, spec) // 2
        spread = 0.5 if spec.init == "random" else 0.0
        self.theta = nn.Parameter(spread * torch.randn(count, dtype=self.dtype))
        self.alpha = nn.Parameter(1 + spread * torch.randn(count, dtype=self.dtype))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: RoAdSpec) -> int:
        return {"road_1": 1, "road_2": 2, "road_4": 4}[spec.variant] * sizes(module)[0]

    @classmethod
    def build(cls, sites: list[Site], spec: RoAdSpec) -> dict[str, Adapter]:
        """Makes the adapters, if the sizes of all maps fit.

        Raises:
            IncompatibleError: if a module's outputs cannot be divided into groups of `group_size`.
        """
        widths = {site.path: sizes(site.module)[0] for site in sites}
        for path, width in widths.items():
            if width % spec.group_size:
                fits = [g for g in range(2, spec.group_size, 2) if not any(w % g for w in widths.values())]
                way = f"use {fits[-1]}, the largest" if fits else "remove odd ones: no size"
                raise IncompatibleError(
                    f"adapter.group_size: {spec.group_size} does not divide the {width} outputs of "
                    f"{path}; {way} that suits all targets."
                )
        return super().build(sites, spec)

    def coefficients(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Returns c₁ and c₂."""
        theta, alpha, group = self.theta, self.alpha, self.spec.group_size
        if self.spec.variant == "road_4":
            (theta_1, theta_2), (alpha_1, alpha_2) = (halves(part, 2 * group, 0) for part in (theta, alpha))
            return (alpha_1 * theta_1.cos()).flatten(), (alpha_2 * theta_2.sin()).flatten()
        own, other = alpha * theta.cos(), alpha * theta.sin()
        return (own, other) if self.spec.variant == "road_2" else (paired(own, group), paired(other, group))

    def transform_output(self, y: Tensor) -> Tensor:
        if self.spec.variant == "road_1":
            return rotate_pairs(y, self.theta, self.alpha, self.spec.group_size)
        return map_pairs(y, *self.coefficients(), self.spec.group_size).to(y.dtype)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        # Half precision is widened inside; the backward pass keeps only the output.
        return self.transform_output(self.base(x))

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """Returns R W: R acts on pairs of rows."""
        return map_pairs(weight, *self.coefficients(), self.spec.group_size, axis=0)
