"""Runs on a user's own rows: what is stored of them, and evaluation on others."""

import csv
import json
import logging
import shutil

import pytest
import torch
import yaml

from lora_lab.adapters.storage import load_adapter, read_label_names
from lora_lab.artifacts.opening import find_adapter
from lora_lab.config import compose
from lora_lab.errors import ConfigError, DataError
from lora_lab.experiment import build_parts, evaluate, run
from lora_lab.models.build import build_tokenizer

CLASSES = ["0012", "12", "never", "yes: ${x}"]


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["review", "verdict"], *rows])
    return str(path)


def reviews(count):
    return [[f"{'abcd'[n % 4] * 3} {n}", CLASSES[n % 4]] for n in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own")
    config = {
        "name": "own",
        "run": "one",
        "output": str(path / "runs"),
        "model": {"name": "random:bert"},
        "data": {"source": "files", "train": write(path / "a.csv", reviews(48)), "text": ["review"]},
        "adapter": {"method": "lora", "rank": 2},
        "trainer": {"max_epochs": 1, "progress_bar": False},
        "tracking": {"wandb": "disabled"},
    }
    config["data"] |= {"label": "verdict", "test_fraction": 0.25, "validation_fraction": 0.25}
    (path / "own.yaml").write_text(yaml.safe_dump(config))
    run(compose(path / "own.yaml"))
    return path


def test_a_run_stores_the_names_of_its_classes_and_what_its_data_were(folder):
    record = json.loads((folder / "runs/own/one/run.json").read_text())
    assert record["label_names"] == CLASSES
    assert record["data"]["train"] == {"rows": 24, "cut": 0}
    assert record["data"]["test"] == {"rows": 12, "cut": 0, "also_in_train": 0, "also_in_validation": 0}
    assert read_label_names(folder / "runs/own/one/adapter") == CLASSES


@pytest.mark.parametrize("classes", [["never"], ["yes: ${x}", "12"]])
def test_an_evaluation_on_rows_of_few_classes_keeps_the_models_ids(folder, tmp_path, classes):
    rows = [row for row in reviews(40) if row[1] in classes]
    own = write(tmp_path / "b.csv", rows)
    told = evaluate(folder / "runs/own/one", [f"data.validation={own}"])
    # By hand: what the stored adapter says of each row, by name.
    config = compose(folder / "own.yaml")
    torch.manual_seed(config.seed)
    model, _ = build_parts(config)
    load_adapter(model, folder / "runs/own/one/adapter")
    tokenizer = build_tokenizer(config.model)
    loss = right = 0
    with torch.no_grad():
        for text, name in rows:
            logits = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0]
            right += model.config.id2label[int(logits.argmax())] == name
            loss -= float(logits.log_softmax(0)[model.config.label2id[name]])
    assert told["validation/accuracy"] == pytest.approx(right / len(rows))
    assert told["validation/loss"] == pytest.approx(loss / len(rows), rel=1e-5)


def test_an_evaluation_on_data_that_have_changed_since_says_so(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        evaluate(folder / "runs/own/one")
    assert "have changed" not in caplog.text
    path = folder / "a.csv"
    before = path.read_text()
    path.write_text(before + "e,never\n")
    try:
        evaluate(folder / "runs/own/one")
    finally:
        path.write_text(before)
    assert "one: its data, or their splits, have changed" in caplog.text


def test_an_unknown_class_is_refused_by_name_and_row(folder, tmp_path):
    own = write(tmp_path / "b.csv", [["a", "never"], ["b", "012"]])
    for split in ("validation", "test"):
        settings = [f"data.{split}={own}"] + ["data.test_fraction=0"] * (split == "test")
        with pytest.raises(DataError, match=r"b\.csv: row 2: label '012' does not occur"):
            evaluate(folder / "runs/own/one", settings)


@pytest.mark.parametrize(("model", "limit"), [("gpt2", 128), ("roberta", 128), ("opt", 128)])
def test_longer_texts_than_a_model_has_positions_for_are_refused_before_any_work(folder, model, limit):
    settings = [f"model.name=random:{model}", "adapter.targets=all-linear", "run=long"]
    with pytest.raises(
        ConfigError, match=f"data.max_length: random:{model} has positions for {limit} tokens"
    ):
        run(compose(folder / "own.yaml", [*settings, f"data.max_length={limit + 1}"]))
    assert not (folder / "runs/own/long").exists()


def test_seeds_of_all_processes_have_to_exist(folder):
    assert compose(folder / "own.yaml", [f"seed={2**32 - 1}"]).seed == 2**32 - 1
    for settings in ([f"seed={2**32 - 1}", "trainer.devices=2"], ["seed=-1"], [f"seed={2**32}"]):
        with pytest.raises(ConfigError, match="seed: must lie from 0 to 42949672"):
            compose(folder / "own.yaml", settings)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_fewer_rows_than_processes_are_refused_before_any_work(folder, split):
    settings = ["trainer.devices=3", f"data.{split}_limit=2", "run=wide"]
    with pytest.raises(DataError, match=f"trainer.devices: 3 processes .* the {split} split has 2"):
        run(compose(folder / "own.yaml", settings))
    assert not (folder / "runs/own/wide").exists()


def test_an_artifact_needs_no_rows_to_know_its_classes(folder, tmp_path):
    elsewhere = tmp_path / "run"
    shutil.copytree(folder / "runs/own/one", elsewhere)
    config = elsewhere / "config.yaml"
    empty = write(tmp_path / "empty.csv", [])
    config.write_text(config.read_text().replace(str(folder / "a.csv"), empty))
    model = find_adapter(elsewhere).build()
    assert [model.config.id2label[n] for n in range(4)] == CLASSES
    assert model.config.num_labels == 4
