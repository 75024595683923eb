"""DoRA: magnitude and direction of a weight trained separately (Liu et al. 2024, arXiv:2402.09353).

    V  = W + s B A                     s = alpha / rank, or alpha / √rank with rslora
    W' = diag(g) V,  g = m / ‖V‖       one magnitude per row of W, an output (dora_axis: out)
    W' = V diag(g)                     one magnitude per column of W, an input (dora_axis: in)

    A   (rank, in)      learned; U(±1/√in) at the start
    B   (out, rank)     learned; zeros at the start
    m   (out,) or (in,) learned; ‖W‖ at the start, computed like ‖V‖: g is exactly 1, so W' = W

The authors' code and PEFT have one magnitude per output; the paper's text, read literally, one per input. The
bias is never scaled. Norms are computed in float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import PeftLayout
from lora_lab.adapters.families.low_rank import (
    ScaledSpec,
    in_pefts_shapes,
    read_lora_config,
    write_lora_config,
)
from lora_lab.adapters.families.magnitude import MagnitudeAdapter, gains
from lora_lab.adapters.maps import LinearMap, is_convolution, matrix, mix, pointwise, project, sizes
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.kaiming import kaiming_uniform
from lora_lab.linalg.norms import SMALLEST_NORM, edited_row_norms
from lora_lab.linalg.rank import widened


@dataclass
class DoRASpec(ScaledSpec):
    """DoRA's options; the paper uses rank 16 or 32, alpha = 2 · rank and dropout 0.05 on all linear maps."""

    method: str = "dora"

    dora_axis: Literal["out", "in"] = "out"
    """What has a magnitude: each output (as in PEFT) or each input (which PEFT cannot open)."""

    detach_norm: bool = True
    """Treat ‖V‖ as a constant in the backward pass, as in the paper's section 4.3."""


def _write_config(spec: DoRASpec) -> dict[str, Any]:
    # PEFT has no magnitudes per input: without a type it refuses the folder instead of misreading it.
    foreign = {"peft_type": None} if spec.dora_axis == "in" else {}
    return {**write_lora_config(spec), "use_dora": True, **foreign}


class DoRA(MagnitudeAdapter[DoRASpec]):
    """The adapter of one linear map."""

    weight_square: Tensor
    convolves = True
    spared_from_decay = ("m",)
    trained_faster = ("B", "m")

    Spec = DoRASpec
    family = "low-rank"
    paper = "Liu et al. 2024, arXiv:2402.09353"
    peft = PeftLayout(
        "LORA",
        tensors={"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"},
        config=_write_config,
        spec=lambda config: read_lora_config(config, "dora"),
    )

    def __init__(self, base: LinearMap, spec: DoRASpec):
        super().__init__(base)
        self.spec, self.scale = spec, spec.scale
        if spec.dora_axis == "in" and is_convolution(base):
            raise IncompatibleError(
                "adapter.dora_axis: in cannot scale a convolution's inputs, which overlap in patches; use "
                "dora_axis: out, or remove the convolution from targets."
            )
        self.axis = 1 if spec.dora_axis == "out" else 0  # the axis that a norm sums over
        self.A = nn.Parameter(kaiming_uniform(spec.rank, self.in_features, dtype=self.dtype))
        self.B = nn.Parameter(torch.zeros(self.out_features, spec.rank, dtype=self.dtype))
        # Constant, so it is computed once; a norm then costs rank products per row.
        square = widened(matrix(base).detach()).square().sum(self.axis)
        self.register_buffer("weight_square", square, persistent=False)
        self.m = nn.Parameter(square.clamp(min=SMALLEST_NORM**2).sqrt())
        self.dropout = nn.Dropout(spec.dropout)

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: DoRASpec) -> int:
        out, columns = sizes(module)
        return spec.rank * (out + columns) + (out if spec.dora_axis == "out" else columns)

    def gain(
        self, weight: Float[Tensor, "out in"], weight_square: Float[Tensor, " k"]
    ) -> Float[Tensor, " k"]:
        """Returns g = m / ‖W + s B A‖, the norms taken along the axis of the spec."""
        # Autocast would compute the products below in half precision, in which terms of the norms cancel.
        learns = torch.is_grad_enabled() and not self.spec.detach_norm
        with torch.set_grad_enabled(learns), torch.autocast(weight.device.type, enabled=False):
            weight, left = widened(weight), self.scale * self.B
            rows, L, R = (weight, left, self.A) if self.axis == 1 else (weight.T, self.A.T, left.T)
            norm = edited_row_norms(weight_square, rows @ R.T, L, R @ R.T)
        return gains(self.m, norm)

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        gain = self.gain(weight, widened(weight).square().sum(self.axis))
        return gain.unsqueeze(self.axis) * (weight + self.scale * (self.B @ self.A))

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Applies the adapted map; dropout acts on everything except the base's product."""
        gain = self.gain(matrix(self.base), self.weight_square)
        if self.axis == 1:
            return self.scaled(x, gain, self.scale * self.B, self.A)
        return self._scaled_inputs(x, gain)

    def _scaled_inputs(self, x: Tensor, gain: Tensor) -> Tensor:
        """Returns W (x + (g − 1) ⊙ x̃) + b + s B A (g ⊙ x̃), which is V (g ⊙ x) + b without dropout."""
        wide = self.cast(x)
        dropped = self.dropout(wide)
        y = self.base((wide + (gain - 1) * dropped).to(x.dtype))
        update = mix(self.base, project(self.base, gain * dropped, self.A) * self.scale, self.B)
        return (y + update).to(y.dtype)

    def without_gradient_at_start(self) -> tuple[str, ...]:
        return ("A",)

    def peft_tensors(self) -> dict[str, Tensor]:
        tensors = in_pefts_shapes(self.base, super().peft_tensors())
        if is_convolution(self.base):
            tensors["lora_magnitude_vector"] = pointwise(self.base, self.m).unsqueeze(0)
        return tensors
