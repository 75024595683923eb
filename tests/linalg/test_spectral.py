"""Parts of a matrix by singular values, edits of the values, and the spectrum of a product not formed."""

import pytest
import torch

from lora_lab.linalg.spectral import (
    edited_row_norms,
    paired_svd,
    positive_qr,
    principal_part,
    rectified,
    singular_triplets,
)

EXACT = {"rtol": 0, "atol": 1e-12}


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


@pytest.mark.parametrize("shapes", [((9, 4), (7, 4)), ((2, 9, 4), (2, 4, 4))])
def test_a_product_is_decomposed_without_being_formed(shapes):
    A, B = (torch.randn(shape) for shape in shapes)
    U, M, V, N = paired_svd(A, B)
    wide_A, wide_B = A.double(), B.double()
    identity = torch.eye(4, dtype=torch.float64).expand(*A.shape[:-2], 4, 4)
    torch.testing.assert_close(U.mT @ U, identity, **EXACT)
    torch.testing.assert_close(V.mT @ V, identity, **EXACT)
    torch.testing.assert_close(U @ M, wide_A, **EXACT)
    torch.testing.assert_close(V @ N, wide_B, **EXACT)
    values = torch.linalg.svdvals(wide_A @ wide_B.mT)[..., :4]
    torch.testing.assert_close(M @ N.mT, values.diag_embed(), **EXACT)
    assert (V.gather(-2, V.abs().argmax(-2, keepdim=True)) > 0).all()


def test_no_sign_of_a_basis_is_left_open():
    """A = diag(3, 2, 1), B = −I: V = I, so U = −I, M = −A and N = −I."""
    values, one = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double(), torch.eye(3).double()
    for found, expected in zip(paired_svd(values, -one), (-one, -values, one, -one), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_singular_factor_still_has_orthonormal_bases():
    U, M, V, _ = paired_svd(torch.zeros(6, 3), torch.randn(5, 3))
    for basis in (U, V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64), **EXACT)
    assert not M.any()


def test_qr_with_a_positive_diagonal_is_the_cholesky_factor():
    A = torch.randn(2, 9, 4, dtype=torch.float64)
    Q, R = positive_qr(A)
    torch.testing.assert_close(R, torch.linalg.cholesky(A.mT @ A, upper=True), **EXACT)
    torch.testing.assert_close(Q @ R, A, **EXACT)
