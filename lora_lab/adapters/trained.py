"""Modules trained whole in place of their frozen originals: full fine-tuning, and task heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import BorrowingAdapter
from lora_lab.adapters.maps import is_linear
from lora_lab.linalg.rank import widened


class TrainedCopy(BorrowingAdapter):
    """A whole module trained in place of its frozen original, which is kept aside for `remove`."""

    base: Any
    trained: Any
    """A module of the base's class."""

    def __init__(self, base: nn.Module, copies: dict[int, Any]):
        super().__init__(base)
        # One `copies` (deepcopy's memo) for all sites keeps tied parameters tied.
        self.trained = copy.deepcopy(base, copies).requires_grad_(True)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether the module owns a floating parameter."""
        return any(p.is_floating_point() for p in module.parameters(recurse=False))

    def __getattr__(self, name: str) -> Any:
        """Lends the trained copy's attributes: model code that looks at a weight must see the one in use."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(self._modules["trained"], name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Runs the trained copy."""
        return self.trained(*arguments, **options)

    def merged_module(self) -> nn.Module:
        """Returns the trained copy."""
        return self.trained

    def decay_exempt(self) -> list[nn.Parameter]:
        """See `Adapter.decay_exempt`: biases and the scales of norms."""
        return [parameter for parameter in self.trained.parameters() if parameter.ndim < 2]

    def singular_values(self) -> Float[Tensor, " k"] | None:
        """See `Adapter.singular_values`: those of what training changed, for a linear map."""
        if not is_linear(self.base):
            return None
        return torch.linalg.svdvals(widened(self.trained.weight) - widened(self.base.weight))

    def peft_tensors(self) -> dict[str, Tensor]:
        """See `Adapter.peft_tensors`: the module's own names."""
        return dict(self.trained.state_dict())

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Adapter.load_peft_tensors`."""
        self.trained.load_state_dict(dict(tensors))


class TrainedHead(TrainedCopy):
    """A module trained whole beside adapters, in float32 where the base is in half precision.

    It takes and gives the base's type: bfloat16 has too few digits for the steps of its weights, not for its
    inputs.
    """

    def __init__(self, base: nn.Module, copies: dict[int, Any]):
        super().__init__(base, copies)
        self.narrow: torch.dtype = next(self.trained.parameters()).dtype
        self.wide: torch.dtype = torch.promote_types(self.narrow, torch.float32)
        self.trained.to(self.wide)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Runs the trained module in its own type."""
        widen = partial(_retyped, old=self.narrow, new=self.wide)
        named = {name: widen(value) for name, value in options.items()}
        output = self.trained(*map(widen, arguments), **named)
        return _retyped(output, self.wide, self.narrow)

    def merged_module(self) -> nn.Module:
        """Returns a copy of the trained module in the base's type."""
        return copy.deepcopy(self.trained).to(self.narrow)


def _retyped(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return value.to(new) if isinstance(value, Tensor) and value.dtype == old else value
