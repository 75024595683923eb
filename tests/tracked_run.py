"""A few real training steps on a tiny model, with the callbacks and loggers that every run has."""

from dataclasses import dataclass

import lightning as L
import torch
from torch.utils.data import DataLoader

from lora_lab.adapters import AdapterSet, inject
from lora_lab.callbacks.adapter_statistics import AdapterStatistics
from lora_lab.callbacks.memory_statistics import MemoryStatistics
from lora_lab.callbacks.speed_statistics import SpeedStatistics
from lora_lab.tracking import TrackingConfig, build_loggers, close_loggers
from lora_lab.training.module import FineTuner

SETTINGS = {"adapter": {"method": "lora", "rank": 4}, "tags": [1, None, "x"]}
TOKENS = 4 * 6 - 3
"""Tokens of each batch; three of its 4 × 6 places are padding."""


@dataclass
class TrackedRun:
    adapters: AdapterSet
    statistics: AdapterStatistics
    memory: MemoryStatistics
    speed: SpeedStatistics
    trainer: L.Trainer


def text_batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        ids = torch.randint(5, 100, (4, 6), generator=generator)
        ids[0, 3:] = 0
        labels = torch.randint(0, 3, (4,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})
    return made


def train(
    model, spec, folder=None, tracking="offline", batches=8, log_every=2, extra=(), checkpoint=None, **options
) -> TrackedRun:
    """Trains; without a folder nothing is logged. `options` are the Trainer's."""
    adapters = inject(model, spec)
    module = FineTuner(model.train(), adapters, "sequence_classification", num_labels=3)
    callbacks = [AdapterStatistics(adapters), MemoryStatistics(adapters), SpeedStatistics()]
    loggers = (
        build_loggers(TrackingConfig(wandb=tracking), folder, "trial", "one", SETTINGS) if folder else []
    )
    arguments = {"max_epochs": 1, "log_every_n_steps": log_every, "accelerator": "cpu", **options}
    trainer = L.Trainer(
        callbacks=[*callbacks, *extra],
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **arguments,
    )
    training = DataLoader(text_batches(batches), batch_size=None)
    validation = DataLoader(text_batches(2), batch_size=None)
    trainer.fit(module, training, validation, ckpt_path=checkpoint)
    close_loggers(loggers)
    return TrackedRun(adapters, *callbacks, trainer)
