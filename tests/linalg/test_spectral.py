"""The principal part of a matrix, exact and randomised."""

import torch

from lora_lab.linalg.spectral import principal_part


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
