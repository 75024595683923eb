"""What else has to change when adapters lose, slice, extend or share tensors during training."""

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
    """Keeps only some components of an adapter, with their gradients and optimizer state.

    Args:
        trainer: gives the optimizers.
        adapter: the adapter.
        index: the components, in ascending order.
    """
    for parameter, axis in adapter.rank_components():
        # It has this length already: nothing is removed, or an adapter that shares the tensor has done it.
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
        adapter: the adapter.
        count: how many.
        init: see `Growable.extend_components`.
    """
    for parameter, axis in adapter.rank_components():
        padding = [0] * (2 * (parameter.ndim - axis) - 1) + [count]
        _change(trainer, parameter, partial(F.pad, pad=padding))
    adapter.extend_components(count, init)


def _change(trainer: L.Trainer, parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the gradient of a tensor, and all optimizer state of the tensor's shape."""
    states = [optimizer.state.get(parameter, {}).values() for optimizer in trainer.optimizers]
    for tensor in [parameter.grad, *(value for state in states for value in state)]:
        if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
            tensor.data = change(tensor)


def structure_changed(trainer: L.Trainer, adapters: AdapterSet) -> None:
    """Updates optimizer and DDP to the adapters' present tensors.

    Call it in every process, between two steps: in `on_train_batch_end` the last graph is freed.

    The optimizer forgets tensors that are no longer trained. Its groups stay, even empty ones, since the
    schedule uses their index. Its state of sliced and extended tensors has changed with them, see above.
    Callbacks with a method `structure_changed` are called, since their measurements may be outdated.
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
    """Puts a new DDP wrapper around a strategy's module: the old one has the former tensors and shapes."""
    old = strategy.model
    # Both refer to the node that accumulates a tensor's gradient, which keeps the tensor's former shape.
    del old.logger, old.reducer
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()
