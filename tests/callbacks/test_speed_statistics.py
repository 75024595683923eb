"""Speed is that of training alone. The clock is the tests' own where times are compared."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.callbacks import speed_statistics
from lora_lab.callbacks.speed_statistics import token_count
from lora_lab.tracking import read_metrics
from tests.tracked_run import TOKENS, train
from tests.wandb_file import offline_folders, read_offline_run

SPEC = LoRASpec(rank=4, targets=["query", "value"])
NAMES = {"speed/step_milliseconds", "speed/tokens_per_second"}


class Slow(L.Callback):
    """Makes each batch and each validation take a known time, and nothing else take any."""

    def __init__(self, monkeypatch, batches=lambda step: 0.05, validation: float = 0.5):
        self.batches = batches
        self.validation = validation
        self.now = 0.0
        monkeypatch.setattr(speed_statistics, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def on_before_backward(self, trainer, *arguments):
        self.now += self.batches(trainer.global_step)

    def on_validation_start(self, *arguments):
        self.now += self.validation


def logged(folder):
    return [row for row in read_metrics(folder) if "train/loss" in row]


def test_speed_stands_in_the_rows_of_the_loss(make_model, tmp_path):
    run = train(make_model("bert"), SPEC, tmp_path, log_every=3)
    assert [row["step"] for row in logged(tmp_path)] == [2, 5]
    for row in logged(tmp_path):
        tokens = row["speed/tokens_per_second"] * row["speed/step_milliseconds"] / 1e3
        assert tokens == pytest.approx(TOKENS, rel=1e-4)
    assert run.speed.median_step_milliseconds > 0
    assert run.speed.tokens_per_second > 0
    offline = read_offline_run(*offline_folders(tmp_path))
    assert sum(NAMES <= row.keys() for row in offline.history) == 2


def test_a_step_is_all_its_batches_and_nothing_else(make_model, tmp_path, monkeypatch):
    run = train(
        make_model("bert"),
        SPEC,
        tmp_path,
        tracking="disabled",
        log_every=1,
        extra=[Slow(monkeypatch)],
        accumulate_grad_batches=2,
        val_check_interval=2,
    )
    times = [row["speed/step_milliseconds"] for row in logged(tmp_path)]
    assert times == pytest.approx([100.0] * 4)
    assert run.speed.median_step_milliseconds == pytest.approx(100)
    assert run.speed.tokens_per_second == pytest.approx(2 * TOKENS / 0.1)


def test_the_median_does_not_see_one_slow_step(make_model, monkeypatch):
    slow = Slow(monkeypatch, batches=lambda step: 9.0 if step == 3 else 0.05)
    run = train(make_model("bert"), SPEC, extra=[slow])
    assert run.speed.median_step_milliseconds == pytest.approx(50)


def test_padding_is_no_token_and_features_are_examples():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert token_count({"input_ids": torch.zeros(2, 3), "attention_mask": mask}) == 3
    assert token_count({"features": torch.zeros(5, 7), "labels": torch.zeros(5, 1)}) == 5


def test_no_steps_give_no_speed(make_model):
    run = train(make_model("bert"), SPEC, max_steps=0)
    assert run.speed.median_step_milliseconds is None
    assert run.speed.tokens_per_second is None
