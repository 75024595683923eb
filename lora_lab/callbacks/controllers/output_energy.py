"""How much each adapter adds to the outputs of its module, over a number of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as distributed
from jaxtyping import Float64
from torch import Tensor, nn

from lora_lab.training.module import FineTuner


@torch.no_grad()
def output_energy(
    module: FineTuner, adapters: Mapping[str, Any], batches: Iterable[Mapping[str, Tensor]]
) -> Float64[Tensor, " adapters"]:
    """Returns Σ_x ‖ΔW x‖² of each adapter, over all real tokens x of all processes' batches.

    Padding, as `attention_mask` (batch, time) tells it, counts where inputs are (batch, time, in) as nothing.
    The model is evaluated, and neither its mode nor its state nor any random generator is changed by it.

    Args:
        module: calls the adapted model.
        adapters: they offer `delta_output`, see `Droppable`.
        batches: this process's batches, on its device.
    """
    sums = dict.fromkeys(adapters, torch.zeros((), dtype=torch.float64, device=module.device))
    mask: Tensor | None = None

    def measure(path: str, adapter: Any, x: Tensor) -> None:
        squares = adapter.delta_output(adapter.cast(x)).double().square()
        if mask is not None and squares.ndim == 3 and squares.shape[:2] == mask.shape:
            squares = squares * mask.unsqueeze(-1)
        sums[path] = sums[path] + squares.sum()

    hooks = [
        # The loop's variables are bound as defaults: the hook runs when they have moved on.
        adapter.register_forward_pre_hook(lambda own, inputs, path=path: measure(path, own, inputs[0]))
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
    total = torch.stack(list(sums.values()))
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total


@contextmanager
def evaluated(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluates a model inside, and leaves no trace of it: neither in modes nor in random generators."""
    modes = {part: part.training for part in model.modules()}
    cuda = [device] if device.type == "cuda" else []
    # A compiled model would not call hooks that it was compiled without.
    with torch.random.fork_rng(cuda), torch.compiler.set_stance("force_eager"):
        try:
            model.eval()
            yield
        finally:
            for part, training in modes.items():
                part.training = training
