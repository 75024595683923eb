"""Real processes, really killed: a resumed run must equal the one that was never stopped, bit for bit."""

import json
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import wandb
from safetensors.torch import load_file

from tests.forks import Fork, lora_lab
from tests.wandb_file import offline_folders, read_offline_run

pytestmark = pytest.mark.slow

CONFIG = """
name: resume
model: {name: "random:bert"}
data: {source: files, train: DATA, text: [text], label: label, batch_size: 4, max_length: 16}
adapter: {method: lora, rank: 2, dropout: 0.2}
optimization: {learning_rate: 0.01}
trainer:
  {max_epochs: 6, accumulate: 3, validate_every: 0.5, log_every: 2, checkpoint_every: 7,
  progress_bar: false, keep: best}
tracking: {wandb: offline}
"""
STEPS = 6 * 8  # 90 rows (of 100, a tenth is set aside for validation) are 23 batches, the last window has 2
VOLATILE = ("speed/", "memory/peak", "_runtime", "_timestamp", "_step", "_wandb", "epoch_seconds")
"""Names of what measures the machine and not the run."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    generator = torch.Generator().manual_seed(0)
    words = ["good", "bad", "film", "plot", "long", "short", "dull", "fine"]
    rows = []
    for _ in range(100):
        chosen = torch.randint(
            0, len(words), (int(torch.randint(2, 12, (1,), generator=generator)),), generator=generator
        )
        text = " ".join(words[index] for index in chosen)
        rows.append({"text": text, "label": "positive" if "good" in text or "fine" in text else "negative"})
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    path = folder / "experiment.yaml"
    path.write_text(CONFIG.replace("DATA", str(folder / "rows.csv")))
    return path


def start(config: Path, run: str, *flags: str) -> Fork:
    command = ["train", str(config), f"output={config.parent / 'runs'}", f"run={run}", *flags]
    # As a process started by this one, which tracks a run, would inherit it.
    return lora_lab(*command, folder=config.parent, WANDB_SERVICE=os.environ["WANDB_SERVICE"])


def folder_of(config: Path, run: str) -> Path:
    return config.parent / "runs" / "resume" / run


def stop_after(process: Fork, folder: Path, rows: int, how: signal.Signals) -> int:
    """Sends the signal when the run has logged this many rows, of which the last checkpoint knows fewer."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = folder / "metrics.csv"
        if (folder / "checkpoints" / "last.ckpt").is_file() and metrics.read_text().count("\n") > rows:
            process.send(how)
            return process.end(60)[0]
        assert process.process.exitcode is None, process.output.read_text()
        time.sleep(0.005)
    raise AssertionError("the run never came so far")


@pytest.fixture(scope="module", autouse=True)
def wandb_in_use():
    """A W&B run of this process, whose service killed runs must not share: it would keep their ids in use."""
    wandb.teardown()  # a test before may have taken the name of the service out of the environment
    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(silent=True, console="off")
        own = wandb.init(dir=folder, mode="offline", project="own", settings=settings)
        yield
        own.finish()


@pytest.fixture(scope="module")
def uninterrupted(config) -> Path:
    code, output = start(config, "whole").end()
    assert code == 0, output
    return folder_of(config, "whole")


def history(folder: Path) -> list[dict]:
    """Returns the rows of the one offline W&B run, without times, random names and what measures the machine.

    Tables and pictures stay in by the hash of their contents.
    """
    (offline,) = offline_folders(folder)
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(VOLATILE) and "artifact" not in name
        }
        for row in read_offline_run(offline).history
    ]


def table(folder: Path) -> pd.DataFrame:
    frame = pd.read_csv(folder / "metrics.csv", float_precision="round_trip")
    return frame[sorted(name for name in frame if not name.startswith(VOLATILE))]


@pytest.mark.parametrize(("how", "rows"), [(signal.SIGINT, 8), (signal.SIGKILL, 22)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(config, uninterrupted, how, rows):
    run = how.name.lower()
    folder = folder_of(config, run)
    code = stop_after(start(config, run), folder, rows, how)
    status = json.loads((folder / "run.json").read_text())["status"]
    assert status == ("interrupted" if how is signal.SIGINT else "running")
    assert code == (130 if how is signal.SIGINT else -signal.SIGKILL)

    code, refused = start(config, run, "--no-resume").end()
    assert code == 2
    assert "Continue it with --resume" in refused.replace("\n", " ")

    code, output = start(config, run).end()
    assert code == 0, output
    assert re.search(r"continues from step \d+", output)

    ours, theirs = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, uninterrupted)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    record, expected = (json.loads((path / "run.json").read_text()) for path in (folder, uninterrupted))
    assert record["status"] == "finished"
    assert record["resumptions"] == 1
    assert record["steps"] == expected["steps"] == STEPS
    assert record["metrics"] == expected["metrics"]
    assert record["best_step"] == expected["best_step"]

    pd.testing.assert_frame_equal(table(folder), table(uninterrupted), check_exact=True)
    assert history(folder) == history(uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_the_beginning(config, uninterrupted):
    process = start(config, "early")
    folder = folder_of(config, "early")
    deadline = time.monotonic() + 120
    while not (folder / "run.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send(signal.SIGKILL)
    process.end(60)
    assert not (folder / "checkpoints" / "last.ckpt").is_file()
    code, output = start(config, "early", "--resume").end()
    assert code == 0, output
    pd.testing.assert_frame_equal(table(folder), table(uninterrupted), check_exact=True)
    assert history(folder) == history(uninterrupted)


def test_the_checkpoint_holds_nothing_of_the_frozen_base_and_loads_without_pickle(uninterrupted):
    checkpoint = torch.load(uninterrupted / "checkpoints" / "last.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    assert all(name.endswith((".A", ".B", ".kept", ".active")) or ".trained." in name for name in names)
    moments = checkpoint["optimizer_states"][0]["state"]
    trainable = [name for name in names if not name.endswith((".kept", ".active"))]
    assert len(moments) == len(trainable)


def test_a_finished_run_is_not_trained_again(config, uninterrupted):
    before = (uninterrupted / "run.json").stat().st_mtime_ns
    code, output = start(config, "whole").end()
    assert code == 0, output
    assert "had finished before" in output
    assert (uninterrupted / "run.json").stat().st_mtime_ns == before
