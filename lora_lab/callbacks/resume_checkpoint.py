"""Checkpoints from which a run continues exactly as if it had not stopped."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any, TypedDict

import lightning as L
import numpy as np
import torch
import torch.distributed as distributed
from torch import Tensor

from lora_lab.errors import DivergenceError
from lora_lab.linalg.norms import nonfinite
from lora_lab.training.stopping import Interruption, StopRequest


class ResumeCheckpoint(L.Callback):
    """Writes `last.ckpt` every few optimizer steps (`every`), with the state of every random generator.

    It writes at the start of a batch, when all rows and validations of the earlier steps are logged.
    Lightning's own checkpoints, made at the end of a batch, come before that batch's row and validation: a
    run resumed from them would lose both. The file gets its name only when it is complete. For runs that
    continue a finished one, a checkpoint is always written before the last optimizer step. Weights that are
    not finite are never written: the earlier checkpoint stays.

    When the process is asked to end, a checkpoint is written at the next step and training stops with an
    `Interruption`, in all processes at the same step.

    Args:
        path: the file.
        every: smallest number of optimizer steps between two checkpoints.
        stop: whether the process was asked to end; None if it cannot be asked.
    """

    def __init__(self, path: Path, every: int, stop: StopRequest | None = None):
        self.path = path
        self.every = every
        self.stop = stop or StopRequest()
        self.seconds = 0.0
        """Wall-clock seconds of training so far, including earlier processes."""
        self._saved_at = 0
        self._last_step = 0
        self._failed = False
        self._resumed: list[RandomState] | None = None
        self._clock = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._clock = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on requests to end wait for a checkpoint."""
        self._last_step = int(trainer.estimated_stepping_batches) - 1
        # Lightning also has signal handlers, which end training at a point from which it cannot continue
        # exactly.
        self.stop.listen()
        self.stop.patient = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Restores the generators before the first batch after a resumption; writes a checkpoint when due.

        Raises:
            Interruption: if this or another process of the run was asked to end.
        """
        if self._resumed is not None:
            if len(self._resumed) == trainer.world_size:
                restore_random_state(self._resumed[trainer.global_rank])
            # Lightning assumes that every checkpoint was made at a batch's end, and counts that batch again.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._resumed = None
        if batch_idx % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        stopping = trainer.strategy.reduce_boolean_decision(self.stop.received is not None, all=False)
        step = trainer.global_step
        last = step == self._last_step != self._saved_at
        if stopping or last or step - self._saved_at >= self.every:
            self._save(trainer)
        if stopping:
            raise Interruption(self.stop.received or signal.SIGTERM)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follows a request to end that came during the last step."""
        self.stop.patient = False
        self.stop.check()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Follows requests to end at once, since training has ended. Names the last checkpoint."""
        self.stop.patient = False
        if isinstance(exception, DivergenceError) and self.path.is_file():
            exception.checkpoint = self.path

    def _save(self, trainer: L.Trainer) -> None:
        """Writes the checkpoint; if the disk refuses, the earlier one stays and training goes on."""
        trained = {n: p.detach() for n, p in trainer.lightning_module.named_parameters() if p.requires_grad}
        if nonfinite(trained):
            return
        self._saved_at = trainer.global_step
        unfinished = self.path.with_suffix(".unfinished")
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # Lightning skips the validation after an epoch's last batch if it continues from a checkpoint in
        # which this batch is marked as the last. Written before the batch, the mark is not set.
        is_last, progress.is_last_batch = progress.is_last_batch, False
        try:
            trainer.save_checkpoint(unfinished)
            if trainer.is_global_zero:
                os.replace(unfinished, self.path)
        except (OSError, RuntimeError) as error:  # torch's writer turns the system's errors into the latter
            unfinished.unlink(missing_ok=True)
            if not self._failed:
                warnings.warn(
                    f"{self.path}: no checkpoint could be written ({error}). Training goes on; once "
                    "stopped, it continues from an earlier step.",
                    stacklevel=2,
                )
            self._failed = True
        finally:
            progress.is_last_batch = is_last

    def elapsed(self) -> float:
        """Returns wall-clock seconds of training so far, including earlier processes."""
        return self.seconds + time.monotonic() - self._clock

    def state_dict(self) -> dict[str, object]:
        """Returns the generators' states of all processes, and the clock."""
        return {
            "random": _of_all_processes(random_state()),
            "saved_at": self._saved_at,
            "seconds": self.elapsed(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the generators' states until the first batch, as setting up data would use them."""
        self._resumed = state_dict["random"]
        self._saved_at = state_dict["saved_at"]
        self.seconds = state_dict["seconds"]


class RandomState(TypedDict):
    """The states of all generators of one process, in types that `torch.load(weights_only=True)` reads."""

    python: tuple[Any, ...]
    numpy: list[Any]
    """Name, keys (an int64 tensor), position, whether a normal number is kept, and that number."""
    torch: Tensor
    cuda: list[Tensor]


def random_state() -> RandomState:
    """Returns the state of the generators of Python, NumPy and torch, as tensors and plain values only.

    `torch.load(weights_only=True)` refuses NumPy's arrays.
    """
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    name, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: RandomState) -> None:
    """Restores what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _of_all_processes(state: RandomState) -> list[RandomState]:
    if not distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, state)
    return states
