"""From table columns to checked texts and labels."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lora_lab.data.table import Table
from lora_lab.errors import DataError
from lora_lab.tasks import TASKS

NAMES_SHOWN = 10
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table mean what."""

    text: list[str]
    """One column, or two for pairs of texts."""
    label: str | None = None
    """Class or number; not read for causal language modelling."""
    prompt: str | None = None
    """Text before the one to learn; causal language modelling only."""


def texts_of(table: Table, column: str, required: bool = True) -> list[str]:
    """Returns the column's texts.

    Raises:
        DataError: If a value is not text, or is blank although `required`.
    """
    values = table.column(column)
    for row, value in values.items():
        if isinstance(value, str) and (value.strip() or not required):
            continue
        what = "is blank" if isinstance(value, str) else f"holds {value!r}, which is not text"
        raise DataError(f"{table.origin}: row {row}: text column '{column}' {what}; mend or remove the row")
    return values.tolist()


def class_name(value: Any) -> str:
    """Returns a label as the name of a class; a whole number in any notation (`1`, `1.0`) becomes `1`.

    Raises:
        ValueError: If it stands for no class; says why.
    """
    if not pd.api.types.is_scalar(value):
        raise ValueError(f"holds {value!r}; a class is a name or a whole number")
    name = "" if pd.isna(value) else str(value).strip()
    if not name:
        raise ValueError("is empty; mend or remove the row")
    if not NUMBER.fullmatch(name):
        return name
    if not float(name).is_integer():
        raise ValueError(f"holds {name}, which is not a class; for numbers set the task to regression")
    if float(name) < 0:
        raise ValueError(f"holds {name}; negative labels often stand for hidden ones. Remove such rows")
    return str(int(float(name)))


def numbers_of(table: Table, column: str) -> Tensor:
    """Returns the labels of a regression task, `(rows,)` float32.

    Raises:
        DataError: If a label is not a finite number.
    """
    labels = table.column(column)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is reported below
        numbers = pd.to_numeric(labels.astype(str), errors="coerce").to_numpy(np.float64).astype(np.float32)
    for row, value, number in zip(labels.index, labels, numbers, strict=True):
        if not np.isfinite(number):
            raise DataError(
                f"{table.origin}: row {row}: label column '{column}' holds {value!r}; "
                "regression needs a finite number in every row"
            )
    return torch.from_numpy(numbers)


def class_names_of(table: Table, column: str) -> pd.Series:
    """Returns each row's class as a name.

    Raises:
        DataError: If a label is missing, negative or a fraction.
    """
    labels = table.column(column)
    names = []
    for row, value in labels.items():
        try:
            names.append(class_name(value))
        except ValueError as fault:
            raise DataError(f"{table.origin}: row {row}: label column '{column}' {fault}") from None
    return pd.Series(names, index=labels.index)


def find_classes(table: Table, column: str) -> list[str]:
    """Returns the distinct classes: whole numbers by value, all others by name.

    Raises:
        DataError: If there are fewer than two classes, or as many as rows.
    """
    found = class_names_of(table, column)
    names = found.unique().tolist()
    if len(names) == 1:
        raise DataError(
            f"{table.origin}: label column '{column}' holds '{names[0]}' in all {len(found)} rows; "
            "classification needs two or more"
        )
    if len(names) == len(found) > 2:
        raise DataError(
            f"{table.origin}: label column '{column}' has another value in each of its {len(found)} rows, "
            f"e.g. '{names[0]}'; choose the column that holds the class"
        )
    numeric = all(name.isdecimal() for name in names)
    return sorted(names, key=int if numeric else None)


def class_ids_of(table: Table, column: str, classes: list[str]) -> Tensor:
    """Returns each row's position in `classes`, `(rows,)` int64.

    Raises:
        DataError: If a row's class is not among them.
    """
    ids = {name: position for position, name in enumerate(classes)}
    names = class_names_of(table, column)
    for row, name in names.items():
        if name not in ids:
            known = ", ".join(classes[:NAMES_SHOWN]) + (", ..." if len(classes) > NAMES_SHOWN else "")
            raise DataError(
                f"{table.origin}: row {row}: label '{name}' does not occur in the training data; "
                f"known: {known}"
            )
    return torch.tensor([ids[name] for name in names])


@dataclass(frozen=True)
class Examples:
    """Checked texts and labels of one split; all lists are of the same length."""

    texts: list[str]
    pairs: list[str] | None
    prompts: list[str] | None
    labels: Tensor | None

    def hash(self) -> str:
        """Returns the sha256 of the contents, in their order."""
        labels = None if self.labels is None else self.labels.tolist()
        content = json.dumps([self.texts, self.pairs, self.prompts, labels])
        return hashlib.sha256(content.encode()).hexdigest()


def read_examples(table: Table, columns: Columns, task: str, classes: list[str]) -> Examples:
    """Takes texts and labels out of a table.

    Args:
        table: Its rows.
        columns: What to read.
        task: A key of TASKS.
        classes: The classes of a classification task.

    Raises:
        DataError: If a column is missing or a value does not suit, naming the row.
    """
    labels = None
    if TASKS[task].labels == "classes":
        labels = class_ids_of(table, str(columns.label), classes)
    elif TASKS[task].labels == "numbers":
        labels = numbers_of(table, str(columns.label))
    return Examples(
        texts=texts_of(table, columns.text[0]),
        pairs=texts_of(table, columns.text[1]) if len(columns.text) > 1 else None,
        prompts=texts_of(table, columns.prompt, required=False) if columns.prompt else None,
        labels=labels,
    )
