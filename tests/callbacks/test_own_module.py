"""Controllers and callbacks with somebody's own LightningModule work, or refuse before the first step."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lab.adapters import METHODS, inject
from lora_lab.callbacks import (
    CONTROLLERS,
    AdapterCheckpoint,
    AdapterStatistics,
    MemoryStatistics,
    SpeedStatistics,
    build_controllers,
)
from lora_lab.errors import LabError
from lora_lab.training.optimization import keep_frozen_parts

SHORT = {
    "importance_pruning": {"target_rank": 2, "tinit": 1, "tfinal": 2},
    "rank_pruning": {"start": 1, "period": 1},
    "rank_switching": {"evaluation_ranks": []},
    "rank_growth": {},
}
"""Controller → options that make it act within eight steps."""
REFUSES = {"output_evaluation": "FineTuner", "rank_redistribution": "FineTuner"}
"""Controller → what its refusal names."""


class Own(L.LightningModule):
    def __init__(self, adapters):
        super().__init__()
        self.model, self.adapters, self.steps = adapters.model, adapters, 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1]) + self.adapters.penalty()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("validation_loss", nn.functional.mse_loss(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.adapters.trainable_parameters(), lr=1e-2)
        keep_frozen_parts(optimizer, self.adapters)
        return optimizer


def adapted(method: str = "lora"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    return inject(model, METHODS[method].Spec(rank=4, targets="all-linear", modules_to_save=[]))


def fit(adapters, callbacks) -> Own:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x[:, :5].roll(1, 1)), batch_size=16)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = Own(adapters)
    trainer.fit(module, loader, loader)
    return module


@pytest.mark.parametrize("name", [name for name in CONTROLLERS if name != "compaction"])
def test_a_controller_trains_with_another_module_or_refuses_before_the_first_step(name):
    spec = CONTROLLERS[name].Spec(**SHORT.get(name, {}))
    method = next(method for method, kind in METHODS.items() if issubclass(kind, spec.needs()))
    adapters = adapted(method)
    controllers = build_controllers({name: spec}, adapters, seed=0)
    if name in REFUSES:
        before = {key: tensor.clone() for key, tensor in adapters.state_dict().items()}
        with pytest.raises(LabError, match=REFUSES[name]):
            fit(adapters, controllers)
        assert all(torch.equal(before[key], tensor) for key, tensor in adapters.state_dict().items())
        return
    module = fit(adapters, controllers)
    assert module.steps == 8
    assert all(torch.isfinite(tensor).all() for tensor in adapters.state_dict().values())


def test_pruning_and_compaction_shrink_another_modules_adapters():
    adapters = adapted()
    specs = {
        "rank_pruning": CONTROLLERS["rank_pruning"].Spec(start=1, end=5, period=1, threshold=0.9),
        "compaction": CONTROLLERS["compaction"].Spec(),
    }
    before = adapters.trainable_count()
    fit(adapters, build_controllers(specs, adapters, seed=0))
    assert 0 < adapters.trainable_count() < before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "evaluation_ranks: uses new_metrics"),
        ({"policy": "recent_loss", "evaluation_ranks": []}, "step_loss"),
    ],
)
def test_rank_switching_names_what_another_module_lacks_and_the_way_out(options, told):
    adapters = adapted("dylora")
    specs = {"rank_switching": CONTROLLERS["rank_switching"].Spec(**options)}
    with pytest.raises(LabError, match=told) as caught:
        fit(adapters, build_controllers(specs, adapters, seed=0))
    assert "Own does not have" in str(caught.value)
    assert "lora_lab.FineTuner, or " in str(caught.value)


def test_statistics_log_with_another_module_and_the_checkpoint_of_the_best_refuses():
    adapters = adapted()
    seen = {}

    class Recorder(L.Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update(trainer.callback_metrics)

    fit(adapters, [AdapterStatistics(adapters), MemoryStatistics(adapters), SpeedStatistics(), Recorder()])
    assert seen["rank/mean"] == 4
    assert seen["memory/trainable_megabytes"] == pytest.approx(4e-6 * adapters.trainable_count())
    with pytest.raises(LabError, match="ModelCheckpoint"):
        fit(adapted(), [AdapterCheckpoint(adapters, "best")])
