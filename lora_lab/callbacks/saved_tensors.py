"""Counting exactly what autograd keeps between forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from lora_lab.linalg.rebuild import observer


class Holder:
    """Holds one saved tensor, and is freed with the graph node that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedTensors:
    """Records every tensor that autograd saves between `start` and `stop`.

    Counting everything that is ever saved would be too much, since graphs that end within the forward pass
    free their tensors. So each tensor is held only by its node, and `count` counts those still alive.
    """

    def __init__(self) -> None:
        self._holders: list[weakref.ref[Holder]] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def start(self) -> None:
        """Starts to record."""
        self._hooks.__enter__()

    def stop(self) -> None:
        """Stops recording; saved tensors stay usable for the backward pass."""
        self._hooks.__exit__()

    def count(self, known: Iterable[Tensor] = ()) -> int:
        """Returns the bytes of the distinct storages that are saved at present.

        Args:
            known: tensors that are in memory anyway, such as parameters and buffers, and do not count.
        """
        alive = [holder.tensor for reference in self._holders if (holder := reference()) is not None]
        storages = {_place(tensor): tensor.untyped_storage().nbytes() for tensor in alive}
        for tensor in known:
            storages.pop(_place(tensor), None)
        return sum(storages.values())

    def _pack(self, tensor: Tensor) -> Holder:
        # Detached, since a node that saves its own output would otherwise never be freed.
        holder = Holder(tensor.detach())
        self._holders.append(weakref.ref(holder))
        return holder


@observer
def _unpack(holder: Holder) -> Tensor:
    return holder.tensor


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
