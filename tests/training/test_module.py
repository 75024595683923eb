"""The LightningModule under a real Trainer, through whole runs."""

from pathlib import Path

import pytest
import torch
import torch._inductor.config
from safetensors.torch import load_file

from lora_lab.adapters import inject
from lora_lab.config import compose
from lora_lab.data import FilesConfig, build_data
from lora_lab.experiment import build_parts, evaluate, run
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

CLASSES = """
name: module
model: {name: "random:bert"}
data: {source: files, train: ROWS, text: [text], label: label, batch_size: 8, max_length: 16}
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


def test_the_penalty_is_trained_on(tmp_path):
    method = "adapter={method: hra, rank: 2, reg_lambda: LAMBDA, targets: [layer1], modules_to_save: []}"
    _, free = trained(tmp_path, TOY, "free", method.replace("LAMBDA", "0.0"))
    _, bound = trained(tmp_path, TOY, "bound", method.replace("LAMBDA", "10.0"))
    assert any(not torch.equal(free[name], bound[name]) for name in free)


def test_each_logged_loss_is_its_own_steps(tmp_path):
    result, _ = trained(tmp_path, TOY, "slow", "optimization.learning_rate=1.0e-12", "trainer.max_epochs=1")
    logged = [row["train/loss"] for row in read_metrics(result.folder.path) if "train/loss" in row]
    config = compose(result.folder.config)
    torch.manual_seed(config.seed)
    model, data = build_parts(config)
    module = FineTuner(model, inject(model, config.adapter, config.seed), "regression")
    by_hand = [
        module.task.loss(*module.task.align(module(batch), batch["labels"])).item()
        for batch in data.train_dataloader()
    ]
    assert logged == pytest.approx(by_hand, rel=1e-5)
    assert len(set(logged)) == len(logged) == 4


@pytest.mark.parametrize(("task", "best"), [("regression", min), ("sequence_classification", max)])
def test_the_best_adapters_are_kept_when_asked_for(tmp_path, prompted, task, best):
    text, metric = TOY, "validation/mse"
    if task == "sequence_classification":
        rows = [f"{'good' if n % 2 else 'bad'} film {n},{'p' if n % 2 else 'n'}" for n in range(200)]
        (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
        text = CLASSES.replace("ROWS", str(tmp_path / "rows.csv"))
        metric = "validation/accuracy"
    jumpy = ["optimization.learning_rate=0.05", "trainer.validate_every=0.25", "trainer.max_epochs=3"]
    result, _ = trained(tmp_path, text, "best", *jumpy, "trainer.keep=best")
    found = [row[metric] for row in read_metrics(result.folder.path) if metric in row]
    record = result.record
    assert min(found) < max(found)
    assert record["best_value"] == best(found)
    assert record["metrics"][metric] == best(found)
    assert evaluate(result.folder.path)[metric] == pytest.approx(best(found), rel=1e-6)
    last, _ = trained(tmp_path, text, "last", *jumpy)
    rows = [row[metric] for row in read_metrics(last.folder.path) if metric in row]
    assert last.record["metrics"][metric] == rows[-1]


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


def test_gradient_clipping_reaches_the_optimizer(tmp_path):
    # AdamW forgets the size of gradients unless they are near its epsilon of 1e-8, as these are then.
    _, free = trained(tmp_path, TOY, "free", "trainer.max_steps=1", "optimization.gradient_clip=null")
    _, clipped = trained(tmp_path, TOY, "clipped", "trainer.max_steps=1", "optimization.gradient_clip=1.0e-9")
    name = "base_model.model.layer1.lora_B.weight"
    assert clipped[name].abs().max() < 0.2 * free[name].abs().max()


@pytest.mark.parametrize("method", ["reft", "lora"])
def test_a_method_that_edits_prompts_is_told_where_they_end_and_others_are_not(prompted, tmp_path, method):
    path = tmp_path / "experiment.yaml"
    path.write_text(prompted)
    overrides = ["adapter={method: reft, rank: 2, positions: l1}"] if method == "reft" else []
    config = compose(path, overrides)
    model, data = build_parts(config)
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
    # Batches of one size: torch compiles once for each, and for training and evaluation.
    same = ["trainer.max_epochs=1", *(f"data.{split}_limit=16" for split in ("train", "validation", "test"))]
    same += ["data.size=160", "data.batch_size=8", "data.evaluation_batch_size=8"]
    plain, _ = trained(tmp_path, TOY, "plain", *same)
    with torch._inductor.config.patch(compile_threads=1):  # more would be processes with torch in them
        other, _ = trained(tmp_path, TOY, "other", *same, "trainer.compile=true")
    name = "validation/loss"
    assert other.record["metrics"][name] == pytest.approx(plain.record["metrics"][name], rel=1e-4)
