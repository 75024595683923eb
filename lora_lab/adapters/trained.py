"""Fully trained modules in place of their frozen originals: full fine-tuning, and task heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lora_lab.adapters.base import Adapter, SpecT
from lora_lab.adapters.maps import LinearMap, is_linear, matrix
from lora_lab.linalg.rank import singular_values, widened
from lora_lab.linalg.updates import Update


class TrainedCopy(Adapter[SpecT]):
    """A fully trained copy of a module, in place of its frozen original, which is kept for `remove`.

    On a base in half precision the trained tensors are float32, as bfloat16 has too few digits for small
    steps of a weight. Every call casts them to the base's types: the module computes what the merged one
    will.
    """

    trained: nn.Module
    """A module of the base's class."""

    def __init__(self, base: nn.Module, copies: dict[int, Any]):
        super().__init__(base)
        # One `copies` (deepcopy's memo) for all sites keeps tied parameters tied.
        self.trained = copy.deepcopy(base, copies).requires_grad_(True)
        for parameter in self.trained.parameters():
            parameter.data = widened(parameter.data)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether the module owns a floating parameter."""
        return any(p.is_floating_point() for p in module.parameters(recurse=False))

    @property
    def lender(self) -> nn.Module:
        """The trained copy: model code that reads a weight must see the one in use."""
        return self._modules["trained"]  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        """Looks up a name here, then in the copy; trained tensors are cast to the base's type."""
        found = super().__getattr__(name)
        parts = self.__dict__["_modules"]
        if isinstance(found, nn.Parameter) and found.dtype != (own := getattr(parts["base"], name)).dtype:
            return found.to(own.dtype)
        return found

    def narrowed(self) -> dict[str, Tensor]:
        """Returns the trained tensors whose type is not the base's, by name, cast to it."""
        base = dict(self.base.named_parameters())
        return {
            name: tensor.to(base[name].dtype)
            for name, tensor in self.trained.named_parameters()
            if tensor.dtype != base[name].dtype
        }

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Runs the trained copy."""
        if narrowed := self.narrowed():
            return functional_call(self.trained, narrowed, arguments, options)
        return self.trained(*arguments, **options)

    @torch.no_grad()
    def merged_module(self) -> nn.Module:
        """Returns the trained copy, in the base's types."""
        narrowed = self.narrowed()
        if not narrowed:
            return self.trained
        merged = copy.deepcopy(self.trained)
        for name, tensor in narrowed.items():
            merged.get_parameter(name).data = tensor
        return merged

    def decay_exempt(self) -> list[nn.Parameter]:
        """Returns biases and the scales of norms."""
        return [parameter for parameter in self.trained.parameters() if parameter.ndim < 2]

    def singular_values(self) -> Float[Tensor, " k"] | None:
        """Returns the singular values of what training changed, for a linear map."""
        if not is_linear(self.base):
            return None
        return singular_values(widened(matrix(self.trained)) - widened(matrix(self.base)))

    @torch.no_grad()
    def update(self) -> Update:
        """Returns the update of a linear map."""
        if not is_linear(self.base):
            return super().update()
        base, trained = self.base, cast(LinearMap, self.trained)
        shift = (
            None if base.bias is None or trained.bias is None else widened(trained.bias) - widened(base.bias)
        )
        return Update.of_matrix(widened(trained.weight) - widened(base.weight), shift)

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the module's tensors under its own names."""
        return dict(self.trained.state_dict())

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.trained.load_state_dict(dict(tensors))
