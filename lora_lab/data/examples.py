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
CHARACTERS_SHOWN = 80
EXACT = 2**53
"""Below it floats represent every whole number exactly."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table mean what."""

    text: list[str]
    """One column, or two for pairs of texts."""
    label: str | None = None
    """Class or number; not used for causal language modelling."""
    prompt: str | None = None
    """Text before the one to learn; only for causal language modelling."""


def shown(value: Any) -> str:
    """Returns how a message writes a value: long ones are cut."""
    text = repr(value)
    return text if len(text) <= CHARACTERS_SHOWN else f"{text[:CHARACTERS_SHOWN]}…"


def _half_character(text: str) -> bool:
    """Whether a text has a lone surrogate, half of a character, which tokenizers and files refuse."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def texts_of(table: Table, column: str, required: bool = True) -> list[str]:
    """Returns the column's texts.

    Raises:
        DataError: If a value is not text, has half of a character, or is blank although `required`.
    """
    values = table.column(column)
    for row, value in values.items():
        if not isinstance(value, str):
            what = f"holds {shown(value)}, which is not text"
        elif required and not value.strip():
            what = "is blank"
        elif _half_character(value):
            what = "has half of a character (a lone surrogate such as \\ud83d, often from a text cut short)"
        else:
            continue
        raise DataError(f"{table.origin}: row {row}: text column '{column}' {what}; fix or remove the row")
    return values.tolist()


def class_name(value: Any) -> str:
    """Returns a label as the name of a class.

    A text is its own name, without surrounding spaces: 007 is not 7. A number is written in full, and 1.0,
    also as text, is 1, since programs write a column of whole numbers in this way if a value is missing.

    Raises:
        ValueError: If it is not a class, with the reason.
    """
    if not pd.api.types.is_scalar(value):
        raise ValueError(f"holds {shown(value)}; a class is a name or a whole number")
    if pd.isna(value) or (isinstance(value, str) and not value.strip()):
        raise ValueError("is empty; fix or remove the row")
    if isinstance(value, float | np.floating) and abs(float(value)) > EXACT:
        raise ValueError(f"holds {value}, which is not exact at this size; write it as text or whole number")
    name = str(value).strip()
    if _half_character(name):
        raise ValueError(f"holds {shown(name)}, which has half of a character; fix or remove the row")
    if re.fullmatch(r"-[0-9]+(\.[0-9]*)?", name):
        raise ValueError(f"holds {name}; negative labels often mark hidden labels. Remove such rows")
    if re.fullmatch(r"[0-9]+\.0*", name):
        return name.partition(".")[0]
    if re.fullmatch(r"[0-9]*\.[0-9]+", name):
        raise ValueError(f"holds {name}, which is not a class; for numbers set the task to regression")
    return name


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
                f"{table.origin}: row {row}: label column '{column}' holds {shown(value)}; "
                "regression needs a finite number in every row"
            )
    return torch.from_numpy(numbers)


def class_names_of(table: Table, column: str) -> pd.Series:
    """Returns each row's class as a name.

    Raises:
        DataError: If a label is missing, negative or a fraction, or if two labels of different kinds (1 and
            "1", true and "True") would get the same name.
    """
    labels = table.column(column)
    names = []
    first: dict[str, tuple[str, Any, Any]] = {}
    for row, value in labels.items():
        try:
            name = class_name(value)
        except ValueError as fault:
            raise DataError(f"{table.origin}: row {row}: label column '{column}' {fault}") from None
        kind, earlier, other = first.setdefault(name, (_kind(value), row, value))
        if kind != _kind(value):
            raise DataError(
                f"{table.origin}: row {row}: label column '{column}' holds {shown(value)}, a {_kind(value)}, "
                f"and in row {earlier} {shown(other)}, a {kind}: are they one class? Write them in the same "
                "way"
            )
        names.append(name)
    return pd.Series(names, index=labels.index)


def _kind(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "truth value"
    return "number" if isinstance(value, int | float | np.number) else "text"


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
            f"{table.origin}: label column '{column}' has a different value in each of its {len(found)} "
            f"rows, e.g. {shown(names[0])}; choose the column that holds the class"
        )
    if all(re.fullmatch("[0-9]{1,4000}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


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
                f"{table.origin}: row {row}: label {shown(name)} does not occur in the training data; "
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

    def inputs(self) -> list[tuple[str, ...]]:
        """Returns the texts of each example; two examples with the same texts count as the same row."""
        columns = [given for given in (self.texts, self.pairs, self.prompts) if given is not None]
        return list(zip(*columns, strict=True))

    def hash(self) -> str:
        """Returns the sha256 of the contents, in their order."""
        labels = None if self.labels is None else self.labels.tolist()
        content = json.dumps([self.texts, self.pairs, self.prompts, labels])
        return hashlib.sha256(content.encode()).hexdigest()


def read_examples(table: Table, columns: Columns, task: str, classes: list[str]) -> Examples:
    """Extracts texts and labels from a table.

    Args:
        table: Its rows.
        columns: What to read.
        task: A key of TASKS.
        classes: The classes of a classification task.

    Raises:
        DataError: If a column is missing or a value does not fit; names the row.
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
