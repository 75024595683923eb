"""The inputs of adapters in some batches, and how much each adapter adds to the outputs of its module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as distributed
from jaxtyping import Float64
from torch import Tensor, nn

from lora_lab.adapters import Adapter
from lora_lab.data import TaskData
from lora_lab.errors import ConfigError
from lora_lab.training.module import FineTuner

Measure = Callable[[str, Adapter, Tensor, Tensor | None], None]
"""Gets path, adapter, its input and the flags of real tokens (batch, time); None if all inputs count."""


def training_sample(trainer: Any, ratio: float, controller: str) -> Iterator[Mapping[str, Tensor]]:
    """Returns this process's batches of a part of the training data, on its device.

    Args:
        trainer: gives data and device.
        ratio: size of the part over that of the whole, in (0, 1].
        controller: id of the controller, for the message.

    Raises:
        ConfigError: if the run's module is not a FineTuner, or its data are not TaskData.
    """
    data, module = getattr(trainer, "datamodule", None), trainer.lightning_module
    if not isinstance(module, FineTuner):
        raise ConfigError(
            f"controllers.{controller}: calls the model on batches, but a {type(module).__name__} has no "
            "common way to do this. Train with lora_lab.FineTuner."
        )
    if not isinstance(data, TaskData):
        raise ConfigError(
            f"controllers.{controller}: samples the training data, and there are none. Fit with the data "
            "module that lora_lab.data.build_data returns."
        )
    return map(trainer.strategy.batch_to_device, data.training_sample(ratio))


@torch.no_grad()
def over_inputs(
    module: FineTuner,
    adapters: Mapping[str, Adapter],
    batches: Iterable[Mapping[str, Tensor]],
    measure: Measure,
) -> None:
    """Calls `measure` for each adapter and batch.

    The model is evaluated; its mode, its state and all random generators are unchanged afterwards.

    Args:
        module: calls the adapted model.
        adapters: by path.
        batches: this process's batches, on its device.
        measure: gets the inputs of an adapter.
    """
    mask: Tensor | None = None

    def seen(path: str, adapter: Any, x: Tensor) -> None:
        # Padding is known where inputs are (batch, time, in).
        known = mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape
        measure(path, adapter, x, mask if known else None)

    hooks = [
        # The loop's variables are bound as defaults, since the hook runs when they have other values.
        adapter.register_forward_pre_hook(lambda own, inputs, path=path: seen(path, own, inputs[0]))
        for path, adapter in adapters.items()
    ]
    try:
        with evaluated(module.model, module.device):
            for batch in batches:
                mask = batch.get("attention_mask")
                module(batch)
    finally:
        for hook in hooks:
            hook.remove()


def output_energy(
    module: FineTuner, adapters: Mapping[str, Adapter], batches: Iterable[Mapping[str, Tensor]]
) -> Float64[Tensor, " adapters"]:
    """Returns Σ_x ‖ΔW x‖² of each adapter, over all real tokens x of all processes' batches.

    Args:
        module: calls the adapted model.
        adapters: they have `delta_output`, see `Droppable`.
        batches: this process's batches, on its device.
    """
    sums = dict.fromkeys(adapters, torch.zeros((), dtype=torch.float64, device=module.device))

    def measure(path: str, adapter: Adapter, x: Tensor, mask: Tensor | None) -> None:
        squares = adapter.delta_output(adapter.cast(x)).double().square()
        sums[path] = sums[path] + (squares if mask is None else squares * mask.unsqueeze(-1)).sum()

    over_inputs(module, adapters, batches, measure)
    total = torch.stack(list(sums.values()))
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total


@contextmanager
def evaluated(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluates a model inside the context; modes and random generators are restored."""
    modes = {part: part.training for part in model.modules()}
    cuda = [device] if device.type == "cuda" else []
    # A compiled model would not call hooks that were registered later.
    with torch.random.fork_rng(cuda), torch.compiler.set_stance("force_eager"):
        try:
            model.eval()
            yield
        finally:
            for part, training in modes.items():
                part.training = training
