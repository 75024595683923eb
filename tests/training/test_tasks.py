import math

import pytest
import torch
import torch.nn.functional as F

from lora_lab.data.config import IGNORED
from lora_lab.training.tasks import TASKS


def test_causal_loss_compares_each_position_with_the_next_token_and_skips_ignored_ones():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[1, 2, 3, IGNORED], [IGNORED, IGNORED, 5, 6]])
    task = TASKS["causal_lm"]
    pairs = [(0, 0, 2), (0, 1, 3), (1, 1, 5), (1, 2, 6)]
    by_hand = -sum(F.log_softmax(logits[row, at], dim=-1)[token] for row, at, token in pairs) / len(pairs)
    assert task.loss(*task.align(logits, labels)) == pytest.approx(by_hand.item(), rel=1e-6)


def test_perplexity_is_the_exponential_of_the_loss():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    task = TASKS["causal_lm"]
    metrics = task.metrics(1)
    metrics.update(*task.align(logits, labels))
    loss = task.loss(*task.align(logits, labels)).item()
    assert metrics.compute()["perplexity"].item() == pytest.approx(math.exp(loss), rel=1e-5)


def test_regression_compares_plain_columns():
    task = TASKS["regression"]
    predictions, labels = task.align(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]]))
    assert task.loss(predictions, labels) == pytest.approx((1 + 4) / 2)
