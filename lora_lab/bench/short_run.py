"""The short training run that benchmarks of callbacks measure: a random BERT, one process, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lora_lab.adapters import AdapterSet
from lora_lab.training.module import FineTuner

BATCH, LENGTH = 8, 64


def bert(**shape: int) -> nn.Module:
    """Returns a classifier of BERT base's shapes, or of others."""
    options: dict[str, Any] = {"vocab_size": 1000, "num_labels": 2, **shape}
    return BertForSequenceClassification(BertConfig(**options))


def train(
    model: nn.Module,
    adapters: AdapterSet,
    steps: int,
    callbacks: Sequence[L.Callback],
    loggers: Sequence[Logger] = (),
    log_every: int = 50,
) -> None:
    """Takes one warm-up step and then the given number of steps, and removes the adapters."""
    trainer = L.Trainer(
        max_steps=steps + 1,
        log_every_n_steps=log_every,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=list(loggers) or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ids = torch.randint(1, 1000, (steps + 1, BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(BATCH, dtype=torch.long)
    batches: Any = [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels} for rows in ids
    ]
    module = FineTuner(model.train(), adapters, "sequence_classification", num_labels=2)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    adapters.remove()


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of results with five digits after the decimal point."""
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}
