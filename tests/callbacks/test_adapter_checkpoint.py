from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lab.training.module import FineTuner


@pytest.mark.parametrize(("values", "best"), [([0.5, 0.2, 0.3], 0.2), ([float("nan"), 0.4, 0.6], 0.4)])
def test_the_best_validation_is_remembered_and_what_is_no_number_is_none(values, best):
    adapters = inject(nn.Sequential(nn.Linear(3, 2)), LoRASpec(targets=["0"], rank=1))
    module = FineTuner(adapters.model, adapters, "regression")
    callback = AdapterCheckpoint(adapters, "best")
    for step, value in enumerate(values):
        trainer = SimpleNamespace(
            state=SimpleNamespace(fn="fit"),
            global_step=step,
            callback_metrics={"validation/mse": torch.tensor(value)},
        )
        with torch.no_grad():
            adapters.adapters["0"].A.fill_(step)
        callback.on_validation_end(trainer, module)
    assert callback.best_value == pytest.approx(best)
    assert callback.best_step == 1
    callback.on_train_end(trainer, module)
    assert adapters.adapters["0"].A.unique().item() == 1


def test_a_validation_of_what_is_not_finite_is_never_the_best():
    adapters = inject(nn.Sequential(nn.Linear(3, 2)), LoRASpec(targets=["0"], rank=1))
    module = FineTuner(adapters.model, adapters, "regression")
    callback = AdapterCheckpoint(adapters, "best")
    steps = [(0.1, float("inf"), 1.0), (0.2, 1.0, float("nan")), (float("-inf"), 1.0, 1.0), (0.3, 1.0, 1.0)]
    for step, (value, loss, weight) in enumerate(steps):
        metrics = {"validation/mse": torch.tensor(value), "validation/loss": torch.tensor(loss)}
        trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), global_step=step, callback_metrics=metrics)
        with torch.no_grad():
            adapters.adapters["0"].A.fill_(weight)
        callback.on_validation_end(trainer, module)
    assert (callback.best_value, callback.best_step) == (pytest.approx(0.3), 3)
