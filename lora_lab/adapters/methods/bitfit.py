"""BitFit: train only the biases (Ben Zaken et al. 2021, arXiv:2106.10199).

    b' = b + δ       y = base(x) + δ

    delta   (width,)   learned; zeros at the start, so b' = b

Any module whose last step adds a bias can be edited: linear maps and layer norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union, cast  # noqa: UP035

import torch
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.maps import is_linear, sizes
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.linalg.rank import widened
from lora_lab.linalg.updates import Update


@dataclass
class BitFitSpec(AdapterSpec):
    """BitFit has no options of its own; `targets` and `layers` may restrict it."""

    method: str = "bitfit"

    targets: Union[str, list[str]] = "all"  # noqa: UP007
    """Where adapters are placed; `all` means every linear map and layer norm that has a bias."""


class Biased(nn.Module):
    """A module that `BitFit.accepts`, of any class; for annotations."""

    weight: Tensor
    bias: Tensor


class BitFit(Adapter[BitFitSpec]):
    """The shift of one module's bias."""

    base: Biased

    Spec = BitFitSpec
    family = "baseline"
    paper = "Ben Zaken et al. 2021, arXiv:2106.10199"
    peft = PeftLayout(None, tensors={"bitfit_delta": "delta"})

    def __init__(self, base: Biased, spec: BitFitSpec):
        super().__init__(base)
        self.delta = nn.Parameter(torch.zeros_like(widened(base.bias), device="cpu"))  # (width,)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether the module is a linear map or layer norm with a bias."""
        known = is_linear(module) or isinstance(module, nn.LayerNorm)
        return known and getattr(module, "bias", None) is not None

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: BitFitSpec) -> int:
        return len(cast(Biased, module).bias)

    @property
    def bias(self) -> Tensor:
        """b', for models that read it instead of calling the module; see `LinearAdapter.weight`."""
        return (widened(self.base.bias) + self.delta).to(self.base.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Shifts the base's output."""
        y: Tensor = self.base(x)
        return (y + self.delta).to(y.dtype)

    @torch.no_grad()
    def update(self) -> Update:
        """Returns the update, which has only a bias."""
        if isinstance(self.base, nn.LayerNorm):
            return super().update()
        rows, columns = self.base.weight.shape
        return Update(self.delta.new_zeros(rows, 0), self.delta.new_zeros(0, columns), self.delta.detach())

    @torch.no_grad()
    def merged_module(self) -> nn.Module:
        base = self.base
        if isinstance(base, nn.LayerNorm):
            merged: nn.Module = nn.LayerNorm(base.normalized_shape, base.eps, device="meta")
        else:
            out, columns = sizes(base)
            merged = nn.Linear(columns, out, device="meta")
        merged.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        merged.bias = nn.Parameter(self.bias, requires_grad=False)
        return merged.train(self.training)
