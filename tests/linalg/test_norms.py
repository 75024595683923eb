"""Norms of sums that are never formed."""

import torch

from lora_lab.linalg.norms import squared_row_norms


def test_norm_from_products_is_the_norm_of_the_sum():
    weight, left, right = torch.randn(9, 7), torch.randn(9, 3), torch.randn(3, 7)
    given = squared_row_norms(weight, weight.square().sum(1), left, right)
    torch.testing.assert_close(given, (weight + left @ right).square().sum(1))
