"""A run's rows of test examples give its test metrics again."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr

from lora_lab import compose, run

TASKS = {
    "sequence_classification": "files",
    "regression": "toy",
    "causal_lm": "files",
}


def experiment(tmp_path, task, *overrides):
    rows = pd.DataFrame({"text": [f"{'good' if i % 3 else 'bad'} {i * 7919}" for i in range(30)]})
    rows["label"] = ["yes" if i % 3 else "no" for i in range(30)]
    for name, part in {"train": rows[:12], "test": rows[12:25], "validation": rows[25:]}.items():
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    data = "{source: toy, size: 30, batch_size: 8, evaluation_batch_size: 7}"
    model, targets = "random:mlp", "all-linear"
    if task != "regression":
        files = ", ".join(f"{name}: {tmp_path / name}.csv" for name in ("train", "test", "validation"))
        label = ", label: label" if task == "sequence_classification" else ""
        data = f"{{source: files, {files}{label}, batch_size: 8, evaluation_batch_size: 5, max_length: 32}}"
        model, targets = (
            ("random:bert" if task == "sequence_classification" else "random:llama"),
            "[query, value]",
        )
    path = tmp_path / "experiment.yaml"
    path.write_text(
        f"model: {{name: {model}, task: {task}}}\ndata: {data}\n"
        f"adapter: {{method: lora, targets: {targets}}}\n"
        f"output: {tmp_path / 'runs'}\ntrainer: {{max_epochs: 1, progress_bar: false}}\n"
        "tracking: {wandb: disabled}\n"
    )
    return run(compose(path, overrides))


@pytest.mark.parametrize("task", TASKS)
def test_the_rows_give_the_metrics(tmp_path, task):
    result = experiment(tmp_path, task)
    rows = pd.read_parquet(result.folder.examples)
    metrics = result.record["metrics"]
    assert rows["id"].tolist() == list(range(30 if task == "regression" else 13))
    if task == "causal_lm":
        mean = (rows["loss"] * rows["tokens"]).sum() / rows["tokens"].sum()
        assert rows["tokens"].min() >= 1
        assert mean == pytest.approx(metrics["test/loss"], rel=1e-5)
        return
    assert rows["loss"].mean() == pytest.approx(metrics["test/loss"], rel=1e-5)
    if task == "regression":
        assert list(rows) == ["id", "label", "score", "loss"]
        assert pearsonr(rows["score"], rows["label"])[0] == pytest.approx(metrics["test/pearson"], abs=1e-4)
    else:
        assert list(rows) == ["id", "label", "prediction", "score", "loss"]
        assert (rows["label"] == rows["prediction"]).mean() == pytest.approx(metrics["test/accuracy"])
        # Of two classes the predicted one has the larger probability; the loss is of the label's.
        assert rows["score"].between(0.5, 1).all()
        right = rows[rows["label"] == rows["prediction"]]
        assert (-np.log(right["score"])).tolist() == pytest.approx(right["loss"].tolist(), abs=1e-5)


def test_an_example_has_its_id_whatever_the_batches(tmp_path):
    one = experiment(tmp_path, "sequence_classification", "run=one")
    two = experiment(tmp_path, "sequence_classification", "run=two", "data.evaluation_batch_size=2")
    first, second = (pd.read_parquet(result.folder.examples) for result in (one, two))
    assert first["label"].tolist() == second["label"].tolist()
    assert first["loss"].tolist() == pytest.approx(second["loss"].tolist(), rel=1e-4)


def test_they_can_be_left_out(tmp_path):
    result = experiment(tmp_path, "regression", "tracking.test_examples=false")
    assert not result.folder.examples.exists()
