"""A run's folder: its files, its one owner, and what may be deleted in it.

runs/<experiment>/<run>/
    run.json         the record; it marks the folder as that of a run
    config.yaml      the composed config
    metrics.csv      every logged row
    test_examples.parquet   a row for each test example
    checkpoints/     last.ckpt, to continue from
    adapter/         PEFT's two files and lora_lab.yaml
    wandb/           W&B's files
    .failed.json     the record of a run that could not even write how it ended
    .lock            held by the process that writes to the folder
    .owner.json      which process that is, or was
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from lora_lab.adapters.storage import CARD, CONFIG, OWN, TENSORS
from lora_lab.callbacks.test_examples import NAME as EXAMPLES
from lora_lab.config.compose import compose
from lora_lab.config.schema import ExperimentConfig
from lora_lab.documents.reading import DocumentError, read_json
from lora_lab.documents.writing import clean_unfinished, writable, write_text
from lora_lab.errors import CheckpointError, ConfigError

Record = dict[str, Any]
"""What `run.json` holds: plain values by name."""

FILES = (
    "config.yaml",
    "metrics.csv",
    EXAMPLES,
    "checkpoints/last.ckpt",
    "checkpoints/last.unfinished",
    f"adapter/{CONFIG}",
    f"adapter/{TENSORS}",
    f"adapter/{OWN}",
    f"adapter/{CARD}",
    ".reserve",
    ".failed.json",
)
"""What a run writes besides its record and W&B's files."""

WANDB_FILES = re.compile(r"(offline-)?run-\d{8}_\d{6}-[\w-]+|latest-run|debug(-\w+)*\.log")
LOCK, OWNER = ".lock", ".owner.json"


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its files."""

    path: Path

    @classmethod
    def of(cls, config: ExperimentConfig) -> RunFolder:
        """Returns the folder of a config's run."""
        return cls(Path(config.output) / config.name / config.run_name())

    @property
    def config(self) -> Path:
        """The composed config."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """The record."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """Every logged row."""
        return self.path / "metrics.csv"

    @property
    def examples(self) -> Path:
        """A row for each test example."""
        return self.path / EXAMPLES

    @property
    def checkpoint(self) -> Path:
        """The checkpoint to continue from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's layout."""
        return self.path / "adapter"

    @property
    def reserve(self) -> Path:
        """Space on the disk that is kept free for the adapter."""
        return self.path / ".reserve"

    @property
    def failure(self) -> Path:
        """The record of a failed run, which replaces the record if nothing can be written any longer."""
        return self.path / ".failed.json"

    def read(self) -> Record | None:
        """Returns the record, or None if there is no run yet.

        Raises:
            CheckpointError: if the record cannot be read, or is not of a run.
        """
        if not self.record.is_file():
            return None
        try:
            record = read_json(self.record)
        except DocumentError as error:
            raise CheckpointError(
                f"{error} Delete it and the other files of the run to start "
                "it again, or choose another name with run=…"
            ) from error
        if not isinstance(record, dict) or not record.keys() >= {"schema_version", "config_hash", "status"}:
            raise CheckpointError(f"{self.record}: is not a record of a run. Choose another name with run=…")
        return record

    def finished(self) -> Record:
        """Returns the record of the finished run in the folder.

        Raises:
            CheckpointError: if there is none.
        """
        record = self.read()
        if record is None or record["status"] != "finished":
            state = "no run" if record is None else f"a run whose status is '{record['status']}'"
            raise CheckpointError(f"{self.path}: holds {state}. Name the folder of a finished run.")
        return record

    def stored_config(self, overrides: Sequence[str] = ()) -> ExperimentConfig:
        """Returns the config of the run, which may be somebody else's: it alone cannot ask to run code.

        Args:
            overrides: settings that win over it, such as `model.trust_remote_code=true`.

        Raises:
            ConfigError: if it is invalid, or would run code that `overrides` do not allow.
        """
        config = compose(self.config, overrides, stored=True)
        key = "model.trust_remote_code"
        if config.model.trust_remote_code and not any(text.startswith(f"{key}=") for text in overrides):
            raise ConfigError(
                f"{self.config}: {key}: is true, which would run Python code that comes with the model. If "
                f"you trust it, `lora-lab evaluate` takes {key}=true on the command line; to merge or "
                "export, build the model in Python and call lora_lab.load_adapter."
            )
        return config

    def write(self, record: Record) -> None:
        """Writes the record, completely or not at all; numbers that are not finite are null in JSON.

        Raises:
            CheckpointError: if the folder cannot be written to.
        """
        write_text(self.record, json.dumps(_finite(record), indent=2, allow_nan=False) + "\n")

    def prepare_failure(self, record: Record) -> None:
        """Writes the record that `write_failure` will put in its place.

        Raises:
            CheckpointError: if the folder cannot be written to.
        """
        error = "the folder could not be written to when the run ended"
        record = {**record, "status": "failed", "error": error}
        write_text(self.failure, json.dumps(_finite(record), indent=2, allow_nan=False) + "\n")

    def write_failure(self) -> None:
        """Marks the run as failed in its record, by a rename, which also works on a full disk."""
        with suppress(OSError):  # the folder is gone, or read-only
            os.replace(self.failure, self.record)

    def check_free(self) -> None:
        """Checks that a folder without a run has no files that a run would overwrite.

        Raises:
            CheckpointError: if it has.
        """
        others = [name for name in (*FILES, "wandb") if (self.path / name).exists()]
        if not self.record.is_file() and others:
            raise CheckpointError(
                f"{self.path}: holds no run, but files that a run would overwrite ({', '.join(others)}). "
                "Choose another name with run=…, or move them away."
            )

    def clear(self) -> None:
        """Deletes what an earlier run wrote, except for its record; everything else in the folder stays."""
        own = {path.name for path in self.adapter.iterdir()} if self.adapter.is_dir() else set()
        shared = bool(own - {CONFIG, TENSORS, OWN, CARD})
        for name in FILES:
            # If there are other files, it marks the folder as that of an adapter, which may be written to
            # again.
            if not (shared and name == f"adapter/{CONFIG}"):
                (self.path / name).unlink(missing_ok=True)
        wandb = self.path / "wandb"
        for path in wandb.iterdir() if wandb.is_dir() else ():
            if WANDB_FILES.fullmatch(path.name):
                path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(
                    path, ignore_errors=True
                )
        for folder in (wandb, self.path / "checkpoints", self.adapter):
            with suppress(OSError):  # it holds something else, or is not there
                folder.rmdir()

    def reserve_space(self, size: int) -> None:
        """Reserves this many bytes on the disk for the adapter, in case the disk fills up.

        Raises:
            CheckpointError: if there is less space.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            with self.reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            self.reserve.unlink(missing_ok=True)
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                return  # a file system that cannot reserve space
            raise CheckpointError(
                f"output: {self.path} has no {size / 1e6:.1f} MB left for the adapter ({error.strerror}). "
                "Choose another output folder, or free some space."
            ) from error

    @contextmanager
    def owned(self, beside: str = "choose another name with run=…") -> Iterator[None]:
        """Makes this process the only writer of the folder within the block.

        The operating system frees the lock of a process that has ended in any way. A new folder is removed if
        no run was started in it.

        Args:
            beside: what to do in order to write at the same time as another process, for the message.

        Raises:
            CheckpointError: if another process owns the folder, or it cannot be written to.
        """
        self._check_writable()
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with writable(self.path):
            lock = self._lock(beside)
        try:
            owner = {"pid": os.getpid(), "host": socket.gethostname()}
            owner["started"] = datetime.now(UTC).isoformat(timespec="seconds")
            write_text(self.path / OWNER, json.dumps(owner) + "\n")
            clean_unfinished(self.path)
            yield
        finally:
            (self.path / OWNER).unlink(missing_ok=True)
            if not self.record.is_file():
                (self.path / LOCK).unlink(missing_ok=True)
            for folder in made:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
            lock.release()

    def wait_until_free(self, seconds: float) -> None:
        """Waits until no other process owns the folder, at most this long.

        A process that was asked to end writes a checkpoint first, and owns the folder until then.
        """
        if (self.path / LOCK).is_file():
            with suppress(Timeout), FileLock(self.path / LOCK, timeout=seconds):
                pass

    def _lock(self, beside: str) -> BaseFileLock:
        try:
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            raise CheckpointError(
                f"{self.path}: {self._owner()} is writing to it. Wait until it has ended, or stop it; to run "
                f"at the same time, {beside}"
            ) from error
        return lock

    def _owner(self) -> str:
        try:
            owner = json.loads((self.path / OWNER).read_text())
            return f"process {owner['pid']} on {owner['host']}, started {owner['started']},"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"  # it has just started

    def _check_writable(self) -> None:
        """Raises CheckpointError, without writing anything, if the folder could not be made."""
        ancestor = self.path.absolute()
        while not ancestor.exists():
            ancestor = ancestor.parent
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
            what = "may not be written to" if ancestor.is_dir() else "is a file, not a folder"
            raise CheckpointError(
                f"output: cannot create {self.path}: {ancestor} {what}. Choose another output folder."
            )


def _finite(value: object) -> object:
    """Returns a value in which None replaces every number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
