"""What a user of the package `volume_lab` meets; tests/test_plugins.py runs it where that is installed."""

import pytest
import torch
import yaml
from torch import nn
from volume_lab import Volume

from lora_lab import CONTROLLERS, METHODS, compose, inject, load_adapter, save_adapter
from lora_lab.cli import main
from lora_lab.testing import Variant, contract

test_contract = contract(Volume, Variant("", trained=1), Variant("loud", {"gain": 2.0}))

TOY = """
name: plugin
model: {name: "random:mlp", task: regression}
data: {source: toy, size: 64}
adapter: {method: volume, gain: 2.0, targets: all-linear}
controllers: {limit: {most: 0.001}}
trainer: {max_epochs: 1, progress_bar: false}
tracking: {wandb: disabled}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "experiment.yaml").write_text(f"{TOY}output: {tmp_path / 'runs'}\n")
    return str(tmp_path / "experiment.yaml")


def test_its_kinds_stand_behind_ours():
    assert list(METHODS)[-1] == "volume"
    assert list(CONTROLLERS)[-1] == "limit"
    assert "volume" not in METHODS.own


def test_its_config_composes_and_its_faults_are_named(config):
    composed = compose(config)
    assert composed.adapter == METHODS["volume"].Spec(gain=2.0, targets="all-linear")
    assert composed.controllers["limit"].most == 0.001
    assert main(["train", config, "adapter.gian=3"]) == 2


def test_it_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    assert " volume " in told
    assert " limit " in told
    assert main(["describe", "volume"]) == 0
    told = capsys.readouterr().out
    assert "W' = (1 + v) W" in told
    assert "Factor of v." in told


def test_it_trains_under_its_controller(config, tmp_path):
    assert main(["train", config]) == 0
    (folder,) = (tmp_path / "runs" / "plugin").iterdir()
    assert yaml.safe_load((folder / "adapter" / "lora_lab.yaml").read_text())["adapter"]["gain"] == 2.0
    x = torch.randn(5, 24)
    model = nn.Sequential(nn.Linear(24, 16))
    adapters = inject(model, METHODS["volume"].Spec(targets=["0"]))
    adapters.adapters["0"].v.data.fill_(0.5)
    save_adapter(adapters, tmp_path / "adapter")
    expected = model(x)
    load_adapter(adapters.remove(), tmp_path / "adapter")
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(expected, 1.5 * model[0].base(x) - 0.5 * model[0].base.bias)
