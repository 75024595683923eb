"""The command line as a user meets it."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
import yaml

from lora_lab.adapters import METHODS
from lora_lab.callbacks import CONTROLLERS
from lora_lab.cli import NO_CONFIG, main
from lora_lab.config import ExperimentConfig, compose
from lora_lab.config.documentation import field_documentation
from lora_lab.data import DATA_SOURCES
from lora_lab.report.descriptions import known
from lora_lab.tasks import TASKS

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


@pytest.mark.parametrize("columns", ["80", "200"])
def test_methods_lists_every_method_with_paper_and_controllers(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    for name in METHODS:
        assert f" {name} " in told
    for name in CONTROLLERS:
        assert f" {name} " in told
    assert "RankAllocatable" in told
    assert "2106.09685" in told
    assert max(map(len, told.splitlines())) <= int(columns)
    assert "…" not in told  # nothing is cut


@pytest.mark.parametrize("name", METHODS)
def test_describe_shows_formula_fields_defaults_and_an_example(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["describe", name]) == 0
    told = capsys.readouterr().out
    assert any(edited in told for edited in ("W'", "A'", "h'", "b'"))
    assert "targets: str | list[str] = " in told
    assert f"method: {name}" in told
    assert "[] means none" in " ".join(told.split())  # brackets are no markup


def test_describe_covers_every_part_of_a_config_and_lists_what_it_knows(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["describe"]) == 0
    listed = capsys.readouterr().out.replace(",", " ").split()
    nodes = [field.name for field in fields(ExperimentConfig) if is_dataclass(field.default_factory)]
    assert {"model", "data", "optimization", "trainer", "tracking"} <= set(nodes)
    topics = [*nodes, *DATA_SOURCES, *TASKS, *METHODS, *CONTROLLERS]
    assert set(topics) - {"adapter"} <= set(listed)
    for name in {*topics, "experiment"} - {"adapter", *METHODS}:
        assert main(["describe", name]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 4
    assert main(["describe", "trainr"]) == 2
    assert "did you mean 'trainer'?" in capsys.readouterr().err


def test_describe_says_every_default_and_meaning_and_peft_name():
    for name, found in known().items():
        for field in found.fields:
            assert field.meaning or name == "experiment", f"{name}.{field.name} has no docstring"
    block = {field.name: field for field in known()["oft"].fields}
    assert (block["dropout"].default, block["dropout"].peft) == ("0.0", "module_dropout")
    assert known()["files"].fields[0].default == "required"
    assert known()["oft"].papers == ("2306.07280", "2506.19847")


def test_a_class_without_source_has_fields_without_meaning():
    shown: dict = {"__name__": "notebook"}
    exec("from dataclasses import dataclass\n@dataclass\nclass Spec:\n    rank: int = 1\n", shown)
    assert field_documentation(shown["Spec"]) == {}


def test_train_without_a_file_says_what_to_do(capsys):
    assert main(["train"]) == 2
    told = capsys.readouterr().err
    assert "experiments/quickstart/experiment.yaml" in told
    assert max(map(len, told.splitlines())) <= 80


def test_the_smallest_experiment_that_the_message_shows_runs(tmp_path, capsys, monkeypatch):
    lines = NO_CONFIG.splitlines()
    shown = "\n".join(line.strip() for line in lines if line.startswith("  ") and "{" in line)
    (tmp_path / "smallest.yaml").write_text(shown)
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_steps=1", "trainer.progress_bar=false", "tracking.wandb=disabled", "data.size=64"]
    assert main(["train", "smallest.yaml", *short]) == 0


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
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["fetch"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
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


def test_the_progress_bar_fits_into_80_columns_with_loss_and_the_metric_that_decides(
    config, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", config, "trainer.progress_bar=true", "trainer.log_every=1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "━" in line]
    assert max(map(len, lines)) <= 80
    line = next(line for line in lines if line.startswith("Epoch 0/0"))
    assert re.search(r"2/2 .*loss: \d+\.\d+ +mse: \d+\.\d+ *$", line)
