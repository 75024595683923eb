"""Parts of a matrix by singular values, exact and randomised, and edits of the values."""

import pytest
import torch

from lora_lab.linalg.spectral import edited_row_norms, principal_part, rectified, singular_triplets


def test_exact_principal_part_is_the_best_approximation_of_its_rank():
    weight = torch.randn(9, 7, dtype=torch.float64)
    U, S, Vh = principal_part(weight, 3)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(S, values[:3])
    torch.testing.assert_close(torch.linalg.svdvals(weight - U * S @ Vh)[:4], values[3:])


def test_power_iterations_bring_the_randomised_svd_to_the_exact_one():
    torch.manual_seed(0)
    weight = torch.randn(60, 40)
    exact = torch.linalg.svdvals(weight)[:6]
    errors = []
    for niter in (0, 2, 16):
        torch.manual_seed(1)
        U, S, Vh = principal_part(weight, 6, niter)
        torch.testing.assert_close(U.T @ U, torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(Vh @ Vh.T, torch.eye(6), atol=1e-5, rtol=0)
        assert (S <= exact * (1 + 1e-5)).all()
        errors.append(float((S - exact).abs().max() / exact.max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize("shape", [(7, 7), (9, 5), (5, 9)])
def test_triplets_are_those_asked_for_and_have_one_sign(shape):
    weight = torch.randn(shape)
    U, S, Vh = singular_triplets(weight, torch.tensor([0, 1, 4]))
    torch.testing.assert_close(S, torch.linalg.svdvals(weight)[[0, 1, 4]])
    torch.testing.assert_close(weight @ Vh.T, U * S, atol=1e-5, rtol=0)
    torch.testing.assert_close(weight.T @ U, Vh.T * S, atol=1e-5, rtol=0)
    greatest = Vh.abs().argmax(1)
    assert (Vh[torch.arange(3), greatest] > 0).all()
    for flipped, one in zip(singular_triplets(-weight, torch.tensor([0, 1, 4]))[1:], (S, Vh), strict=True):
        torch.testing.assert_close(flipped, one)


def test_head_and_tail_of_half_the_values_each_make_the_matrix():
    weight = torch.randn(100, 200)
    head, tail = (singular_triplets(weight, torch.arange(first, first + 50)) for first in (0, 50))
    parts = [U @ S.diag() @ Vh for U, S, Vh in (head, tail)]
    torch.testing.assert_close(parts[0] + parts[1], weight, atol=2e-5, rtol=0)


def test_triplets_of_half_precision_are_float32_under_autocast_too():
    weight = torch.randn(6, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        U, S, Vh = singular_triplets(weight, torch.arange(4))
    assert {U.dtype, S.dtype, Vh.dtype} == {torch.float32}
    torch.testing.assert_close(U * S @ Vh, weight.float(), atol=1e-5, rtol=0)


def test_rectified_change_stops_where_the_sum_would_fall_below_zero():
    start, change = torch.tensor([3.0, 2, 0, 0]), torch.tensor([-1.0, -5, 0, -1])
    assert torch.equal(rectified(change, start), torch.tensor([-1.0, -2, 0, 0]))


def test_edited_row_norms_are_the_norms_of_the_sum():
    weight, left = torch.randn(9, 7), torch.randn(9, 3)
    V = torch.linalg.qr(torch.randn(7, 3)).Q
    given = edited_row_norms(weight.square().sum(1), weight @ V, left)
    torch.testing.assert_close(given, torch.linalg.vector_norm(weight + left @ V.T, dim=1))
    assert edited_row_norms(torch.zeros(1), torch.zeros(1, 3), torch.zeros(1, 3)) == 1e-12
