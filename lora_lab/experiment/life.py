"""The life of a run: an earlier run in its folder, its start, its end, and its failure."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.storage import TENSORS, stored_lineage
from lora_lab.config.compose import compose
from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import TaskData
from lora_lab.documents.console import plain_console
from lora_lab.documents.reading import yaml_text
from lora_lab.documents.writing import write_text
from lora_lab.errors import CheckpointError, ConfigError, DataError, LabError
from lora_lab.experiment.callbacks import RunCallbacks
from lora_lab.experiment.continuation import differences, source_of
from lora_lab.experiment.environment import process_rank
from lora_lab.experiment.folder import Record, RunFolder
from lora_lab.experiment.record import end_record, start_record
from lora_lab.tracking import (
    build_loggers,
    close_loggers,
    log_adapter,
    read_metrics,
    replay,
    summarise,
    wandb_mode,
)
from lora_lab.training.stopping import Interruption, StopRequest

SPARE_BYTES = 1 << 20
"""Space for the record and the last rows, besides the adapter's."""
SUMMARY_AT_START = ("method_parameters", "trainable_parameters", "total_parameters")
SUMMARY_AT_END = ("final_method_parameters", "best_value", "best_step", "steps", "adapter_file_bytes")
"""Fields of the record that are also in W&B's summary."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    folder: RunFolder
    record: Record
    fresh: bool
    """Whether this call trained; False if a finished run of this config was found."""


@dataclass
class OpenRun:
    """A run in progress, or one that was already finished."""

    config: ExperimentConfig
    folder: RunFolder
    before: Record | None
    """The record of the earlier run in the folder, if it is continued or finished."""
    source: RunFolder | None
    """The folder of the finished run that this one continues."""
    stop: StopRequest
    """Whether the process was asked to end."""
    record: Record = field(default_factory=dict)
    loggers: list[Logger] = field(default_factory=list)

    @property
    def finished(self) -> RunResult | None:
        """The run, if it was already finished."""
        if self.before is None or self.before["status"] != "finished":
            return None
        return RunResult(self.folder, self.before, fresh=False)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to continue from, if there is one."""
        if self.before and self.folder.checkpoint.is_file():
            return self.folder.checkpoint
        return self.source.checkpoint if self.source else None

    def check_data(self, data: TaskData) -> None:
        """Checks that an earlier run in the folder had the same data.

        Raises:
            DataError: if it had other data.
        """
        earlier = [(self.folder, self.before)] if self.before else []
        if self.source and (record := self.source.read()):
            earlier.append((self.source, record))
        for folder, record in earlier:
            if record["data_fingerprint"] != data.fingerprint:
                raise DataError(
                    f"{folder.path}: its run ({_state(record)}) was trained on other data: a file, or how it "
                    "is read, has changed since. Choose another name with run=…, --overwrite the run, or "
                    "restore the former data."
                )

    def start(self, adapters: AdapterSet, data: TaskData) -> list[Logger]:
        """Writes config and record, and returns the loggers; before this nothing is written.

        A continued run's loggers hold the rows up to its checkpoint.

        Raises:
            ConfigError: if the settings of tracking are invalid.
            CheckpointError: if the folder cannot be written to, the disk has no space for the adapter, or the
                checkpoint cannot be read.
        """
        wandb_mode(self.config.tracking)
        rows = read_metrics(self.folder.path) if self.before else []
        if self.source and not (self.before and self.folder.checkpoint.is_file()):
            rows = read_metrics(self.source.path)
        done_steps = step_of(self.checkpoint) if self.checkpoint else 0
        self.record = start_record(self.config, adapters, data, self.before)
        if process_rank() == 0:
            if self.before:
                state = f"{_state(self.before)} before; it continues from step {done_steps}"
                text = f"{self.folder.path}: {state}."
                plain_console(stderr=True).print(text, soft_wrap=True, highlight=False)
            else:
                # While `starting`, the remains of an overwritten run are ignored.
                self.folder.write({**self.record, "status": "starting"})
                self.folder.clear()
                write_text(self.folder.config, yaml_text(asdict(self.config)))
            self.folder.checkpoint.parent.mkdir(exist_ok=True)
            tensors = adapters.state_dict().values()
            self.folder.reserve_space(SPARE_BYTES + sum(tensor.nbytes for tensor in tensors))
            self.folder.prepare_failure(self.record)
            self.folder.write(self.record)
        self.loggers = build_loggers(
            self.config.tracking,
            self.folder.path,
            self.config.name,
            self.config.run_name(),
            asdict(self.config),
        )
        if self.before or self.source:
            replay(rows, self.loggers, done_steps)
        summarise(self.loggers, {name: self.record[name] for name in SUMMARY_AT_START})
        return self.loggers

    def lineage(self, data: TaskData) -> dict[str, Any]:
        """Returns what the adapter's folder says about its origin, besides its base's weights."""
        model = self.config.model
        base = {"name": model.source().public_name or model.name} | (
            {"revision": model.revision} if model.revision else {}
        )
        return {"base": base, "data": data.fingerprint, "config": self.config.hash()}

    def release_space(self) -> None:
        """Frees the disk space that was reserved for the adapter, which is written next."""
        self.folder.reserve.unlink(missing_ok=True)

    def finish(
        self, trainer: L.Trainer, callbacks: RunCallbacks, metrics: Mapping[str, Tensor | float]
    ) -> RunResult:
        """Closes the loggers and then writes the record of a run whose adapter is in the folder."""
        self.stop.ending = True
        self.record |= end_record(trainer, callbacks, metrics)
        if trainer.is_global_zero:
            self.record["adapter_file_bytes"] = (self.folder.adapter / TENSORS).stat().st_size
            summarise(self.loggers, {name: self.record[name] for name in SUMMARY_AT_END})
            if self.config.tracking.log_adapter:
                log_adapter(self.loggers, self.folder.adapter, stored_lineage(self.folder.adapter))
        close_loggers(self.loggers)
        self.record["status"] = "finished"
        if trainer.is_global_zero:
            self.folder.write(self.record)
            self.folder.failure.unlink(missing_ok=True)
        return RunResult(self.folder, self.record, fresh=True)

    def fail(self, error: BaseException) -> None:
        """Records how the run has ended, and closes the loggers."""
        self.stop.ending = True
        asked = self.stop.received or isinstance(error, KeyboardInterrupt | SystemExit)
        if asked and not self.record and process_rank() == 0:
            with suppress(CheckpointError):  # it cannot be read
                found = self.folder.read() or {}
                # A process that was killed has left this; the one that ends now has not begun to train.
                self.record = found if found.get("status") == "running" else {}
        if not self.record:
            return
        if asked:
            name = self.stop.received.name if self.stop.received else "the process was asked to end"
            self.record |= {"status": "interrupted", "error": f"interrupted: {name}"}
        else:
            status = error.status if isinstance(error, LabError) else "failed"
            self.record |= {"status": status, "error": f"{type(error).__name__}: {error}"}
        if process_rank() == 0:
            self.release_space()
            try:
                self.folder.write(self.record)
                self.folder.failure.unlink(missing_ok=True)
            except CheckpointError as fault:  # it must not hide the error that ended the run
                self.folder.write_failure()
                warnings.warn(f"the record cannot say how the run has ended: {fault}", stacklevel=2)
        close_loggers(self.loggers, failed=True)


@contextmanager
def open_run(config: ExperimentConfig, resume: bool, overwrite: bool) -> Iterator[OpenRun]:
    """Opens the folder of a run, as its only writer; the record says how the block has ended.

    Raises:
        LabError: if the folder cannot be used for this run, or another process is writing to it.
        Interruption: if the process was asked to end by a signal other than Ctrl-C.
        KeyboardInterrupt: if it was asked by Ctrl-C.
    """
    folder = RunFolder.of(config)
    stop = StopRequest()
    first = process_rank() == 0
    earlier = folder.read() if first and not overwrite else None
    if earlier and earlier["status"] == "finished":
        # Nothing is written, so the folder may be read-only.
        _check_config(folder, earlier, config)
        yield OpenRun(config, folder, earlier, None, stop)
        return
    with folder.owned() if first else nullcontext(), stop.watched():
        # Other processes of the run are started after the first one has prepared the folder.
        this = OpenRun(config, folder, None, None, stop)
        try:
            this.before = _earlier(folder, config, resume, overwrite) if first else folder.read()
            this.source = source_of(config)
            yield this
        except BaseException as error:
            this.fail(error)
            if isinstance(error, Exception) and _is_worker_death(error):
                raise DataError(
                    f"data.workers: a process that loads data was killed ({error}). Probably memory ran out: "
                    "the same command continues from the last checkpoint (--resume); lower data.workers, or "
                    "give the job more memory."
                ) from error
            if stop.received and not isinstance(error, KeyboardInterrupt):
                stop_error = Interruption(stop.received)
                raise (KeyboardInterrupt() if stop_error.code == 130 else stop_error) from error
            raise


def _earlier(folder: RunFolder, config: ExperimentConfig, resume: bool, overwrite: bool) -> Record | None:
    """Decides what an earlier run in the folder means; returns its record if it continues or is finished."""
    folder.check_free()
    before = folder.read()  # also before it is overwritten, as it may not be of a run
    if before is None or overwrite or before["status"] == "starting":
        return None
    _check_config(folder, before, config)
    if before["status"] == "diverged" and config.trainer.on_nonfinite == "stop":
        raise CheckpointError(
            f"{folder.path}: holds a run that diverged, and it would diverge again ({before['error']}). "
            "Change the config, --overwrite the run, or continue it with trainer.on_nonfinite=skip."
        )
    if before["status"] != "finished" and not resume:
        raise CheckpointError(
            f"{folder.path}: holds a run that was {_state(before)}. Continue it with --resume, or "
            "--overwrite it."
        )
    return before


def _state(record: Record) -> str:
    """Says how an unfinished run has ended: one that was killed could not record it."""
    return "killed" if record["status"] == "running" else record["status"]


def _check_config(folder: RunFolder, before: Record, config: ExperimentConfig) -> None:
    if before["config_hash"] == config.hash():
        return
    try:
        stored: Any = compose(folder.config, stored=True)
    except LabError:
        stored = None
    # A newer version may have added fields; with their defaults a config is the same.
    if stored is not None and stored.hash() == config.hash():
        return
    differing = differences(stored.decisive(), config.decisive()) if stored else []
    where = f" ({', '.join(differing[:5])})" if differing else ""
    raise ConfigError(
        f"{folder.path}: holds a run of another config{where}. Choose another name with run=…, or "
        "--overwrite it."
    )


def _is_worker_death(error: BaseException) -> bool:
    """Whether a loader's worker was killed; torch has no class of its own for it."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def step_of(checkpoint: Path) -> int:
    """Returns the number of optimizer steps of a checkpoint.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return int(torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"])
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: cannot be read ({error}). Delete it to train from the start."
        ) from error
