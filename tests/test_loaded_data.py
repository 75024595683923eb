"""Data that a process keeps from run to run."""

import json

import pytest

from lora_lab.config import compose
from lora_lab.experiment import loaded as module, run
from lora_lab.experiment.loaded import MOST, LoadedData

FILES = ("adapter/adapter_model.safetensors", "adapter/lora_lab.safetensors")


@pytest.fixture
def config(tmp_path):
    rows = "".join(f"{'abcd'[n % 4] * (2 + n % 7)} {n},{'good' if n % 2 else 'bad'}\n" for n in range(40))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")

    def make(*settings):
        (tmp_path / "run.yaml").write_text(
            "model: {name: 'random:bert'}\nadapter: {method: lora, targets: [query]}\n"
            f"data: {{source: files, train: {tmp_path / 'rows.csv'}, label: label, test_fraction: 0.2}}\n"
            "trainer: {max_steps: 3, progress_bar: false, accelerator: cpu}\ntracking: {wandb: disabled}\n"
        )
        return compose(tmp_path / "run.yaml", [f"output={tmp_path / 'runs'}", *settings])

    return make


def content(result):
    """Returns all that a run has learned and measured of its model."""
    folder = result.folder.path
    tensors = [(folder / name).read_bytes() for name in FILES if (folder / name).is_file()]
    assert tensors
    record = json.loads((folder / "run.json").read_text())
    return tensors, record["metrics"], record["data_fingerprint"]


def test_runs_of_one_process_read_their_data_once_and_learn_what_they_learn_alone(config, monkeypatch):
    built = []
    real = module.build_data
    monkeypatch.setattr(module, "build_data", lambda *given: built.append(given) or real(*given))
    loaded = LoadedData()
    for seed, method in ((0, "full"), (0, "lora"), (1, "lora")):
        settings = (f"seed={seed}", f"adapter.method={method}")
        together = run(config(*settings, "name=together"), loaded=loaded)
        alone = run(config(*settings, "name=alone"))
        assert content(together) == content(alone)
    assert len(built) == 1 + 3


def test_only_the_last_data_sets_are_kept(config, monkeypatch):
    built = []
    monkeypatch.setattr(module, "build_data", lambda config, *rest: built.append(config.max_length) or Data())
    loaded = LoadedData()
    for length in (*range(8, 8 + MOST), 8, 99, 8, 9):
        loaded.of(config(f"data.max_length={length}"))
    assert built == [*range(8, 8 + MOST), 99, 9]


class Data:
    def with_seed(self, seed):
        return self
