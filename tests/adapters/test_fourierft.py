"""FourierFT: the spec's worked numbers, the product without ΔW, indices equal to PEFT's, refusals."""

import math
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods import fourierft
from lora_lab.adapters.methods.fourierft import FourierFT, FourierFTSpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError, IncompatibleError, TargetError
from lora_lab.linalg.fourier import first_of_permutation
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, reached, relative, shake, tiny_llama

test_contract = contract(
    FourierFT,
    Variant("", {"n_frequency": 40, "scaling": 10.0}, trained=40),
    Variant("zeros", {"n_frequency": 40, "init": "zeros"}, start="exact"),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
SIZES = pytest.mark.parametrize("sizes", [(16, 24), (7, 5), (6, 9), (5, 8), (1, 6), (6, 1), (2, 2), (1, 1)])


@pytest.fixture
def fft(monkeypatch):
    """Transforms of x for small maps too."""
    monkeypatch.setattr(fourierft, "SMALL", 0)


@pytest.fixture(params=["dense", "fft"])
def either(request):
    """Both ways to compute x ΔWᵀ."""
    if request.param == "fft":
        request.getfixturevalue("fft")


def adapt(model, **options):
    adapters = inject(model, FourierFTSpec(targets=["0"], **{"n_frequency": 12, "scaling": 3.0} | options))
    return next(iter(adapters)), adapters


def with_indices(adapter, pairs, values):
    """Puts these coefficients at these places."""
    adapter.indices.copy_(torch.tensor(pairs).T)
    adapter.tensors_changed()
    adapter.c.data.copy_(torch.tensor(values))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    ("place", "expected"),
    [((0, 1), [[1, 0, -1, 0], [1, 0, -1, 0]]), ((1, 0), [[1, 1, 1, 1], [-1, -1, -1, -1]])],
)
def test_worked_example(place, expected):
    model = linear(2, 4, bias=False)
    adapter, _ = adapt(model, n_frequency=1, scaling=1.0)
    with_indices(adapter, [place], [8.0])
    adapter.base.weight.data.zero_()
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(torch.eye(4)).T, expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("fft")
@SIZES
def test_every_coefficient_is_a_cosine_and_both_products_agree(sizes):
    rows, columns = sizes
    model = linear(rows, columns, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter, _ = adapt(model, n_frequency=rows * columns)
    a, b = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    for c, r, s in zip(adapter.c.tolist(), *adapter.indices.tolist(), strict=True):
        expected += c * torch.cos(2 * math.pi * (a * r / rows + b * s / columns))
    expected *= 3 / (rows * columns)
    torch.testing.assert_close(adapter.delta_weight(), expected)
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    torch.testing.assert_close(model(x), adapter.base(x) + x @ expected.T)


@pytest.mark.usefixtures("fft")
@SIZES
def test_gradients_are_those_of_finite_differences(sizes):
    rows, columns = sizes
    model = linear(rows, columns, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter, _ = adapt(model, n_frequency=min(12, rows * columns))
    x = torch.randn(3, columns, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, c: torch.func.functional_call(model, {"0.c": c}, (x,)), (x, adapter.c)
    )


@pytest.mark.parametrize(("total", "count"), [(1, 1), (6, 6), (7, 3), (768 * 768, 1000), (768 * 3072, 1001)])
@pytest.mark.parametrize("seed", [0, 3, 777])
def test_first_numbers_of_a_permutation_are_torchs(total, count, seed):
    expected = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    assert torch.equal(first_of_permutation(count, total, seed), expected)


@pytest.mark.parametrize("sizes", [(16, 24), (33, 17), (300, 200)])
@pytest.mark.usefixtures("either")
def test_equals_peft_both_ways_whatever_the_sizes(sizes, tmp_path):
    rows, columns = sizes
    model, x = linear(rows, columns), torch.randn(5, columns)
    adapter, adapters = adapt(model, n_frequency=40, random_loc_seed=3)
    save_adapter(adapters, tmp_path / "ours")
    assert len(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == 1
    theirs = peft.PeftModel.from_pretrained(linear(rows, columns), tmp_path / "ours")
    assert torch.equal(theirs.base_model.model[0].indices["default"], adapter.indices)
    assert relative(theirs(x), model(x)) < TOLERANCE
    config = peft.FourierFTConfig(n_frequency=50, scaling=7.0, target_modules=["0"])
    theirs = peft.get_peft_model(linear(rows, columns), config)
    theirs.save_pretrained(tmp_path / "theirs")
    back = linear(rows, columns)
    load_adapter(back, tmp_path / "theirs")
    assert relative(back(x), theirs(x)) < TOLERANCE


def test_patterns_count_site_by_site_and_open_both_ways(tmp_path):
    ours = tiny_llama()
    spec = FourierFTSpec(n_frequency=30, n_frequency_pattern={"query": 20, r"layers\.1\..*v_proj": 9})
    adapters = inject(ours, spec)
    assert [len(adapter.c) for adapter in adapters] == [20, 30, 20, 9]
    save_adapter(adapters, tmp_path / "ours")
    ids = torch.arange(1, 8).unsqueeze(0)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert relative(theirs(ids).logits, ours(ids).logits) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    back = tiny_llama()
    load_adapter(back, tmp_path / "theirs")
    assert relative(back(ids).logits, ours(ids).logits) < TOLERANCE


@pytest.mark.usefixtures("either")
def test_zeros_start_bitwise_as_the_base_and_are_reached():
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    _, adapters = adapt(model, init="zeros")
    assert torch.equal(model(x), before)
    assert reached(model, adapters, x) == {"c"}


def test_default_start_has_the_papers_size():
    adapter, _ = adapt(linear(64, 48), n_frequency=1000, scaling=150.0)
    expected = 150 * math.sqrt(1000 / 2) / (64 * 48)
    assert abs(float(adapter.delta_weight().square().mean().sqrt()) / expected - 1) < 0.1


def test_large_maps_keep_their_input_alone_and_form_no_matrix():
    adapter, _ = adapt(linear(150, 130))
    x = torch.randn(500, 130)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(x)
    assert {t.data_ptr() for t in kept if t.numel() >= 150 * 130} == {x.data_ptr()}


@pytest.mark.usefixtures("fft")
def test_checkpoint_holds_the_indices_which_win_over_the_seeds():
    model, x = linear(), torch.randn(5, 24)
    adapter, adapters = adapt(model)
    assert {name.rpartition(".")[2] for name in adapters.state_dict()} == {"c", "indices"}
    with_indices(adapter, [(i, i) for i in range(12)], [1.0] * 12)
    other = linear()
    again, fresh = adapt(other)
    fresh.load_state_dict(adapters.state_dict())
    assert torch.equal(again.indices, adapter.indices)
    assert torch.equal(other(x), model(x))


@pytest.mark.usefixtures("fft")
def test_half_precision_is_transformed_in_float32():
    model, x = linear(dtype=torch.bfloat16), torch.randn(5, 24).bfloat16()
    adapter, _ = adapt(model)
    expected = (adapter.base(x).float() + x.float() @ adapter.delta_weight().T).bfloat16()
    assert relative(model(x).float(), expected.float()) < 2**-7
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert adapter.c.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frequency": 0}, "adapter.n_frequency: must be at least 1; got 0"),
        ({"n_frequency_pattern": {"0": 0}}, "adapter.n_frequency_pattern.0: must be at least 1; got 0"),
        ({"scaling": 0.0}, "adapter.scaling: must be finite and above 0; got 0.0"),
        ({"scaling": math.nan}, "adapter.scaling: must be finite and above 0; got nan"),
        ({"random_loc_seed": -1}, "adapter.random_loc_seed: must be at least 0; got -1"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), **options)


def test_more_frequencies_than_numbers_are_refused_and_idle_ones_warned_of():
    model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(IncompatibleError, match="must be at most in · out = 48 here; got 49"):
        adapt(model, n_frequency=49)
    assert type(model[0]) is nn.Linear
    with pytest.warns(UserWarning, match="more than 26 add nothing"):
        adapter, _ = adapt(model, n_frequency=27)
    assert isinstance(adapter, FourierFT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(nn.Sequential(nn.Linear(8, 6)), n_frequency=26)


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(TargetError, match="adapter.n_frequency_pattern: 'keys' matches no adapted module"):
        adapt(linear(), n_frequency_pattern={"keys": 3})


def test_all_frequencies_reach_26_of_48_dimensions():
    with pytest.warns(UserWarning, match="add nothing"):
        adapter, _ = adapt(nn.Sequential(nn.Linear(8, 6)), n_frequency=48)
    columns = []
    for k in range(48):
        adapter.c.data.zero_()[k] = 1
        columns.append(adapter.delta_weight().detach().flatten())
    assert torch.linalg.matrix_rank(torch.stack(columns)) == 26


@pytest.mark.usefixtures("fft")
def test_shaken_folder_comes_back_the_same(tmp_path):
    model, x = linear(), torch.randn(5, 24)
    _, adapters = adapt(model)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    fresh = linear()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model(x))
