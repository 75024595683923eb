"""The principal part of a matrix, exact and randomised; choices of directions, and rotations among them."""

import math

import pytest
import torch

from lora_lab.linalg.spectral import (
    cayley_change,
    contrastive_directions,
    neumann_change,
    principal_part,
    skew,
    with_fixed_signs,
)


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


def test_fixed_signs_forget_which_signs_a_decomposition_chose():
    U, S, Vh = principal_part(torch.randn(6, 9, dtype=torch.float64), 5)
    fixed = with_fixed_signs(U, Vh)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    again = with_fixed_signs(U * signs, Vh * signs.unsqueeze(1))
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
