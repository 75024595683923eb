"""`test_examples.parquet`: one row for each test example, for paired statistics of runs.

id           position in the test split, counted from 0; the same rows for all runs on the same data
label        class or number                                        (not of language models)
prediction   predicted class                                        (classification)
score        probability of that class, or the predicted number     (classification, regression)
loss         cross entropy, squared error, or mean over the tokens
tokens       number of tokens over which the loss is a mean                      (language models)
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch.distributed as distributed

NAME = "test_examples.parquet"


class TestExamples(L.Callback):
    """Writes what the test step returned for each example.

    Args:
        folder: the run's folder; None writes nothing.
    """

    __test__ = False  # pytest would take it for a test class

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._parts: list[pd.DataFrame] = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets an earlier test."""
        self._parts = []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps a batch's rows."""
        if self.folder is None:
            return
        loaders: Any = trainer.test_dataloaders
        columns = {name: tensor.detach().cpu().numpy() for name, tensor in outputs.items()}
        self._parts.append(pd.DataFrame({"id": loaders.batch_sampler.batches[batch_idx], **columns}))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the rows of all processes, in the order of the split; a full disk loses only these rows."""
        if self.folder is None:
            return
        own = pd.concat(self._parts) if self._parts else pd.DataFrame()
        parts = [own]
        if distributed.is_initialized():
            parts = [own] * trainer.world_size
            distributed.all_gather_object(parts, own)
        if trainer.is_global_zero:
            path = self.folder / NAME
            unfinished = path.with_name(f".{NAME}.unfinished.{os.getpid()}")
            try:
                pd.concat(parts).sort_values("id").to_parquet(unfinished, index=False)
                os.replace(unfinished, path)
            except OSError as error:
                warnings.warn(f"{path}: could not be written ({error}); the run goes on.", stacklevel=2)
            finally:
                unfinished.unlink(missing_ok=True)
