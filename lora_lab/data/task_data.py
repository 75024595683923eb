"""The Lightning data module: padding, loaders, and continuing in the middle of an epoch."""

import math
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lora_lab.data.batches import BucketedBatches, EvaluationBatches, seeded_generator, stratified_sample
from lora_lab.data.config import DataConfig, Splits
from lora_lab.errors import CheckpointError, DataError, suggest
from lora_lab.tasks import IGNORED, TASKS


def collate(examples: list[dict[str, Tensor]], pad_token: int, padding_side: str) -> dict[str, Tensor]:
    """Stacks examples, and pads sequences to the longest of the batch.

    Args:
        examples: Tensors of each example; `input_ids` is `(length,)` where there is text.
        pad_token: Pads `input_ids`; labels are padded with -100 and everything else with 0.
        padding_side: `right` or `left`.

    Returns:
        The same keys with a batch axis in front, and an `attention_mask` `(batch, time)` for text.
    """
    batch = {}
    fill = {"input_ids": pad_token, "labels": IGNORED}
    if "input_ids" in examples[0]:
        examples = [
            example | {"attention_mask": torch.ones_like(example["input_ids"])} for example in examples
        ]
    for key in examples[0]:
        values = [example[key] for example in examples]
        if values[0].ndim and "input_ids" in examples[0]:
            batch[key] = pad_sequence(
                values, batch_first=True, padding_value=fill.get(key, 0), padding_side=padding_side
            )
        else:
            batch[key] = torch.stack(values)
    return batch


def uncounted(example: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns an example whose labels do not count in any loss."""
    labels = example["labels"]
    return example | {"labels": torch.full_like(labels, math.nan if labels.is_floating_point() else IGNORED)}


class TrainingLoader(DataLoader[dict[str, Tensor]]):
    """A loader that finds its position in the run only when its first batch is requested.

    Lightning creates a loader's iterator during setup, before it has decided where a restored run continues.
    The epoch and the number of batches done in it are certain only when the training loop requests a batch,
    so nothing happens before, and no workers start.
    """

    def __init__(
        self,
        batches: BucketedBatches,
        examples: Dataset[dict[str, Tensor]],
        trainer: L.Trainer | None,
        collate_fn: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]],
        workers: int,
    ):
        super().__init__(
            examples,
            batch_sampler=batches,
            collate_fn=collate_fn,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=seeded_generator(0),
            worker_init_fn=_outlive_sigterm,
        )
        self.batches = batches
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        if self.trainer is not None:
            loop = self.trainer.fit_loop
            self.batches.set_epoch(self.trainer.current_epoch)
            self.batches.skip = loop.epoch_loop.batch_progress.current.ready if loop.restarting else 0
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing, as the trainer's progress is enough. Lightning sees that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has nothing to restore; see `state_dict`."""


class TaskData(L.LightningDataModule):
    """The splits of one task as padded batches.

    Each batch is a dict of tensors. Text: `input_ids`, `attention_mask`, `token_type_ids` if the tokenizer
    returns them (all `(batch, time)` int64) and `labels`: `(batch,)` int64 classes, `(batch,)` float32
    numbers, or `(batch, time)` int64 tokens with -100 on padding and prompts. Toy: `features (batch,
    features)` and `labels (batch, 1)`, float32.

    Every epoch has all examples. A process without rows of an incomplete batch gets an example whose labels
    do not count (-100, or NaN for numbers), so that all processes make the same steps.

    Loaders never draw from torch's global generator, so iterating over them changes no other random numbers.

    Attributes:
        task: A key of TASKS.
        label_names: Classes in the order of their ids; empty for other tasks.
        num_labels: Number of the model's outputs, see `Task.outputs`.
        fingerprint: sha256 of the contents of all splits.
        sizes: Number of examples of each split.
    """

    def __init__(self, config: DataConfig, splits: Splits, task: str, seed: int):
        super().__init__()
        self.config = config
        self._loaded = splits
        self.splits = splits.splits
        self.task = task
        self.seed = seed
        self.label_names = splits.label_names
        self.num_labels = TASKS[task].outputs(len(splits.label_names))
        self.fingerprint = splits.fingerprint
        self.sizes = {name: len(split.lengths) for name, split in self.splits.items()}
        self.collate = partial(collate, pad_token=splits.pad_token, padding_side=splits.padding_side)

    def with_seed(self, seed: int) -> Self:
        """Returns the same examples for another run, which has a trainer and an order of its own."""
        return type(self)(self.config, self._loaded, self.task, seed)

    def train_dataloader(self) -> TrainingLoader:
        """Returns this process's batches: of the trainer's current epoch, or of epoch 0 without a trainer.

        Raises:
            DataError: If there are fewer examples than processes.
        """
        split = self.splits["train"]
        batches = self._training_batches(*self._place())
        return TrainingLoader(
            batches, split.examples, self.trainer, self._collate_training, self.config.workers
        )

    def _collate_training(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        split = self.splits["train"]
        return self.collate(examples or [uncounted(split.examples[int(split.lengths.argmin())])])

    def batches_per_epoch(self, processes: int) -> int:
        """Returns the number of training batches of an epoch in each of `processes` processes.

        Raises:
            DataError: If a split has fewer examples than there are processes.
        """
        for name in self.splits:
            self._check_size(name, processes)
        return len(self._training_batches(0, processes))

    def training_sample(self, ratio: float) -> Iterator[dict[str, Tensor]]:
        """Yields this process's batches of a random part of the training split, always the same.

        Classes have the same shares as in the whole split.

        Args:
            ratio: Size of the part divided by that of the split, in (0, 1]; the part has at least one
                training batch.
        """
        split, (rank, processes) = self.splits["train"], self._place()
        count = len(split.lengths)
        classes = torch.zeros(count)
        if TASKS[self.task].labels == "classes":
            classes = self._training_classes()
        size = max(math.ceil(ratio * count), min(count, self.config.batch_size * processes))
        chosen = stratified_sample(size, classes, self.seed)
        batches = EvaluationBatches(split.lengths[chosen], self.config.evaluation_batch_size, rank, processes)
        for batch in batches:
            yield self.collate([split.examples[index] for index in chosen[batch].tolist()])

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns this process's share of the validation split, in a fixed order."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]] | None:
        """Returns this process's share of the test split; None if the source has none."""
        return self._evaluation_loader("test") if "test" in self.splits else None

    def state_dict(self) -> dict[str, Any]:
        """Returns what decides the batches, and must be equal in a run that continues from a checkpoint."""
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "max_length": self.config.max_length,
            "bucket_by_length": self.config.bucket_by_length,
            "global_batch_size": self.config.batch_size * self._place()[1],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks, when training continues, that the remaining batches are those of the interrupted run.

        Raises:
            CheckpointError: If they are not.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        differing = [name for name, value in self.state_dict().items() if state.get(name) != value]
        if fitting and differing:
            raise CheckpointError(
                f"data: {', '.join(differing)} differ from the checkpoint's, so training cannot continue "
                "where it stopped; use the same values, or start a new run"
            )

    def class_weights(self) -> list[float] | None:
        """Returns the weight of each class in the loss, by id; None if all have the same.

        Raises:
            DataError: If `data.class_weights` names an unknown class.
        """
        given = self.config.class_weights
        if not given:
            return None
        if isinstance(given, dict):
            if unknown := [name for name in given if name not in self.label_names]:
                known = suggest(unknown[0], self.label_names)
                raise DataError(f"data.class_weights: no class '{unknown[0]}'{known}")
            return [float(given.get(name, 1.0)) for name in self.label_names]
        counts = self._training_classes().bincount(minlength=len(self.label_names))
        # A class without training rows has no balanced weight; it may occur in validation.
        return (len(self._training_classes()) / (len(counts) * counts)).nan_to_num(posinf=1.0).tolist()

    def _training_classes(self) -> Tensor:
        examples = self.splits["train"].examples
        return torch.stack([examples[index]["labels"] for index in range(self.sizes["train"])])

    def facts(self) -> dict[str, dict[str, int]]:
        """Returns each split's number of rows, of cut rows, and of rows that repeat an earlier split."""
        return {
            name: {"rows": self.sizes[name], "cut": split.cut}
            | {f"also_in_{earlier}": count for earlier, count in split.also_in.items()}
            for name, split in self.splits.items()
        }

    def remarks(self) -> list[str]:
        """Returns what a user should know about the data before trusting a score, as sentences."""
        found = []
        what = "answers" if any("prompt_lengths" in self._first(name) for name in self.splits) else "texts"
        if cut := [f"{n:,} of {self.sizes[name]:,} in {name}" for name, n in self._counts("cut")]:
            found.append(
                f"{what} cut at the end to data.max_length={self.config.max_length} tokens: {', '.join(cut)}."
            )
        for earlier in ("train", "validation"):
            shared = self._counts(f"also_in_{earlier}")
            if shared:
                counts = ", ".join(f"{n:,} of {self.sizes[name]:,} in {name}" for name, n in shared)
                found.append(
                    f"rows whose texts are also in {earlier}: {counts}. A score on them says little of new "
                    "texts."
                )
        return found

    def _counts(self, fact: str) -> list[tuple[str, int]]:
        return [(name, facts[fact]) for name, facts in self.facts().items() if facts.get(fact)]

    def _first(self, name: str) -> dict[str, Tensor]:
        return self.splits[name].examples[0]

    def _check_size(self, name: str, processes: int) -> None:
        if self.sizes[name] < processes:
            raise DataError(
                f"trainer.devices: {processes} processes need at least one example each, and the {name} "
                f"split has {self.sizes[name]}; use fewer devices, or more data"
            )

    def _evaluation_loader(self, name: str) -> DataLoader[dict[str, Tensor]]:
        self._check_size(name, self._place()[1])
        split = self.splits[name]
        return DataLoader(
            split.examples,
            batch_sampler=EvaluationBatches(split.lengths, self.config.evaluation_batch_size, *self._place()),
            collate_fn=self.collate,
            num_workers=self.config.workers,
            pin_memory=torch.cuda.is_available(),
            generator=seeded_generator(0),
            worker_init_fn=_outlive_sigterm,
        )

    def _training_batches(self, rank: int, processes: int) -> BucketedBatches:
        self._check_size("train", processes)
        lengths, config = self.splits["train"].lengths, self.config
        return BucketedBatches(
            lengths, config.batch_size, self.seed, config.bucket_by_length, rank, processes
        )

    def _place(self) -> tuple[int, int]:
        """Returns rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _outlive_sigterm(worker: int) -> None:
    """Lets a loader's worker ignore a SIGTERM to the whole process group, which its parent handles."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
