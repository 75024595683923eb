"""SALT-EDoRA: head and tail apart, places, refusals."""

import logging

import pytest
import torch
import torch.nn.functional as F

from lora_lab.adapters import inject
from lora_lab.adapters.methods.salt_edora import SaltEDoRA, SaltEDoRASpec
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, relative, shake, tiny_bert, tiny_llama

test_contract = contract(
    SaltEDoRA,
    Variant("", {"rank": 4}, trained=2 * 4 + 4 * 4),
)


def adapt(model=None, **options):
    model = linear(dtype=torch.float64) if model is None else model
    adapters = inject(model, SaltEDoRASpec(targets=["0"], modules_to_save=[], **{"rank": 4, **options}))
    return model, adapters, model[0]


def head_and_tail(weight, rank):
    """The split in its two cases: disjoint halves, or all that the head leaves."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    values = len(S)
    head = min(rank, values)
    tail = min(rank, values - head) if 2 * rank <= values else min(rank, max(0, values - head))
    first = values - tail
    return (U[:, :head], S[:head], Vh[:head]), (U[:, first:], S[first:], Vh[first:])


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 7, 9])
def test_output_is_the_sum_of_head_and_tail(shape, rank):
    model = linear(*shape, dtype=torch.float64)
    _, adapters, adapter = adapt(model, rank=rank)
    shake(adapters)
    (U_top, S_top, Vh_top), (U_bot, _, Vh_bot) = head_and_tail(adapter.base.weight, rank)
    sign = (torch.cat([U_top, U_bot], dim=1) * adapter.U).sum(0).sign()[rank:]  # the two pick their own
    x = torch.randn(2, 5, shape[1], dtype=torch.float64)
    shift = S_top * adapter.alpha + adapter.beta
    y = adapter.base(x) + F.linear(F.linear(x, Vh_top) * shift, U_top)
    if adapter.R is not None:
        hidden = F.linear(F.linear(x, sign.unsqueeze(1) * Vh_bot), adapter.R)
        y = y + F.linear(hidden, U_bot * sign)
    assert (adapter.R is None) == (rank == min(shape))
    assert relative(model(x), y) < 1e-12


def test_head_and_tail_are_apart_and_the_middle_stays():
    _, adapters, adapter = adapt(rank=5)
    shake(adapters)
    identity = torch.eye(10, dtype=torch.float64)
    assert relative(adapter.U.T @ adapter.U, identity) < 1e-12
    U, S, Vh = torch.linalg.svd(adapter.base.weight, full_matrices=False)
    core = U.T @ adapter.delta_weight() @ Vh.T
    middle = slice(5, 11)
    assert core[middle].abs().max() < 1e-12
    assert core[:, middle].abs().max() < 1e-12
    assert core[:5, 11:].abs().max() < 1e-12
    assert core[11:, :5].abs().max() < 1e-12
    torch.testing.assert_close(
        core[:5, :5], (S[:5] * adapter.alpha + adapter.beta).diag(), atol=1e-12, rtol=0
    )


def test_starts_bitwise_as_the_base():
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    adapt(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"rank": 4}, 8 + 16),
        ({"rank": 10}, 20 + 36),
        ({"rank": 16}, 32),
    ],
)
def test_count_of_trained_numbers_is_the_formulas(options, count):
    model, adapters, _ = adapt(**options)
    assert adapters.trainable_count() == count
    shake(adapters)
    model(torch.randn(3, 24, dtype=torch.float64)).sum().backward()


def test_a_head_without_a_tail_is_told(caplog):
    with caplog.at_level(logging.INFO):
        adapt(rank=16)
    assert "adapter.rank: leaves no singular value for a tail in 0" in caplog.text


def test_gradients():
    _, adapters, adapter = adapt(linear(6, 8, dtype=torch.float64), rank=3)
    shake(adapters)
    x, names = (
        torch.randn(3, 8, dtype=torch.float64),
        [name for name, p in adapter.named_parameters() if p.requires_grad],
    )
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,)),
        tuple(getattr(adapter, name) for name in names),
    )


@pytest.mark.parametrize(
    ("make", "names"), [(tiny_bert, ("key", "value")), (tiny_llama, ("k_proj", "v_proj"))]
)
def test_keys_and_values_are_found_by_their_roles(make, names):
    model = make()
    expected = {
        f"{path}.{name}" for path, module in model.named_modules() for name in names if hasattr(module, name)
    }
    assert set(inject(model, SaltEDoRASpec(rank=2, targets=["key", "value"])).adapters) == expected


def test_a_rank_of_0_is_refused():
    with pytest.raises(ConfigError, match="adapter.rank: must be at least 1; got 0"):
        adapt(rank=0)


def test_a_rank_above_the_number_of_singular_values_is_refused():
    with pytest.raises(IncompatibleError, match="a map from 24 to 16 has 16 singular values; got rank 17"):
        adapt(rank=17)
