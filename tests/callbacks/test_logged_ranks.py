"""Logged ranks and sparsity are counts of what is in the tensors at that step, between decisions too."""

import csv

import lightning as L
import pytest

from lora_lab import experiment
from lora_lab.config import compose
from lora_lab.errors import ConfigError
from tests.wandb_file import offline_folders, read_offline_run

RANK = 6
CONFIG = """
name: counted
model: {{name: "random:mlp", task: regression, config: {{sizes: [6, 8, 8, 8]}}}}
data: {{source: toy, target: product, features: 6, size: 640, batch_size: 8, bucket_by_length: false}}
adapter: {{method: {method}, rank: 6, targets: [layer1, layer2, layer3], modules_to_save: [layer4]}}
optimization: {{learning_rate: 0.02}}
trainer: {{max_epochs: 1, log_every: {every}, validate_every: 0.2, progress_bar: false, accelerator: cpu}}
tracking: {{wandb: {wandb}}}
controllers: {controllers}
"""
PATHS = ["layer1", "layer2", "layer3"]


class Count(L.Callback):
    """Counts the components whose parts are all non-zero, at the end of each step and at each validation."""

    def __init__(self, adapters, every):
        self.adapters, self.every, self.counts, self.kept = adapters, every, {}, {}

    def count(self, kind, step):
        found = []
        for path in PATHS:
            adapter = self.adapters.adapters[path]
            flags = adapter.A.any(1) & adapter.B.any(0)
            if hasattr(adapter, "E"):
                flags &= adapter.E != 0
            found.append(0 if adapter.dropped else int(flags.sum()))
        self.counts[kind, step] = found
        self.kept[kind, step] = [int(self.adapters.adapters[path].kept.sum()) for path in PATHS]

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % self.every == 0:
            self.count("train/loss", trainer.global_step - 1)

    def on_validation_epoch_start(self, trainer, *_):
        self.count("validation/loss", trainer.global_step - 1)


def tracked(tmp_path, monkeypatch, method, controllers, every, wandb="disabled"):
    path = tmp_path / "experiment.yaml"
    path.write_text(CONFIG.format(method=method, controllers=controllers, every=every, wandb=wandb))
    seen, everything = [], experiment._Callbacks.everything

    def with_count(callbacks, bars):
        seen.append(Count(callbacks.adapters.adapters, every))
        return [*everything(callbacks, bars), seen[0]]

    monkeypatch.setattr(experiment._Callbacks, "everything", with_count)
    result = experiment.run(compose(path, [f"output={tmp_path}"]))
    with (result.folder.path / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return seen[0], rows, result


def check(counted, rows, step_of, shared=()):
    """Asserts that every row of a step or a validation has the ranks that were counted; returns how many."""
    found = 0
    for (kind, step), counts in counted.counts.items():
        for row in (row for row in rows if kind in row and step_of(row) == step):
            for path, count in zip(PATHS, counts, strict=True):
                assert row[f"rank/{path}"] == count, (kind, step)
                sparsity = 1 if path in shared else 1 - count / RANK
                assert row[f"sparsity/{path}"] == pytest.approx(sparsity, abs=1e-6), (kind, step)
            assert row["rank/mean"] == pytest.approx(sum(counts) / 3)
            own = [count for path, count in zip(PATHS, counts, strict=True) if path not in shared]
            assert row["rank/total"] == sum(own)
            found += 1
    return found


def test_adalora_at_its_default_intervals_logs_the_ranks_of_its_weights(tmp_path, monkeypatch):
    """In CSV and in W&B's file; at the steps logged, all that was silenced has been filled again."""
    controllers = "{importance_pruning: {target_rank: 2}}"
    counted, rows, result = tracked(tmp_path, monkeypatch, "adalora", controllers, 10, "offline")
    steps = 80
    assert check(counted, rows, lambda row: row["step"]) == steps / 10 + 5
    offline = read_offline_run(*offline_folders(result.folder.path))
    assert check(counted, offline.history, lambda row: row["trainer/global_step"]) == steps / 10 + 5
    pruning = [key for key in counted.counts if steps * 0.1 < key[1] < steps * 0.7]
    filled = [key for key in pruning if sum(counted.counts[key]) > sum(counted.kept[key])]
    assert {kind for kind, _ in filled} == {"train/loss", "validation/loss"}
    last = counted.counts["train/loss", steps - 1]
    assert sum(last) == 6
    assert result.record["final_rank_mean"] == 2


@pytest.mark.parametrize(
    ("method", "controllers", "every"),
    [
        ("lora", "{importance_pruning: {target_rank: 3, deltaT: 3, importance: magnitude}}", 4),
        ("lora", "{rank_pruning: {threshold: 0.8}}", 7),
        (
            "lora",
            "{output_evaluation: {threshold: 0.4, group_by: global, share: false}, compaction: {}}",
            5,
        ),
    ],
)
def test_other_controllers_log_the_ranks_of_the_weights_too(
    tmp_path, monkeypatch, method, controllers, every
):
    counted, rows, _ = tracked(tmp_path, monkeypatch, method, controllers, every)
    assert check(counted, rows, lambda row: row["step"]) == 80 // every + 5
    assert sum(counted.counts["validation/loss", 79]) < 3 * RANK


def test_an_evaluation_refuses_settings_that_cannot_act(tmp_path, monkeypatch):
    controllers = "{importance_pruning: {target_rank: 3}}"
    _, _, result = tracked(tmp_path, monkeypatch, "lora", controllers, 40)
    for setting in (
        "controllers.importance_pruning.target_rank=1",
        "controllers={compaction: {}}",
        "adapter.rank=2",
        "adapter.method=adalora",
        "optimization.learning_rate=1",
    ):
        part = setting.partition(".")[0].partition("=")[0]
        with pytest.raises(ConfigError, match=f"command line: {part}: an evaluation uses the stored adapter"):
            experiment.evaluate(result.folder.path, [setting])
    metrics = experiment.evaluate(result.folder.path, ["data.evaluation_batch_size=3", "adapter.rank=6"])
    assert metrics["test/mse"] == pytest.approx(result.record["metrics"]["test/mse"], rel=1e-5)


def test_shared_adapters_show_in_rank_and_sparsity(tmp_path, monkeypatch):
    options = "{output_evaluation: {threshold: 0.1, group_by: global, share: true, warmup: 10}}"
    sizes = "sizes: [8, 8, 8, 8]}} "
    monkeypatch.setattr(
        "tests.callbacks.test_logged_ranks.CONFIG",
        CONFIG.replace("sizes: [6, 8, 8, 8]}}", sizes).replace("features: 6", "features: 8"),
    )
    counted, rows, result = tracked(tmp_path, monkeypatch, "lora", options, 10)
    owners = counted.adapters.owners
    assert len(owners) == 1
    late = [row for row in rows if row["step"] > 10]
    assert check(counted, late, lambda row: row["step"], owners) == 7 + 5
    last = [row for row in late if "rank/total" in row][-1]
    assert last["rank/total"] == 2 * RANK
    assert last["sparsity/shared_layers"] == 1
    assert "sparsity/shared_layers" not in rows[0]
    assert result.record["sparsity_mean"] == pytest.approx(1 / 3)
