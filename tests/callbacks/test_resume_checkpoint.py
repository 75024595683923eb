"""Checkpoints at every kind of step: within an epoch, behind a validation, at an epoch's start."""

from contextlib import suppress
from pathlib import Path

import lightning as L
import pytest
import torch

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lab.callbacks.resume_checkpoint import ResumeCheckpoint, random_state, restore_random_state
from lora_lab.data import ToyConfig, build_data
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.tracking import MetricsFile, read_metrics
from lora_lab.training.module import FineTuner
from lora_lab.training.optimization import OptimizationConfig
from lora_lab.training.trainer import TrainerConfig, trainer_arguments

BATCHES = 25
"""Of an epoch; the validations stand behind batches 12, 24 and 25 - 1."""


class Stopped(Exception):
    pass


class StopAt(L.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step >= self.step:
            raise Stopped


def train(folder: Path, every: int, accumulate: int, stop: int = 10**9, resume: bool = False):
    """Returns the adapters' tensors after training, and the logged rows."""
    L.seed_everything(0, verbose=False)
    model = build_model(ModelConfig(name="random:mlp", task="regression"))
    data = build_data(ToyConfig(size=8 * BATCHES, batch_size=8), None, "regression", 0)
    spec = LoRASpec(targets=["layer1", "layer2"], rank=2, dropout=0.3, modules_to_save=["layer3"])
    adapters = inject(model, spec)
    module = FineTuner(model.train(), adapters, "regression", 1, OptimizationConfig(learning_rate=0.01))
    config = TrainerConfig(
        max_epochs=3,
        log_every=2,
        validate_every=0.5,
        accumulate=accumulate,
        progress_bar=False,
        accelerator="cpu",
    )
    checkpoint = folder / "last.ckpt"
    trainer = L.Trainer(
        **trainer_arguments(config, 1.0),
        callbacks=[AdapterCheckpoint(adapters, "best"), StopAt(stop), ResumeCheckpoint(checkpoint, every)],
        logger=MetricsFile(folder),
        default_root_dir=folder,
    )
    with suppress(Stopped):
        trainer.fit(module, data, ckpt_path=checkpoint if resume else None, weights_only=True)
    return adapters.state_dict(), read_metrics(folder)


@pytest.mark.parametrize(
    ("accumulate", "every", "stop"),
    [
        (1, 7, 9),
        (1, 12, 14),  # right behind a validation within an epoch
        (1, 24, 27),  # due at an epoch's last batch, so made at the next one's first
        (1, 25, 27),  # at an epoch's start
        (1, 37, 39),
        (3, 4, 6),
        (3, 9, 10),
        (2, 13, 15),
    ],
)
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path, accumulate, every, stop):
    whole, rows = train(tmp_path / "whole", every, accumulate)
    train(tmp_path / "part", every, accumulate, stop)
    done = torch.load(tmp_path / "part" / "last.ckpt", weights_only=True)["global_step"]
    assert every <= done <= stop
    resumed, later = train(tmp_path / "part", every, accumulate, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert later == [row for row in rows if row["step"] >= done]


def test_random_states_are_restored_exactly_and_load_without_pickle(tmp_path):
    import random

    import numpy as np

    def draw():
        return [random.random(), np.random.rand(), torch.rand(()).item(), np.random.randn()]  # noqa: NPY002

    draw()
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    restore_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected
