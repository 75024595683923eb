import pytest
import torch
from peft.tuners.oft.layer import OFTRotationModule

from lora_lab.linalg.orthogonal import (
    cayley,
    cayley_change,
    cayley_neumann,
    orthonormal_columns,
    overlap,
    reflect_chain,
    rotate_blocks,
    skew,
    unit_columns,
)
from lora_lab.linalg.rebuild import PIECE


def dense_chain(u: torch.Tensor) -> torch.Tensor:
    """R = H_1 H_2 … H_k, one reflection after the other."""
    R = torch.eye(u.shape[0], dtype=u.dtype)
    for column in u.T:
        unit = column / column.norm()
        R = R @ (torch.eye(u.shape[0], dtype=u.dtype) - 2 * torch.outer(unit, unit))
    return R


@pytest.mark.parametrize("k", [1, 2, 7, 8])
def test_chain_equals_one_reflection_after_the_other(k):
    u, x = torch.randn(6, k, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    R = dense_chain(u)
    torch.testing.assert_close(reflect_chain(x, u), x @ R.T)
    torch.testing.assert_close(reflect_chain(x, u.flip(1)), x @ R)
    torch.testing.assert_close(reflect_chain(x[0, 0], u), x[0, 0] @ R.T)


@pytest.mark.parametrize("k", [1, 2, 7, 8])
def test_chain_is_orthogonal_of_low_rank_and_of_alternating_determinant(k):
    R = reflect_chain(torch.eye(12), torch.randn(12, k)).T.double()
    torch.testing.assert_close(R @ R.T, torch.eye(12, dtype=torch.float64), atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(R - torch.eye(12), atol=1e-5) <= k
    assert torch.linalg.det(R).item() == pytest.approx((-1) ** k, abs=1e-5)


def test_worked_chain():
    u = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    R = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(reflect_chain(torch.eye(4), u).T, R)


def test_equal_neighbours_cancel():
    u = torch.randn(32, 4).repeat_interleave(2, dim=1)
    x = torch.randn(10, 32)
    torch.testing.assert_close(reflect_chain(x, u), x, atol=1e-6, rtol=0)


def test_zero_vectors_reflect_nothing_and_have_finite_gradients():
    u = torch.randn(6, 3)
    with_zero = torch.cat([u[:, :1], torch.zeros(6, 1), u[:, 1:]], dim=1).requires_grad_()
    x = torch.randn(5, 6)
    found = reflect_chain(x, with_zero)
    torch.testing.assert_close(found, reflect_chain(x, u))
    found.square().mean().backward()
    assert with_zero.grad.isfinite().all()


def test_length_of_the_vectors_does_not_count():
    u, x = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(reflect_chain(x, u * torch.tensor([1e-3, 1, 1e3])), reflect_chain(x, u))


def test_chain_keeps_the_type_of_its_rows():
    u, x = torch.randn(6, 4), torch.randn(5, 6)
    expected = reflect_chain(x, u)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reflect_chain(x, u), expected)
    found = reflect_chain(x.bfloat16(), u)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=0)


def test_gradients():
    u = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reflect_chain, (x, u))
    assert torch.autograd.gradcheck(orthonormal_columns, (u,))
    assert torch.autograd.gradcheck(unit_columns, (u,))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_orthonormal_columns_are_those_of_gram_schmidt(k):
    u = torch.randn(6, k, dtype=torch.float64)
    expected = []
    for column in u.T:
        for former in expected:
            column = column - (former @ column) * former
        expected.append(column / column.norm())
    torch.testing.assert_close(orthonormal_columns(u), torch.stack(expected, dim=1))


def test_orthonormal_columns_are_left_alone():
    Q = torch.linalg.qr(torch.randn(32, 8)).Q
    torch.testing.assert_close(orthonormal_columns(Q), Q, atol=1e-6, rtol=0)
    assert orthonormal_columns(Q.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert orthonormal_columns(Q).dtype == torch.float32


def test_overlap_is_zero_for_orthogonal_columns_of_any_length():
    Q = orthonormal_columns(torch.randn(12, 3, dtype=torch.float64))
    assert overlap(Q * torch.tensor([1.0, 10, 0.1])).item() == pytest.approx(0, abs=1e-7)
    u = torch.randn(12, 3)
    cosines = torch.nn.functional.cosine_similarity(u[:, :, None], u[:, None], dim=0)
    expected = (cosines - torch.eye(3)).norm()
    torch.testing.assert_close(overlap(u), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(overlap(u), expected)


def test_skew_fills_rows_above_the_diagonal():
    expected = torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]])
    assert torch.equal(skew(torch.tensor([[1.0, 2, 3]]), 3), expected[None])


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_cayley_is_the_rotation_of_the_closed_form(size):
    Q = skew(torch.randn(5, size * (size - 1) // 2, dtype=torch.float64), size)
    identity = torch.eye(size, dtype=torch.float64)
    R = cayley(Q)
    torch.testing.assert_close(R, (identity - Q) @ torch.linalg.inv(identity + Q))
    torch.testing.assert_close(R @ R.mT, identity.expand_as(R))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(cayley(-Q), R.mT)


@pytest.mark.parametrize("size", [4, 64, 256])
def test_cayley_is_orthogonal_in_single_precision_and_under_autocast(size):
    Q = skew(torch.randn(2, size * (size - 1) // 2), size)
    with torch.autocast("cpu", torch.bfloat16):
        R = cayley(Q)
        polynomial = cayley_neumann(Q / size, 5)
    assert (R @ R.mT - torch.eye(size)).abs().max() < 1e-5
    assert torch.equal(R, cayley(Q))
    assert torch.equal(polynomial, cayley_neumann(Q / size, 5))
    assert cayley(Q.bfloat16()).dtype == torch.float32


def test_cayley_turns_by_twice_the_arc_tangent():
    q = torch.tensor(0.7, dtype=torch.float64)
    angle = 2 * torch.atan(q)
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    torch.testing.assert_close(cayley(skew(q[None], 2)), expected)


@pytest.mark.parametrize("terms", range(1, 9))
def test_neumann_polynomial_is_pefts(terms):
    q = 0.3 * torch.randn(3, 10)
    reference = OFTRotationModule(3, 10, 5, 15, num_cayley_neumann_terms=terms)
    expected = reference._cayley_batch(q, 5, True, terms)
    torch.testing.assert_close(cayley_neumann(skew(q, 5), terms), expected)


@pytest.mark.parametrize(
    ("terms", "error"), [(3, 6.4e-5), (4, 6.4e-5), (5, 3.2e-3), (6, 1.02e-7), (8, 1.6e-10)]
)
def test_neumann_polynomial_is_off_by_the_powers_told(terms, error):
    R = cayley_neumann(skew(torch.tensor([0.2], dtype=torch.float64), 2), terms)
    found = torch.linalg.matrix_norm(R @ R.T - torch.eye(2), 2)
    assert found.item() == pytest.approx(error, rel=0.05)


def test_rotated_blocks_are_a_product_with_the_block_diagonal():
    R, x = torch.randn(3, 4, 4), torch.randn(2, 5, 12)
    torch.testing.assert_close(rotate_blocks(x, R), x @ torch.block_diag(*R))
    torch.testing.assert_close(rotate_blocks(x.mT.contiguous().mT, R), x @ torch.block_diag(*R))
    torch.testing.assert_close(rotate_blocks(x[0, 0], R[:1]), x[0, 0] @ torch.block_diag(R[0], R[0], R[0]))
    torch.testing.assert_close(rotate_blocks(x[0].T.contiguous().T, R[:1]), rotate_blocks(x[0], R[:1]))
    assert rotate_blocks(x.bfloat16(), R).dtype == torch.bfloat16


@pytest.mark.parametrize("blocks", [1, 2, 24])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_of_rotated_blocks_are_those_of_a_product_with_the_block_diagonal(blocks, wanted):
    x, R = torch.randn(2, 150, 768).double(), torch.randn(blocks, 768 // blocks, 768 // blocks).double()
    x, R = x.requires_grad_(wanted[0]), R.requires_grad_(wanted[1])
    given = [tensor for tensor in (x, R) if tensor.requires_grad]
    direction = torch.randn(2, 150, 768).double()
    assert x.numel() > PIECE
    found = torch.autograd.grad(rotate_blocks(x, R), given, direction)
    expected = torch.autograd.grad(x @ torch.block_diag(*R), given, direction)
    torch.testing.assert_close(found, expected)


def test_blocks_are_rotated_in_autocasts_precision_forward_and_backward():
    x, R = torch.randn(5, 12, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = rotate_blocks(x, R)
        assert y.dtype == torch.bfloat16
        assert rotate_blocks(x.double(), R).dtype == torch.float64
    y.sum().backward()
    expected = torch.autograd.grad((x @ torch.block_diag(*R)).sum(), (x, R))
    torch.testing.assert_close((x.grad, R.grad), expected, atol=3e-2, rtol=3e-2)


def test_gradients_of_rotations():
    Q = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)  # of any matrix, skew or not
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cayley, (Q,))
    for terms in (2, 3, 5, 8):
        assert torch.autograd.gradcheck(lambda Q, terms=terms: cayley_neumann(Q, terms), (Q,))
    assert torch.autograd.gradcheck(cayley_change, (Q,))
    assert torch.autograd.gradcheck(rotate_blocks, (x, Q))
    assert torch.autograd.gradcheck(rotate_blocks, (x, Q[:1]))
    assert torch.autograd.gradcheck(
        lambda upper: skew(upper, 4), (torch.randn(2, 6).double().requires_grad_(),)
    )
