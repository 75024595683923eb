import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchmetrics import MetricCollection
from torchmetrics.regression import MeanAbsoluteError

from lora_lab.adapters import LoRASpec, inject
from lora_lab.config import compose
from lora_lab.data import ToyConfig, build_data
from lora_lab.errors import ConfigError, DataError
from lora_lab.experiment import evaluate, run
from lora_lab.tasks import IGNORED, TASKS, Correlation
from lora_lab.testing import tiny_model
from lora_lab.training.module import FineTuner


def test_causal_loss_compares_each_position_with_the_next_token_and_skips_ignored_ones():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[1, 2, 3, IGNORED], [IGNORED, IGNORED, 5, 6]])
    task = TASKS["causal_lm"]
    pairs = [(0, 0, 2), (0, 1, 3), (1, 1, 5), (1, 2, 6)]
    by_hand = -sum(F.log_softmax(logits[row, at], dim=-1)[token] for row, at, token in pairs)
    assert task.total(*task.align(logits, labels)) == pytest.approx(by_hand.item(), rel=1e-6)
    assert task.count(task.align(logits, labels)[1]) == len(pairs)
    assert task.loss(*task.align(logits, labels)) == pytest.approx(by_hand.item() / len(pairs), rel=1e-6)


def test_perplexity_is_the_exponential_of_the_loss():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    task = TASKS["causal_lm"]
    metrics = task.metrics(1)
    metrics.update(*task.align(logits, labels))
    loss = task.loss(*task.align(logits, labels)).item()
    assert metrics.compute()["perplexity"].item() == pytest.approx(math.exp(loss), rel=1e-5)


def test_correlation_does_not_depend_on_how_processes_share_the_rows():
    """Each of three has one row, or two equal ones; torchmetrics' own class returns NaN."""
    x, y = (
        torch.tensor([[1.0, 1.0], [3.0, 3.0], [4.0, 4.0]]),
        torch.tensor([[2.0, 2.0], [1.0, 1.0], [5.0, 5.0]]),
    )
    for width in (1, 2):
        parts = [Correlation() for _ in x]
        for part, own, label in zip(parts, x[:, :width], y[:, :width], strict=True):
            part.update(own, label)
        joined = Correlation()
        for name in joined._defaults:  # as torchmetrics joins the states of processes
            setattr(joined, name, torch.stack([getattr(part, name) for part in parts]))
        expected = torch.corrcoef(torch.stack([x[:, :width].flatten(), y[:, :width].flatten()]))[0, 1]
        assert float(joined.compute()) == pytest.approx(float(expected), rel=1e-5)


def test_regression_compares_plain_columns():
    task = TASKS["regression"]
    predictions, labels = task.align(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]]))
    assert task.loss(predictions, labels) == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("name", TASKS)
def test_a_label_that_does_not_count_adds_nothing_and_has_no_gradient(name):
    torch.manual_seed(0)
    task = TASKS[name]
    logits = torch.randn({"classes": (3, 4), "numbers": (3, 1), "tokens": (3, 5, 4)}[task.labels])
    labels = {
        "classes": torch.tensor([2, 0, 1]),
        "numbers": torch.randn(3),
        "tokens": torch.randint(0, 4, (3, 5)),
    }[task.labels]
    whole = task.total(*task.align(logits[:2], labels[:2]))
    labels[2] = math.nan if task.labels == "numbers" else IGNORED
    logits.requires_grad_(True)
    pair = task.align(logits, labels)
    assert task.total(*pair).item() == pytest.approx(whole.item(), rel=1e-6)
    assert task.count(pair[1]) == task.count(task.align(logits[:2], labels[:2])[1]) > 0
    task.total(*pair).backward()
    assert logits.grad[2].abs().max() == 0 < logits.grad[:2].abs().max()
    nothing = task.align(logits[2:], labels[2:])
    assert task.loss(*nothing) == 0 == task.count(nothing[1])


def test_evaluation_weighs_each_batch_by_its_labels_that_count():
    model = tiny_model("gpt2")
    module = FineTuner(model, inject(model, LoRASpec()), "causal_lm")
    ids = torch.randint(5, 100, (2, 6))
    labels = ids.clone()
    labels[0, 2:] = IGNORED  # one token to predict in the first batch, five in the second
    metrics = module.new_metrics()
    for row in (0, 1):
        module.evaluate({"input_ids": ids[[row]], "labels": labels[[row]]}, metrics)
    chances = F.log_softmax(model(input_ids=ids).logits, dim=-1)
    pairs = [(0, 0), *((1, at) for at in range(5))]
    by_hand = -sum(chances[row, at, ids[row, at + 1]] for row, at in pairs) / len(pairs)
    assert module.results(metrics)["loss"].item() == pytest.approx(by_hand.item(), rel=1e-6)


CONFIG = """
name: tasks
model: {name: "random:mlp", task: TASK}
data: {source: toy, target: product, size: 32, batch_size: 16}
adapter: {method: lora, rank: 2, targets: [layer1]}
trainer: {max_epochs: 1, progress_bar: false}
tracking: {wandb: disabled}
"""


def composed(folder, task):
    path = folder / "experiment.yaml"
    path.write_text(CONFIG.replace("TASK", task))
    return compose(path, [f"output={folder}"])


def test_a_task_is_added_by_one_entry(tmp_path, monkeypatch):
    added = replace(
        TASKS["regression"],
        name="absolute_regression",
        total=lambda values, labels: F.l1_loss(values, labels, reduction="sum"),
        metrics=lambda classes: MetricCollection({"mae": MeanAbsoluteError()}),
        monitor="mae",
    )
    monkeypatch.setitem(TASKS, added.name, added)
    result = run(composed(tmp_path, added.name))
    metrics = result.record["metrics"]
    assert metrics["validation/loss"] == pytest.approx(metrics["validation/mae"], rel=1e-6)
    assert result.record["best_value"] == metrics["validation/mae"]
    assert evaluate(result.folder.path)["test/mae"] == pytest.approx(metrics["test/mae"], rel=1e-6)


def test_an_unknown_task_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(ConfigError, match="model.task: no task 'regresion'; did you mean 'regression'?"):
        composed(tmp_path, "regresion")
    with pytest.raises(DataError, match="task: no task 'regresion'; did you mean 'regression'?"):
        build_data(ToyConfig(), None, "regresion", 0)
