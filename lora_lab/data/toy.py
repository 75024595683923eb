"""Two functions of random numbers: one to pre-train a small network on, one to adapt it to."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lora_lab.data.batches import seeded_generator
from lora_lab.data.config import DataConfig, Split, Splits
from lora_lab.errors import suggest
from lora_lab.tasks import TASKS

TARGETS = ("product", "sum")


class ToyExamples(Dataset[dict[str, Tensor]]):
    """Normally distributed inputs and a function of them: `features (features,)` and `labels (1,)`."""

    def __init__(self, target: str, features: Tensor):
        self.features = features  # (examples, features)
        self.labels = (
            features.sum(1, keepdim=True) if target == "sum" else features[:, :2].prod(1, keepdim=True)
        )

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}


@dataclass
class ToyConfig(DataConfig):
    """Regression on random numbers, for networks without text."""

    source: str = "toy"
    """Always `toy`."""
    target: Literal["sum", "product"] = "sum"
    """What to learn: the sum of all inputs, or the product of the first two."""
    size: int = 1000
    """Examples in each of training, validation and test; at least 1."""
    features: int = 10
    """Inputs of an example; at least 2."""

    def faults(self, task: str) -> list[str]:
        """Also checks that the task is regression, and the sizes."""
        faults = super().faults(task)
        if TASKS[task].labels != "numbers":
            faults.append(f"data.source: 'toy' is for regression, not for {task}")
        if self.target not in TARGETS:
            faults.append(f"data.target: no target '{self.target}'{suggest(self.target, TARGETS)}")
        if self.size < 1:
            faults.append(f"data.size: must be at least 1; got {self.size}")
        if self.features < 2:
            faults.append(f"data.features: must be at least 2; got {self.features}")
        return faults

    def load(
        self, tokenizer: PreTrainedTokenizerBase | None, task: str, label_names: Sequence[str] = ()
    ) -> Splits:
        """Draws the three splits, each from its own generator; the tokenizer is not used."""
        splits = {}
        digest = hashlib.sha256(self.target.encode())
        for number, name in enumerate(("train", "validation", "test")):
            size = min(self.size, self.limit(name) or self.size)
            features = torch.randn(size, self.features, generator=seeded_generator(self.split_seed, number))
            digest.update(features.numpy().tobytes())
            splits[name] = Split(ToyExamples(self.target, features), torch.ones(size, dtype=torch.long))
        return Splits(splits, [], digest.hexdigest(), pad_token=0, padding_side="right")
