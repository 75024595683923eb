"""RoAd: the spec's worked numbers, both sides, gradients read off the output, refusals."""

import math

import peft
import pytest
import torch
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.road import RoAd, RoAdSpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, reached, relative, shake

test_contract = contract(
    RoAd,
    Variant("", {"group_size": 4}, trained=16),
    Variant("2", {"group_size": 2, "variant": "road_2"}, trained=2 * 16),
    Variant("4", {"group_size": 8, "variant": "road_4"}, trained=4 * 16),
    Variant("random", {"group_size": 4, "init": "random"}, start="other"),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
VARIANTS = ["road_1", "road_2", "road_4"]
ALL = pytest.mark.parametrize("variant", VARIANTS)


def adapt(model, **options):
    adapters = inject(model, RoAdSpec(targets=["0"], **{"group_size": 4} | options))
    return next(iter(adapters)), adapters


def matrix(adapter):
    """R, written out pair by pair from the formula of the specification."""
    own, other = (part.detach() for part in adapter.coefficients())
    half = adapter.spec.group_size // 2
    R = own.diag()
    for first in range(len(own)):
        if first % (2 * half) < half:
            R[first, first + half] = -other[first]
            R[first + half, first] = other[first + half]
    return R


@pytest.mark.parametrize(
    ("group", "expected"), [(2, (-4, 2, 0.598076, 4.964102)), (4, (-6, -0.267949, 2, 4.464102))]
)
def test_worked_example(group, expected):
    model = linear(4, 4, bias=False)
    road, _ = adapt(model, group_size=group)
    road.base.weight.data.copy_(torch.eye(4))
    road.theta.data.copy_(torch.tensor([math.pi / 2, math.pi / 6]))
    road.alpha.data.copy_(torch.tensor([2.0, 1]))
    torch.testing.assert_close(model(torch.tensor([1.0, 2, 3, 4])), torch.tensor(expected), rtol=0, atol=1e-6)


@ALL
def test_output_is_the_formula_with_R_written_out(variant):
    model, x = linear(dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    road, adapters = adapt(model, variant=variant, group_size=8)
    shake(adapters, by=1.0)
    R, W, b = matrix(road), road.base.weight, road.base.bias
    expected = (x @ W.T + b) @ R.T
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(road.adapted_weight(W), R @ W)
    torch.testing.assert_close(road.adapted_bias(b), R @ b)


@ALL
def test_gradients_are_those_of_finite_differences(variant):
    model = linear(6, 8, dtype=torch.float64)
    road, adapters = adapt(model, variant=variant, group_size=2)
    shake(adapters, by=0.5)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def run(x, theta, alpha):
        return torch.func.functional_call(model, {"0.theta": theta, "0.alpha": alpha}, (x,))

    assert torch.autograd.gradcheck(run, (x, road.theta, road.alpha))


def test_gradients_of_gradients_are_those_of_finite_differences():
    model = linear(4, 3, dtype=torch.float64)
    road, adapters = adapt(model, group_size=2)
    shake(adapters, by=0.5)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, theta, alpha):
        return torch.func.functional_call(model, {"0.theta": theta, "0.alpha": alpha}, (x,))

    assert torch.autograd.gradgradcheck(run, (x, road.theta, road.alpha))


def test_a_pair_scaled_by_zero_has_finite_gradients():
    model = linear()
    road, _ = adapt(model)
    road.alpha.data[3] = 0
    model(torch.randn(5, 24)).square().sum().backward()
    assert road.alpha.grad[3] == 0
    assert all(p.grad.isfinite().all() for p in (road.theta, road.alpha))


def test_lengths_of_pairs_are_scaled_by_alpha():
    model, x = linear(), torch.randn(5, 24)
    road, adapters = adapt(model, group_size=2)
    shake(adapters, by=1.0)
    before, after = (y.unflatten(1, (8, 2)).norm(dim=2) for y in (road.base(x), model(x)))
    torch.testing.assert_close(after, road.alpha.abs() * before)


@ALL
def test_start_is_bitwise_the_base_and_reaches_both_tensors(variant):
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    road, adapters = adapt(model, variant=variant)
    assert torch.equal(model(x), before)
    assert road.decay_exempt() == [road.alpha]
    assert reached(model, adapters, x - 1) >= {"alpha"}


def test_random_start_has_pefts_spread():
    road, _ = adapt(linear(4000, 2), init="random", group_size=2)
    assert abs(float(road.theta.mean())) < 0.05
    assert abs(float(road.alpha.mean()) - 1) < 0.05
    assert abs(float(road.theta.std()) - 0.5) < 0.05
    assert abs(float(road.alpha.std()) - 0.5) < 0.05


def test_backward_keeps_the_output_and_nothing_of_its_size_besides():
    road, _ = adapt(linear())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = road(torch.randn(50, 24))
    assert {t.data_ptr() for t in kept if t.numel() >= y.numel()} == {y.data_ptr()}


def test_half_precision_is_computed_in_float32_and_rounded_once():
    model, x = linear(dtype=torch.bfloat16), torch.randn(5, 24).bfloat16()
    for variant in VARIANTS:
        road, adapters = adapt(model, variant=variant)
        shake(adapters, by=1.0)
        expected = (road.base(x).double() @ matrix(road).double().T).bfloat16()
        y = model(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-6)
        adapters.remove()


@ALL
@pytest.mark.parametrize("sizes", [(2, 64, 2), (6, 3, 6), (14, 5, 2), (66, 17, 22)])
def test_equals_peft_both_ways_whatever_the_sizes(variant, sizes, tmp_path):
    rows, columns, group = sizes
    model, x = linear(rows, columns), torch.randn(5, columns)
    _, adapters = adapt(model, variant=variant, group_size=group)
    shake(adapters, by=1.0)
    save_adapter(adapters, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(linear(rows, columns), tmp_path / "ours")
    assert relative(theirs(x), model(x)) < TOLERANCE
    assert relative(theirs.merge_and_unload()(x), model(x)) < TOLERANCE
    config = peft.RoadConfig(variant=variant, group_size=group, target_modules=["0"], init_weights=False)
    theirs = peft.get_peft_model(linear(rows, columns), config)
    theirs.save_pretrained(tmp_path / "theirs")
    back = linear(rows, columns)
    assert load_adapter(back, tmp_path / "theirs").spec.init == "random"
    assert relative(back(x), theirs(x)) < TOLERANCE


@pytest.mark.parametrize("group", [-2, 0, 3])
def test_odd_groups_are_refused(group):
    with pytest.raises(ConfigError, match=f"adapter.group_size: must be even and at least 2; got {group}"):
        adapt(linear(), group_size=group)


def test_unknown_variants_are_refused():
    with pytest.raises(
        ConfigError, match="adapter.variant: must be one of road_1, road_2, road_4; got 'road_3'"
    ):
        adapt(linear(), variant="road_3")


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([(12, 9)], {"group_size": 64}, "64 does not divide the 12 outputs of 0; use 12, the largest that"),
        (
            [(12, 9), (16, 9)],
            {"group_size": 6},
            "6 does not divide the 16 outputs of 1; use 4, the largest",
        ),
        ([(8, 9), (15, 9)], {}, "4 does not divide the 15 outputs of 1; remove odd ones: no size that"),
    ],
)
def test_groups_that_do_not_fit_are_refused_before_anything_is_placed(sizes, options, message):
    model = nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in sizes))
    with pytest.raises(IncompatibleError, match=f"adapter.group_size: {message}"):
        inject(model, RoAdSpec(targets="all-linear", **{"group_size": 4} | options))
    assert all(type(module) is nn.Linear for module in model)
