"""RandLoRA: the bases of PEFT, the formula, what is stored, refusals."""

import json
import math
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.randlora import RandLoRA, RandLoRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, logits, relative, shake, tiny_llama

test_contract = contract(
    RandLoRA,
    Variant("", {"rank": 5}, trained=5 * 4 + 4 * 16),
    Variant("sparse", {"rank": 5, "alpha": 10.0, "sparse": True}),
    Variant("very sparse", {"rank": 5, "very_sparse": True}),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
TARGETS = ["query", "value", "down"]
SIZES = [(16, 24), (24, 16), (20, 20), (7, 13), (13, 7)]
KINDS = {"dense": {}, "sparse": {"sparse": True}, "very sparse": {"very_sparse": True}}


def adapt(model, **options):
    adapters = inject(model, RandLoRASpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def in_peft(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.RandLoraConfig(target_modules=["0"], **options))


def by_hand(adapter):
    """ΔW as a sum of rank-one products, in the order in which PEFT pairs columns and rows."""
    A, B = adapter.projections.A, adapter.projections.B
    rank, bases = adapter.lambda_.shape
    small, large = sorted((adapter.in_features, adapter.out_features))
    update = torch.zeros(large, small, dtype=A.dtype)
    for k in range(rank * bases):
        (j, i), (row, base) = divmod(k, rank), divmod(k, bases)
        scaled = adapter.lambda_[row, base] * A[row, 0, :small] * adapter.gamma[base]
        update += torch.outer(B[:large, j, i], scaled)
    update *= adapter.scale
    return update if adapter.in_features == small else update.T


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@torch.no_grad()
def test_output_is_the_sum_of_the_scaled_bases(rows, columns):
    model, x = linear(rows, columns, dtype=torch.float64), torch.randn(2, 5, columns, dtype=torch.float64)
    adapter, adapters = adapt(model, rank=3)
    shake(adapters)
    weight = by_hand(adapter)
    assert relative(adapter.delta_weight(), weight) < 1e-12
    assert relative(model(x) - adapter.base(x), x @ weight.T) < 1e-12
    assert relative(adapter.singular_values(), torch.linalg.svdvals(weight)) < 1e-12


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_same_tensors_give_pefts_outputs_and_gradients(rows, columns, kind):
    ours, theirs = linear(rows, columns, dtype=torch.float64), linear(rows, columns, dtype=torch.float64)
    adapter, adapters = adapt(ours, rank=3, **kind)
    shake(adapters)
    other = in_peft(theirs, r=3, randlora_alpha=60, **kind)
    layer = other.base_model.model[0]
    pairs = {adapter.lambda_: layer.randlora_lambda, adapter.gamma: layer.randlora_gamma}
    for own, foreign in pairs.items():
        foreign["default"].data.copy_(own.data)
        foreign["default"].data = foreign["default"].data.double()
    x = torch.randn(5, columns, dtype=torch.float64, requires_grad=True)
    wanted = other(x)
    assert relative(ours(x), wanted) < TOLERANCE
    probe = torch.randn_like(wanted)
    found = torch.autograd.grad((ours(x) * probe).sum(), [x, *pairs])
    expected = torch.autograd.grad((wanted * probe).sum(), [x, *(p["default"] for p in pairs.values())])
    for given, gradient in zip(found, expected, strict=True):
        assert relative(given, gradient) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_bases_are_pefts_for_sites_of_several_sizes(kind):
    def three():
        return nn.ModuleList([nn.Linear(9, 30), nn.Linear(41, 12), nn.Linear(9, 9)])

    adapters = inject(three(), RandLoRASpec(targets="all-linear", rank=4, projection_prng_key=3, **kind))
    theirs = peft.get_peft_model(
        three(),
        peft.RandLoraConfig(r=4, projection_prng_key=3, target_modules=["0", "1", "2"], **kind),
    )
    projections = next(iter(adapters)).projections
    assert projections.A.shape == (4, 1, 30)
    assert projections.B.shape == (41, 8, 4)
    assert torch.equal(projections.A, theirs.base_model.randlora_A["default"])
    assert torch.equal(projections.B, theirs.base_model.randlora_B["default"])
    for adapter in adapters:
        assert adapter.projections is projections
        assert adapter.A.data_ptr() == projections.A.data_ptr()
        assert adapter.B.data_ptr() == projections.B.data_ptr()


def test_very_sparse_bases_have_the_share_of_signs_of_pefts_code():
    A = (
        inject(nn.ModuleList([nn.Linear(400, 400)]), RandLoRASpec(targets=["0"], rank=50, very_sparse=True))
        .adapters["0"]
        .projections.A
    )
    share = float((A != 0).double().mean())
    assert abs(share - 1 / math.sqrt(400)) < 0.005  # two signs of 1 / (2 √d)
    assert len(A.unique()) == 3


def test_update_has_full_rank_and_a_smaller_rank_trains_more():
    counts = {}
    for rank in (1, 4, 16):
        adapter, adapters = adapt(linear(), rank=rank)
        shake(adapters)
        counts[rank] = adapters.trainable_count()
        bases = math.ceil(16 / rank)
        assert counts[rank] == rank * bases + bases * 16
        values = torch.linalg.svdvals(adapter.delta_weight())
        assert len(values) == 16
        assert values[-1] > 1e-4 * values[0]
    assert counts[1] > counts[4] > counts[16]
    assert adapt(linear(), rank=5)[1].trainable_count() == 84


def test_null_alpha_is_twenty_times_the_rank(tmp_path):
    adapter, adapters = adapt(linear(), rank=5)
    assert adapter.scale == 20.0
    assert adapt(linear(), rank=5, alpha=10.0)[0].scale == 2.0
    save_adapter(adapters, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["randlora_alpha"] == 100.0


@pytest.mark.parametrize("save", [True, False])
def test_our_file_holds_the_bases_once_or_not_at_all(save, tmp_path):
    model = tiny_llama()
    adapters = inject(model, RandLoRASpec(targets=TARGETS, rank=4, save_projection=save))
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    frozen = {name for name in file if not name.endswith(("randlora_lambda", "randlora_gamma"))}
    assert frozen == {f"base_model.randlora_{name}" for name in (("A", "B") if save else ("sizes",))}
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    again = tiny_llama()
    inject(again, adapters.spec).load_state_dict(adapters.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_pefts_file_with_its_bases_in_every_map_is_read(tmp_path):
    theirs = in_peft(linear(), r=5, randlora_alpha=100)
    theirs.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {name for name in file if "_A" in name} == {
        "base_model.randlora_A",
        "base_model.model.0.randlora_A",
    }
    assert next(iter(load_adapter(linear(), tmp_path))).spec.alpha == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"alpha": 0.0}, "adapter.alpha: must be finite and not 0; got 0.0"),
        ({"dropout": 1.0}, r"adapter.dropout: must lie in \[0, 1\); got 1.0"),
        ({"sparse": True, "very_sparse": True}, "adapter.very_sparse: excludes sparse; keep one of the two"),
        ({"projection_prng_key": -1}, "adapter.projection_prng_key: must be at least 0; got -1"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), **options)


def test_rank_above_a_side_is_refused_before_anything_is_placed():
    model = linear()
    with pytest.raises(IncompatibleError, match=r"at most min\(in, out\) = 16 here; got 17. Lower the rank"):
        adapt(model, rank=17)
    assert isinstance(model[0], nn.Linear)
    adapt(model, rank=16)


def test_float16_base_is_warned_of():
    with pytest.warns(UserWarning, match="alpha / rank = 20, and on this float16 base outputs above 65504"):
        adapt(linear().half(), rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(linear().bfloat16(), rank=4)


def test_half_precision_model_has_float32_bases():
    adapter, _ = adapt(linear().bfloat16(), rank=4)
    assert {adapter.projections.A.dtype, adapter.lambda_.dtype} == {torch.float32}
