"""Norms of sums and products that are never formed."""

import torch

from lora_lab.linalg.norms import product_norm, squared_row_norms


def test_norm_from_products_is_the_norm_of_the_sum():
    weight, left, right = torch.randn(9, 7), torch.randn(9, 3), torch.randn(3, 7)
    given = squared_row_norms(weight, weight.square().sum(1), left, right)
    torch.testing.assert_close(given, (weight + left @ right).square().sum(1))


def test_norm_of_a_product_is_frobenius_and_flat_at_zero():
    left, right = torch.randn(9, 3), torch.randn(3, 7)
    torch.testing.assert_close(product_norm(left, right), torch.linalg.matrix_norm(left @ right))
    right = torch.zeros(3, 7, requires_grad=True)
    norm = product_norm(left, right)
    norm.backward()
    assert norm == 0
    assert torch.equal(right.grad, torch.zeros(3, 7))
