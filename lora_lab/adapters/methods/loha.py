"""LoHa: the entrywise product of two low-rank updates (Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098).

    W' = W + s (w1_a w1_b) ⊙ (w2_a w2_b)       s = alpha / rank; the update's rank is up to rank²
       = W + s P Q       P[:, i·rank + j] = w1_a[:, i] ⊙ w2_a[:, j],   Q[i·rank + j] = w1_b[i] ⊙ w2_b[j]

    w1_a, w2_a   (out, rank)            learned; U(±1/√rank) at the start
    w1_b         (rank, in)             learned; U(±1/√in) at the start
    w2_b         (rank, in)             learned; zeros at the start, so W' = W
    t1, t2       (rank, rank, *kernel)  learned, with use_effective_conv2d; the others: (rank, channels)

init: lycoris draws w1_a from N(0, 0.1²), w1_b and w2_b from N(0, 1), cores from N(0, 0.1²), and w2_a is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import PeftLayout
from lora_lab.adapters.families.lycoris import (
    FIELDS,
    LycorisAdapter,
    LycorisSpec,
    core_shape,
    product,
    read_lycoris_config,
    recomputed,
)
from lora_lab.adapters.maps import LinearMap, matrix, mix, project, sizes
from lora_lab.linalg.rank import product_singular_values, widened


@dataclass
class LoHaSpec(LycorisSpec):
    """LoHa's options; a rank of √min(in, out) is enough for updates of full rank."""

    method: str = "loha"


class LoHa(LycorisAdapter[LoHaSpec]):
    """The adapter of one linear map."""

    Spec = LoHaSpec
    family = "low-rank"
    paper = "Hyeon-Woo et al. 2021, arXiv:2108.06098"
    peft = PeftLayout(
        "LOHA",
        tensors={f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        fields=FIELDS,
        config=lambda spec: {"init_weights": spec.init != "random"},  # PEFT has no third start here
        spec=read_lycoris_config,
    )

    def __init__(self, base: LinearMap, spec: LoHaSpec):
        super().__init__(base, spec)
        rank, out, columns, core = spec.rank, self.out_features, self.in_features, self.core
        left, right = (out, rank), (rank, columns)
        if core is not None:
            left, right = (rank, out), (rank, base.weight.shape[1])
        lycoris = spec.init == "lycoris"
        one, tenth = (1.0, 0.1) if lycoris else (None, None)
        self.w1_a, self.w1_b = self.started(*left, spread=tenth), self.started(*right, spread=one)
        self.w2_a, self.w2_b = self.started(*left), self.started(*right, spread=one)
        self.t1, self.t2 = (None if core is None else self.started(*core, spread=tenth) for _ in range(2))
        self.zeros = {"default": ("w2_b",), "lycoris": ("w2_a",), "random": ()}[spec.init]
        for name in self.zeros:
            nn.init.zeros_(getattr(self, name))
        # Products per row of x, forward and backward: P and Q take 3 rank² (out + in), besides the base's
        # 2 out · in; W + ΔW takes 3 out · in and replaces the base's.
        self.factored = 3 * rank**2 * (out + columns) < out * columns

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: LoHaSpec) -> int:
        shape = core_shape(module, spec)
        if shape is None:
            return 2 * spec.rank * sum(sizes(module))
        out, columns = sizes(module)
        channels = columns // math.prod(shape[2:])
        return 2 * (spec.rank * (out + channels) + math.prod(shape))

    def products(self, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns both pairs of factors; the first one includes the scale and the dropout mask."""
        left, right = product(self.w1_a, self.w1_b, self.t1)
        gain = self.spec.scale if kept is None else self.spec.scale * kept.unsqueeze(1)
        return gain * left, right, *product(self.w2_a, self.w2_b, self.t2)

    def delta_weight(self, kept: Float[Tensor, " out"] | None = None) -> Float[Tensor, "out in"]:
        left1, right1, left2, right2 = self.products(kept)
        return (left1 @ right1) * (left2 @ right2)

    def factors(
        self, kept: Float[Tensor, " out"] | None = None
    ) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Returns s P and Q, the Khatri-Rao products of the factors, with ΔW = s P Q."""
        left1, right1, left2, right2 = self.products(kept)
        left = (left1.unsqueeze(2) * left2.unsqueeze(1)).flatten(1)  # (out, rank²)
        return left, (right1.unsqueeze(1) * right2).flatten(0, 1)  # (rank², in)

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        kept = self.kept_outputs(x, rescale=True)
        if self.factored:
            left, right = self.factors(kept)
            return mix(self.base, project(self.base, x, right), left)
        return recomputed(self._alone, x, kept)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Applies base and update, in one product with W + ΔW if P and Q cost more.

        Not under autocast, which would round the sum to half precision: a small ΔW would be lost.
        """
        if self.factored or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return recomputed(self._with_base, x, self.kept_outputs(x, rescale=True))

    def _alone(self, x: Tensor, kept: Tensor | None) -> Tensor:
        return project(self.base, x, self.delta_weight(kept))

    def _with_base(self, x: Tensor, kept: Tensor | None) -> Tensor:
        weight, bias = widened(matrix(self.base)), self.base.bias
        bias = None if bias is None else widened(bias)
        return project(self.base, self.cast(x), weight + self.delta_weight(kept), bias).to(x.dtype)

    def singular_values(self) -> Float[Tensor, " k"]:
        return product_singular_values(*self.factors()) if self.factored else super().singular_values()
