"""What users get wrong: one clear message each, exit code 2, no traceback, nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_lab.cli import main

BASE = """
name: bad
output: OUTPUT
model: {name: "random:bert"}
data: {source: files, train: TRAIN, text: [text], label: label, max_length: 16}
adapter: {method: lora, rank: 2}
trainer: {max_epochs: 1, progress_bar: false}
tracking: {wandb: disabled}
"""
ROWS = [
    ("a good film", "positive"),
    ("a bad film", "negative"),
    ("fine plot", "positive"),
    ("dull plot", "negative"),
]


@pytest.fixture
def place(tmp_path) -> Path:
    lines = ["text,label", *(f"{text},{label}" for text, label in ROWS * 5)]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    text = BASE.replace("OUTPUT", str(tmp_path / "runs")).replace("TRAIN", str(tmp_path / "train.csv"))
    (tmp_path / "experiment.yaml").write_text(text)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """Runs a command that must fail as a user's fault; returns its message on one line."""
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.startswith("error: ")
    return " ".join(told.split())


def data_file(place: Path, name: str, text: str) -> str:
    (place / name).write_text(text)
    return f"data.train={place / name}"


OVERRIDES = {
    "typo in a key": ("adapter.rnak=2", "adapter.rnak: no such key; did you mean 'rank'?"),
    "another library's key": ("adapter.lora_alpha=2", "it is called 'alpha' here"),
    "unknown method": ("adapter.method=lorra", "no method 'lorra'; did you mean 'lora'?"),
    "unknown data source": ("data.source=huub", "no source 'huub'; did you mean 'hub'?"),
    "wrong type": ("adapter.rank=two", "adapter.rank: Value 'two'"),
    "not a setting": ("rank", "'rank' is not a setting; write key=value"),
    "rank 0": ("adapter.rank=0", "adapter.rank: must be at least 1; got 0"),
    "dropout 1": ("adapter.dropout=1.0", "adapter.dropout: must lie in [0, 1); got 1.0"),
    "alpha 0": ("adapter.alpha=0", "adapter.alpha: must be finite and not 0"),
    "learning rate below 0": ("optimization.learning_rate=-1", "learning_rate: must be above 0"),
    "infinite learning rate": ("optimization.learning_rate=.inf", "must be above 0 and finite; got inf"),
    "no such choice": ("optimization.schedule=stairs", "optimization.schedule: "),
    "no such model": ("model.name=random:brt", "did you mean 'bert'?"),
    "no such embedded model": ("model.name=embedded:minlm", "did you mean 'minilm'?"),
    "no such model folder": ("model.name=./nowhere", "nowhere"),
    "task without labels to match": ("model.task=regression", "label"),
    "no target matched": ("adapter.targets=[qery]", "bert has no 'qery' (its roles are query, key, value"),
    "target is not a regular expression": ("adapter.targets=['regex:(']", "is not a regular expression"),
    "target the method cannot edit": ("adapter.targets=[LayerNorm]", "a LayerNorm, which lora cannot edit"),
    "target inside the head": ("adapter.targets=[classifier]", "which is fully trained"),
    "layer out of range": ("adapter.layers=[7]", "have no layer [7]; their layers are [0, 1]"),
    "pattern that matches nothing": ("adapter.rank_pattern={kye: 3}", "'kye' matches no adapted module"),
    "module to save that is not there": ("adapter.modules_to_save=[hed]", "no module 'hed'"),
    "module to save without parameters": ("adapter.modules_to_save=[dropout]", "has no parameters to train"),
    "odd rank where halves are needed": ("adapter={method: lora, init: orthogonal, rank: 3}", "must be even"),
    "rank above min(m, n)": (
        "adapter={method: lora, init: olora, rank: 33}",
        "allows at most min(in, out) = 32",
    ),
    "loraplus without a B": ("adapter={method: bitfit}", None),
    "missing data file": ("data.train=nowhere.csv", "nowhere.csv"),
    "missing column": ("data.label=lable", "lable"),
    "negative batch size": ("data.batch_size=-1", "batch_size: must be at least 1; got -1"),
    "run name that is a path": ("run=a/b", "run: must be a plain folder name"),
    "unknown controller": (
        "controllers.rank_prunning={}",
        "no such controller; did you mean 'rank_pruning'?",
    ),
    "controllers that are no mapping": (
        "controllers=[rank_pruning]",
        "must hold controllers and their options",
    ),
    "controller switched on by a word": ("controllers.rank_pruning=true", "must hold options, {} for the"),
    "typo in a controller's key": (
        "controllers.rank_pruning.treshold=0.1",
        "controllers.rank_pruning.treshold: no such key; did you mean 'threshold'?",
    ),
    "controller's option out of range": (
        "controllers.rank_pruning.threshold=1.0",
        "controllers.rank_pruning.threshold: must lie in [0, 1); got 1.0",
    ),
    "controller that the method does not fit": (
        "controllers.rank_switching={}",
        "controllers.rank_switching: needs adapters that are NestedRank; those of method 'lora' are not. "
        "Methods that are: dylora",
    ),
    "controllers that decide the same": (
        "controllers={rank_pruning: {}, importance_pruning: {target_rank: 1}}",
        "decides which components are kept, as rank_pruning does; remove one",
    ),
    "controller with nothing to do": (
        "controllers.compaction={}",
        "has nothing to compact: no other controller",
    ),
    "run too short for a controller": (
        "controllers.importance_pruning.target_rank=1",
        "of a run of 1; the budget needs steps between them to fall",
    ),
    "budget above what there is": (
        "controllers.importance_pruning.target_rank=3",
        "3 for each of 4 adapters makes 12 components; they start with 8",
    ),
    "a list within a list": (
        "adapter.targets=[[query]]",
        "adapter.targets: must be text, or a list of text; got [['query']]",
    ),
    "a list for a number": (
        "adapter.rank_pattern={query: [3]}",
        "adapter.rank_pattern: must be names, each with a whole number; got {'query': [3]}",
    ),
    "a reference that does not fit": ("adapter.rank=${name}", "could not be converted to Integer"),
    "steps 0": ("trainer.max_steps=0", "max_steps: must be at least 1"),
}


@pytest.mark.parametrize("case", [name for name, (_, told) in OVERRIDES.items() if told])
def test_a_wrong_setting_is_told_before_anything_is_written(place, capsys, case):
    override, expected = OVERRIDES[case]
    message = refused(capsys, "train", str(place / "experiment.yaml"), override)
    assert expected in message
    assert not (place / "runs").exists()


def test_loraplus_on_a_method_without_b_is_told(place, capsys):
    config = str(place / "experiment.yaml")
    message = refused(capsys, "train", config, "adapter={method: bitfit}", "optimization.loraplus_ratio=4")
    assert "bitfit has no factor B" in message
    assert not (place / "runs").exists()


DATA = {
    "broken CSV row": ("rows.csv", 'text,label\n"good,positive\nfilm,"neg"x"ative\n', "rows.csv"),
    "empty data set": ("rows.csv", "text,label\n", "rows.csv"),
    "empty file": ("rows.csv", "", "rows.csv"),
    "broken JSON line": ("rows.jsonl", '{"text": "good", "label": "p"}\n{"text": \n', "line 2"),
    "missing label": ("rows.csv", "text,label\ngood,positive\nbad,\n", "label"),
    "empty text": ("rows.csv", "text,label\n,positive\nbad,negative\n", "text"),
    "only one class": ("rows.csv", "text,label\n" + "good,positive\n" * 20, "class"),
    "unknown kind of file": ("rows.xyz", "text,label\n", ".xyz"),
}


@pytest.mark.parametrize("case", DATA)
def test_broken_data_are_told_with_their_file(place, capsys, case):
    name, text, expected = DATA[case]
    message = refused(capsys, "train", str(place / "experiment.yaml"), data_file(place, name, text))
    assert expected in message
    assert name in message
    assert not (place / "runs").exists()


def test_a_validation_label_that_training_does_not_know_is_told(place, capsys):
    (place / "validation.csv").write_text("text,label\ngood,great\n")
    message = refused(
        capsys, "train", str(place / "experiment.yaml"), f"data.validation={place / 'validation.csv'}"
    )
    assert "great" in message
    assert "validation.csv" in message


def test_a_missing_config_and_broken_yaml_are_told(place, capsys):
    assert "no file" in refused(capsys, "train", str(place / "nowhere.yaml"))
    (place / "broken.yaml").write_text("adapter: {method: lora")
    assert "is not valid YAML" in refused(capsys, "train", str(place / "broken.yaml"))


def test_an_output_that_is_a_file_is_told(place, capsys):
    (place / "taken").write_text("")
    message = refused(capsys, "train", str(place / "experiment.yaml"), f"output={place / 'taken'}")
    assert "is a file, not a folder" in message
    assert (place / "taken").read_text() == ""


def test_a_model_folder_with_pickled_weights_only_is_told(place, capsys):
    from lora_lab.models.build import ModelConfig, build_model

    build_model(ModelConfig(name="random:bert"), 2).config.save_pretrained(place / "model")
    torch.save({}, place / "model" / "pytorch_model.bin")
    message = refused(capsys, "train", str(place / "experiment.yaml"), f"model.name={place / 'model'}")
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    lines = ["text,label", *(f"{text},{label}" for text, label in ROWS * 5)]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    text = BASE.replace("OUTPUT", str(folder / "runs")).replace("TRAIN", str(folder / "train.csv"))
    (folder / "experiment.yaml").write_text(text)
    assert main(["train", str(folder / "experiment.yaml"), "run=one"]) == 0
    return folder


@pytest.fixture
def spoiled(finished, tmp_path) -> Path:
    """A copy of a finished run that a test may break."""
    shutil.copytree(finished / "runs" / "bad" / "one", tmp_path / "one")
    return tmp_path / "one"


def test_the_finished_run_evaluates(spoiled, capsys):
    record = json.loads((spoiled / "run.json").read_text())
    assert main(["evaluate", str(spoiled), "trainer.progress_bar=false"]) == 0
    assert f"{record['metrics']['validation/accuracy']:.4g}" in capsys.readouterr().out


def test_evaluating_what_is_no_run_is_told(place, capsys):
    assert "holds no run" in refused(capsys, "evaluate", str(place))


def test_evaluating_an_unfinished_run_is_told(spoiled, capsys):
    record = json.loads((spoiled / "run.json").read_text())
    (spoiled / "run.json").write_text(json.dumps({**record, "status": "running"}))
    assert "status is 'running'" in refused(capsys, "evaluate", str(spoiled))


def test_a_truncated_adapter_is_told(spoiled, capsys):
    path = spoiled / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert "is truncated or no safetensors file" in refused(capsys, "evaluate", str(spoiled))


def test_a_pickled_adapter_is_told(spoiled, capsys):
    (spoiled / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({}, spoiled / "adapter" / "adapter_model.bin")
    assert "a pickle, which can run code" in refused(capsys, "evaluate", str(spoiled))


def test_the_adapter_of_another_model_is_told(spoiled, capsys):
    assert "belongs to another model" in refused(
        capsys, "evaluate", str(spoiled), "model.config={hidden_size: 64}"
    )


def test_an_adapter_of_the_wrong_kind_of_numbers_is_told(spoiled, capsys):
    from safetensors.torch import load_file, save_file

    path = spoiled / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(path).items()}, path)
    assert "of type torch.int32" in refused(capsys, "evaluate", str(spoiled))


def test_a_run_of_another_config_under_the_same_name_is_told(finished, capsys):
    message = refused(capsys, "train", str(finished / "experiment.yaml"), "run=one", "adapter.rank=3")
    assert "holds a run of another config" in message


def test_an_unfinished_run_is_not_overwritten_silently(finished, capsys):
    shutil.copytree(finished / "runs" / "bad" / "one", finished / "runs" / "bad" / "two")
    record = finished / "runs" / "bad" / "two" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    message = refused(capsys, "train", str(finished / "experiment.yaml"), "run=two", "--no-resume")
    assert "Continue it with --resume, or --overwrite it" in message


def test_a_checkpoint_that_is_a_pickle_of_objects_is_told(finished, capsys):
    shutil.copytree(finished / "runs" / "bad" / "one", finished / "runs" / "bad" / "three")
    folder = finished / "runs" / "bad" / "three"
    record = folder / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    torch.save({"global_step": 3, "object": Path("x")}, folder / "checkpoints" / "last.ckpt")
    before = record.read_text()
    message = refused(capsys, "train", str(finished / "experiment.yaml"), "run=three")
    assert "last.ckpt: cannot be read" in message
    assert json.loads(before)["status"] == "running"


def test_overwriting_loses_nothing_when_the_new_run_cannot_start(finished, capsys):
    shutil.copytree(finished / "runs" / "bad" / "one", finished / "runs" / "bad" / "four")
    before = {path: path.read_bytes() for path in (finished / "runs" / "bad" / "four").glob("*.*")}
    config = str(finished / "experiment.yaml")
    refused(capsys, "train", config, "run=four", "--overwrite", "adapter.targets=[qery]")
    assert {path: path.read_bytes() for path in (finished / "runs" / "bad" / "four").glob("*.*")} == before


def test_an_unknown_method_to_describe_is_told(capsys):
    assert "did you mean 'dora'" in refused(capsys, "describe", "dorra")


def test_an_unknown_asset_is_told(capsys):
    assert "did you mean 'minilm'" in refused(capsys, "fetch", "minilmm")
