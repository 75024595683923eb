"""What a model is trained for: its loss, its metrics, and the metric that says which run is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.regression import MeanAbsoluteError, PearsonCorrCoef
from torchmetrics.text import Perplexity

from lora_lab.data.config import IGNORED


@dataclass(frozen=True)
class Task:
    """A kind of supervised learning."""

    name: str
    align: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(logits, labels) → the pair that loss and metrics compare."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Aligned pair → mean loss, a scalar."""
    metrics: Callable[[int], MetricCollection]
    """Number of classes → metrics of the aligned pair."""
    monitor: str
    """Name of the metric by which runs are compared."""
    mode: Literal["min", "max"]
    """Whether less or more of it is better."""


def _classes(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
    return logits.float(), labels


def _values(logits: Float[Tensor, "batch 1"], labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.float().reshape(-1), labels.float().reshape(-1)


def _next_tokens(
    logits: Float[Tensor, "batch time vocabulary"], labels: Int[Tensor, "batch time"]
) -> tuple[Tensor, Tensor]:
    return logits[:, :-1].float(), labels[:, 1:]


def _token_loss(logits: Float[Tensor, "batch time vocabulary"], labels: Int[Tensor, "batch time"]) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "sequence_classification",
            align=_classes,
            loss=F.cross_entropy,
            metrics=lambda classes: MetricCollection(
                {"accuracy": MulticlassAccuracy(classes, average="micro"), "f1": MulticlassF1Score(classes)}
            ),
            monitor="accuracy",
            mode="max",
        ),
        Task(
            "regression",
            align=_values,
            loss=F.mse_loss,
            metrics=lambda classes: MetricCollection(
                {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "pearson": PearsonCorrCoef()}
            ),
            monitor="mse",
            mode="min",
        ),
        Task(
            "causal_lm",
            align=_next_tokens,
            loss=_token_loss,
            metrics=lambda classes: MetricCollection({"perplexity": Perplexity(ignore_index=IGNORED)}),
            monitor="perplexity",
            mode="min",
        ),
    )
}
"""Every task by the name that `model.task` gives."""
