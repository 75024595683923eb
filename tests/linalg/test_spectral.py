"""Parts of a matrix by singular values, choices and edits of them, and rotations among the directions."""

import math

import pytest
import torch

from lora_lab.linalg.orthogonal import cayley_change, neumann_change, positive_qr, skew
from lora_lab.linalg.spectral import (
    contrastive_directions,
    fixed_signs,
    paired_svd,
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


def test_fixed_signs_forget_which_signs_a_decomposition_chose():
    U, S, Vh = principal_part(torch.randn(6, 9, dtype=torch.float64), 5)
    fixed = fixed_signs(U, Vh)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    again = fixed_signs(U * signs, Vh * signs.unsqueeze(1))
    for one, other in zip(fixed, again, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(fixed[0] * S @ fixed[1], U * S @ Vh)
    assert all(row[row.abs().argmax()] > 0 for row in fixed[1])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("seed", range(5))
def test_contrastive_directions_are_the_union_filled_up_by_the_best(count, seed):
    scores = torch.rand(3, 12, generator=torch.Generator().manual_seed(seed))
    if seed == 0:
        scores[2] = scores[1] = scores[0]  # they overlap entirely
    third = count // 3
    expected: set[int] = set()
    for kind, share in zip(scores.tolist(), (third, third, count - 2 * third), strict=True):
        expected |= set(sorted(range(12), key=lambda i: -kind[i])[:share])  # noqa: B023
    rest = sorted(set(range(12)) - expected, key=lambda i: -max(scores[:, i].tolist()))
    expected |= set(rest[: count - len(expected)])
    assert contrastive_directions(*scores, count).tolist() == sorted(expected)


def test_skew_is_filled_by_rows_of_its_upper_triangle():
    Q = skew(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), 3)
    assert Q[0].tolist() == [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]
    assert Q[1].tolist() == [[0, 4, 5], [-4, 0, 6], [-5, -6, 0]]


@pytest.mark.parametrize(("size", "tolerance"), [(4, 1e-6), (256, 1e-5), (1024, 1e-5)])
def test_cayley_map_is_orthogonal_and_its_inverse_belongs_to_the_negative(size, tolerance):
    Q, identity = skew(0.1 * torch.randn(size * (size - 1) // 2), size), torch.eye(size)
    R, back = cayley_change(Q) + identity, cayley_change(-Q) + identity
    torch.testing.assert_close(R @ R.T, identity, atol=tolerance, rtol=0)
    torch.testing.assert_close(R.T, back, atol=tolerance, rtol=0)
    assert not cayley_change(0 * Q).any()


def test_cayley_map_of_a_plane_turns_by_twice_the_arcus_tangent():
    for q in (0.5, -0.25, 3.0):
        R = cayley_change(skew(torch.tensor([q], dtype=torch.float64), 2)) + torch.eye(2)
        angle = 2 * math.atan(q)
        expected = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        torch.testing.assert_close(R, torch.tensor(expected, dtype=torch.float64))


def test_cayley_map_keeps_its_digits_for_tiny_angles():
    Q = skew(1e-6 * torch.randn(6), 4)
    exact = torch.linalg.solve((torch.eye(4) - Q).double(), 2 * Q.double())
    torch.testing.assert_close(cayley_change(Q).double(), exact, rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize(("terms", "power"), [(3, 3), (4, 3), (5, 4), (6, 5), (7, 6), (8, 7)])
def test_polynomial_is_a_truncated_series_with_one_half_of_its_last_term(terms, power):
    Q, identity = skew(0.1 * torch.randn(10, dtype=torch.float64), 5), torch.eye(5, dtype=torch.float64)
    series = sum(torch.linalg.matrix_power(Q, k) for k in range(power))
    torch.testing.assert_close(neumann_change(Q, terms) + identity, (identity + Q) @ series)


def test_shortest_polynomials_are_the_identity_and_a_straight_line():
    Q = skew(torch.randn(6), 4)
    assert not neumann_change(Q, 1).any()
    assert torch.equal(neumann_change(Q, 2), 2 * Q)


def test_polynomials_are_as_far_from_orthogonal_as_is_told():
    Q = skew(torch.tensor([0.2], dtype=torch.float64), 2)  # of spectral norm 0.2
    errors = {}
    for terms in (4, 5, 6):
        R = neumann_change(Q, terms) + torch.eye(2)
        errors[terms] = float((R @ R.T - torch.eye(2)).abs().max())
    assert errors[4] == pytest.approx(6e-5, rel=0.1)
    assert errors[5] == pytest.approx(3.2e-3, rel=0.05)
    assert errors[6] == pytest.approx(1e-7, rel=0.1)
