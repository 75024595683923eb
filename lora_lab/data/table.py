"""Reading CSV, TSV, JSON lines and Parquet into tables that know where each row came from."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa

from lora_lab.errors import DataError, suggest

LONGEST_VALUE = 2**31 - 1
"""Characters of one value; the standard library's own limit is 131,072."""


@dataclass(frozen=True)
class Table:
    """Rows, with the name of their origin for messages."""

    frame: pd.DataFrame
    """One row per example; the index counts from 1 and stays with its row in every selection."""
    origin: str
    """The file, or the split of a hosted data set."""

    def column(self, name: str) -> pd.Series:
        """Returns the column.

        Raises:
            DataError: If there is no such column.
        """
        if name not in self.frame.columns:
            known = [str(column) for column in self.frame.columns]
            hint = other_delimiter(known)
            raise DataError(f"{self.origin}: no column '{name}'{suggest(name, known)}{hint}")
        return self.frame[name]


def other_delimiter(header: list[str]) -> str:
    """Returns a hint for the end of a message, if the only name of a header looks like several."""
    found = [mark for mark in ";\t|," if len(header) == 1 and mark in header[0]]
    return f". If {found[0]!r} stands between values, set data.delimiter to it" if found else ""


def read_delimited(path: Path, delimiter: str, quotes: bool = True) -> pd.DataFrame:
    """Reads a file with a header line; every value is text.

    The standard library's reader is used since it can name the line of every fault, also of rows that are too
    short, which pandas fills without a message.

    Args:
        path: UTF-8, with or without a byte order mark.
        delimiter: One character between the values of a row.
        quotes: Whether values may be quoted with `"`, and then hold the delimiter, line breaks and `""` for
            `"`. If not, `"` is an ordinary character.
    """
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    usual = csv.field_size_limit(LONGEST_VALUE)
    start = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
            header = next(reader, [])
            rows = []
            start = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path}: line {reader.line_num} has {len(row)} values, but the header {len(header)} "
                        f"columns ({', '.join(header)}); quote values that contain the delimiter"
                        f"{other_delimiter(header)}"
                    )
                if row:
                    rows.append(row)
                start = reader.line_num + 1
    except csv.Error as fault:
        raise DataError(
            f"{path}: line {reader.line_num}: {fault}; look for a quotation mark from line {start} on that "
            "is not closed or not doubled. If values in this file are not quoted, set data.quotes to false"
        ) from None
    finally:
        csv.field_size_limit(usual)  # it holds for the whole process
    return pd.DataFrame(rows, columns=header, dtype=object)


def read_json_lines(path: Path) -> pd.DataFrame:
    """Reads one JSON object per line; values keep their JSON types."""
    records = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, object_pairs_hook=_unique_keys)
            except (ValueError, RecursionError) as fault:  # ValueError: also a number with too many digits
                raise DataError(
                    f"{path}: line {number} is not valid JSON ({fault}); fix or remove it"
                ) from None
            if not isinstance(record, dict):
                raise DataError(
                    f'{path}: line {number} is not a JSON object such as {{"text": "...", "label": 0}}'
                )
            records.append(record)
    columns = list(dict.fromkeys(key for record in records for key in record))
    return pd.DataFrame({key: pd.Series([r.get(key) for r in records], dtype=object) for key in columns})


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return found


DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Suffix of a file of delimited values → its delimiter."""
READERS: dict[str, Callable[[Path], pd.DataFrame]] = {".jsonl": read_json_lines, ".parquet": pd.read_parquet}
"""Suffix of every other file → its reader."""
SUFFIXES = (*DELIMITERS, *READERS)


def read_table(path: Path, delimiter: str | None = None, quotes: bool = True) -> Table:
    """Reads a file by its suffix.

    Args:
        path: A file ending in one of `SUFFIXES`, in lower or upper case.
        delimiter: Delimiter of `.csv` and `.tsv` files, if it is not the usual one.
        quotes: As `read_delimited` takes it.

    Raises:
        DataError: If the file is missing, unreadable, broken or has no rows, or two columns share a name.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot read '{path.suffix}' files{suggest(path.suffix, SUFFIXES)}")
    try:
        if suffix in DELIMITERS:
            frame = read_delimited(path, delimiter or DELIMITERS[suffix], quotes)
        else:
            frame = READERS[suffix](path)
    except UnicodeDecodeError as fault:
        raise DataError(
            f"{path}: is not UTF-8 text ({fault.reason} at byte {fault.start}); convert it"
        ) from None
    except pa.ArrowException as fault:
        raise DataError(f"{path}: is not a readable Parquet file ({fault}); write it again") from None
    except OSError as fault:
        raise DataError(f"{path}: cannot be read ({fault.strerror or fault}); check the path") from None
    if not frame.columns.is_unique:
        names = ", ".join(map(str, frame.columns))
        raise DataError(f"{path}: a column name occurs twice in the header ({names}); rename one")
    if frame.empty:
        raise DataError(f"{path}: has no rows; a data file needs a header and at least one row")
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    return Table(frame, str(path))
