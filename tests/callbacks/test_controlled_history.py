"""What offline W&B files of runs with controllers hold, read back."""

import json

import numpy as np
import pytest
from PIL import Image

from lora_lab.config import compose
from lora_lab.experiment import run
from tests.wandb_file import offline_folders, read_offline_run

pytestmark = pytest.mark.slow

CONFIG = """
name: controlled
model: {{name: "random:mlp", task: regression}}
data: {{source: toy, target: product, size: 320, batch_size: 16, bucket_by_length: false}}
adapter: {{method: {method}, rank: 4, targets: [layer1, layer2], modules_to_save: [layer3]}}
optimization: {{learning_rate: 0.01}}
trainer: {{max_epochs: 2, log_every: 4, progress_bar: false, accelerator: cpu}}
tracking: {{wandb: offline}}
controllers: {controllers}
"""

ALWAYS = {"rank/mean", "sparsity/mean", "sparsity/dropped_layers"} | {
    f"{name}{path}"
    for name in ("rank/", "rank/effective/", "rank/stable/", "sparsity/")
    for path in ("layer1", "layer2")
}

RUNS = {
    "importance_pruning": (
        "adalora",
        "{importance_pruning: {target_rank: 2, deltaT: 3}, compaction: {}}",
        "budget/total budget/kept budget/threshold importance/mean importance/layer1 importance/layer2",
    ),
    "rank_pruning": ("lora_prune", "{rank_pruning: {threshold: 0.8}}", "budget/kept importance/threshold"),
    "rank_switching": (
        "dylora",
        "{rank_switching: {}}",
        "rank/active validation/mse_rank_1 validation/mse_rank_4 validation/loss_rank_2",
    ),
    "output_evaluation": (
        "lora",
        "{output_evaluation: {threshold: 0.5, group_by: global, share: false}, compaction: {}}",
        "budget/kept budget/threshold importance/layer1 importance/layer2",
    ),
    "dropout_schedule": (
        "lora_drop",
        "{dropout_schedule: {}}",
        "budget/drop_prob",
    ),
}
CHANGES = {"importance_pruning", "rank_pruning", "output_evaluation"}
"""Runs in which adapters end with another rank than they began with."""


@pytest.fixture(scope="module", params=RUNS)
def read_back(request, tmp_path_factory):
    method, controllers, names = RUNS[request.param]
    folder = tmp_path_factory.mktemp("controlled")
    path = folder / "experiment.yaml"
    path.write_text(CONFIG.format(method=method, controllers=controllers))
    result = run(compose(path, [f"output={folder}"]))
    return request.param, set(names.split()), result, read_offline_run(*offline_folders(result.folder.path))


def test_every_curve_is_in_the_file(read_back):
    _, names, _, offline = read_back
    logged = {name for row in offline.history for name in row}
    assert names <= logged
    assert ALWAYS <= logged


def test_ranks_and_budget_stand_in_the_rows_of_the_loss(read_back):
    _, names, _, offline = read_back
    own = {name for name in names if not name.startswith("validation/")} - {"budget/threshold"}
    rows = [row for row in offline.history if "train/loss" in row]
    assert len(rows) == 10
    assert all("rank/layer1" in row and "sparsity/layer1" in row for row in rows)
    late = {name for name in own if name.startswith("importance/")}  # known once something was decided
    assert all(own - late <= row.keys() for row in rows)
    assert own <= rows[-1].keys()


def test_history_agrees_with_what_the_run_ends_with(read_back):
    name, _, result, offline = read_back
    last = [row for row in offline.history if "rank/mean" in row][-1]
    assert last["rank/mean"] == result.record["final_rank_mean"]
    first = next(row for row in offline.history if "rank/mean" in row)
    assert (last["rank/mean"] < first["rank/mean"]) == (name in CHANGES)
    if name == "importance_pruning":
        assert last["rank/mean"] == 2


def test_table_and_pictures_are_in_the_file(read_back):
    name, names, _, offline = read_back
    (path,) = [path for path in offline.media if path.name.endswith(".table.json")]
    table = json.loads(path.read_text())
    assert ("importance" in table["columns"]) == ("importance/layer1" in names)
    assert [row[0] for row in table["data"]] == ["layer1", "layer2"]
    pictures = {path.name.split("_")[0]: path for path in offline.media if path.suffix == ".png"}
    assert ("history" in pictures) == (name in CHANGES | {"rank_switching"})
    for picture in pictures.values():
        assert np.asarray(Image.open(picture).convert("L")).std() > 10
