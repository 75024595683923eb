"""The user's own CSV, TSV, JSON lines or Parquet files."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from lora_lab.data.examples import Columns
from lora_lab.data.table import DELIMITERS, SUFFIXES, Table, read_table
from lora_lab.data.text import TextConfig
from lora_lab.errors import suggest
from lora_lab.tasks import TASKS


@dataclass
class FilesConfig(TextConfig):
    """Local files, one per split; the suffix (.csv, .tsv, .jsonl, .parquet) decides the format."""

    source: str = "files"
    """Always `files`."""
    train: str = MISSING
    """Path of the training rows, relative to the current folder or absolute."""
    validation: str | None = None
    """Path of the validation rows; a share of the training rows if empty."""
    test: str | None = None
    """Path of the test rows; no test if empty."""
    text: list[str] = field(default_factory=lambda: ["text"])
    """Column of the text, or two columns for pairs of texts."""
    label: str | None = None
    """Column of the class (number or name) or of the rating; needed unless the task is causal_lm. Names are
    kept as they are, without surrounding spaces: 007 is not 7, but 1.0 is 1. In JSON and Parquet true is not
    1, and a column with both 1 and "1" is refused."""
    prompt: str | None = None
    """Only for causal_lm: column of a text that comes first and is given, not learned."""
    delimiter: str | None = None
    """Delimiter of CSV and TSV files; a comma or a tab if empty."""
    quotes: bool = True
    """Whether values of CSV and TSV files may be quoted, and then hold delimiters and line breaks; false if
    quotation marks are ordinary characters."""

    def faults(self, task: str) -> list[str]:
        """Also checks for missing files, files given twice, and columns that do not fit the task."""
        faults = super().faults(task)
        given = {name: getattr(self, name) for name in ("train", "validation", "test")}
        seen: dict[Path, str] = {}
        for name, value in given.items():
            if value is None:
                continue
            path = Path(value).expanduser()
            if value == MISSING:
                faults.append("data.train: missing; give the path of the training rows")
            elif not path.is_file():
                faults.append(f"data.{name}: no file '{value}' (looked in {path.absolute().parent})")
            elif path.suffix.lower() not in SUFFIXES:
                faults.append(f"data.{name}: cannot read '{value}'{suggest(path.suffix, SUFFIXES)}")
            elif path.resolve() in seen:
                faults.append(
                    f"data.{name}: '{value}' is also data.{seen[path.resolve()]}; scores on the same rows "
                    "would mean nothing. Give another file or leave it empty"
                )
            else:
                seen[path.resolve()] = name
        if self.delimiter is not None:
            if len(self.delimiter) != 1 or self.delimiter in '"\r\n\0':
                faults.append(
                    "data.delimiter: must be one character, and neither a quotation mark nor a line break; "
                    f"got {self.delimiter!r}"
                )
            elif not {Path(value).suffix.lower() for value in given.values() if value} & {*DELIMITERS}:
                faults.append("data.delimiter: only CSV and TSV files have one; leave it empty")
        return faults + self._column_faults(task)

    def columns(self, task: str) -> Columns:
        """Returns the columns the user named."""
        return Columns(self.text, self.label, self.prompt)

    def tables(self) -> dict[str, Table]:
        """Reads the files."""
        paths = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            split: read_table(Path(path).expanduser(), self.delimiter, self.quotes)
            for split, path in paths.items()
            if path is not None
        }

    @property
    def has_test_split(self) -> bool:
        """Whether a file of test rows is named."""
        return self.test is not None

    def _column_faults(self, task: str) -> list[str]:
        faults = column_count_faults(self.text, task)
        if not TASKS[task].causal and self.label is None:
            faults.append(f"data.label: missing; {task} needs the name of the column that holds the label")
        if not TASKS[task].causal and self.prompt is not None:
            faults.append(f"data.prompt: only causal_lm has prompts, not {task}; leave it empty")
        return faults


def column_count_faults(text: list[str], task: str) -> list[str]:
    """Checks the number of text columns."""
    if TASKS[task].causal and len(text) != 1:
        return [f"data.text: {task} needs one column; got {len(text)}"]
    if not 1 <= len(text) <= 2:
        return [f"data.text: must be one column, or two for pairs of texts; got {len(text)}"]
    return []
