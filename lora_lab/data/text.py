"""What all text sources share: from their tables to tokenised splits."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lora_lab.data.config import DataConfig, Split, Splits
from lora_lab.data.examples import Columns, class_names_of, find_classes, read_examples
from lora_lab.data.table import Table
from lora_lab.data.tokens import Tokens, check_causal, tokenise
from lora_lab.errors import DataError
from lora_lab.tasks import IGNORED, TASKS


class TokenisedTexts(Dataset[dict[str, Tensor]]):
    """Examples of text without padding: `input_ids`, `token_type_ids` where known, and `labels`.

    If a text follows a prompt, `prompt_lengths` has the prompt's number of tokens, for methods that edit
    prompts.
    """

    def __init__(self, tokens: Tokens, labels: Tensor | None):
        self.tokens = tokens
        self.labels = labels
        self.prompted = labels is None and bool(tokens.prompts.any())

    def __len__(self) -> int:
        return len(self.tokens.prompts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # which also ends an iteration
        start, end = self.tokens.offsets[index : index + 2].tolist()
        example = {"input_ids": self.tokens.ids[start:end].long()}  # (length,)
        if self.tokens.types is not None:
            example["token_type_ids"] = self.tokens.types[start:end].long()
        if self.labels is not None:
            example["labels"] = self.labels[index]
        else:
            example["labels"] = example["input_ids"].clone()
            example["labels"][: self.tokens.prompts[index]] = IGNORED
        if self.prompted:
            example["prompt_lengths"] = self.tokens.prompts[index]
        return example


def shuffled(table: Table, seed: int) -> Table:
    """Returns the rows in a random order that depends only on the seed."""
    return Table(table.frame.sample(frac=1, random_state=seed), table.origin)


def set_aside(
    table: Table, count: int, classes: pd.Series | None = None, purpose: str = "validation"
) -> tuple[Table, Table]:
    """Sets aside the first rows; returns the rest and these.

    Args:
        table: Its rows in a random order.
        count: Rows to set aside.
        classes: Class of each row; then each class has its part of the share, to the nearest row, and keeps a
            row in the rest if possible.
        purpose: What the rows are for, for messages.

    Raises:
        DataError: If nothing would be left.
    """
    if count >= len(table.frame):
        raise DataError(
            f"{table.origin}: {len(table.frame)} rows are too few to set aside {count} for {purpose}; add "
            f"rows or name a {purpose} split"
        )
    chosen = pd.Series(range(len(table.frame)), index=table.frame.index) < count
    if classes is not None:
        classes = classes[table.frame.index]
        parts = classes_share(classes.value_counts().to_dict(), count)
        chosen = classes.groupby(classes).cumcount() < classes.map(parts)
    return Table(table.frame[~chosen], table.origin), Table(table.frame[chosen], table.origin)


def classes_share(sizes: Mapping[Any, int], count: int) -> dict[Any, int]:
    """Returns how many rows of each class are among `count`: the rounded shares, which add up.

    Args:
        sizes: Rows of each class; in all more than `count`.
        count: Rows to take.
    """
    total = sum(sizes.values())
    parts = {name: size * count // total for name, size in sizes.items()}
    # First come classes that keep a row, then those whose share lost most by rounding down.
    order = sorted(sizes, key=lambda name: (sizes[name] - parts[name] < 2, -(sizes[name] * count % total)))
    for name in order[: count - sum(parts.values())]:
        parts[name] += 1
    return parts


def without_duplicates(table: Table, column: str) -> Table:
    """Returns the rows whose text has not occurred before; case and white space do not count."""
    plain = table.frame[column].str.casefold().str.split().str.join(" ")
    return Table(table.frame[~plain.duplicated()], table.origin)


@dataclass
class TextConfig(DataConfig):
    """Options of every source of text."""

    def columns(self, task: str) -> Columns:
        """Returns which columns hold text and label."""
        raise NotImplementedError

    def tables(self) -> dict[str, Table]:
        """Returns the rows of `train`, and of `validation` and `test` where the source has them."""
        raise NotImplementedError

    def load(
        self, tokenizer: PreTrainedTokenizerBase | None, task: str, label_names: Sequence[str] = ()
    ) -> Splits:
        """Reads, checks, splits and tokenises the texts; see `DataConfig.load`."""
        if tokenizer is None:
            raise DataError(
                f"data.source: '{self.source}' holds text, but the model has no tokenizer; use source 'toy'"
            )
        columns = self.columns(task)
        tables = {split: shuffled(table, self.split_seed) for split, table in self.tables().items()}
        # Before any limit, so that a rare class does not disappear from a short run.
        classes, of_rows = list(label_names), None
        if TASKS[task].labels == "classes":
            of_rows = class_names_of(tables["train"], str(columns.label))
            classes = classes or find_classes(tables["train"], str(columns.label))
        count = len(tables["train"].frame)
        for name, fraction in (("test", self.test_fraction), ("validation", self.validation_fraction)):
            if name not in tables and fraction:
                part = max(1, round(count * fraction))
                tables["train"], tables[name] = set_aside(tables["train"], part, of_rows, name)
        splits = {}
        hashes = []
        inputs: dict[str, set[tuple[str, ...]]] = {}
        for name in sorted(tables, key=["train", "validation", "test"].index):
            table = Table(
                tables[name].frame.head(self.limit(name) or len(tables[name].frame)), tables[name].origin
            )
            examples = read_examples(table, columns, task, classes)
            tokens = tokenise(examples, tokenizer, TASKS[task].causal, self.max_length)
            if TASKS[task].causal:
                check_causal(tokens, table.origin, table.frame.index.tolist(), self.max_length)
            rows = examples.inputs()
            also_in = {earlier: sum(row in known for row in rows) for earlier, known in inputs.items()}
            inputs[name] = set(rows)
            splits[name] = Split(
                TokenisedTexts(tokens, examples.labels), tokens.lengths, int(tokens.cut.sum()), also_in
            )
            hashes.append(f"{name} {examples.hash()}")
        # It is masked everywhere, so any id would do, but a model may refuse one outside its vocabulary.
        pad_token = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        # In the order of names, so that fingerprints stay the same.
        fingerprint = hashlib.sha256(" ".join([task, *classes, *sorted(hashes)]).encode()).hexdigest()
        return Splits(splits, classes, fingerprint, pad_token, tokenizer.padding_side)
