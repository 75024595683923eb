"""Reading CSV, TSV, JSON lines and Parquet into tables that remember where each row came from."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa

from lora_lab.errors import DataError, suggest


@dataclass(frozen=True)
class Table:
    """Rows together with the words that name their origin in messages."""

    frame: pd.DataFrame
    """One row per example; the index counts from 1 and stays with a row through every selection."""
    origin: str
    """The file, or the split of a hosted data set."""

    def column(self, name: str) -> pd.Series:
        """Returns the column.

        Raises:
            DataError: If there is none of that name.
        """
        if name not in self.frame.columns:
            raise DataError(f"{self.origin}: no column '{name}'{suggest(name, map(str, self.frame.columns))}")
        return self.frame[name]


def read_delimited(path: Path, delimiter: str, quoting: Literal[0, 3]) -> pd.DataFrame:
    """Reads a file with a header line; every value is text.

    The standard library's reader is used since it can name the line of any fault, also of rows that are too
    short, which pandas fills up silently.
    """
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            header = next(reader, [])
            rows = []
            for row in reader:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path}: line {reader.line_num} has {len(row)} values, but the header {len(header)} "
                        f"columns ({', '.join(header)}); quote values that contain the delimiter"
                    )
                if row:
                    rows.append(row)
        except csv.Error as fault:
            raise DataError(
                f"{path}: line {reader.line_num}: {fault}; "
                "look for a quotation mark that is not closed or not doubled"
            ) from None
    if len(set(header)) < len(header):
        raise DataError(f"{path}: a column name occurs twice in the header ({', '.join(header)}); rename one")
    return pd.DataFrame(rows, columns=header, dtype=object)


def read_csv(path: Path) -> pd.DataFrame:
    """Reads comma-separated values with optional double quotes."""
    return read_delimited(path, ",", csv.QUOTE_MINIMAL)


def read_tsv(path: Path) -> pd.DataFrame:
    """Reads tab-separated values; a quotation mark is an ordinary character."""
    return read_delimited(path, "\t", csv.QUOTE_NONE)


def read_json_lines(path: Path) -> pd.DataFrame:
    """Reads one JSON object per line; values keep their JSON types."""
    records = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as fault:
                raise DataError(
                    f"{path}: line {number} is not valid JSON ({fault}); mend or remove it"
                ) from None
            if not isinstance(record, dict):
                raise DataError(
                    f'{path}: line {number} is not a JSON object such as {{"text": "...", "label": 0}}'
                )
            records.append(record)
    columns = list(dict.fromkeys(key for record in records for key in record))
    return pd.DataFrame({key: pd.Series([r.get(key) for r in records], dtype=object) for key in columns})


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_json_lines,
    ".parquet": pd.read_parquet,
}


def read_table(path: Path) -> Table:
    """Reads a file by its suffix.

    Args:
        path: A file ending in one of `READERS`.

    Raises:
        DataError: If the file is missing, unreadable, broken or has no rows.
    """
    if path.suffix not in READERS:
        raise DataError(f"{path}: cannot read '{path.suffix}' files{suggest(path.suffix, READERS)}")
    try:
        frame = READERS[path.suffix](path)
    except UnicodeDecodeError as fault:
        raise DataError(
            f"{path}: is not UTF-8 text ({fault.reason} at byte {fault.start}); convert it"
        ) from None
    except pa.ArrowException as fault:
        raise DataError(f"{path}: is not a readable Parquet file ({fault}); write it anew") from None
    except OSError as fault:
        raise DataError(f"{path}: cannot be read ({fault.strerror or fault}); check the path") from None
    if frame.empty:
        raise DataError(f"{path}: has no rows; a data file needs a header and at least one row")
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    return Table(frame, str(path))
