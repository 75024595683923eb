import pytest
import torch

from lora_lab.linalg.orthogonal import orthonormal_columns, overlap, reflect_chain, unit_columns


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
