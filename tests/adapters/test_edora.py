"""EDoRA: the formula, its norms, start and gradients, refusals."""

import pytest
import torch
import torch.nn.functional as F

from lora_lab.adapters import inject
from lora_lab.adapters.methods.dora import DoRASpec
from lora_lab.adapters.methods.edora import EDoRA, EDoRASpec
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, reached, relative, shake

test_contract = contract(
    EDoRA,
    Variant("", {"rank": 4}, trained=4 * 4 + 16),
    Variant("exact", {"rank": 4, "init_sigma": 0.0}, start="exact"),
)


TOLERANCE = 2e-6  # float32, relative to the greatest output


def adapt(model=None, **options):
    model = linear() if model is None else model
    adapters = inject(model, EDoRASpec(targets=["0"], modules_to_save=[], **{"rank": 4, **options}))
    return model, adapters, model[0]


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (9, 9)])
def test_output_is_the_papers_formula(shape):
    model = linear(*shape, dtype=torch.float64)
    _, adapters, adapter = adapt(model, alpha=6.0)
    shake(adapters)
    weight, x = adapter.base.weight, torch.randn(2, 5, shape[1], dtype=torch.float64)
    V = weight + 6 / 4 * adapter.U @ adapter.R @ torch.linalg.svdvals(weight)[:4].diag() @ adapter.Vh
    V = adapter.m.unsqueeze(1) / V.norm(dim=1, keepdim=True) * V
    assert relative(model(x), F.linear(x, V, adapter.base.bias)) < 1e-12
    assert relative(adapter.adapted_weight(weight), V) < 1e-12


def test_the_core_stays_in_its_subspace():
    _, adapters, adapter = adapt(linear(dtype=torch.float64))
    shake(adapters)
    delta = (adapter.left() @ adapter.Vh).detach()
    assert torch.linalg.matrix_rank(delta) == 4
    assert relative(adapter.U @ (adapter.U.T @ delta), delta) < 1e-12
    assert relative(delta @ adapter.Vh.T @ adapter.Vh, delta) < 1e-12


def test_zero_core_starts_bitwise_as_the_base():
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    _, adapters, adapter = adapt(model, init_sigma=0.0)
    assert torch.equal(model(x), before)
    assert not adapter.R.any()
    assert reached(model, adapters, x) == {"R", "m"}


def test_default_start_is_almost_the_base():
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    adapter = adapt(model)[2]
    assert 0 < relative(model(x), before) < 2e-4
    assert 0.3e-5 < float(adapter.R.detach().std()) < 3e-5
    torch.testing.assert_close(adapter.m.detach(), adapter.base.weight.norm(dim=1))


def test_norms_count_as_constants():
    model, adapters, adapter = adapt(linear(dtype=torch.float64))
    shake(adapters)
    x, probe = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    learned = [adapter.R, adapter.m]
    found = torch.autograd.grad((model(x) * probe).sum(), learned)
    V = adapter.base.weight + adapter.left() @ adapter.Vh
    norm = V.norm(dim=1)
    expected, attached = (
        torch.autograd.grad((adapter.m / n * (x @ V.T) * probe).sum(), learned, retain_graph=True)
        for n in (norm.detach(), norm)
    )
    assert relative(found[0], expected[0]) < 1e-10
    assert relative(found[1], expected[1]) < 1e-10
    assert relative(found[0], attached[0]) > 1e-3


def test_gradients():
    """A step of R would change the norms, which count as constants: m alone, and x."""
    model, adapters, adapter = adapt(linear(6, 8, dtype=torch.float64))
    shake(adapters)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, x: torch.func.functional_call(adapter, {"m": m}, (x,)), (adapter.m, x)
    )


def test_count_of_trained_numbers_is_the_formulas():
    assert adapt(linear(32, 20))[1].trainable_count() == 48


def test_dropout_acts_on_all_but_the_bases_own_product():
    model, x = linear(), torch.randn(5, 24)
    _, adapters, adapter = adapt(model, dropout=0.5)
    shake(adapters)
    torch.manual_seed(7)
    given = model.train()(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    gain = adapter.m / (adapter.base.weight + adapter.left() @ adapter.Vh).norm(dim=1)
    delta = dropped @ (adapter.left() @ adapter.Vh).T
    expected = adapter.base(x) + (gain - 1) * (dropped @ adapter.base.weight.T) + gain * delta
    assert relative(given, expected) < TOLERANCE


def test_norms_are_of_this_base_where_the_basis_came_from_another():
    """For example a quantised base under what was learned on a plain one."""
    _, adapters, adapter = adapt()
    shake(adapters)
    model, other_adapters, other = adapt(linear(seed=1))
    other_adapters.load_state_dict(adapters.state_dict())
    x = torch.randn(5, 24)
    assert (
        relative(model(x), F.linear(x, other.adapted_weight(other.base.weight), other.base.bias)) < TOLERANCE
    )


def test_weight_decay_spares_the_magnitudes():
    adapter = adapt()[2]
    assert [id(p) for p in adapter.decay_exempt()] == [id(adapter.m)]


def test_a_row_of_zeros_gives_no_nan():
    model = linear()
    model[0].weight.data[3] = 0
    _, adapters, adapter = adapt(model)
    model(torch.randn(5, 24)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapters.trainable_parameters())


@pytest.mark.parametrize("Spec", [EDoRASpec, DoRASpec])
def test_forward_and_merged_agree_on_a_map_of_zeros_after_training(Spec):
    model, x = linear(), torch.randn(5, 24)
    model[0].weight.data.zero_()
    adapters = inject(model, Spec(targets=["0"], modules_to_save=[], rank=4))
    optimizer = torch.optim.SGD(adapters.trainable_parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    adapter = model[0]
    expected = F.linear(x, adapter.adapted_weight(adapter.weight), adapter.bias)
    assert relative(model(x), expected) < TOLERANCE
    if Spec is EDoRASpec:  # whose singular vectors of zeros make nothing
        assert torch.equal(model(x), adapter.bias.expand(5, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"alpha": 0.0}, "adapter.alpha: must be finite and not 0; got 0.0"),
        ({"init_sigma": -1.0}, "adapter.init_sigma: must be finite and at least 0; got -1.0"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(**options)


def test_a_rank_above_the_number_of_singular_values_is_refused():
    with pytest.raises(IncompatibleError, match="a map from 24 to 16 has 16 singular values; got rank 17"):
        adapt(rank=17)
