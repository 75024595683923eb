"""What every data source is asked for, and what it answers with."""

from dataclasses import dataclass

from omegaconf import MISSING
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Split:
    """The examples of one split, ready for a DataLoader."""

    examples: Dataset[dict[str, Tensor]]
    """Map-style: index -> one example's tensors, without a batch axis."""
    lengths: Tensor
    """Tokens of each example, `(examples,)`; decides which examples share a batch."""


@dataclass(frozen=True)
class Splits:
    """All that a source yields: the examples and what the model must know of them."""

    splits: dict[str, Split]
    """Always `train` and `validation`; `test` where the source has one."""
    label_names: list[str]
    """The classes in the order of their ids; empty for other tasks."""
    fingerprint: str
    """sha256 of the contents of the splits, before tokenisation."""
    pad_token: int
    """Id that fills up short sequences."""
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
    """Share of the training rows set aside where the source has no validation split; above 0, below 1."""
    split_seed: int = 1234
    """Seed of splits and limits, at least 0; not the run's seed, so that all runs see the same rows."""
    bucket_by_length: bool = True
    """Whether training batches gather texts of like length, which saves padding."""

    def faults(self, task: str) -> list[str]:
        """Returns what is wrong with these options for a task, as far as they show without data."""
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
        return faults

    def limit(self, split: str) -> int | None:
        """Returns the limit of `train`, `validation` or `test`."""
        return {"train": self.train_limit, "validation": self.validation_limit, "test": self.test_limit}[
            split
        ]

    def load(self, tokenizer: PreTrainedTokenizerBase | None, task: str) -> Splits:
        """Reads, checks, splits and tokenises the examples; same result for the same options.

        Raises:
            DataError: If the examples are missing, broken or do not suit the task.
        """
        raise NotImplementedError
