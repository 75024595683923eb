"""Norms of sums and products that are never formed."""

import torch

from lora_lab.linalg.norms import edited_row_norms, product_norm


def test_norms_from_products_are_the_norms_of_the_sum():
    weight, left, right = torch.randn(9, 7), torch.randn(9, 3), torch.randn(3, 7)
    given = edited_row_norms(weight.square().sum(1), weight @ right.T, left, right @ right.T)
    torch.testing.assert_close(given, torch.linalg.vector_norm(weight + left @ right, dim=1))


def test_edits_along_orthonormal_rows_need_no_gram_matrix():
    weight, left = torch.randn(9, 7), torch.randn(9, 3)
    V = torch.linalg.qr(torch.randn(7, 3)).Q
    given = edited_row_norms(weight.square().sum(1), weight @ V, left)
    torch.testing.assert_close(given, torch.linalg.vector_norm(weight + left @ V.T, dim=1))
    assert edited_row_norms(torch.zeros(1), torch.zeros(1, 3), torch.zeros(1, 3)) == 1e-12


def test_norm_of_a_product_is_frobenius_and_flat_at_zero():
    left, right = torch.randn(9, 3), torch.randn(3, 7)
    torch.testing.assert_close(product_norm(left, right), torch.linalg.matrix_norm(left @ right))
    right = torch.zeros(3, 7, requires_grad=True)
    norm = product_norm(left, right)
    norm.backward()
    assert norm == 0
    assert torch.equal(right.grad, torch.zeros(3, 7))
