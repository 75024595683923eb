"""DoRA: both axes, the norm without the sum, magnitudes, what the norm's gradient does, refusals."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.adapters import inject
from lora_lab.adapters.methods.dora import DoRA, DoRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError, TargetError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, reached, relative, shake, tiny_bert, train

test_contract = contract(
    DoRA,
    Variant("", {"rank": 4}, trained=4 * (24 + 16) + 16),
    Variant("in", {"rank": 4, "dora_axis": "in"}, trained=4 * (24 + 16) + 24),
    Variant("attached", {"rank": 4, "detach_norm": False}),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
AXES = pytest.mark.parametrize("axis", ["out", "in"])


def adapt(model, **options):
    adapters = inject(model, DoRASpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def dense(dora):
    """W' from the paper's formula, norms of the whole matrix and all."""
    direction = dora.base.weight + dora.scale * dora.B @ dora.A
    norm = torch.linalg.vector_norm(direction, dim=dora.axis, keepdim=True)
    return dora.m.unsqueeze(dora.axis) * direction / norm


class Sizes(TorchDispatchMode):
    """Notes how many numbers every operation inside makes; views make none."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made.append(result.numel())
        return result


class Quantised(nn.Module):
    """A stand-in for a quantised map: integers inside, a `weight` that is computed when asked for."""

    def __init__(self, rows=16, columns=24):
        super().__init__()
        self.in_features, self.out_features, self.bias = columns, rows, None
        torch.manual_seed(0)
        self.register_buffer("codes", torch.randint(-127, 128, (rows, columns), dtype=torch.int8))

    @property
    def weight(self):
        return self.codes.float() / 300

    def forward(self, x):
        return F.linear(x, self.weight)


@AXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_start_is_bitwise_the_base(axis, dtype):
    model = linear(dtype=dtype)
    x = torch.randn(5, 24, dtype=dtype)
    before = model(x)
    dora, _ = adapt(model, rank=4, dora_axis=axis, dropout=0.1)
    gain = dora.gain(dora.base.weight, dora.weight_square)
    assert torch.equal(gain, torch.ones_like(dora.m))
    assert torch.equal(model(x), before)
    assert not dora.delta_weight().any()
    assert torch.equal(model.train()(x), before)


@AXES
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_papers_formula(axis, bias):
    model, x = linear(bias=bias), torch.randn(2, 5, 24)
    dora, adapters = adapt(model, rank=4, alpha=6.0, dora_axis=axis)
    shake(adapters, by=0.3)
    assert relative(model(x), F.linear(x, dense(dora), dora.base.bias)) < TOLERANCE
    assert relative(dora.adapted_weight(dora.base.weight), dense(dora)) < TOLERANCE


@AXES
def test_dropout_acts_on_all_but_the_bases_own_product(axis):
    model, x = linear(), torch.randn(5, 24)
    dora, adapters = adapt(model, rank=4, dropout=0.5, dora_axis=axis)
    shake(adapters, by=0.3)
    model.train()
    torch.manual_seed(7)
    given = model(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    expected = dora.base(x) + F.linear(dropped, dense(dora) - dora.base.weight)
    assert relative(given, expected) < TOLERANCE


@AXES
def test_norms_of_the_adapted_weight_are_the_magnitudes_after_training(axis):
    model, x = linear(), torch.randn(5, 24)
    dora, adapters = adapt(model, rank=4, dora_axis=axis)
    start = dora.m.clone()
    train(model, adapters, x, steps=5)
    assert relative(dora.m, start) > 0.01
    norms = torch.linalg.vector_norm(dora.merged_module().weight, dim=dora.axis)
    assert relative(norms, dora.m) < TOLERANCE


def test_doubled_magnitude_doubles_the_weight_and_spares_the_bias():
    model, x = linear(), torch.randn(5, 24)
    dora, _ = adapt(model, rank=4)
    with torch.no_grad():
        dora.m.mul_(2)
    assert relative(model(x), F.linear(x, 2 * dora.base.weight, dora.base.bias)) < TOLERANCE


@pytest.mark.parametrize(("axis", "count"), [("out", 176), ("in", 184)])
def test_count_of_trained_numbers_is_the_formulas(axis, count):
    assert adapt(linear(), rank=4, dora_axis=axis)[1].trainable_count() == count


@AXES
def test_first_gradient_reaches_b_and_the_magnitude(axis):
    model = linear()
    _, adapters = adapt(model, rank=4, dora_axis=axis)
    assert reached(model, adapters, torch.randn(5, 24)) == {"B", "m"}


@AXES
@pytest.mark.parametrize("detach", [True, False])
def test_gradients_are_those_of_the_dense_formula(axis, detach):
    model, x = linear(dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    dora, adapters = adapt(model, rank=4, dora_axis=axis, detach_norm=detach)
    shake(adapters, by=0.3)
    direction = dora.base.weight + dora.scale * dora.B @ dora.A
    norm = torch.linalg.vector_norm(direction, dim=dora.axis, keepdim=True)
    weight = dora.m.unsqueeze(dora.axis) * direction / (norm.detach() if detach else norm)
    trained = [dora.A, dora.B, dora.m]
    expected = torch.autograd.grad(F.linear(x, weight, dora.base.bias).square().sum(), trained)
    given = torch.autograd.grad(model(x).square().sum(), trained)
    torch.testing.assert_close(given, expected)


def test_forward_makes_nothing_of_the_weights_size():
    model, x = linear(rows=160, columns=240), torch.randn(5, 240)
    _, adapters = adapt(model, rank=2)
    shake(adapters)
    with Sizes() as sizes:
        model(x)
    assert max(sizes.made) < 160 * 240
    assert len(sizes.made) > 5


def test_norm_is_float32_under_autocast():
    model, x = linear(), torch.randn(5, 24)
    dora, adapters = adapt(model, rank=4)
    shake(adapters)
    expected = dora.gain(dora.base.weight, dora.weight_square)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dora.gain(dora.base.weight, dora.weight_square), expected)
        assert model(x).dtype == torch.bfloat16


@AXES
def test_row_or_column_of_zeros_starts_as_the_identity_and_can_learn(axis):
    model, x = linear(), torch.randn(5, 24)
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].weight[:, 5] = 0
    before = model(x)
    dora, adapters = adapt(model, rank=4, dora_axis=axis)
    assert torch.equal(model(x), before)
    train(model, adapters, x)
    assert model(x).isfinite().all()
    assert dora.m.abs().min() > 1e-6


@AXES
def test_quantised_base_works_through_the_weight_it_lends(axis):
    model, x = nn.Sequential(Quantised()), torch.randn(5, 24)
    before = model(x)
    dora, adapters = adapt(model, rank=4, dora_axis=axis)
    assert torch.equal(model(x), before)
    shake(adapters)
    assert relative(model(x), F.linear(x, dense(dora))) < TOLERANCE


def test_weight_decay_spares_the_magnitude_and_loraplus_speeds_it_up():
    dora, _ = adapt(linear(), rank=4)
    assert dora.decay_exempt() == [dora.m]
    assert dora.loraplus_parameters() == [dora.B, dora.m]


def test_magnitudes_per_input_are_saved_without_pefts_type(tmp_path):
    model = tiny_bert()
    adapters = inject(model, DoRASpec(rank=3, dora_axis="in"))
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] is None
    fresh = load_adapter(tiny_bert(), tmp_path / "adapter")
    for name, tensor in adapters.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_file_with_magnitudes_of_the_other_axis_is_refused(tmp_path):
    adapters = inject(tiny_bert(), DoRASpec(targets=["up"], rank=3, dora_axis="in"))
    save_adapter(adapters, tmp_path / "adapter")
    own = tmp_path / "adapter" / "lora_lab.yaml"
    own.write_text(own.read_text().replace("dora_axis: in", "dora_axis: out"))
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector' of shape \(30,\), not \(50,\)"):
        load_adapter(tiny_bert(), tmp_path / "adapter")


def test_refusals_say_what_is_allowed():
    with pytest.raises(ConfigError, match="adapter.dora_axis: must be one of out, in; got 'rows'"):
        adapt(linear(), dora_axis="rows")
    with pytest.raises(ConfigError, match="adapter.rank: must be at least 1"):
        adapt(linear(), rank=0)
    with pytest.raises(TargetError, match="a Embedding, which dora cannot edit"):
        inject(nn.Sequential(nn.Embedding(9, 4)), DoRASpec(targets=["0"]))


def test_diverged_adapter_is_not_merged():
    dora, adapters = adapt(linear(), rank=4)
    with torch.no_grad():
        dora.m[0] = torch.inf
    with pytest.raises(IncompatibleError, match="not finite"):
        adapters.merge()
