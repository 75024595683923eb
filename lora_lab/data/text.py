"""What all sources of text share: from their tables to tokenised splits."""

import hashlib
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lora_lab.data.config import DataConfig, Split, Splits
from lora_lab.data.examples import Columns, find_classes, read_examples
from lora_lab.data.table import Table
from lora_lab.data.tokens import Tokens, check_causal, tokenise
from lora_lab.errors import DataError
from lora_lab.tasks import IGNORED, TASKS


class TokenisedTexts(Dataset[dict[str, Tensor]]):
    """Examples of text without padding: `input_ids`, `token_type_ids` where known, and `labels`.

    Where a text follows a prompt, `prompt_lengths` tells its tokens, for methods that edit prompts.
    """

    def __init__(self, tokens: Tokens, labels: Tensor | None):
        self.tokens = tokens
        self.labels = labels
        self.prompted = labels is None and bool(tokens.prompts.any())

    def __len__(self) -> int:
        return len(self.tokens.prompts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
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
    """Returns the rows in a random order that depends on the seed alone."""
    return Table(table.frame.sample(frac=1, random_state=seed), table.origin)


def set_aside(table: Table, fraction: float) -> tuple[Table, Table]:
    """Splits off a share of the rows, at least one, and returns rest and share.

    Raises:
        DataError: If nothing would be left.
    """
    count = max(1, round(len(table.frame) * fraction))
    if count >= len(table.frame):
        raise DataError(
            f"{table.origin}: {len(table.frame)} rows are too few to set aside {fraction:.0%} for "
            "validation; add rows or name a validation split"
        )
    return Table(table.frame.iloc[count:], table.origin), Table(table.frame.iloc[:count], table.origin)


def without_duplicates(table: Table, column: str) -> Table:
    """Returns the rows whose text has not occurred before; case and white space do not tell texts apart."""
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

    def load(self, tokenizer: PreTrainedTokenizerBase | None, task: str) -> Splits:
        """Reads, checks, splits and tokenises the texts; see `DataConfig.load`."""
        if tokenizer is None:
            raise DataError(
                f"data.source: '{self.source}' holds text, but the model has no tokenizer; use source 'toy'"
            )
        columns = self.columns(task)
        tables = {split: shuffled(table, self.split_seed) for split, table in self.tables().items()}
        # Before any limit, so that a class which is rare does not vanish from a short run.
        classes = find_classes(tables["train"], str(columns.label)) if TASKS[task].labels == "classes" else []
        if "validation" not in tables:
            tables["train"], tables["validation"] = set_aside(tables["train"], self.validation_fraction)
        splits = {}
        hashes = []
        for name in sorted(tables):
            table = Table(
                tables[name].frame.head(self.limit(name) or len(tables[name].frame)), tables[name].origin
            )
            examples = read_examples(table, columns, task, classes)
            tokens = tokenise(examples, tokenizer, TASKS[task].causal, self.max_length)
            if TASKS[task].causal:
                check_causal(tokens, table.origin, table.frame.index.tolist(), self.max_length)
            splits[name] = Split(TokenisedTexts(tokens, examples.labels), tokens.lengths)
            hashes += [name, examples.hash()]
        # Masked everywhere, so any id will do; but a model may refuse one that is not in its vocabulary.
        pad_token = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        fingerprint = hashlib.sha256(" ".join([task, *classes, *hashes]).encode()).hexdigest()
        return Splits(splits, classes, fingerprint, pad_token, tokenizer.padding_side)
