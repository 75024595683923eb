"""SALT: the worked example, its spectrum, what the clamps do, what is stored, refusals."""

import math

import pytest
import torch
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.salt import SALT, SALTSpec
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, relative, shake

test_contract = contract(
    SALT,
    Variant("", {"rank": 3, "r_lora": 2}, trained=2 * 3 + 2 * 2 * (16 - 3)),
    Variant("values", {"rank": None, "ratio": 0.5, "r_lora": 0}, trained=2 * 8),
    Variant("clamped", {"rank": 3, "r_lora": 2, "relu": "diag", "reg_multiplier": 0.1}),
    Variant("clamped whole", {"rank": 3, "r_lora": 2, "relu": "all"}),
)


TOLERANCE = 1e-6  # float32, relative to the greatest number


def adapt(model=None, **options):
    model = linear() if model is None else model
    adapters = inject(model, SALTSpec(targets=["0"], modules_to_save=[], **options))
    return model, adapters, model[0]


def given(weight, **options):
    """Returns the adapter of a map with this weight and no bias, and the set that it is."""
    model = linear(*weight.shape, bias=False, dtype=weight.dtype)
    model[0].weight.data.copy_(weight)
    _, adapters, adapter = adapt(model, **options)
    return adapter, adapters


def fill(adapter, **values):
    for name, value in values.items():
        getattr(adapter, name).data.copy_(torch.tensor(value))


def test_worked_example():
    adapter, _ = given(torch.diag(torch.tensor([3.0, 2, 1])), rank=1, r_lora=1)
    fill(adapter, alpha=[0.5], beta=[1.0], X=[[1.0], [0]], Y=[[0.0, 2]])
    expected = torch.tensor([[5.5, 0, 0], [0, 2, 2], [0, 0, 1]])
    assert relative(adapter.adapted_weight(adapter.base.weight), expected) < TOLERANCE
    x = torch.randn(4, 3)
    assert relative(adapter(x), x @ expected.T) < TOLERANCE


@pytest.mark.parametrize("shape", [(7, 7), (9, 6), (6, 9)])
def test_the_top_of_the_spectrum_is_scaled_and_shifted_and_keeps_its_vectors(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    adapter, _ = given(weight, rank=2, r_lora=0)
    fill(adapter, alpha=[0.5, 0.25], beta=[1.0, 2])
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    S[:2] = S[:2] * torch.tensor([1.5, 1.25]) + torch.tensor([1.0, 2])
    assert relative(adapter.adapted_weight(weight), U * S @ Vh) < 1e-12


@pytest.mark.parametrize("shape", [(7, 7), (9, 6), (6, 9)])
def test_all_values_scaled_leave_singular_vectors_alone(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    adapter, adapters = given(weight, rank=min(shape), r_lora=0)
    shake(adapters)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    core = U.T @ adapter.adapted_weight(weight) @ Vh.T
    assert relative(core, (S * (1 + adapter.alpha) + adapter.beta).diag()) < 1e-12


@pytest.mark.parametrize("shape", [(8, 8), (11, 6), (6, 11)])
@pytest.mark.parametrize("relu", ["none", "diag", "all"])
def test_edited_core_is_the_papers(shape, relu):
    weight = torch.randn(shape, dtype=torch.float64)
    adapter, adapters = given(weight, rank=2, r_lora=3, relu=relu)
    shake(adapters, by=2.0)
    fill(adapter, alpha=[0.5, -2.0], beta=[0.1, 0.0])
    core = torch.block_diag(
        (adapter.S[:2] * (1 + adapter.alpha) + adapter.beta).diag(),
        adapter.S[2:].diag() + adapter.X @ adapter.Y,
    )
    if relu == "diag":
        core[[0, 1], [0, 1]] = core[[0, 1], [0, 1]].relu()
    core = core.relu() if relu == "all" else core
    assert core[1, 1] == 0 or relu == "none"
    assert relative(adapter.adapted_weight(weight), adapter.U @ core @ adapter.Vh) < 1e-12


def test_clamping_the_whole_core_leaves_gradients_to_its_diagonal():
    """Why it is not a default: 5 of the 25 entries of X Y."""
    adapter, _ = given(torch.randn(8, 8, dtype=torch.float64), rank=3, r_lora=5, relu="all")
    fill(adapter, X=torch.eye(5).tolist())  # X Y is Y then
    probe = torch.randn(8, 8, dtype=torch.float64)
    (adapter.delta_weight() * probe).sum().backward()
    assert int((adapter.Y.grad != 0).sum()) == 5
    assert adapter.Y.grad.diagonal().all()


def test_rank_from_a_ratio_is_rounded_down_to_at_least_one():
    for ratio, rank in [(0.5, 8), (0.3, 4), (0.01, 1), (1.0, 16)]:
        adapter = adapt(rank=None, ratio=ratio, r_lora=0)[2]
        assert adapter.rank == len(adapter.alpha) == rank


def test_count_of_trained_numbers_is_the_formulas():
    assert adapt(linear(32, 64), rank=8, r_lora=4)[1].trainable_count() == 208


def test_start_of_x_is_within_the_authors_bound():
    adapter = adapt(linear(300, 400), rank=8, r_lora=4)[2]
    expected = torch.empty_like(adapter.X)
    nn.init.kaiming_uniform_(expected, a=math.sqrt(20))
    assert 0.95 < float(adapter.X.detach().abs().max() / expected.abs().max()) < 1.05


def test_values_alone_keep_the_top_vectors_alone():
    adapter = adapt(rank=3, r_lora=0)[2]
    assert {name: tuple(b.shape) for name, b in adapter.named_buffers()} == {
        "U": (16, 3),
        "S": (3,),
        "Vh": (3, 24),
    }
    assert adapter.U.untyped_storage().nbytes() == 16 * 3 * 4  # nothing of the whole basis is held
    assert adapter.Vh.untyped_storage().nbytes() == 3 * 24 * 4


def test_penalty_is_the_size_of_both_edits():
    _, adapters, adapter = adapt(rank=3, r_lora=2, reg_multiplier=0.5)
    assert adapters.penalty() < 1e-12
    adapters.penalty().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapters.trainable_parameters())
    shake(adapters)
    shift = torch.diag(adapter.S[:3] * adapter.alpha + adapter.beta)
    expected = 0.5 * (torch.linalg.matrix_norm(shift) + torch.linalg.matrix_norm(adapter.X @ adapter.Y))
    torch.testing.assert_close(adapters.penalty(), expected)
    assert adapt(rank=3, r_lora=2)[1].penalty() == 0.0


@pytest.mark.parametrize("relu", ["none", "diag", "all"])
def test_gradients(relu):
    model, adapters, adapter = adapt(linear(6, 8, dtype=torch.float64), rank=2, r_lora=3, relu=relu)
    shake(adapters, by=1.0)
    x, names = torch.randn(3, 8, dtype=torch.float64), ["alpha", "beta", "X", "Y"]
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,)),
        tuple(getattr(adapter, name) for name in names),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5}, "adapter.rank, ratio: exactly one must be given and the other null; got 8, 0.5"),
        ({"rank": None}, "adapter.rank, ratio: exactly one must be given and the other null; got None, None"),
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"rank": None, "ratio": 0.0}, r"adapter.ratio: must lie in \(0, 1\]; got 0.0"),
        ({"rank": None, "ratio": 1.5}, r"adapter.ratio: must lie in \(0, 1\]; got 1.5"),
        ({"r_lora": -1}, "adapter.r_lora: must be at least 0; got -1"),
        ({"relu": "top"}, "adapter.relu: must be one of none, diag, all; got 'top'"),
        ({"reg_multiplier": -1.0}, "adapter.reg_multiplier: must be finite and at least 0; got -1.0"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 17, "r_lora": 0}, "a map from 24 to 16 has 16 singular values; got rank 17"),
        ({"rank": 10, "r_lora": 7}, "10 of 16 singular values scaled and shifted leave 6 directions.*got 7"),
        ({"rank": 16, "r_lora": 1}, "16 of 16 singular values scaled and shifted leave 0 directions"),
    ],
)
def test_ranks_that_the_map_has_no_room_for_are_refused(options, message):
    model = linear()
    with pytest.raises(IncompatibleError, match=message):
        adapt(model, **options)
    assert type(model[0]) is nn.Linear
