"""A run's folder, and the record `run.json` that says what became of the run.

runs/<experiment>/<run>/
    config.yaml      the composed config
    run.json         the record
    metrics.csv      every logged row
    checkpoints/     last.ckpt, to resume from
    adapter/         PEFT's two files and lora_lab.yaml
    wandb/           W&B's files
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.errors import CheckpointError
from lora_lab.files import write_text


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its files."""

    path: Path

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
    def checkpoint(self) -> Path:
        """The checkpoint to resume from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's layout."""
        return self.path / "adapter"

    def read(self) -> dict[str, Any] | None:
        """Returns the record, or None where there is no run yet.

        Raises:
            CheckpointError: if the record cannot be read.
        """
        if not self.record.is_file():
            return None
        try:
            return json.loads(self.record.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{self.record}: cannot be read ({error}). Delete {self.path} to start the run afresh."
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Writes the record, whole or not at all."""
        write_text(self.record, json.dumps(record, indent=2, sort_keys=False) + "\n")

    def clear(self) -> None:
        """Deletes the run."""
        shutil.rmtree(self.path, ignore_errors=True)

    def check_writable(self) -> None:
        """Raises CheckpointError, without writing anything, if the folder could not be made."""
        ancestor = self.path
        while not ancestor.exists():
            ancestor = ancestor.parent
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
            what = "may not be written to" if ancestor.is_dir() else "is a file, not a folder"
            raise CheckpointError(
                f"output: cannot make {self.path}: {ancestor} {what}. Choose another output folder."
            )
