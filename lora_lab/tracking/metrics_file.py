"""`metrics.csv`: every logged row of a run, readable at any moment of it."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lora_lab.errors import CheckpointError
from lora_lab.files import write_text

NAME = "metrics.csv"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads a run's rows, each with its `step` and the columns that have a number in it.

    Numbers are bit for bit those that were logged. A last line without an end, left by a process that was
    killed while writing it, is dropped.

    Args:
        folder: the run's folder.

    Raises:
        CheckpointError: if the file cannot be read, or holds something else than numbers.
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
            f"{path}: cannot be read ({error}). Mend it, or delete it to go on without the rows so far."
        ) from error


class MetricsFile(Logger):
    """Writes `<folder>/metrics.csv`, one line for each call of `log_metrics`.

    Lightning's CSVLogger empties the file whenever a new column appears, and a process killed then has lost
    all of its rows. Here a new column makes a new file that takes the old one's place when it is whole; any
    other row is one write at the end. An earlier file in the folder stays until the first row.
    """

    name = ""
    version = ""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self._columns: list[str] = []

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes one row; it is in the file when this returns."""
        row = {"step": step, **metrics}
        if not row.keys() <= set(self._columns):
            earlier = read_metrics(self.folder) if self._columns else []
            self.write([*earlier, row])
            return
        with (self.folder / NAME).open("a", encoding="utf-8", newline="") as file:
            file.write(_lines([row], self._columns))

    @rank_zero_only
    def write(self, rows: list[dict[str, Any]]) -> None:
        """Puts these rows in the place of all that the file holds."""
        self._columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        header = dict(zip(self._columns, self._columns, strict=True))
        write_text(self.folder / NAME, _lines([header, *rows], self._columns))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *arguments: Any, **options: Any) -> None:
        """Writes nothing: the run's folder holds its config."""


def _lines(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
