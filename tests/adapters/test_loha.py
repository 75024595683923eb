"""LoHa: the worked example, both of its forms, what it is as a LoRA."""

import pytest
import torch
from torch import nn

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.methods.loha import LoHa, LoHaSpec
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, relative, shake

test_contract = contract(
    LoHa,
    Variant("", {"rank": 4, "alpha": 6.0}, trained=2 * 4 * (24 + 16)),
    Variant("factored", {"rank": 1}),
    Variant("lycoris", {"rank": 4, "init": "lycoris"}),
    Variant("random", {"rank": 4, "init": "random"}, start="other"),
)


EXACT = 1e-12  # float64


def adapt(model, **options):
    adapters = inject(model, LoHaSpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_worked_example_gives_the_printed_weights():
    model = nn.Sequential(nn.Linear(3, 2, bias=False, dtype=torch.float64))
    loha, _ = adapt(model, rank=1, alpha=1.0)
    with torch.no_grad():
        model[0].base.weight.copy_(double([[1.0, 2, 3], [4, 5, 6]]))
        loha.w1_a.copy_(double([[0.1], [0.2]]))
        loha.w1_b.copy_(double([[1.0, 1.1, 1.2]]))
        loha.w2_a.copy_(double([[0.3], [0.4]]))
        loha.w2_b.copy_(double([[1.3, 1.4, 1.5]]))
    delta = double([[0.039, 0.0462, 0.054], [0.104, 0.1232, 0.144]])
    weight = double([[1.039, 2.0462, 3.054], [4.104, 5.1232, 6.144]])
    torch.testing.assert_close(loha.delta_weight(), delta, atol=EXACT, rtol=0)
    torch.testing.assert_close(loha.merged_module().weight.data, weight, atol=EXACT, rtol=0)
    torch.testing.assert_close(
        model(double([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])), weight.T, atol=EXACT, rtol=0
    )


@pytest.mark.parametrize(("rank", "factored"), [(4, True), (8, True), (11, True), (12, False), (40, False)])
def test_cheaper_form_is_chosen(rank, factored):
    """At 768 × 768; three products with P and Q against one more with W + ΔW."""
    assert adapt(linear(768, 768), rank=rank)[0].factored is factored


@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 16), lambda: nn.Conv2d(6, 9, 3, padding=1)])
@pytest.mark.parametrize("options", [{}, {"use_effective_conv2d": True}, {"rank_dropout": 0.4}])
def test_both_forms_give_equal_outputs_and_gradients(make, options):
    model = nn.Sequential(make().double())
    x = torch.randn((5, 24) if isinstance(model[0], nn.Linear) else (2, 6, 5, 5), dtype=torch.float64)
    loha, adapters = adapt(model, rank=3, alpha=2.0, **options)
    shake(adapters, 0.3)
    found = []
    for factored in (True, False):
        loha.factored = factored
        torch.manual_seed(1)
        y = model(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), adapters.trainable_parameters())))
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < EXACT


def test_update_is_a_lora_of_the_squared_rank():
    """A = Q, B = s P, up to where the scale stands: alpha = s · rank² gives LoRA the same s."""
    x, loha, adapters = (
        torch.randn(5, 24, dtype=torch.float64),
        *adapt(linear(dtype=torch.float64), rank=3, alpha=5.0),
    )
    shake(adapters, 0.3)
    expected = adapters.model(x)
    left, right = (factor.detach() for factor in loha.factors())
    scale = 5 / 3
    base = adapters.remove()
    twin = inject(base, METHODS["lora"].Spec(targets=["0"], rank=9, alpha=scale * 9))
    lora = next(iter(twin))
    assert lora.scale == pytest.approx(scale)
    with torch.no_grad():
        lora.A.copy_(right)
        lora.B.copy_(left / scale)
    assert relative(base(x), expected) < EXACT


def test_rank_of_the_update_may_reach_the_square_of_its_rank():
    loha, adapters = adapt(linear(64, 64, dtype=torch.float64), rank=5)
    shake(adapters, 0.3)
    assert torch.linalg.matrix_rank(loha.delta_weight()) == 25


@pytest.mark.parametrize("effective", [True, False])
def test_lycoris_start_has_its_spreads(effective):
    model = nn.Sequential(nn.Conv2d(200, 300, 3))
    loha, _ = adapt(model, rank=16, init="lycoris", use_effective_conv2d=effective)
    spreads = {"w1_a": 0.1, "w1_b": 1.0, "w2_b": 1.0} | ({"t1": 0.1, "t2": 0.1} if effective else {})
    for name, spread in spreads.items():
        assert float(getattr(loha, name).detach().std()) == pytest.approx(spread, rel=0.05)
    assert not loha.w2_a.any()
