import math

import pytest
import torch

from lora_lab.linalg.rank import (
    effective_rank,
    product_singular_values,
    stable_rank,
    widened,
    zero_fraction,
)


def test_widening_leaves_wide_types_alone():
    assert widened(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert widened(torch.ones(1, dtype=torch.float16)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        tensor = torch.ones(1, dtype=dtype)
        assert widened(tensor) is tensor


@pytest.mark.parametrize(("rows", "rank", "columns"), [(9, 3, 7), (7, 3, 9), (4, 6, 5), (1, 1, 1)])
def test_singular_values_of_a_product_are_those_of_the_formed_product(rows, rank, columns):
    left = torch.randn(rows, rank, dtype=torch.float64)
    right = torch.randn(rank, columns, dtype=torch.float64)
    found = product_singular_values(left, right)
    assert len(found) == min(rows, rank, columns)
    torch.testing.assert_close(found, torch.linalg.svdvals(left @ right)[: len(found)])


def test_singular_values_of_half_precision_factors():
    left, right = torch.randn(9, 3).bfloat16(), torch.randn(3, 7).bfloat16()
    expected = torch.linalg.svdvals(left.float() @ right.float())[:3]
    torch.testing.assert_close(product_singular_values(left, right), expected)


def test_effective_rank_counts_equal_singular_values():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 2.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_rank(torch.tensor([1.0, 1e-12])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_effective_rank_is_the_exponential_of_the_entropy():
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(entropy))


def test_stable_rank():
    assert stable_rank(torch.tensor([2.0, 2.0])) == pytest.approx(2)
    assert stable_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.25)
    assert stable_rank(torch.zeros(3)) == 0
    assert stable_rank(torch.zeros(0)) == 0


def test_ranks_do_not_depend_on_the_scale():
    values = torch.tensor([3.0, 2.0, 0.5])
    for rank in (effective_rank, stable_rank):
        assert rank(values) == pytest.approx(rank(1000 * values))


def test_zero_fraction():
    assert zero_fraction(torch.tensor([0.0, -0.0, 1.0, 2.0])) == 0.5
    assert zero_fraction(torch.zeros(0)) == 0
