"""The LightningModule under a real Trainer, through whole runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_lab.config import compose
from lora_lab.data import FilesConfig, build_data
from lora_lab.experiment import build_parts, run
from lora_lab.models.build import ModelConfig, build_tokenizer
from lora_lab.tracking import read_metrics
from lora_lab.training.module import FineTuner

TOY = """
name: module
model: {name: "random:mlp", task: regression}
data: {source: toy, target: product, size: 64, batch_size: 16}
adapter: {method: lora, rank: 4, targets: [layer1, layer2], modules_to_save: [layer3]}
optimization: {learning_rate: 0.01}
trainer: {max_epochs: 2, log_every: 1, progress_bar: false}
tracking: {wandb: disabled}
"""
TEXT = """
name: module
model: {name: "random:llama", task: causal_lm}
data: {source: files, train: ROWS, text: [answer], prompt: question, batch_size: 4, max_length: 24}
adapter: {method: lora, rank: 2}
trainer: {max_epochs: 1, log_every: 1, progress_bar: false}
tracking: {wandb: disabled}
"""


def trained(tmp_path: Path, text: str, name: str, *overrides: str):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    result = run(compose(path, [f"output={tmp_path}", f"run={name}", *overrides]))
    return result, load_file(result.folder.adapter / "adapter_model.safetensors")


@pytest.fixture
def prompted(tmp_path) -> str:
    rows = [f'{{"question": "what is {n}", "answer": "it is {n}"}}' for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return TEXT.replace("ROWS", str(tmp_path / "rows.jsonl"))


def test_four_accumulated_batches_train_what_one_batch_of_all_of_them_does(tmp_path):
    _, whole = trained(tmp_path, TOY, "whole", "data.batch_size=64")
    result, parts = trained(tmp_path, TOY, "parts", "trainer.accumulate=4")
    assert result.record["steps"] == 2
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_logged_loss_of_an_accumulated_step_is_the_mean_of_its_batches(tmp_path):
    whole, _ = trained(tmp_path, TOY, "whole", "data.batch_size=64")
    parts, _ = trained(tmp_path, TOY, "parts", "trainer.accumulate=4")
    losses = [
        [row["train/loss"] for row in read_metrics(result.folder.path) if "train/loss" in row]
        for result in (whole, parts)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_logged_loss_is_the_tasks_and_the_penalty_stands_apart(tmp_path):
    penalty = "adapter={method: hra, rank: 2, reg_lambda: 0.5, targets: [layer1], modules_to_save: []}"
    result, _ = trained(tmp_path, TOY, "penalty", penalty, "data.batch_size=64")
    first = next(row for row in read_metrics(result.folder.path) if "train/loss" in row)
    config = compose(result.folder.config)
    torch.manual_seed(config.seed)
    assert first["train/penalty"] > 0
    free, _ = trained(tmp_path, TOY, "free", penalty.replace("0.5", "0.0"), "data.batch_size=64")
    without = next(row for row in read_metrics(free.folder.path) if "train/loss" in row)
    assert first["train/loss"] == pytest.approx(without["train/loss"], rel=1e-6)
    assert without["train/penalty"] == 0


@pytest.mark.parametrize("option", ["precision=bf16-mixed", "gradient_checkpointing=true"])
def test_an_option_of_precision_or_memory_trains_nearly_the_same(tmp_path, prompted, option):
    plain, _ = trained(tmp_path, prompted, "plain")
    other, _ = trained(tmp_path, prompted, "other", f"trainer.{option}")
    tolerance = 1e-6 if "checkpointing" in option else 2e-2
    name = "validation/loss"
    assert other.record["metrics"][name] == pytest.approx(plain.record["metrics"][name], rel=tolerance)


def test_checkpointing_saves_activations(tmp_path, prompted):
    name = "memory/saved_activation_megabytes"
    saved = []
    for option in ("false", "true"):
        result, _ = trained(tmp_path, prompted, option, f"trainer.gradient_checkpointing={option}")
        saved.append(next(row[name] for row in read_metrics(result.folder.path) if name in row))
    assert saved[1] < 0.6 * saved[0]


def test_gradient_clipping_bounds_the_step(tmp_path):
    free, _ = trained(tmp_path, TOY, "free", "optimization.gradient_clip=null")
    clipped, _ = trained(tmp_path, TOY, "clipped", "optimization.gradient_clip=1.0e-9", "trainer.max_steps=1")
    assert free.record["metrics"] != clipped.record["metrics"]


@pytest.mark.parametrize("method", ["reft", "lora"])
def test_a_method_that_edits_prompts_is_told_where_they_end_and_others_are_not(prompted, tmp_path, method):
    path = tmp_path / "experiment.yaml"
    path.write_text(prompted)
    overrides = ["adapter={method: reft, rank: 2, positions: l1}"] if method == "reft" else []
    config = compose(path, overrides)
    model, data = build_parts(config)
    from lora_lab.adapters import inject

    adapters = inject(model, config.adapter)
    module = FineTuner(model, adapters, "causal_lm", 1)
    batch = next(iter(data.val_dataloader()))
    assert "prompt_lengths" in batch
    module(batch)
    if method == "reft":
        positions = next(iter(adapters)).positions
        index, used = positions.slots["l"]
        assert used.all()
        assert index.flatten().tolist() == (batch["prompt_lengths"] - 1).tolist()


def test_data_without_prompts_have_no_prompt_lengths(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"text": "it is {n} here"}}' for n in range(20)))
    tokenizer = build_tokenizer(ModelConfig(name="random:llama", task="causal_lm"))
    config = FilesConfig(train=str(tmp_path / "rows.jsonl"), text=["text"])
    batch = next(iter(build_data(config, tokenizer, "causal_lm", 0).val_dataloader()))
    assert "prompt_lengths" not in batch


@pytest.mark.slow
def test_a_compiled_run_trains_nearly_the_same(tmp_path):
    plain, _ = trained(tmp_path, TOY, "plain", "trainer.max_epochs=1")
    other, _ = trained(tmp_path, TOY, "other", "trainer.max_epochs=1", "trainer.compile=true")
    name = "validation/loss"
    assert other.record["metrics"][name] == pytest.approx(plain.record["metrics"][name], rel=1e-4)
