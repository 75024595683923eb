"""Two real processes over gloo on the loopback train what one process trains on batches twice as large."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.forks import lora_lab

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Relative to the largest weight: float32 sums of two halves against one sum, over 30 optimizer steps."""

CONFIG = """
name: distributed
model: {name: "random:mlp", task: regression}
data: {source: toy, target: product, size: 160, evaluation_batch_size: 7}
adapter: {method: lora, rank: 4, targets: [layer1, layer2], modules_to_save: [layer3]}
optimization: {learning_rate: 0.01}
trainer: {max_epochs: 3, log_every: 2, checkpoint_every: 5, progress_bar: false, accelerator: cpu}
tracking: {wandb: offline}
"""


def train(folder, run: str, *overrides: str) -> dict:
    path = folder / "experiment.yaml"
    path.write_text(CONFIG)
    command = ["train", str(path), f"output={folder}", f"run={run}", *overrides]
    if run == "one":
        code, printed = lora_lab(*command, folder=folder).end()
    else:
        places = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(
            [sys.executable, "-m", "lora_lab", *command],
            cwd=folder,
            env={**os.environ, **places},
            capture_output=True,
            text=True,
            timeout=300,
        )
        code, printed = done.returncode, done.stdout + done.stderr
    assert code == 0, printed
    run_folder = folder / "distributed" / run
    return {
        "record": json.loads((run_folder / "run.json").read_text()),
        "weights": load_file(run_folder / "adapter" / "adapter_model.safetensors"),
        "rows": (run_folder / "metrics.csv").read_text().count("\n"),
        "wandb": sorted(path.name for path in (run_folder / "wandb").glob("offline-run-*")),
        "files": sorted(path.name for path in run_folder.iterdir()),
        "printed": printed,
    }


def test_two_processes_equal_one_with_the_doubled_batch_and_log_and_save_once(tmp_path):
    one = train(tmp_path, "one", "data.batch_size=16")
    two = train(tmp_path, "two", "data.batch_size=8", "trainer.devices=2")

    assert one["record"]["steps"] == two["record"]["steps"] == 30
    for name, weight in one["weights"].items():
        difference = (weight - two["weights"][name]).abs().max() / weight.abs().max()
        assert difference <= TOLERANCE, (name, float(difference))
    for name, value in one["record"]["metrics"].items():
        assert two["record"]["metrics"][name] == pytest.approx(value, rel=1e-4), name

    assert two["rows"] == one["rows"]
    assert len(two["wandb"]) == 1
    assert two["files"] == one["files"]
    assert two["printed"].count("Run folder") == 1
    checkpoint = torch.load(tmp_path / "distributed" / "two" / "checkpoints" / "last.ckpt", weights_only=True)
    first, second = checkpoint["callbacks"]["ResumeCheckpoint"]["random"]
    assert not torch.equal(first["torch"], second["torch"]), "both would draw the same dropout masks"
