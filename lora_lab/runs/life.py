"""The life of a run's folder: what an earlier run in it means, its start, its end, and how it failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import Logger
from rich.console import Console
from torch import Tensor

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.storage import TENSORS
from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import TaskData
from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.files import write_text
from lora_lab.runs.callbacks import RunCallbacks
from lora_lab.runs.environment import process_rank
from lora_lab.runs.folder import RunFolder
from lora_lab.runs.record import end_record, start_record
from lora_lab.tracking import build_loggers, close_loggers, read_metrics, replay, wandb_mode


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: RunFolder
    record: dict[str, Any]
    fresh: bool
    """Whether this call trained; False where a finished run of this config was found."""


@dataclass
class OpenRun:
    """A run under way, or one that was found finished."""

    config: ExperimentConfig
    folder: RunFolder
    overwrite: bool
    before: dict[str, Any] | None
    """The record of the earlier run in the folder, where it is continued or finished."""
    record: dict[str, Any] = field(default_factory=dict)
    loggers: list[Logger] = field(default_factory=list)

    @property
    def finished(self) -> RunResult | None:
        """The run that was found finished, if it was."""
        if self.before is None or self.before["status"] != "finished":
            return None
        return RunResult(self.folder, self.before, fresh=False)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to continue from, if there is one."""
        return self.folder.checkpoint if self.before and self.folder.checkpoint.is_file() else None

    def start(self, adapters: AdapterSet, data: TaskData) -> list[Logger]:
        """Writes config and record, and returns the loggers; nothing is written before.

        A continued run's loggers hold the rows up to its checkpoint.

        Raises:
            ConfigError: if the settings of tracking are at fault.
            CheckpointError: if the folder cannot be written to, or the checkpoint cannot be read.
        """
        wandb_mode(self.config.tracking)
        rows = read_metrics(self.folder.path) if self.before else []
        done_steps = step_of(self.checkpoint) if self.checkpoint else 0
        self.record = start_record(self.config, adapters, data, self.before)
        if process_rank() == 0:
            if self.before:
                state = f"{self.before['status']} before; it continues from step {done_steps}"
                Console(stderr=True).print(f"{self.folder.path}: {state}.", soft_wrap=True, highlight=False)
            if self.overwrite:
                self.folder.clear()
            write_text(self.folder.config, yaml.safe_dump(asdict(self.config), sort_keys=False))
            self.folder.checkpoint.parent.mkdir(exist_ok=True)
            self.folder.write(self.record)
        self.loggers = build_loggers(
            self.config.tracking,
            self.folder.path,
            self.config.name,
            self.config.run_name(),
            asdict(self.config),
        )
        if self.before:
            replay(rows, self.loggers, done_steps)
        return self.loggers

    def finish(
        self, trainer: L.Trainer, callbacks: RunCallbacks, metrics: Mapping[str, Tensor | float]
    ) -> RunResult:
        """Closes the loggers and writes the record of a run whose adapter is in the folder."""
        self.record |= end_record(trainer, callbacks, metrics)
        if trainer.is_global_zero:
            self.record["adapter_file_bytes"] = (self.folder.adapter / TENSORS).stat().st_size
        close_loggers(self.loggers)
        self.record["status"] = "finished"
        if trainer.is_global_zero:
            self.folder.write(self.record)
        return RunResult(self.folder, self.record, fresh=True)

    def fail(self, error: BaseException) -> None:
        """Writes into the record why the run has ended, and closes the loggers."""
        if not self.record:
            return
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        self.record["error"] = "interrupted" if stopped else f"{type(error).__name__}: {error}"
        self.record["status"] = "failed"
        if process_rank() == 0:
            self.folder.write(self.record)
        close_loggers(self.loggers, failed=True)


@contextmanager
def open_run(config: ExperimentConfig, resume: bool, overwrite: bool) -> Iterator[OpenRun]:
    """Opens the folder of a run; what goes wrong inside the block is written into its record.

    Raises:
        LabError: if the folder cannot take this run.
    """
    folder = RunFolder(Path(config.output) / config.name / config.run_name())
    this = OpenRun(config, folder, overwrite, _earlier(folder, config, resume, overwrite))
    try:
        yield this
    except BaseException as error:
        this.fail(error)
        raise


def _earlier(
    folder: RunFolder, config: ExperimentConfig, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Decides what an earlier run in the folder means; returns its record if it continues or is finished."""
    folder.check_writable()
    if process_rank() != 0:
        # The first process has decided and prepared the folder before it started this one.
        return folder.read()
    before = None if overwrite else folder.read()
    if before is None:
        return None
    if before["config_hash"] != config.hash():
        raise ConfigError(
            f"{folder.path}: holds a run of another config. Choose another name with run=…, or --overwrite "
            "it."
        )
    if before["status"] != "finished" and not resume:
        raise CheckpointError(
            f"{folder.path}: holds a run that is {before['status']}. Continue it with --resume, or "
            "--overwrite it."
        )
    return before


def step_of(checkpoint: Path) -> int:
    """Returns the optimizer steps done by a checkpoint.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"]
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: cannot be read ({error}). Delete it to train from the start."
        ) from error
