"""Tensors that are computed when their values are needed, so that a whole model never has to be in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor


class LazyTensor(Tensor):
    """Shape and type of a tensor, and how its values are computed; operations on it are lazy too.

    Nothing is kept: each call of `now` computes again.
    """

    make: Callable[[], Tensor]

    @staticmethod
    def of(make: Callable[[], Tensor], shape: Iterable[int], dtype: torch.dtype) -> LazyTensor:
        """Returns a tensor of this shape and type whose values `make` returns."""
        lazy = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(LazyTensor)
        lazy.make = make
        return lazy

    def now(self) -> Tensor:
        """Returns the values."""
        with torch.no_grad():
            return self.make()

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Applies an operation to shape and type, and to the values only when they are needed."""
        options = options or {}
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*_each(_shape_of, arguments), **_each(_shape_of, options))

        def make() -> Any:
            return function(*_each(now, arguments), **_each(now, options))

        if isinstance(found, Tensor):
            return LazyTensor.of(make, found.shape, found.dtype)
        if isinstance(found, tuple | list) and found and all(isinstance(part, Tensor) for part in found):
            return [
                LazyTensor.of(lambda number=number: make()[number], part.shape, part.dtype)  # type: ignore[misc]
                for number, part in enumerate(found)
            ]
        return found


def now(tensor: Any) -> Any:
    """Returns a tensor with its values; other values are returned unchanged."""
    return tensor.now() if isinstance(tensor, LazyTensor) else tensor


def _shape_of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.as_subclass(Tensor) if isinstance(value, LazyTensor) else value.to("meta")


def _each(change: Callable[[Any], Any], values: Any) -> Any:
    """Applies a function to every value in lists, tuples and mappings of arguments."""
    if isinstance(values, Mapping):
        return {name: _each(change, value) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_each(change, value) for value in values)
    return change(cast(Any, values))
