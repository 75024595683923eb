"""What training keeps in memory, in megabytes of 1e6 bytes.

    memory/base_megabytes                frozen model: parameters and buffers without those of adapters
    memory/trainable_megabytes           trained tensors, task heads included
    memory/optimizer_megabytes           the optimizer's state
    memory/gradient_megabytes            gradients of the trained tensors
    memory/saved_activation_megabytes    what the forward pass of one batch kept for backward
    memory/peak_megabytes                largest memory in use so far

With several processes each counts its own: these are the largest numbers, and `memory/all/…` the sums. Saved
activations are counted exactly, at the run's first batch and at the first one after a controller has changed
the adapters' structure, and are in every row from then on; under torch.compile they are left out, as counting
would change what is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
import torch.distributed as distributed
from torch import Tensor

from lora_lab.adapters import AdapterSet
from lora_lab.callbacks.saved_tensors import SavedTensors
from lora_lab.callbacks.step_rows import StepRows

MEGABYTE = 1e6


def size(tensors: Iterable[Tensor | None]) -> int:
    """Returns the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def optimizer_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Returns the bytes of the optimizers' state tensors."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return size(value for state in states for value in state.values() if isinstance(value, Tensor))


def resident_peak_bytes() -> int:
    """Returns the largest resident memory of this process since it started."""
    if sys.platform == "linux":
        # Not getrusage, whose maximum is inherited from the parent process.
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


def base_tensors(adapters: AdapterSet) -> list[Tensor]:
    """Returns parameters and buffers of the adapted model that are in no adapter and no trained head."""
    parts = set(adapters.model.modules())
    for adapter in adapters.everything():
        parts -= set(adapter.modules()) - set(adapter.base.modules())
    held = [t for part in parts for t in [*part._parameters.values(), *part._buffers.values()]]
    return list({id(tensor): tensor for tensor in held if tensor is not None}.values())


def over_processes(megabytes: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Returns what is logged for this process's numbers: the largest of all processes, and the sums."""
    if not distributed.is_initialized():
        return {f"memory/{name}_megabytes": value for name, value in megabytes.items()}
    most = torch.tensor(list(megabytes.values()), dtype=torch.float64, device=device)
    total = most.clone()
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    distributed.all_reduce(total)
    found = dict[str, float]()
    for prefix, values in {"memory/": most, "memory/all/": total}.items():
        found |= {f"{prefix}{n}_megabytes": v for n, v in zip(megabytes, values.tolist(), strict=True)}
    return found


class MemoryStatistics(StepRows):
    """Logs the statistics in the rows of `train/loss`.

    Args:
        adapters: the run's adapters.
    """

    def __init__(self, adapters: AdapterSet):
        self.adapters = adapters
        self.saved_activation_bytes: int | None = None
        """Bytes that the last counted batch kept for backward; None before the first, and under
        torch.compile."""
        self.base_bytes = 0
        """Bytes of the frozen model; 0 before the fit."""
        self._again = False  # whether the structure has changed since the count
        self._probe: SavedTensors | None = None
        self._probes = True
        self._device = torch.device("cpu")

    @property
    def peak_kind(self) -> str:
        """What `peak_megabytes` counts: `cuda_allocated` tensors, or the `process_resident` set on a CPU."""
        return "cuda_allocated" if self._device.type == "cuda" else "process_resident"

    @property
    def peak_megabytes(self) -> float:
        """Largest memory in use so far: on a GPU since training began, on a CPU since the process began."""
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else resident_peak_bytes()
        return peak / MEGABYTE

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts the base, and resets the GPU's peak, which would include earlier runs of the process."""
        self._device = pl_module.device
        self._probes = not is_compiled(pl_module)
        self.base_bytes = size(base_tensors(self.adapters))
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Starts to count at the first batch, and at the first one after the structure has changed."""
        if (self.saved_activation_bytes is None or self._again) and self._probes:
            self._probe = SavedTensors()
            self._probe.start()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Counts the tensors that are alive between forward and backward."""
        if self._probe is not None:
            self._probe.stop()
            self.saved_activation_bytes = self._probe.count([*pl_module.parameters(), *pl_module.buffers()])
            self._probe, self._again = None, False

    def structure_changed(self) -> None:
        """Counts saved activations again; see `controllers.structure`."""
        self._again = True

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Removes the hooks if the first forward pass fails."""
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    def numbers(self, trainer: L.Trainer) -> dict[str, float]:
        """Returns megabytes by name; the optimizer's state is complete only after the step."""
        trained = self.adapters.trainable_parameters()
        counted = {
            "base": self.base_bytes,
            "trainable": size(trained),
            "optimizer": optimizer_bytes(trainer.optimizers),
            "gradient": size(parameter.grad for parameter in trained),
            "saved_activation": self.saved_activation_bytes,
        }
        known = {name: n / MEGABYTE for name, n in counted.items() if n is not None}
        return over_processes(known | {"peak": self.peak_megabytes}, self._device)

    def state_dict(self) -> dict[str, object]:
        """Returns the count, which a resumed run logs without counting again."""
        state: dict[str, object] = {"saved_activation_bytes": self.saved_activation_bytes}
        return state | ({"again": True} if self._again else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.saved_activation_bytes = state_dict["saved_activation_bytes"]
        self._again = state_dict.get("again", False)
