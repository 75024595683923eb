"""CPU time of a training run, and of the callbacks and loggers in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import psutil
from lightning.pytorch.loggers import Logger


def children_time() -> float:
    """Returns the CPU seconds that the child processes, W&B's service, have used."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(spent.user + spent.system for spent in times)


CLOCKS = (time.process_time, time.thread_time, children_time)


class HookClock(L.Callback):
    """Measures CPU seconds from the second batch, after warm-up, to the last row.

    Attributes:
        process: of this process.
        main: of its main thread.
        wandb: of W&B's process.
        once: in hooks at the start and the end of training.
        hooks: in the hooks and loggers of the measured steps.
    """

    def __init__(self) -> None:
        self.process = self.main = self.wandb = self.once = self.hooks = 0.0
        self._inside = False

    def on_train_batch_start(self, trainer: object, pl_module: object, batch: object, batch_idx: int) -> None:
        """Starts at the second batch."""
        if batch_idx == 1:
            self.process, self.main, self.wandb = (-clock() for clock in CLOCKS)
            self.hooks = 0.0

    def on_train_epoch_end(self, trainer: object, pl_module: object) -> None:
        """Stops after the last row."""
        now = [clock() for clock in CLOCKS]
        self.process, self.main, self.wandb = self.process + now[0], self.main + now[1], self.wandb + now[2]

    def watch(self, target: L.Callback | Logger, names: tuple[str, ...], sum_up: str) -> None:
        """Adds the time of an object's methods to an attribute; nested calls are counted once."""
        for name in names:
            setattr(target, name, self._timed(getattr(target, name), sum_up))

    def _timed(self, method: Callable[..., Any], sum_up: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return method(*arguments, **options)
            self._inside, begin = True, time.thread_time()
            try:
                return method(*arguments, **options)
            finally:
                self._inside = False
                setattr(self, sum_up, getattr(self, sum_up) + time.thread_time() - begin)

        return timed
