"""The components of all adapters of a model, arranged so that few kernels measure them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_lab.adapters.protocols import Prunable


@dataclass(frozen=True)
class Stack:
    """Tensors of one name and shape, one for each adapter.

    Attributes:
        paths: the adapters.
        name: the tensors' attribute.
        shape: shape of each of them.
        axis: the one that counts components.
        places: (paths, rank), the number in the model of each component.
    """

    paths: list[str]
    name: str
    shape: torch.Size
    axis: int
    places: Int[Tensor, "paths rank"]


class ComponentStacks:
    """The trained tensors that hold components, as one row of numbers, equal shapes side by side.

    Components are numbered through the model, adapter after adapter.

    Args:
        adapters: by path.

    Attributes:
        sizes: number of components of each adapter.
        count: number of all components.
    """

    def __init__(self, adapters: Mapping[str, Prunable]):
        self.adapters = dict(adapters)
        self.sizes = [len(adapter.kept) for adapter in adapters.values()]
        self.count = sum(self.sizes)
        found = defaultdict(list)
        first = 0
        for path, adapter in adapters.items():
            for name, axis in adapter.components.items():
                if isinstance(tensor := getattr(adapter, name), nn.Parameter):
                    found[name, tensor.shape, axis].append((path, first))
            first += len(adapter.kept)
        self.stacks = [
            Stack(
                [path for path, _ in members],
                name,
                shape,
                axis,
                torch.tensor([[first] for _, first in members]) + torch.arange(shape[axis]),
            )
            for (name, shape, axis), members in found.items()
        ]

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterates over `path.name` and tensor, in the row's order."""
        for stack in self.stacks:
            for path in stack.paths:
                yield f"{path}.{stack.name}", getattr(self.adapters[path], stack.name)

    def tensors(self) -> list[nn.Parameter]:
        """Returns the tensors in the row's order."""
        return [tensor for _, tensor in self.named()]

    def parts(self, row: Float[Tensor, " numbers"]) -> Iterator[tuple[Stack, Float[Tensor, "paths rank k"]]]:
        """Splits a row: every stack with the k numbers of each of its components."""
        lengths = [len(stack.paths) * stack.shape.numel() for stack in self.stacks]
        for stack, part in zip(self.stacks, row.split(lengths), strict=True):
            stacked = part.view(-1, *stack.shape).movedim(stack.axis + 1, 1)
            yield stack, stacked.unsqueeze(-1).flatten(2)

    def by_name(self, row: Float[Tensor, " numbers"]) -> dict[str, Tensor]:
        """Returns a row's numbers by `path.name`, in the tensors' shapes."""
        named = list(self.named())
        parts = row.split([tensor.numel() for _, tensor in named])
        return {name: part.view(tensor.shape) for (name, tensor), part in zip(named, parts, strict=True)}

    def row(self, named: Mapping[str, Tensor]) -> Float[Tensor, " numbers"]:
        """Returns the row for a result of `by_name`."""
        return torch.cat([named[name].flatten() for name, _ in self.named()])
