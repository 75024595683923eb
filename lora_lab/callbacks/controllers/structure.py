"""What else has to change when adapters lose, slice, extend or share tensors in the middle of a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.protocols import Growable, Prunable


@torch.no_grad()
def select_components(trainer: L.Trainer, adapter: Prunable, index: Int[Tensor, " k"]) -> None:
    """Makes an adapter consist of some of its components, with their gradients and optimizer state.

    Args:
        trainer: gives the optimizers.
        adapter: whose components.
        index: the components, in ascending order.
    """
    for parameter, axis in adapter.rank_components():
        # As long as that already: nothing is left out, or the adapter that shares the tensor has been here.
        if parameter.shape[axis] != len(index):
            _change(trainer, parameter, partial(torch.index_select, dim=axis, index=index))
    adapter.select_components(index)


@torch.no_grad()
def extend_components(
    trainer: L.Trainer, adapter: Growable, count: int, init: Mapping[str, Tensor] | None = None
) -> None:
    """Adds components to an adapter; their gradients and optimizer state are zero.

    Args:
        trainer: gives the optimizers.
        adapter: what grows.
        count: how many.
        init: see `Growable.extend_components`.
    """
    for parameter, axis in adapter.rank_components():
        padding = [0] * (2 * (parameter.ndim - axis) - 1) + [count]
        _change(trainer, parameter, partial(F.pad, pad=padding))
    adapter.extend_components(count, init)


def _change(trainer: L.Trainer, parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the gradient of a tensor, and all state of its own shape that optimizers have of it."""
    states = [optimizer.state.get(parameter, {}).values() for optimizer in trainer.optimizers]
    for tensor in [parameter.grad, *(value for state in states for value in state)]:
        if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
            tensor.data = change(tensor)


def structure_changed(trainer: L.Trainer, adapters: AdapterSet) -> None:
    """Fits optimizer and DDP to the tensors that the adapters have now.

    To be called in every process, between two steps: in `on_train_batch_end` the last graph is gone.

    The optimizer forgets tensors that are trained no more. Its groups stay, even empty ones, for the schedule
    knows them by their number. Its state of sliced and extended tensors has changed with them, see above.
    Callbacks with a method `structure_changed` are called: what they have measured may hold no longer.
    """
    trained = {id(parameter) for parameter in adapters.trainable_parameters()}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in trained:
                    optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in trained]
    for callback in getattr(trainer, "callbacks", ()):
        if changed := getattr(callback, "structure_changed", None):
            changed()
    strategy: Any = trainer.strategy
    if isinstance(strategy.model, DistributedDataParallel):
        _wrap_again(strategy)


def _wrap_again(strategy: Any) -> None:
    """Puts a new DDP wrapper around a strategy's module: the old one knows the former tensors and shapes."""
    old = strategy.model
    # Both hold the node that gathers a tensor's gradient, which remembers the tensor's shape while it lives.
    del old.logger, old.reducer
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()
