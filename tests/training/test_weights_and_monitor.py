"""Class weights in the loss, and the metric that decides which validation is the best."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lab.config import compose
from lora_lab.data import FilesConfig, ToyConfig, build_data, check_data
from lora_lab.errors import ConfigError, DataError
from lora_lab.experiment import evaluate, run
from lora_lab.models.build import ModelConfig, build_model, build_tokenizer
from lora_lab.tasks import TASKS, MeanLoss
from lora_lab.training.module import FineTuner

ROWS = [("a", "x")] * 30 + [("b", "y")] * 12 + [("c", "z")] * 3


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS))
    return FilesConfig(train=str(path), label="label", validation_fraction=1 / 3)


def data_of(config):
    return build_data(config, build_tokenizer(ModelConfig(name="random:bert")), "sequence_classification", 0)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({}, None),
        # 30 rows for training: 20 of x, 8 of y, 2 of z
        ("balanced", [30 / (3 * 20), 30 / (3 * 8), 30 / (3 * 2)]),
        ({"y": 2.5}, [1, 2.5, 1]),
        ({"z": 0.1, "x": 4}, [4, 1, 0.1]),
    ],
)
def test_weights_are_those_given_or_balanced_by_the_training_rows(config, given, weights):
    config.class_weights = given
    assert data_of(config).class_weights() == (weights and pytest.approx(weights))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"X": 2.0}, "data.class_weights: no class 'X'. Known: x, y, z"),
        ({"x": 0.0}, "data.class_weights.x: must be above 0; got 0.0"),
        ({"x": float("inf")}, "data.class_weights.x: must be above 0; got inf"),
        ("even", "data.class_weights: must be balanced, or hold class: weight; got 'even'"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(config, given, fault):
    config.class_weights = given
    with pytest.raises(DataError) as refused:
        data_of(config).class_weights()
    assert fault in str(refused.value)
    faults = check_data(ToyConfig(class_weights="balanced"), "regression")
    assert faults == ["data.class_weights: regression has no classes; remove them"]


@pytest.mark.parametrize("weights", [[0.2, 3.0, 1.0], [1e-3, 1e-3, 2e-3]])
def test_losses_over_batches_are_torchs_weighted_mean_over_all(weights):
    task, loss, weights = TASKS["sequence_classification"], MeanLoss(weighted=True), torch.tensor(weights)
    logits, labels = torch.randn(20, 3), torch.randint(0, 3, (20,))
    labels[4] = -100
    for part in range(0, 20, 7):
        loss.update(*task.sums(logits[part : part + 7], labels[part : part + 7], weights))
    whole = F.cross_entropy(logits, labels, weights)
    assert float(loss.compute()) == pytest.approx(float(whole), rel=1e-6)


EXPERIMENT = """
name: chosen
run: one
output: {folder}/runs
model: {{name: "random:bert"}}
data: {{source: files, train: {folder}/rows.jsonl, label: label, class_weights: balanced, batch_size: 8}}
adapter: {{method: lora, rank: 2}}
trainer: {{max_epochs: 3, keep: best, monitor: {monitor}, progress_bar: false, validate_every: 0.5}}
tracking: {{wandb: disabled}}
"""


@pytest.mark.parametrize(("monitor", "best"), [("loss", min), ("f1", max)])
def test_the_chosen_metric_decides_which_adapters_a_run_ends_with(config, tmp_path, monitor, best):
    (tmp_path / "own.yaml").write_text(EXPERIMENT.format(folder=tmp_path, monitor=monitor))
    result = run(compose(tmp_path / "own.yaml"))
    lines = [line.split(",") for line in result.folder.metrics.read_text().splitlines()]
    column = lines[0].index(f"validation/{monitor}")
    values = [float(line[column]) for line in lines[1:] if line[column]]
    assert len(values) >= 6
    assert result.record["best_value"] == best(values)
    again = evaluate(result.folder.path)
    assert again[f"validation/{monitor}"] == pytest.approx(best(values), rel=1e-6)
    assert again["validation/loss"] == pytest.approx(result.record["metrics"]["validation/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("task", "better"),
    [
        ("sequence_classification", {"loss": "min", "accuracy": "max", "f1": "max"}),
        ("regression", {"loss": "min", "mse": "min", "mae": "min", "pearson": "max"}),
        ("causal_lm", {"loss": "min", "perplexity": "min"}),
    ],
)
def test_every_metric_of_a_task_can_be_chosen_and_is_meant_as_it_is(task, better):
    assert {"loss", *map(str, TASKS[task].metrics(2))} == set(better)
    for metric, mode in better.items():
        assert TASKS[task].better(metric) == mode
        assert TASKS[task].monitor_faults(metric) == []


def test_an_unknown_metric_is_refused_with_those_that_there_are(config, tmp_path):
    (tmp_path / "own.yaml").write_text(EXPERIMENT.format(folder=tmp_path, monitor="mae"))
    with pytest.raises(ConfigError, match="trainer.monitor: sequence_classification has no metric 'mae'"):
        compose(tmp_path / "own.yaml")


@pytest.mark.parametrize(("monitor", "step"), [("pearson", 2), ("mae", 1), (None, 3)])
def test_the_best_is_the_highest_or_the_lowest_as_the_metric_is_meant(monitor, step):
    model = build_model(ModelConfig(name="random:mlp", task="regression"))
    adapters = inject(model, LoRASpec(targets="all-linear", rank=1))
    callback = AdapterCheckpoint(adapters, "last")
    module = FineTuner(model, adapters, "regression", monitor=monitor)
    values = {"pearson": [0.1, 0.2, 0.9, 0.3], "mae": [3.0, 1.0, 2.0, 4.0], "mse": [4.0, 3.0, 2.0, 1.0]}
    for number in range(4):
        metrics = {f"validation/{name}": torch.tensor(v[number]) for name, v in values.items()}
        state = SimpleNamespace(fn="fit")
        trainer = SimpleNamespace(state=state, global_step=number, callback_metrics=metrics)
        callback.on_validation_end(trainer, module)
    assert callback.best_step == step
