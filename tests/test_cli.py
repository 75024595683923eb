"""The command line as a user meets it."""

import subprocess
import sys

import pytest
import yaml

from lora_lab.adapters import METHODS
from lora_lab.cli import main
from lora_lab.config import compose

TOY = """
name: commands
model: {name: "random:mlp", task: regression}
data: {source: toy, size: 64}
adapter: {method: lora, rank: 2, targets: all-linear}
trainer: {max_epochs: 1, progress_bar: false}
tracking: {wandb: disabled}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "experiment.yaml").write_text(f"{TOY}output: {tmp_path / 'runs'}\n")
    return str(tmp_path / "experiment.yaml")


def test_methods_lists_every_method_with_paper_and_controllers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    for name in METHODS:
        assert f" {name} " in told
    assert "RankAllocatable" in told
    assert "arXiv:2106.09685" in told


@pytest.mark.parametrize("name", METHODS)
def test_describe_tells_formula_fields_defaults_and_an_example(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["describe", name]) == 0
    told = capsys.readouterr().out
    assert any(edited in told for edited in ("W'", "A'", "h'", "b'"))
    assert "targets" in told
    assert f"method: {name}" in told
    assert "[] means none" in " ".join(told.replace("│", " ").split())  # brackets are no markup


def test_print_config_prints_what_composes_to_the_same_and_trains_nothing(config, capsys, tmp_path):
    assert main(["train", config, "adapter.rank=3", "--print-config"]) == 0
    told = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(told)
    assert yaml.safe_load(told)["adapter"]["rank"] == 3
    assert compose(tmp_path / "printed.yaml") == compose(config, ["adapter.rank=3"])
    assert not (tmp_path / "runs").exists()


def test_settings_may_stand_before_and_after_a_flag(config, capsys):
    assert main(["train", config, "seed=1", "--print-config", "adapter.rank=5"]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert (told["seed"], told["adapter"]["rank"]) == (1, 5)


def test_train_shows_a_table_and_a_second_call_shows_it_again_without_training(config, capsys, tmp_path):
    assert main(["train", config]) == 0
    first = capsys.readouterr().out
    assert "trained parameters" in first
    assert "test/mse" in first
    assert main(["train", config]) == 0
    second = capsys.readouterr().out
    assert "had finished before" in second
    assert main(["train", config, "--overwrite"]) == 0
    assert "had finished before" not in capsys.readouterr().out


def test_fetch_lists_what_there_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["fetch"]) == 0
    told = capsys.readouterr().out
    assert "minilm" in told
    assert "Apache-2.0" in told


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "lora_lab", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "train" in done.stdout


def test_an_unknown_flag_is_refused(config):
    with pytest.raises(SystemExit) as caught:
        main(["train", config, "--resme"])
    assert caught.value.code == 2
