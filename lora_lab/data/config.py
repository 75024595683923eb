"""The options of every data source, and what a source returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Union  # omegaconf reads it

from omegaconf import MISSING
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lora_lab.tasks import TASKS

LONGEST = 2**24
"""Most tokens of an example: far above what any model reads, and below what a tokenizer can count."""


@dataclass(frozen=True)
class Split:
    """The examples of one split, ready for a DataLoader."""

    examples: Dataset[dict[str, Tensor]]
    """Map-style: index -> one example's tensors, without a batch axis."""
    lengths: Tensor
    """Tokens of each example, `(examples,)`; decides which examples share a batch."""
    cut: int = 0
    """Number of examples that were cut at `max_length`."""
    also_in: dict[str, int] = field(default_factory=dict)
    """For each earlier split (`train`, for `test` also `validation`): number of examples whose texts are also
    there."""


@dataclass(frozen=True)
class Splits:
    """Everything that a source returns: the examples, and what the model must know about them."""

    splits: dict[str, Split]
    """Always `train` and `validation`; `test` if the source has one."""
    label_names: list[str]
    """The classes in the order of their ids; empty for other tasks."""
    fingerprint: str
    """sha256 of the contents of the splits, before tokenisation."""
    pad_token: int
    """Id that fills short sequences."""
    padding_side: str
    """`right` or `left`, as the tokenizer has it."""


@dataclass
class DataConfig:
    """Options of every data source."""

    source: str = MISSING
    """Where the examples come from: embedded, hub, files or toy."""
    batch_size: int = 32
    """Training examples per device and batch, before gradient accumulation; at least 1."""
    evaluation_batch_size: int = 64
    """Validation and test examples per device and batch; at least 1. Does not change any result."""
    max_length: int = 128
    """Tokens per example, special ones included; longer texts are cut. At least 4."""
    workers: int = 0
    """Processes that collate batches; 0 does it in the main process."""
    train_limit: int | None = None
    """Examples kept of the training split after its seeded shuffle; all if empty."""
    validation_limit: int | None = None
    """Examples kept of the validation split after its seeded shuffle; all if empty."""
    test_limit: int | None = None
    """Examples kept of the test split after its seeded shuffle; all if empty."""
    validation_fraction: float = 0.1
    """Share of the training rows set aside if the source has no validation split, between 0 and 1; the same
    share of each class."""
    test_fraction: float = 0.0
    """Share of the training rows set aside for testing if the source has no test split, likewise; 0 means no
    test."""
    class_weights: Union[str, dict[str, float]] = field(default_factory=dict)  # noqa: UP007
    """Class weights in every loss of a classification: name of a class → weight above 0, and 1 for classes
    left out; `balanced` weighs each by rows / (classes · rows of the class) in the training split."""
    split_seed: int = 1234
    """Seed of splits and limits, at least 0; not the run's seed, so that all runs use the same rows."""
    bucket_by_length: bool = True
    """Whether training batches have texts of similar length, which saves padding."""

    def faults(self, task: str) -> list[str]:
        """Returns what is wrong with these options for a task, as far as it shows without data."""
        lowest = {
            "batch_size": 1,
            "evaluation_batch_size": 1,
            "max_length": 4,
            "workers": 0,
            "train_limit": 1,
            "validation_limit": 1,
            "test_limit": 1,
            "split_seed": 0,
        }
        faults = [
            f"data.{name}: must be at least {least}; got {getattr(self, name)}"
            for name, least in lowest.items()
            if getattr(self, name) is not None and getattr(self, name) < least
        ]
        if not 0 < self.validation_fraction < 1:
            faults.append(
                f"data.validation_fraction: must be above 0 and below 1; got {self.validation_fraction}"
            )
        elif not 0 <= self.test_fraction < 1 - self.validation_fraction:
            faults.append(
                "data.test_fraction: must be at least 0, and leave rows for training besidess "
                f"data.validation_fraction={self.validation_fraction}; got {self.test_fraction}"
            )
        weights = self.class_weights
        if weights and TASKS[task].labels != "classes":
            faults.append(f"data.class_weights: {task} has no classes; remove them")
        elif isinstance(weights, str) and weights != "balanced":
            faults.append(f"data.class_weights: must be balanced, or hold class: weight; got '{weights}'")
        elif isinstance(weights, dict):
            faults += [
                f"data.class_weights.{name}: must be above 0; got {weight}"
                for name, weight in weights.items()
                if not (weight > 0 and isfinite(weight))
            ]
        if self.test_fraction and self.has_test_split:
            faults.append(
                f"data.test_fraction: '{self.source}' already has a test split; remove one of the two"
            )
        if self.split_seed >= 2**32:
            faults.append(f"data.split_seed: must be below {2**32}; got {self.split_seed}")
        if self.max_length > LONGEST:
            faults.append(f"data.max_length: must be at most {LONGEST:,}; got {self.max_length}")
        return faults

    @property
    def has_test_split(self) -> bool:
        """Whether the source has test rows."""
        return True

    def limit(self, split: str) -> int | None:
        """Returns the limit of `train`, `validation` or `test`."""
        return {"train": self.train_limit, "validation": self.validation_limit, "test": self.test_limit}[
            split
        ]

    def load(
        self, tokenizer: PreTrainedTokenizerBase | None, task: str, label_names: Sequence[str] = ()
    ) -> Splits:
        """Reads, checks, splits and tokenises the examples; same result for the same options.

        Args:
            tokenizer: Of the model; None for models without text.
            task: A key of TASKS.
            label_names: The classes of a stored model in the order of their ids; empty to find them in the
                training rows.

        Raises:
            DataError: If the examples are missing, broken or do not fit the task.
        """
        raise NotImplementedError
