"""`metrics.csv`: every logged row of a run, readable at any time.

Own code, because Lightning's CSVLogger loses rows when a column is added or the process is killed.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from argparse import Namespace
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lora_lab.documents.writing import write_text
from lora_lab.errors import CheckpointError

NAME = "metrics.csv"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads a run's rows, each with its `step` and the columns that have a number.

    Numbers are exactly those that were logged. An incomplete last line, from a process that was killed while
    writing, is dropped.

    Args:
        folder: the run's folder.

    Raises:
        CheckpointError: if the file cannot be read, or does not hold numbers.
    """
    path = folder / NAME
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        return [{name: _number(value) for name, value in row.items() if value} for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Correct it, or delete it to continue without the earlier "
            "rows."
        ) from error


class MetricsFile(Logger):
    """Writes `<folder>/metrics.csv`, one line for each call of `log_metrics`.

    Lightning's CSVLogger empties the file when a new column appears, and if the process is killed then, all
    rows are lost. Here a new column makes a new file, which replaces the old one when it is complete; every
    other row is one write at the end. An earlier file in the folder stays until the first row.

    Rows for which the disk has no space are kept in memory and written later.
    """

    name = ""
    version = ""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self._columns: list[str] = []
        self._waiting: list[dict[str, Any]] = []
        self._size = 0
        self._failed = False

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes one row; it is in the file when this returns, unless the disk refuses."""
        self._waiting.append({"step": step, **metrics})
        self.close()

    @rank_zero_only
    def close(self) -> None:
        """Writes the rows that are not in the file yet."""
        if not self._waiting:
            return
        path = self.folder / NAME
        try:
            if {name for row in self._waiting for name in row} <= set(self._columns):
                with path.open("a", encoding="utf-8", newline="") as file:
                    file.write(_lines(self._waiting, self._columns))
                self._size = path.stat().st_size
            else:
                earlier = read_metrics(self.folder) if self._columns else []
                self.write([*earlier, *self._waiting])
            self._waiting = []
        except (OSError, CheckpointError) as error:
            with suppress(OSError):  # half a row would damage the next one
                if path.stat().st_size > self._size > 0:
                    os.truncate(path, self._size)
            if not self._failed:
                warnings.warn(
                    f"{path}: no row can be written ({error}). Training continues, and each row tries again.",
                    stacklevel=2,
                )
            self._failed = True

    @rank_zero_only
    def write(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the contents of the file by these rows.

        Raises:
            CheckpointError: if the disk refuses them.
        """
        columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        header = dict(zip(columns, columns, strict=True))
        write_text(self.folder / NAME, _lines([header, *rows], columns))
        self._columns, self._size = columns, (self.folder / NAME).stat().st_size

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *arguments: object, **options: object
    ) -> None:
        """Writes nothing: the run's folder holds its config."""


def _lines(rows: Iterable[Mapping[str, object]], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
