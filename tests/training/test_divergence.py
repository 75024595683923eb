"""A step that is not finite ends the run or changes nothing; what is not finite is never kept."""

import json
import math
import runpy
import sys
from pathlib import Path

import lightning as L
import psutil
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lab.callbacks.resume_checkpoint import ResumeCheckpoint
from lora_lab.cli import main
from lora_lab.data import ToyConfig, build_data
from lora_lab.errors import CheckpointError, DivergenceError, IncompatibleError
from lora_lab.experiment.folder import RunFolder
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.tracking import MetricsFile, read_metrics
from lora_lab.training.module import FineTuner
from lora_lab.training.optimization import OptimizationConfig
from lora_lab.training.trainer import TrainerConfig, trainer_arguments
from tests.forks import fork
from tests.two_processes import run_in_two_processes

CONFIG = """
name: divergence
model: {name: "random:mlp", task: regression}
data: {source: toy, size: 40, batch_size: 5}
adapter: {method: lora, rank: 2, targets: [layer1, layer2]}
optimization: {learning_rate: 1.0e+38, warmup: 0, gradient_clip: null, schedule: constant}
trainer: {max_epochs: 2, log_every: 1, checkpoint_every: 1, progress_bar: false, accelerator: cpu}
tracking: {wandb: disabled}
"""


class Broken(L.Callback):
    """Makes the loss of some steps infinite, and keeps weights and moments from before and after them."""

    def __init__(self, steps: set[int], where: str = "label"):
        self.steps, self.where = steps, where
        self.before: dict[int, list[torch.Tensor]] = {}
        self.after: dict[int, list[torch.Tensor]] = {}

    @staticmethod
    def state(trainer) -> list[torch.Tensor]:
        optimizer = trainer.optimizers[0]
        moments = [x.clone() for state in optimizer.state.values() for x in state.values()]
        return [*(x.clone() for x in trainer.lightning_module.state_dict().values()), *moments]

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in self.steps:
            self.before.setdefault(trainer.global_step, self.state(trainer))
            if self.where == "label" and batch_idx % trainer.accumulate_grad_batches == 0:
                batch["labels"][1] = math.inf

    def on_after_backward(self, trainer, module):
        if trainer.global_step in self.steps and self.where == "gradient":
            trainer.optimizers[0].param_groups[0]["params"][0].grad.view(-1)[0] = math.nan

    def on_train_batch_end(self, trainer, module, *arguments):
        if trainer.global_step - 1 in self.steps:
            self.after.setdefault(trainer.global_step - 1, self.state(trainer))


class Stop(L.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == self.step:
            raise KeyError("stopped")


def train(
    folder: Path, on_nonfinite: str, *callbacks, accumulate=1, resume=False, plugins=None, every=2, most=10
):
    L.seed_everything(0, verbose=False)
    model = build_model(ModelConfig(name="random:mlp", task="regression"))
    data = build_data(ToyConfig(size=40, batch_size=5), None, "regression", 0)
    adapters = inject(model, LoRASpec(targets=["layer1", "layer2"], rank=2, dropout=0.2))
    options = OptimizationConfig(learning_rate=0.01)
    module = FineTuner(
        model.train(), adapters, "regression", 1, options, on_nonfinite, max_skipped_steps=most
    )
    config = TrainerConfig(
        max_epochs=2, log_every=1, accumulate=accumulate, accelerator="cpu", progress_bar=False
    )
    checkpoint = folder / "last.ckpt"
    arguments = trainer_arguments(config, 1.0)
    if plugins:
        arguments = {**arguments, "precision": None, "plugins": plugins}
    trainer = L.Trainer(
        **arguments,
        callbacks=[*callbacks, AdapterCheckpoint(adapters, "last"), ResumeCheckpoint(checkpoint, every)],
        logger=MetricsFile(folder),
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=checkpoint if resume else None, weights_only=True)
    return module


@pytest.mark.parametrize(("where", "fault"), [("label", "the loss is inf"), ("gradient", "gradients is nan")])
def test_a_step_that_is_not_finite_ends_training_and_names_step_rows_and_checkpoint(tmp_path, where, fault):
    broken = Broken({5}, where)
    with pytest.raises(DivergenceError) as caught:
        train(tmp_path, "stop", broken)
    message = str(caught.value)
    data = build_data(ToyConfig(size=40, batch_size=5), None, "regression", 0)
    rows = ", ".join(map(str, list(data.train_dataloader().batches)[5]))
    for part in (
        fault,
        "optimizer step 6 (batch 6 of epoch 1)",
        f"from 0: {rows}.",
        str(tmp_path / "last.ckpt"),
    ):
        assert part in message
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 4


@pytest.mark.parametrize(("where", "accumulate"), [("label", 1), ("label", 3), ("gradient", 1)])
def test_a_skipped_step_changes_neither_weights_nor_moments_and_resumes_exactly(tmp_path, where, accumulate):
    steps = {0, 2, 3}
    broken = Broken(steps, where)
    (tmp_path / "whole").mkdir()
    (tmp_path / "part").mkdir()
    whole = train(tmp_path / "whole", "skip", broken, accumulate=accumulate, every=1)
    assert broken.before.keys() == broken.after.keys() == steps
    for step in steps:
        before, after = broken.before[step], broken.after[step]
        assert len(before) == len(after)
        assert all(map(torch.equal, before, after))
    rows = read_metrics(tmp_path / "whole")
    counts = [row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row]
    assert counts[:5] == [1, 1, 2, 3, 3]
    assert whole.skipped_steps == 3
    with pytest.raises(KeyError):
        train(tmp_path / "part", "skip", Broken(steps, where), Stop(4), accumulate=accumulate, every=1)
    again = train(
        tmp_path / "part", "skip", Broken(steps, where), accumulate=accumulate, every=1, resume=True
    )
    assert again.skipped_steps == 3
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


def test_steps_left_out_one_after_another_end_a_run_and_are_counted_over_a_resumption(tmp_path):
    broken = {1, 2, 4, 5, 7, 8, 9, 10}
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    with pytest.raises(DivergenceError, match="step 10 .*all of the last 3 steps") as caught:
        train(tmp_path / "whole", "skip", Broken(broken), most=3, every=1)
    assert "max_skipped_steps: 3" in str(caught.value)
    assert str(tmp_path / "whole" / "last.ckpt") in str(caught.value)
    assert "on_nonfinite=skip" not in str(caught.value)
    with pytest.raises(KeyError):
        train(tmp_path / "part", "skip", Broken(broken), Stop(9), most=3, every=1)
    with pytest.raises(DivergenceError, match="step 10 .*all of the last 3 steps"):
        train(tmp_path / "part", "skip", Broken(broken), most=3, every=1, resume=True)
    assert train(tmp_path, "skip", Broken(broken), most=5).skipped_steps == 8


def test_the_scalers_own_skips_are_no_divergence_and_a_real_one_is(tmp_path):
    def scaled(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return [MixedPrecision("16-mixed", "cpu", scaler)]

    assert train(tmp_path, "stop", Broken({3}, "gradient"), plugins=scaled(2.0**10)).skipped_steps == 0
    with pytest.raises(DivergenceError, match="gradients is nan"):
        train(tmp_path, "stop", Broken({3}, "gradient"), plugins=scaled(1.0))
    assert train(tmp_path, "skip", Broken({3, 5}), plugins=scaled(2.0**10)).skipped_steps == 2


# AdamW's first step leaves weights of the size of the first rate; the second is past float32's range.
@pytest.mark.parametrize(("choice", "rate", "finite"), [("stop", "3e+36", True), ("skip", "1e+38", False)])
def test_a_diverged_run_has_its_exit_code_status_and_last_finite_checkpoint(
    tmp_path, capsys, choice, rate, finite
):
    (tmp_path / "experiment.yaml").write_text(CONFIG)
    command = ["train", str(tmp_path / "experiment.yaml"), f"output={tmp_path}", "run=r"]
    command += [f"optimization.learning_rate={rate}"]
    assert main([*command, f"trainer.on_nonfinite={choice}"]) == 3
    folder = RunFolder(tmp_path / "divergence" / "r")
    record = folder.read()
    assert record["status"] == "diverged"
    assert f"learning rate of {rate}" in record["error"]
    assert "optimizer step 2 " in record["error"]
    assert folder.checkpoint.exists() == (str(folder.checkpoint) in record["error"]) == finite
    if finite:
        stored = torch.load(folder.checkpoint, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in stored.values())
    assert not folder.adapter.exists()
    capsys.readouterr()
    assert main(command) == 2
    assert "on_nonfinite=skip" in capsys.readouterr().err


def test_a_diverged_run_goes_on_with_skip_from_its_last_finite_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "experiment.yaml").write_text(CONFIG)
    command = [
        "train",
        str(tmp_path / "experiment.yaml"),
        f"output={tmp_path}",
        "optimization.learning_rate=0.01",
    ]
    skip = "trainer.on_nonfinite=skip"
    step = FineTuner.training_step

    def broken(self, batch, batch_idx):
        if self.trainer.global_step == 6:
            batch = {**batch, "labels": batch["labels"] * math.inf}
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FineTuner, "training_step", broken)
    assert main([*command, "run=whole", skip]) == 0
    assert main([*command, "run=part"]) == 3
    assert main([*command, "run=part", skip]) == 0
    whole, part = (
        load_file(tmp_path / "divergence" / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "part")
    )
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert RunFolder(tmp_path / "divergence" / "part").read()["resumptions"] == 1


SCRIPT = """
import math, os, sys
from lora_lab.cli import main
from lora_lab.training.module import FineTuner

first, last, *arguments = sys.argv[1:]
step = FineTuner.training_step

def broken(self, batch, batch_idx):
    if self.global_rank == 1 and int(first) <= self.trainer.global_step <= int(last):
        batch = {**batch, "labels": batch["labels"] * math.inf}
    return step(self, batch, batch_idx)

FineTuner.training_step = broken
sys.exit(main(arguments))
"""


def run_script(*arguments: str) -> None:
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "settings", "batch", "kept"),
    [
        ("3", ["trainer.on_nonfinite=stop"], "step 4 (batch 4 of epoch 1)", 3),
        ("6", ["trainer.on_nonfinite=skip", "trainer.max_skipped_steps=2"], "step 5 (batch 1 of epoch 2)", 4),
    ],
)
def test_two_processes_end_together_where_one_of_them_diverges(tmp_path, last, settings, batch, kept):
    """Both know of the other's loss; none waits for one that has ended, or is taken for dead."""
    (tmp_path / "experiment.yaml").write_text(CONFIG)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = ["3", last, "train", str(tmp_path / "experiment.yaml"), f"output={tmp_path}", "run=r"]
    arguments += ["trainer.devices=2", "optimization.learning_rate=0.01", *settings]
    if "trainer.on_nonfinite=stop" in settings:  # the second process is one that Lightning starts and watches
        places = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        places["PYTHONPATH"] = str(Path(__file__).parents[2])
        code, printed = fork(run_script, str(script), *arguments, folder=tmp_path, **places).end()
        assert code == 3, printed
    else:
        run_in_two_processes(str(script), tmp_path, *arguments, codes=(3, 0))
    left = [own for own in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(own.info["cmdline"])]
    assert not psutil.wait_procs(left, timeout=30)[1]
    folder = RunFolder(tmp_path / "divergence" / "r")
    record = folder.read()
    assert record["status"] == "diverged"
    assert str(folder.checkpoint) in record["error"]
    assert f"optimizer {batch}: the loss is inf" in record["error"]
    assert ("all of the last 2 steps" in record["error"]) == (last == "6")
    stored = torch.load(folder.checkpoint, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in stored["state_dict"].values())
    assert stored["global_step"] == kept


def test_a_last_step_that_leaves_infinite_weights_ends_a_run_as_diverged(tmp_path):
    (tmp_path / "experiment.yaml").write_text(CONFIG)
    command = [
        "train",
        str(tmp_path / "experiment.yaml"),
        f"output={tmp_path}",
        "run=r",
        "trainer.max_steps=1",
    ]
    # AdamW's first step has the size of the learning rate: past float32 with decay.
    assert main([*command, "optimization.weight_decay=1e38"]) == 3
    assert RunFolder(tmp_path / "divergence" / "r").read()["status"] == "diverged"


def test_a_record_is_valid_json_whatever_its_numbers(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write({"a": math.nan, "b": {"c": [1.5, -math.inf]}, "d": (math.inf, True), "e": 3, "f": "NaN"})

    def refuse(name):
        raise AssertionError(name)

    record = json.loads(folder.record.read_text(), parse_constant=refuse)
    assert record == {"a": None, "b": {"c": [1.5, None]}, "d": [None, True], "e": 3, "f": "NaN"}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_adapters_that_are_not_finite_are_neither_loaded_nor_merged(tmp_path, bad):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))

    adapters = inject(model(), LoRASpec(targets=["0"], rank=2, modules_to_save=["1"]))
    save_adapter(adapters, tmp_path / "good")
    save_adapter(adapters, tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][1, 2] = bad
    save_file(tensors, file)
    base = model()
    with pytest.raises(CheckpointError, match=r"1 of 4 tensors .* not finite .*lora_A"):
        load_adapter(base, tmp_path / "bad")
    assert type(base[0]) is nn.Linear
    load_adapter(model(), tmp_path / "good").merge()
    with torch.no_grad():
        next(p for name, p in adapters.named_parameters().items() if name.startswith("1"))[0] = bad
    with pytest.raises(IncompatibleError, match="not finite"):
        adapters.merge()
    assert adapters.model[0] is adapters.adapters["0"]
