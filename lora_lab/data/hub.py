"""Data sets of the Hugging Face hub; the columns of GLUE are known."""

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
from omegaconf import MISSING

from lora_lab.data.examples import Columns
from lora_lab.data.files import column_count_faults
from lora_lab.data.table import Table
from lora_lab.data.text import TextConfig
from lora_lab.errors import DataError, suggest
from lora_lab.tasks import TASKS

if TYPE_CHECKING:
    from datasets import DatasetDict

GLUE = ("glue", "nyu-mll/glue")
GLUE_TEXT = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "stsb": ["sentence1", "sentence2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
"""Text columns of each task of GLUE (Wang et al. 2018, arXiv:1804.07461)."""


@dataclass
class HubConfig(TextConfig):
    """A data set of the Hugging Face hub; needs the package datasets."""

    source: str = "hub"
    """Always `hub`."""
    path: str = MISSING
    """Repository, e.g. `glue` or `stanfordnlp/imdb`."""
    name: str | None = None
    """Configuration inside the repository, e.g. `sst2`."""
    revision: str | None = None
    """Commit or tag of the repository, which makes a study repeatable; the newest if empty."""
    text: list[str] = field(default_factory=list)
    """Column of the text, or two for pairs; may be empty for GLUE."""
    label: str = "label"
    """Column of the class or rating; not used for causal_lm."""
    train_split: str = "train"
    """Name of the training split."""
    validation_split: str | None = None
    """Name of the validation split; if empty, GLUE's, for other data a share of the training rows."""
    test_split: str | None = None
    """Name of the test split; no test if empty. GLUE's test labels are hidden."""

    def faults(self, task: str) -> list[str]:
        """Also checks that the package datasets is installed, the GLUE task, and the columns."""
        faults = super().faults(task)
        if self.path == MISSING:
            return [*faults, "data.path: missing; give the repository of the data set, e.g. glue"]
        if importlib.util.find_spec("datasets") is None:
            faults.append("data.source: 'hub' needs the package datasets: pip install 'lora_lab[hub]'")
        if self.path in GLUE and self.name not in GLUE_TEXT:
            known = suggest(str(self.name), GLUE_TEXT)
            return [*faults, f"data.name: GLUE has no task '{self.name}'{known}"]
        labels = "numbers" if self.name == "stsb" else "classes"
        if self.path in GLUE and TASKS[task].labels not in (labels, "tokens"):
            faults.append(f"data.name: GLUE's '{self.name}' is not for {task}; only stsb is regression")
        return faults + column_count_faults(self.columns(task).text, task)

    def columns(self, task: str) -> Columns:
        """Returns the columns the user named, or GLUE's."""
        preset = GLUE_TEXT.get(str(self.name), []) if self.path in GLUE else []
        return Columns(self.text or preset, self.label)

    def tables(self) -> dict[str, Table]:
        """Downloads the splits, or takes them from the cache of the package datasets.

        Raises:
            DataError: If the data set cannot be loaded, lacks a split or has no rows.
        """
        import datasets

        where = " ".join(filter(None, [self.path, self.name]))
        try:
            loaded = datasets.load_dataset(self.path, self.name, revision=self.revision)
        except Exception as fault:  # the package raises errors of many libraries that it uses
            raise DataError(
                f"data.path: '{where}' cannot be loaded ({fault}); check the name and the connection"
            ) from fault
        names = {"train": self.train_split, "validation": self._validation_split(), "test": self.test_split}
        return {split: to_table(loaded, name, where) for split, name in names.items() if name is not None}

    @property
    def has_test_split(self) -> bool:
        """Whether a test split is named."""
        return self.test_split is not None

    def _validation_split(self) -> str | None:
        if self.validation_split is None and self.path in GLUE:
            return "validation_matched" if self.name == "mnli" else "validation"
        return self.validation_split


def to_table(loaded: "DatasetDict", split: str, where: str) -> Table:
    """Returns one split as a table; classes keep the data set's numbers.

    Raises:
        DataError: If there is no such split, or it has no rows.
    """
    if split not in loaded:
        raise DataError(f"{where}: no split '{split}'{suggest(split, loaded)}")
    frame: pd.DataFrame = loaded[split].to_pandas()
    if frame.empty:
        raise DataError(f"{where} ({split}): has no rows; choose another split")
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    return Table(frame, f"{where} ({split})")
