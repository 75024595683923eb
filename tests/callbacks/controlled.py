"""Short real runs with controllers, in one process or in two, with stops and resumptions."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch

from lora_lab.adapters import AdapterSet, inject
from lora_lab.callbacks import Controller, build_controllers
from lora_lab.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lab.callbacks.resume_checkpoint import ResumeCheckpoint
from lora_lab.data import build_data
from lora_lab.data.toy import ToyConfig
from lora_lab.models.perceptron import MultiLayerPerceptron, MultiLayerPerceptronConfig
from lora_lab.training.module import FineTuner
from lora_lab.training.optimization import OptimizationConfig
from tests.two_processes import run_in_two_processes

LAYERS = ["layer1", "layer2", "layer3"]


@dataclass
class ControlledRun:
    adapters: AdapterSet
    controllers: dict[str, Controller]
    trainer: L.Trainer
    checkpoint: AdapterCheckpoint


def fresh_model(uneven: bool = False) -> MultiLayerPerceptron:
    """Returns the perceptron 6 → 8 → 8 → 8 → 1 of every run, as it is before.

    Args:
        uneven: make each hidden number twice as large as the one before it.
    """
    torch.manual_seed(0)
    model = MultiLayerPerceptron(MultiLayerPerceptronConfig(sizes=[6, 8, 8, 8], num_labels=1))
    if uneven:
        sizes = 2.0 ** torch.arange(-4, 4)
        for layer in (model.layer1, model.layer2):
            layer.weight.data.mul_(sizes.unsqueeze(1))
            layer.bias.data.mul_(sizes)
    return model


def train(
    spec,
    controllers,
    steps=20,
    devices=1,
    accumulate=1,
    extra=(),
    keep="last",
    stop_after=None,
    folder=None,
    resume=False,
    uneven=False,
    log_every=1000,
    **optimization,
) -> ControlledRun:
    """Trains a perceptron 6 → 8 → 8 → 8 → 1 on batches of 8 rows an optimizer step.

    Args:
        spec: the adapters' spec; those of LAYERS next to a head, layer4.
        controllers: specs by name.
        extra: callbacks that stand behind the controllers, or functions that make one for the adapters.
        stop_after: writes a checkpoint after this many steps, and stops one step later.
        resume: goes on from the folder's checkpoint.
        uneven: see `fresh_model`.
        log_every: steps between those that are logged, a quarter of the time of which logging would take.
    """
    model = fresh_model(uneven)
    spec.targets, spec.modules_to_save = LAYERS, ["layer4"]
    adapters = inject(model, spec)
    options = OptimizationConfig(**{"learning_rate": 0.01} | optimization)
    module = FineTuner(model.train(), adapters, "regression", optimization=options)
    built = build_controllers(controllers, adapters, seed=3)
    best = AdapterCheckpoint(adapters, keep, built)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step - 1 == stop_after

    made = [own if isinstance(own, L.Callback) else own(adapters) for own in extra]
    callbacks = [*built, *made, best, Stop()]
    if folder is not None:
        callbacks.append(ResumeCheckpoint(folder / "last.ckpt", stop_after or steps))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=options.gradient_clip,
        callbacks=callbacks,
        logger=False,
        log_every_n_steps=log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        val_check_interval=0.25 if keep == "best" else 0.5,
    )
    batch = 8 // devices // accumulate
    toy = ToyConfig(
        target="product", size=8 * steps, features=6, batch_size=batch, bucket_by_length=False
    )  # in buckets, batches of another size would hold other rows
    data = build_data(toy, None, "regression", seed=0)
    trainer.fit(module, data, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    return ControlledRun(adapters, {own.name: own for own in built}, trainer, best)


def from_two_processes(file: str, folder: Path) -> dict[str, torch.Tensor]:
    """Runs a test file as a script, which trains with `devices=2` and calls `hand_back`."""
    path = folder / "two.pt"
    run_in_two_processes(file, folder, str(path))
    return torch.load(path, weights_only=True)


def hand_back(state: dict) -> None:
    """Leaves a state for the process that called `from_two_processes`."""
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(state, sys.argv[1])


def assert_equal(ours: AdapterSet, theirs: AdapterSet) -> None:
    """Asserts that two sets hold the same numbers, bit for bit."""
    given, expected = ours.state_dict(), theirs.state_dict()
    assert given.keys() == expected.keys()
    for name, tensor in given.items():
        assert torch.equal(tensor, expected[name]), name
