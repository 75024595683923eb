"""LoKr: the worked example, how sides are split, counts, sizes and refusals."""

import warnings

import pytest
import torch
from peft.tuners.lokr.layer import factorization as pefts_factorization
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lokr import LoKr, LoKrSpec, factorization
from lora_lab.errors import ConfigError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, relative, shake

test_contract = contract(
    LoKr,
    Variant("", {"rank": 1, "alpha": 2.0}, trained=4 * 4 + 1 * (4 + 6)),
    Variant("both", {"rank": 1, "decompose_both": True}, trained=1 * (4 + 4) + 1 * (4 + 6)),
    Variant("whole", {"rank": 64, "decompose_factor": 3}, trained=2 * 3 + 8 * 8),
    Variant("lycoris", {"rank": 1, "init": "lycoris"}),
    Variant("random", {"rank": 1, "init": "random"}, start="other"),
)


EXACT = 1e-12  # float64


def adapt(model, **options):
    adapters = inject(model, LoKrSpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_worked_example_gives_the_printed_weights():
    """W1 = [[1]] and W2 = A B, which for a column A and a row B is their Kronecker product."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False, dtype=torch.float64))
    lokr, _ = adapt(model, rank=1, alpha=1.0, decompose_factor=1)
    A, B = double([[0.1], [0.2]]), double([[1.0, 1.1, 1.2, 1.3]])
    with torch.no_grad():
        lokr.base.weight.copy_(double([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
        lokr.w1.fill_(1)
        lokr.w2_a.copy_(A)
        lokr.w2_b.copy_(B)
    delta = double([[0.1, 0.11, 0.12, 0.13], [0.2, 0.22, 0.24, 0.26]])
    torch.testing.assert_close(torch.kron(A, B), delta, atol=EXACT, rtol=0)
    torch.testing.assert_close(lokr.delta_weight(), delta, atol=EXACT, rtol=0)
    update = model(torch.eye(4, dtype=torch.float64)) - lokr.base.weight.T
    torch.testing.assert_close(update, delta.T, atol=EXACT, rtol=0)
    # The printed example goes on with a dense C (out, in), entrywise, which is no longer LoKr.
    C = double([[0.9, 1.1, 0.8, 1.2], [1, 0.9, 1.1, 0.7]])
    printed = double([[1.09, 2.121, 3.096, 4.156], [5.2, 6.198, 7.264, 8.182]])
    torch.testing.assert_close(lokr.base.weight + C * lokr.delta_weight(), printed, atol=EXACT, rtol=0)


@pytest.mark.parametrize("options", [{}, {"rank": 12}, {"decompose_both": True, "rank": 1}])
def test_update_is_torchs_kronecker_product(options):
    lokr, adapters = adapt(linear(dtype=torch.float64), **{"rank": 2, "alpha": 3.0, **options})
    shake(adapters, 0.3)
    W1 = lokr.w1 if lokr.w1 is not None else lokr.w1_a @ lokr.w1_b
    W2 = lokr.w2 if lokr.w2 is not None else lokr.w2_a @ lokr.w2_b
    assert W1.shape == (4, 4)
    assert W2.shape == (4, 6)
    assert relative(lokr.delta_weight(), 3 / lokr.spec.rank * torch.kron(W1, W2)) < EXACT


@pytest.mark.parametrize(
    ("dimension", "factor", "pair"),
    [
        (127, -1, (1, 127)),
        (128, -1, (8, 16)),
        (250, -1, (10, 25)),
        (360, -1, (18, 20)),
        (768, -1, (24, 32)),
        (1024, -1, (32, 32)),
        (4096, -1, (64, 64)),
        (11008, -1, (86, 128)),
        (128, 16, (16, 8)),  # a divisor is taken as it is
        (128, 4, (4, 32)),
        (360, 7, (6, 60)),
        (1, -1, (1, 1)),
    ],
)
def test_sides_are_split_as_in_the_table(dimension, factor, pair):
    assert factorization(dimension, factor) == pair


def test_sides_are_split_as_in_peft():
    for dimension in range(1, 200):
        for factor in (-1, *range(1, 40)):
            assert factorization(dimension, factor) == pefts_factorization(dimension, factor)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"rank": 1}, 26),
        ({"rank": 1, "decompose_both": True}, 18),
        ({"rank": 2, "decompose_both": True}, 4 * 4 + 2 * 10),
        ({"rank": 3}, 4 * 4 + 4 * 6),  # a rank of half the larger side is not a saving
        ({"rank": 1, "decompose_factor": 2}, 2 * 2 + 1 * (8 + 12)),
    ],
)
def test_count_of_trained_numbers_is_the_formulas(options, count):
    assert adapt(linear(), **options)[1].trainable_count() == count


def test_first_factor_is_decomposed_below_half_its_greater_side_alone():
    assert adapt(linear(36, 16), rank=3, decompose_both=True)[0].w1.shape == (6, 4)
    lokr, _ = adapt(linear(36, 16), rank=2, decompose_both=True)
    assert (lokr.w1_a.shape, lokr.w1_b.shape) == ((6, 2), (2, 4))


def test_convolution_keeps_its_kernel_in_the_second_factor():
    model = nn.Sequential(nn.Conv2d(6, 8, (3, 2)))
    assert adapt(model, rank=9)[0].w2.shape == (4, 3, 3, 2)
    lokr, _ = adapt(nn.Sequential(nn.Conv2d(6, 8, (3, 2))), rank=1)
    assert (lokr.w2_a.shape, lokr.w2_b.shape) == ((4, 1), (1, 18))
    lokr, _ = adapt(nn.Sequential(nn.Conv1d(6, 8, 3)), rank=1, use_effective_conv2d=True)
    assert (lokr.w2_a.shape, lokr.w2_b.shape, lokr.t2.shape) == ((1, 4), (1, 3), (1, 1, 3, 1))


def test_sides_without_a_divisor_are_told_once():
    model = nn.ModuleDict({"one": nn.Linear(7, 13), "two": nn.Linear(13, 7), "three": nn.Linear(7, 12)})
    with pytest.warns(
        UserWarning, match="-1 splits no side of one, two: there W1 is a single number"
    ) as told:
        inject(model, LoKrSpec(targets=["one", "two", "three"], rank=2))
    assert len(told) == 1


@pytest.mark.parametrize(("sides", "factor"), [((7, 13), 1), ((7, 12), -1), ((8, 12), 2)])
def test_sides_that_are_split_or_meant_whole_are_not_told(sides, factor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(linear(*sides), rank=2, decompose_factor=factor)


@pytest.mark.parametrize("factor", [0, -2])
def test_faulty_factors_are_refused(factor):
    with pytest.raises(
        ConfigError, match=f"adapter.decompose_factor: must be at least 1, or -1; got {factor}"
    ):
        adapt(linear(), decompose_factor=factor)
