"""How fast training is: wall-clock time from a batch's start to its end, without data loading and validation.

    speed/step_milliseconds    mean time of an optimizer step since the last logged row, in the first process
    speed/tokens_per_second    tokens of all processes over that time, without padding; examples if the batch
                               is not text

The process waits for a GPU only at logged steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lora_lab.training.trainer import logging_due


def token_count(batch: Mapping[str, Tensor] | Sequence[Tensor] | Tensor) -> Tensor | int:
    """Returns how many tokens a batch has, or examples without text; a tensor, to not wait for a GPU."""
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping) and "attention_mask" in batch:
        return batch["attention_mask"].sum()
    return len(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))


@dataclass
class Span:
    """What happened over some batches."""

    seconds: float = 0.0
    steps: int = 0
    tokens: Tensor | int = 0

    def add(self, other: Span) -> None:
        """Adds another span."""
        self.seconds += other.seconds
        self.steps += other.steps
        self.tokens = self.tokens + other.tokens


class SpeedStatistics(L.Callback):
    """Logs the statistics in the rows of `train/loss`.

    It is the last callback, so that the clock starts after the work of the others at a batch's start.
    Everything is measured in this process only, also in a resumed run.
    """

    def __init__(self) -> None:
        self.median_step_milliseconds: float | None = None
        """Median time of an optimizer step; on a GPU of the logged rows' means. None before training ends."""
        self.tokens_per_second: float | None = None
        """Tokens (or examples) of all processes over the time of all steps. None before training ends."""
        self._samples: list[float] = []
        self._since_sample = Span()
        self._since_row = Span()
        self._total = Span()
        self._clock = 0.0
        self._stepped = False
        self._due = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self._clock = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: object, optimizer: torch.optim.Optimizer
    ) -> None:
        """Records that this batch ends a step, and whether it is logged."""
        self._stepped = True
        self._due = logging_due(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock, and logs when due."""
        on_gpu = pl_module.device.type == "cuda"
        if on_gpu and self._due:
            torch.cuda.synchronize(pl_module.device)
        span = Span(time.perf_counter() - self._clock, int(self._stepped), token_count(batch))
        for sum_of_spans in (self._since_sample, self._since_row, self._total):
            sum_of_spans.add(span)
        if self._stepped and (self._due or not on_gpu):
            self._sample()
        if self._due:
            self._log(pl_module)
        self._stepped = self._due = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Computes what the run's record keeps."""
        if not self._total.steps:
            return
        if self._since_sample.steps and not self._samples:
            self._sample()
        self.median_step_milliseconds = statistics.median(self._samples)
        rate = float(self._total.tokens) / self._total.seconds
        everywhere: Any = trainer.strategy.reduce(
            torch.tensor(rate, device=pl_module.device), reduce_op="sum"
        )
        self.tokens_per_second = float(everywhere)

    def _sample(self) -> None:
        self._samples.append(1e3 * self._since_sample.seconds / self._since_sample.steps)
        self._since_sample = Span()

    def _log(self, pl_module: L.LightningModule) -> None:
        row, self._since_row = self._since_row, Span()
        pl_module.log("speed/step_milliseconds", 1e3 * row.seconds / row.steps)
        rate = float(row.tokens) / row.seconds
        pl_module.log("speed/tokens_per_second", rate, sync_dist=True, reduce_fx="sum")
