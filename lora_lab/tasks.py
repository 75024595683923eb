"""The one table of tasks: what a model is trained for.

An entry has the kind of labels, which decides what is read from the data and which head the model has; the
loss; the metrics, and the one by which runs are compared. To add a task, add an entry to `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.regression import MeanAbsoluteError, PearsonCorrCoef
from torchmetrics.text import Perplexity

from lora_lab.errors import suggest

IGNORED = -100
"""Label of a token or class that does not count in the loss; PyTorch's default for cross entropy. If labels
are real numbers, NaN has this meaning."""


@dataclass(frozen=True)
class Task:
    """A kind of supervised learning."""

    name: str
    """The value of `model.task`."""
    labels: Literal["classes", "numbers", "tokens"]
    """What is predicted: a class, a real number, or each token of the text from those before it."""
    peft_type: str
    """PEFT's `task_type`."""
    align: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(logits, labels) → the pair that loss and metrics compare."""
    total: Callable[[Tensor, Tensor], Tensor]
    """Aligned pair → sum of the losses of all labels that count, a scalar."""
    examples: Callable[[Tensor, Tensor], dict[str, Tensor]]
    """Aligned pair → what is stored for each example: tensors `(batch,)` by name, including `loss`."""
    metrics: Callable[[int], MetricCollection]
    """Number of classes → metrics of the aligned pair."""
    monitor: str
    """Name of the metric by which runs are compared."""
    mode: Literal["min", "max"]
    """Whether less or more of it is better."""

    @property
    def causal(self) -> bool:
        """Whether the text itself is learned, from left to right, without labels."""
        return self.labels == "tokens"

    def outputs(self, classes: int) -> int:
        """Returns the size of the model's output for this many classes; 0 if it is the vocabulary."""
        return {"classes": classes, "numbers": 1, "tokens": 0}[self.labels]

    def count(self, labels: Tensor) -> Tensor:
        """Returns how many of a batch's aligned labels count, a scalar."""
        return (~labels.isnan() if labels.is_floating_point() else labels != IGNORED).sum()

    def loss(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Returns an aligned pair's mean loss over the labels that count, a scalar; 0 if none does."""
        return self.total(predictions, labels) / divisor(self.count(labels))

    def sums(
        self, predictions: Tensor, labels: Tensor, class_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the sum of an aligned pair's losses and the number of its labels that count, both scalars.

        Args:
            predictions: aligned, as `labels`.
            labels: classes, if they are weighted.
            class_weights: weight of each class, shape (classes). Each loss is then multiplied by the weight
                of its label, and the weights are summed instead of counted: the mean is that of torch's
                `cross_entropy(weight=…)`.
        """
        if class_weights is None:
            return self.total(predictions, labels), self.count(labels)
        total = F.cross_entropy(predictions, labels, class_weights, ignore_index=IGNORED, reduction="sum")
        return total, class_weights[labels[labels != IGNORED]].sum()

    def better(self, metric: str) -> Literal["min", "max"]:
        """Returns whether less or more of a validation metric is better, as torchmetrics says.

        For correlations it does not say it: between predictions and labels, more is better.
        """
        if metric == self.monitor:
            return self.mode
        higher = metric != "loss" and self.metrics(2)[metric].higher_is_better is not False
        return "max" if higher else "min"

    def monitor_faults(self, metric: str | None) -> list[str]:
        """Returns the fault if there is no such validation metric; None means `monitor`."""
        known = ["loss", *map(str, self.metrics(2))]
        if metric is None or metric in known:
            return []
        return [f"monitor: {self.name} has no metric '{metric}'{suggest(metric, known)}"]


def divisor(count: Tensor) -> Tensor:
    """Returns a count, or sum of weights, to divide by: 1 if nothing was counted."""
    return torch.where(count > 0, count, torch.ones_like(count))


class MeanLoss(Metric):
    """The mean loss over the labels of all batches; not finite if one batch's is not.

    (`torchmetrics.MeanMetric` ignores NaN.)

    Args:
        weighted: whether labels have weights, so that their sum is not an integer.
    """

    total: Tensor
    count: Tensor

    def __init__(self, weighted: bool = False) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0 if weighted else 0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Adds a batch's sum of losses and its number of labels, both scalars."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Returns the mean."""
        return self.total / divisor(self.count)


class Correlation(PearsonCorrCoef):
    """Pearson's correlation, also where each process has too few rows to differ among themselves.

    torchmetrics scales by the largest deviation from a process's own mean, which is 0 then.
    """

    def compute(self) -> Tensor:
        """Returns the correlation."""
        if self.mean_x.numel() > 1:  # states of several processes
            apart_x, apart_y = (means.max() - means.min() for means in (self.mean_x, self.mean_y))
            self.max_abs_dev_x = self.max_abs_dev_x.maximum(apart_x)
            self.max_abs_dev_y = self.max_abs_dev_y.maximum(apart_y)
        return super().compute()


def _classes(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
    return logits.float(), labels


def _values(logits: Float[Tensor, "batch 1"], labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.float().reshape(-1), labels.float().reshape(-1)


def _next_tokens(
    logits: Float[Tensor, "batch time vocabulary"], labels: Int[Tensor, "batch time"]
) -> tuple[Tensor, Tensor]:
    return logits[:, :-1].float(), labels[:, 1:]


def _class_total(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _class_examples(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> dict[str, Tensor]:
    """Returns label, predicted class, its probability (`score`) and loss."""
    score, prediction = logits.softmax(-1).max(-1)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return {"label": labels, "prediction": prediction, "score": score, "loss": loss}


def _value_examples(values: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> dict[str, Tensor]:
    """Returns label, predicted number (`score`) and squared error."""
    return {"label": labels, "score": values, "loss": (values - labels).square()}


def _token_examples(
    logits: Float[Tensor, "batch time vocabulary"], labels: Int[Tensor, "batch time"]
) -> dict[str, Tensor]:
    """Returns the mean loss of the tokens that count, and their number."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    tokens = (labels != IGNORED).sum(1)
    return {"loss": losses.sum(1) / tokens.clamp(min=1), "tokens": tokens}


def _squared_total(values: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Tensor:
    counted = ~labels.isnan()
    return F.mse_loss(values[counted], labels[counted], reduction="sum")


def _token_total(logits: Float[Tensor, "batch time vocabulary"], labels: Int[Tensor, "batch time"]) -> Tensor:
    return _class_total(logits.flatten(0, 1), labels.flatten())


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "sequence_classification",
            labels="classes",
            peft_type="SEQ_CLS",
            align=_classes,
            total=_class_total,
            examples=_class_examples,
            metrics=lambda classes: MetricCollection(
                {"accuracy": MulticlassAccuracy(classes, average="micro"), "f1": MulticlassF1Score(classes)}
            ),
            monitor="accuracy",
            mode="max",
        ),
        Task(
            "regression",
            labels="numbers",
            peft_type="SEQ_CLS",
            align=_values,
            total=_squared_total,
            examples=_value_examples,
            metrics=lambda classes: MetricCollection(
                {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "pearson": Correlation()}
            ),
            monitor="mse",
            mode="min",
        ),
        Task(
            "causal_lm",
            labels="tokens",
            peft_type="CAUSAL_LM",
            align=_next_tokens,
            total=_token_total,
            examples=_token_examples,
            metrics=lambda classes: MetricCollection({"perplexity": Perplexity(ignore_index=IGNORED)}),
            monitor="perplexity",
            mode="min",
        ),
    )
}
"""Every task by the name that `model.task` gives."""


def name_classes(config: Any, names: Sequence[str]) -> None:
    """Writes the names of a classifier's classes into its model's config, if their number fits.

    Args:
        config: a config of transformers, or None.
        names: in the order of the outputs; none change nothing.
    """
    if names and getattr(config, "num_labels", None) == len(names):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}


def task_faults(name: str) -> list[str]:
    """Returns the fault if there is no such task, as `task: what is wrong and what is allowed`."""
    return [] if name in TASKS else [f"task: no task '{name}'{suggest(name, TASKS)}"]
