"""What tracking costs: a run with loggers and statistics against the same run without.

    python -m lora_lab.bench.tracking_cost OUTPUT.csv

The model has BERT base's shapes and random weights, LoRA of rank 8 on query and value, batches of 8 × 64
tokens. One thread and CPU time, of this process and of W&B's own: wall time would also count what else the
machine does. The two runs take turns, and each round gives one ratio.

A CPU's speed drifts by some per cent within a round, which hides smaller costs. So there are two more
measures: directly, the time in hooks and loggers, in W&B's threads and in W&B's process; and the difference
of the two runs on a model with the same adapters that is so narrow that the drift is a few milliseconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from lora_lab.adapters import AdapterSet, inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.bench import short_run
from lora_lab.bench.hook_clock import HookClock, children_time
from lora_lab.bench.results import about, write_rows
from lora_lab.callbacks.adapter_statistics import AdapterStatistics
from lora_lab.callbacks.memory_statistics import MemoryStatistics
from lora_lab.callbacks.speed_statistics import SpeedStatistics
from lora_lab.tracking import TrackingConfig, build_loggers, close_loggers

LOG_EVERY = 10
ONCE = ("on_fit_start", "on_train_start", "on_train_end")
EACH_STEP = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")


@dataclass(frozen=True)
class Setting:
    """A model, and for how long it is measured."""

    name: str
    widths: dict[str, int]
    rounds: int
    steps: int


SETTINGS = (
    Setting("base", {"hidden_size": 768, "intermediate_size": 3072}, rounds=3, steps=10),
    Setting("narrow", {"hidden_size": 48, "intermediate_size": 96}, rounds=5, steps=40),
)


def train(model: nn.Module, steps: int, folder: Path | None) -> HookClock:
    """Trains some steps; with a folder with full tracking, without one without tracking."""
    adapters = inject(model, LoRASpec(rank=8, targets=["query", "value"]))
    clock = HookClock()
    begin = time.process_time() + children_time()
    loggers = (
        build_loggers(TrackingConfig(wandb="offline"), folder, "cost", folder.name, {}) if folder else []
    )
    startup = time.process_time() + children_time() - begin
    callbacks = _watched(adapters, loggers, clock) if folder else []
    short_run.train(model, adapters, steps, [clock, *callbacks], loggers, LOG_EVERY)
    close_loggers(loggers)
    clock.once += startup
    return clock


def _watched(adapters: AdapterSet, loggers: list[Logger], clock: HookClock) -> list[L.Callback]:
    callbacks = [AdapterStatistics(adapters), MemoryStatistics(adapters), SpeedStatistics()]
    for callback in callbacks:
        clock.watch(callback, ONCE, "once")
        clock.watch(callback, EACH_STEP, "hooks")
    for logger in loggers:
        clock.watch(logger, ("log_metrics",), "hooks")
    return callbacks


def measure(model: nn.Module, setting: Setting, number: int) -> dict[str, Any]:
    """Runs one round and returns its row: CPU milliseconds of a step, and of what is done once in a run."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for tracked in (False, True) if number % 2 else (True, False):
            runs[tracked] = train(model, setting.steps, Path(folder) / "tracked" if tracked else None)
    plain, tracked_run = runs[False], runs[True]
    each = 1e3 / setting.steps
    # W&B's threads: the process's time outside its main thread, minus the same without tracking.
    threads = max(0.0, (tracked_run.process - tracked_run.main) - (plain.process - plain.main))
    row = {
        "setting": setting.name,
        "round": number,
        "plain_step_milliseconds": plain.process * each,
        "tracked_step_milliseconds": (tracked_run.process + tracked_run.wandb) * each,
        "difference_milliseconds": (tracked_run.process + tracked_run.wandb - plain.process) * each,
        "ratio": (tracked_run.process + tracked_run.wandb) / plain.process,
        "hooks_and_loggers_milliseconds": tracked_run.hooks * each,
        "wandb_threads_milliseconds": threads * each,
        "wandb_process_milliseconds": tracked_run.wandb * each,
        "added_milliseconds": (tracked_run.hooks + threads + tracked_run.wandb) * each,
        "once_per_run_milliseconds": tracked_run.once * 1e3,
    }
    return short_run.rounded(row)


def main() -> None:
    """Measures all rounds and writes one row each."""
    parser = argparse.ArgumentParser(description="Measures what tracking costs.")
    parser.add_argument("output", type=Path, help="CSV file to write")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    torch.manual_seed(0)
    origin = about(["torch", "lightning", "wandb"])
    rows = []
    for setting in SETTINGS:
        model = short_run.bert(**setting.widths)
        for number in range(1, setting.rounds + 1):
            rows.append(origin | measure(model, setting, number))
            print(rows[-1])
    write_rows(output, rows)


if __name__ == "__main__":
    main()
