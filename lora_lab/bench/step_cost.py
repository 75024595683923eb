"""What a call costs in time and memory, on a CPU or a CUDA device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lora_lab.callbacks.saved_tensors import SavedTensors

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would report every start and stop


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the time of a call: CPU time of this process, or the device's from event to event."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Returns the largest memory that a call holds in addition to what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # Every allocation and every release is one event; the profiler's own tables sum them up by operator.
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Returns the bytes that autograd keeps after a forward pass, the module's own tensors excluded.

    Args:
        forward: returns the loss.
        module: holds the parameters and buffers, which are in memory anyway.
    """
    saved = SavedTensors()
    saved.start()
    try:
        loss = forward()
    finally:
        saved.stop()
    count = saved.count([*module.parameters(), *module.buffers()])
    del loss  # the graph is needed until here
    return count
