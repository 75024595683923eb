"""What else has to change when adapters lose, slice or share tensors in the middle of a fit."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.nn.parallel import DistributedDataParallel

from lora_lab.adapters import AdapterSet


def structure_changed(trainer: L.Trainer, adapters: AdapterSet) -> None:
    """Fits optimizer and DDP to the tensors that the adapters have now.

    To be called in every process, between two steps: in `on_train_batch_end` the last graph is gone.

    The optimizer forgets tensors that are trained no more. Its groups stay, even empty ones, for the schedule
    knows them by their number. Slicing its state is up to whoever sliced the tensors.
    """
    trained = {id(parameter) for parameter in adapters.trainable_parameters()}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in trained:
                    optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in trained]
    strategy: Any = trainer.strategy
    if isinstance(strategy.model, DistributedDataParallel):
        _wrap_again(strategy)


def _wrap_again(strategy: Any) -> None:
    """Puts a new DDP wrapper around a strategy's module: the old one knows tensors and shapes of before."""
    old = strategy.model
    # Both hold the node that gathers a tensor's gradient, which remembers the tensor's shape while it lives.
    del old.logger, old.reducer
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()
