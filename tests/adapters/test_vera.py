"""VeRA: the shared projections, the formula, what is stored, refusals."""

import math

import pytest
import torch
from safetensors.torch import load_file

from lora_lab.adapters import inject
from lora_lab.adapters.methods.vera import VeRA, VeRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, logits, reached, relative, shake, tiny_bert, tiny_llama

test_contract = contract(
    VeRA,
    Variant("", {"rank": 8}, trained=16 + 8),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
TARGETS = ["query", "value", "down"]


def adapt(model, **options):
    adapters = inject(model, VeRASpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def test_output_is_the_papers_formula():
    model, x = linear(), torch.randn(2, 5, 24)
    vera, adapters = adapt(model, rank=8)
    shake(adapters)
    expected = vera.base(x) + vera.lambda_b * ((vera.lambda_d * (x @ vera.A.T)) @ vera.B.T)
    assert relative(model(x), expected) < TOLERANCE
    weight = vera.lambda_b.diag() @ vera.B @ vera.lambda_d.diag() @ vera.A
    assert relative(vera.delta_weight(), weight) < TOLERANCE
    assert relative(vera.singular_values(), torch.linalg.svdvals(weight)[:8]) < TOLERANCE


def test_start_is_bitwise_the_base_and_reached_through_lambda_b_alone():
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    vera, adapters = adapt(model, rank=8, d_initial=0.3)
    assert torch.equal(model(x), before)
    assert torch.equal(vera.lambda_d, torch.full((8,), 0.3))
    assert reached(model, adapters, x) == {"lambda_b"}


def test_count_of_trained_numbers_is_the_formulas():
    assert adapt(linear(), rank=8)[1].trainable_count() == 24


def test_all_sites_share_one_pair_sliced_to_their_sizes():
    adapters = inject(tiny_llama(), VeRASpec(targets=TARGETS, rank=8))
    assert len({id(vera.projections) for vera in adapters}) == 1
    for vera in adapters:
        assert vera.projections.A.shape == (8, 53)
        assert vera.projections.B.shape == (35, 8)
        assert vera.A.data_ptr() == vera.projections.A.data_ptr()
        assert vera.A.shape == (8, vera.in_features)
        assert vera.B.shape == (vera.out_features, 8)


def test_projections_follow_from_their_key_and_the_papers_bounds():
    one = next(iter(inject(tiny_llama(), VeRASpec(targets=TARGETS, rank=8), seed=0))).projections
    same = next(iter(inject(tiny_llama(1), VeRASpec(targets=TARGETS, rank=8), seed=5))).projections
    other = next(iter(inject(tiny_llama(), VeRASpec(targets=TARGETS, rank=8, projection_prng_key=1))))
    assert torch.equal(one.A, same.A)
    assert torch.equal(one.B, same.B)
    assert not torch.equal(one.A, other.projections.A)
    assert 0.9 < float(one.A.abs().max()) / math.sqrt(6 / 53) <= 1
    assert 0.9 < float(one.B.abs().max()) / math.sqrt(6 / 8) <= 1


@pytest.mark.parametrize("save", [True, False])
def test_checkpoint_holds_the_projections_once_or_not_at_all(save, tmp_path):
    model = tiny_llama()
    adapters = inject(model, VeRASpec(targets=TARGETS, rank=8, save_projection=save))
    shake(adapters)
    frozen = [name for name in adapters.state_dict() if "projections" in name]
    assert [name.rpartition(".")[2] for name in frozen] == (["A", "B"] if save else ["sizes"])
    save_adapter(adapters, tmp_path / "adapter")
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shared = {name for name in file if name.startswith("base_model.vera")}
    assert shared == {f"base_model.vera_{name}" for name in (("A", "B") if save else ("sizes",))}
    assert file.get("base_model.vera_sizes", torch.empty(0)).numel() == 0
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    again = tiny_llama()
    inject(again, adapters.spec).load_state_dict(adapters.state_dict())
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"dropout": -0.1}, r"adapter.dropout: must lie in \[0, 1\); got -0.1"),
        ({"d_initial": 0.0}, "adapter.d_initial: must be finite and not 0; got 0.0"),
        ({"projection_prng_key": -1}, "adapter.projection_prng_key: must be at least 0; got -1"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), **options)


def test_rank_may_exceed_both_sides():
    model, x = linear(), torch.randn(5, 24)
    vera, adapters = adapt(model, rank=256)
    shake(adapters)
    before = model(x)
    with adapters.merged():
        assert relative(model(x), before) < TOLERANCE
    assert len(vera.singular_values()) == 16


def test_half_precision_model_has_float32_projections():
    model = tiny_bert().bfloat16()
    adapters = inject(model, VeRASpec(rank=8))
    assert next(iter(adapters)).projections.A.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
