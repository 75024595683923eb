"""What training keeps in memory, in megabytes of 1e6 bytes.

    memory/trainable_megabytes           trained tensors, task heads included
    memory/optimizer_megabytes           the optimizer's state
    memory/gradient_megabytes            gradients of the trained tensors
    memory/saved_activation_megabytes    what the forward pass of the run's first batch kept for backward
    memory/peak_megabytes                most memory in use at any moment so far

All are of the first process. Saved activations are counted exactly, once, and stand in every row from then
on; under torch.compile they are left out, as counting would change what is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from torch import Tensor

from lora_lab.adapters import AdapterSet
from lora_lab.callbacks.saved_tensors import SavedTensors

MEGABYTE = 1e6


def size(tensors: Iterable[Tensor | None]) -> int:
    """Returns the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def optimizer_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Returns the bytes of the optimizers' state tensors."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return size(value for state in states for value in state.values() if isinstance(value, Tensor))


def resident_peak_bytes() -> int:
    """Returns the most memory that this process has had resident at any moment since it started."""
    if sys.platform == "linux":
        # Not getrusage: its mark is inherited from the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether any part of a module runs under torch.compile."""
    optimized = torch._dynamo.OptimizedModule
    parts = module.modules()
    return any(part._compiled_call_impl is not None or isinstance(part, optimized) for part in parts)


class MemoryStatistics(L.Callback):
    """Logs the statistics in the rows of `train/loss`.

    Args:
        adapters: the run's adapters.
    """

    def __init__(self, adapters: AdapterSet):
        self.adapters = adapters
        self.saved_activation_bytes: int | None = None
        """Bytes kept for backward by the first batch; None before it, and under torch.compile."""
        self._probe: SavedTensors | None = None
        self._probes = True
        self._due = False
        self._device = torch.device("cpu")

    @property
    def peak_kind(self) -> str:
        """What `peak_megabytes` counts: `cuda_allocated` tensors, or the `process_resident` set on a CPU."""
        return "cuda_allocated" if self._device.type == "cuda" else "process_resident"

    @property
    def peak_megabytes(self) -> float:
        """Most memory in use so far: on a GPU since the fit began, on a CPU since the process began."""
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else resident_peak_bytes()
        return peak / MEGABYTE

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at what is there, and starts the GPU's peak afresh: runs in one process must not share it."""
        self._device = pl_module.device
        self._probes = not is_compiled(pl_module)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts to count at the first batch."""
        if self.saved_activation_bytes is None and self._probes:
            self._probe = SavedTensors()
            self._probe.start()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Counts what is alive between forward and backward."""
        if self._probe is not None:
            self._probe.stop()
            self.saved_activation_bytes = self._probe.count([*pl_module.parameters(), *pl_module.buffers()])
            self._probe = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leaves no hooks behind if the first forward pass fails."""
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Asks whether this step's numbers are logged; the optimizer's state is whole only after it."""
        self._due = pl_module.logging_due()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs."""
        if not self._due:
            return
        self._due = False
        trained = self.adapters.trainable_parameters()
        counted = {
            "trainable": size(trained),
            "optimizer": optimizer_bytes(trainer.optimizers),
            "gradient": size(parameter.grad for parameter in trained),
            "saved_activation": self.saved_activation_bytes,
        }
        known = {f"memory/{name}_megabytes": n / MEGABYTE for name, n in counted.items() if n is not None}
        pl_module.log_dict(known | {"memory/peak_megabytes": self.peak_megabytes})

    def state_dict(self) -> dict[str, Any]:
        """Returns the count: a resumed run logs its own first batch's, and counts no other."""
        return {"saved_activation_bytes": self.saved_activation_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.saved_activation_bytes = state_dict["saved_activation_bytes"]
