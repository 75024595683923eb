"""DeLoRA: the formula, its bound, its starts, what is stored and opens in PEFT, refusals."""

import json
import math
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.delora import DeLoRA, DeLoRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.callbacks.saved_tensors import SavedTensors
from lora_lab.errors import ConfigError, TargetError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, logits, reached, relative, shake, tiny_llama, train

test_contract = contract(
    DeLoRA,
    Variant("", {"rank": 4}, trained=4 * (24 + 16) + 1),
    Variant("current", {"rank": 4, "residual_lambda": "current"}),
    Variant("zero_b", {"rank": 4, "init": "zero_b"}),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
pytestmark = pytest.mark.filterwarnings("ignore:delora with init. zero_b")

MODES = {
    "frozen": {},
    "current": {"residual_lambda": "current"},
    "zero_b": {"init": "zero_b"},
}
all_modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def adapt(model, **options):
    adapters = inject(model, DeLoRASpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def by_hand(A, B, strength, w):
    """Δ(A, B, λ) as a sum of rank-one products."""
    rank = len(A)
    terms = [
        torch.outer(B[:, i], A[i]) / (max(B[:, i].norm(), 1e-4) * max(A[i].norm(), 1e-4)) for i in range(rank)
    ]
    return sum(s / rank * term for s, term in zip(strength.expand(rank), terms, strict=True)) * w


@all_modes
@torch.no_grad()
def test_output_is_the_papers_formula(mode):
    model, x = linear(dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    adapter, adapters = adapt(model, rank=5, delora_lambda=3.0, **mode)
    shake(adapters)
    w = adapter.base.weight.square().sum(0).sqrt()
    weight = by_hand(adapter.A, adapter.B, adapter.lambda_, w)
    if "init" not in mode:
        strength = (
            adapter.lambda_ if "residual_lambda" in mode else torch.full((1,), 3.0, dtype=torch.float64)
        )
        weight = weight - by_hand(adapter.start_A, adapter.start_B, strength, w)
    assert relative(adapter.delta_weight(), weight) < 1e-12
    assert relative(model(x) - adapter.base(x), x @ weight.T) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@all_modes
def test_start_is_exactly_no_change(mode, dtype):
    model, x = linear(dtype=dtype), torch.randn(5, 24, dtype=dtype)
    before = model(x)
    adapter, adapters = adapt(model, rank=5, delora_lambda=0.1, **mode)
    assert torch.equal(model(x), before)
    assert not adapter.delta_weight().any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), adapter.base(x))
    adapters.merge()
    assert torch.equal(model(x), before)


@all_modes
def test_first_gradients_reach_lambda_only_where_it_changes_something(mode):
    model = linear()
    _, adapters = adapt(model, rank=5, **mode)
    expected = (
        {"B"} if "init" in mode else {"A", "B"} | ({"lambda_"} if "residual_lambda" not in mode else set())
    )
    assert reached(model, adapters, torch.randn(5, 24)) == expected


@pytest.mark.parametrize("mode", ["frozen", "current", "zero_b"])
def test_update_stays_below_its_bound_after_any_steps(mode):
    model, x = linear(), torch.randn(64, 24)
    adapter, adapters = adapt(model, rank=4, delora_lambda=3.0, **MODES[mode])
    train(model, adapters, x, steps=30, learning_rate=0.3)
    strength, w = float(adapter.lambda_.detach().abs()), float(adapter.w.max())
    left, right = adapter._left(adapter.A, adapter.B, adapter.lambda_), adapter.A * adapter.w
    assert (left @ right).norm() <= strength * w * (1 + 1e-5)
    subtracted = {"frozen": 3.0, "current": strength, "zero_b": 0.0}[mode]
    norm = adapter.delta_weight().norm()
    assert 0.05 * strength * w < norm <= (strength + subtracted) * w * (1 + 1e-5)


@all_modes
@torch.no_grad()
def test_lengths_of_rows_and_columns_do_not_matter(mode):
    model, x = linear(), torch.randn(5, 24)
    adapter, adapters = adapt(model, rank=4, **mode)
    shake(adapters)
    expected = model(x)
    adapter.A *= 3
    assert relative(model(x), expected) < TOLERANCE
    adapter.B *= torch.tensor([3.0, 0.5, 7.0, 20.0])
    assert relative(model(x), expected) < TOLERANCE


@torch.no_grad()
def test_orthonormal_directions_of_strength_rank_have_singular_values_of_one():
    model = linear(dtype=torch.float64)
    with torch.no_grad():
        model[0].weight /= model[0].weight.norm(dim=0)
    adapter, _ = adapt(model, rank=6, delora_lambda=6.0, init="zero_b")
    adapter.A.copy_(torch.linalg.qr(torch.randn(24, 6, dtype=torch.float64)).Q.T)
    adapter.B.copy_(torch.linalg.qr(torch.randn(16, 6, dtype=torch.float64)).Q)
    torch.testing.assert_close(
        adapter.singular_values(), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12
    )
    values = torch.linalg.svdvals(adapter.delta_weight())
    expected = torch.tensor([1.0] * 6 + [0.0] * 10, dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


def first_step(**mode):
    """Returns B's first gradient and the update after Adam's first step at 1e-3, both as norms."""
    model, x = linear(), torch.randn(64, 24)
    adapter, adapters = adapt(model, rank=4, delora_lambda=15.0, **mode)
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=1e-3)
    (model(x) - torch.randn(64, 16)).square().mean().backward()
    optimizer.step()
    return float(adapter.B.grad.norm()), float(adapter.delta_weight().detach().norm())


def test_zero_b_jumps_in_its_first_step_and_the_residual_does_not():
    assert float(linear()[0].weight.detach().norm()) == pytest.approx(2.3, abs=0.1)
    gradient, update = first_step(init="zero_b")
    assert gradient == pytest.approx(3500, rel=0.15)
    assert update == pytest.approx(3.5, rel=0.1)
    gradient, update = first_step()
    assert gradient < 1
    assert update < 0.1


def test_zero_b_is_warned_of_and_the_residual_is_not():
    with pytest.warns(UserWarning, match="zero_b starts as the identity and jumps away from it"):
        adapt(linear(), init="zero_b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(linear())


@pytest.mark.parametrize(("rows", "columns", "rank"), [(16, 24, 4), (25, 7, 3), (9, 9, 1), (5, 11, 13)])
def test_zero_b_is_pefts_delora_with_its_gradients(rows, columns, rank):
    ours, theirs = linear(rows, columns), linear(rows, columns)
    adapter, adapters = adapt(ours, rank=rank, init="zero_b")
    other = peft.get_peft_model(theirs, peft.DeloraConfig(r=rank, target_modules=["0"]))
    layer = other.base_model.model[0]
    pairs = {adapter.A: layer.delora_A, adapter.B: layer.delora_B, adapter.lambda_: layer.delora_lambda}
    for seed in range(2):  # at the start, and away from it
        for own, foreign in pairs.items():
            foreign["default"].data.copy_(own.data)
        x = torch.randn(5, columns, requires_grad=True)
        wanted = other(x)
        assert relative(ours(x), wanted) < TOLERANCE
        probe = torch.randn_like(wanted)
        found = torch.autograd.grad((ours(x) * probe).sum(), [x, *pairs])
        expected = torch.autograd.grad((wanted * probe).sum(), [x, *(p["default"] for p in pairs.values())])
        for given, gradient in zip(found, expected, strict=True):
            assert torch.equal(given, gradient) or relative(given, gradient) < 1e-5
        shake(adapters, seed=seed)
    assert relative(adapter.w, layer.delora_w_norm["default"]) < TOLERANCE


def test_backward_pass_keeps_nothing_of_the_inputs_size_but_the_input():
    for mode in MODES.values():
        model = linear(40, 48)
        _, adapters = adapt(model, rank=2, **mode)
        shake(adapters)
        x = torch.randn(1000, 48, requires_grad=True)
        saved = SavedTensors()
        saved.start()
        output = model(x)
        saved.stop()
        hidden = 4 * 1000 * (2 if "init" in mode else 4)
        assert saved.count([x, *model.parameters(), *model.buffers()]) < hidden + 6000
        output.sum().backward()


# What is stored -----------------------------------------------------------------------------------------


def test_a_start_of_another_strength_opens_in_peft_as_a_lora(tmp_path):
    model = tiny_llama()
    adapters = inject(model, DeLoRASpec(rank=4, rank_pattern={"value": 2}, dropout=0.1))
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 8
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert relative(logits(theirs), logits(model)) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    back = tiny_llama()
    assert load_adapter(back, tmp_path / "theirs").spec.method == "lora"
    assert relative(logits(back), logits(model)) < TOLERANCE


@pytest.mark.parametrize("mode", ["frozen", "current"])
def test_dropped_adapters_open_in_peft_as_no_change(mode, tmp_path):
    adapters = inject(tiny_llama(), DeLoRASpec(rank=4, **MODES[mode]))
    shake(adapters)
    for adapter in adapters:
        adapter.drop()
    save_adapter(adapters, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert relative(logits(theirs), logits(tiny_llama())) < TOLERANCE


def test_one_strength_opens_in_peft_as_a_delora_of_twice_the_rank(tmp_path):
    model = tiny_llama()
    spec = DeLoRASpec(rank=4, rank_pattern={"value": 2}, residual_lambda="current")
    adapters = inject(model, spec)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("DELORA", 8)
    assert set(config["rank_pattern"].values()) == {4}
    adapter = next(iter(adapters))
    stored = adapter.peft_tensors()
    assert torch.equal(stored["delora_A"], torch.cat([adapter.A, -adapter.start_A]))
    assert torch.equal(stored["delora_B"], torch.cat([adapter.B, adapter.start_B], dim=1))
    assert torch.equal(stored["delora_lambda"], 2 * adapter.lambda_)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert relative(logits(theirs), logits(model)) < TOLERANCE


@pytest.mark.parametrize("sliced", [False, True])
@all_modes
def test_folders_hold_the_components_that_are_left(mode, sliced, tmp_path):
    model = tiny_llama()
    adapters = inject(model, DeLoRASpec(rank=4, **mode))
    shake(adapters)
    for number, adapter in enumerate(adapters):
        adapter.keep_components(torch.arange(4) < max(number % 4, sliced))
        if sliced:
            adapter.select_components(adapter.kept.nonzero().flatten())
    expected = logits(model)
    save_adapter(adapters, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert relative(logits(theirs), expected) < TOLERANCE
    fresh = tiny_llama()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert [len(adapter.A) for adapter in loaded] == [max(1, number % 4) for number in range(len(loaded))]
    assert relative(logits(fresh), expected) < TOLERANCE


def test_pefts_folder_with_patterns_opens_here(tmp_path):
    theirs = peft.get_peft_model(
        tiny_llama(),
        peft.DeloraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            module_dropout=0.2,
            rank_pattern={"v_proj": 2},
            lambda_pattern={"q_proj": 7},
            init_weights=False,
        ),
    )
    theirs.save_pretrained(tmp_path)
    ours = tiny_llama()
    adapters = load_adapter(ours, tmp_path)
    assert (adapters.spec.init, adapters.spec.dropout) == ("zero_b", 0.2)
    ranks = {path.rpartition(".")[2]: adapter.rank for path, adapter in adapters.items()}
    assert ranks == {"q_proj": 4, "v_proj": 2}
    assert relative(logits(ours), logits(theirs)) < TOLERANCE


def test_norms_in_a_file_win_over_those_of_the_base(tmp_path):
    model, x = linear(), torch.randn(5, 24)
    adapter, adapters = adapt(model, rank=4, residual_lambda="current")
    shake(adapters)
    adapter.w.mul_(2)
    save_adapter(adapters, tmp_path / "adapter")
    fresh = linear()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model(x))


# Controllers --------------------------------------------------------------------------------------------


@all_modes
@torch.no_grad()
def test_silenced_components_add_nothing_and_the_others_stay(mode):
    model = linear()
    adapter, adapters = adapt(model, rank=4, **mode)
    shake(adapters)
    keep = torch.tensor([True, False, True, False])
    left, right = adapter.factors()
    chosen = torch.cat([keep, keep]) if len(right) == 8 else keep
    expected = left[:, chosen] @ right[chosen]
    adapter.keep_components(keep)
    assert relative(adapter.delta_weight(), expected) < TOLERANCE
    assert adapter.rank == 2


def test_a_silenced_component_that_is_revived_is_at_full_strength():
    model, x = linear(), torch.randn(64, 24)
    with torch.no_grad():
        model[0].weight /= model[0].weight.norm(dim=0)
    adapter, adapters = adapt(model, rank=4, init="zero_b", delora_lambda=8.0)
    shake(adapters)
    adapter.keep_components(torch.tensor([True, False, True, True]))
    model(x).square().mean().backward()
    torch.optim.Adam(adapters.trainable_parameters(), lr=1e-3).step()
    left, right = adapter.factors()
    assert float(torch.outer(left[:, 1], right[1]).detach().norm()) == pytest.approx(
        2.0, rel=0.01
    )  # λ / rank


@torch.no_grad()
def test_dropped_adapter_is_bitwise_the_base():
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    adapter, adapters = adapt(model, rank=4)
    shake(adapters)
    assert not torch.equal(model(x), before)
    adapter.drop()
    assert torch.equal(model(x), before)
    assert adapter.rank == 0


def test_weight_decay_spares_what_is_no_change_away_from_zero():
    def spared(**mode):
        adapter, _ = adapt(linear(), rank=4, **mode)
        own = {id(parameter): name for name, parameter in adapter.named_parameters()}
        return {own[id(parameter)] for parameter in adapter.decay_exempt()}

    assert spared() == {"A", "B", "lambda_"}
    assert spared(residual_lambda="current") == {"A", "B"}
    assert spared(init="zero_b") == set()


# Bases --------------------------------------------------------------------------------------------------


def test_norms_are_those_of_the_dequantised_weight(make_model):
    adapters = inject(make_model("int8"), DeLoRASpec(rank=4))
    for adapter in adapters:
        assert not isinstance(adapter.base, nn.Linear)
        assert relative(adapter.w, adapter.base.weight.square().sum(0).sqrt()) < TOLERANCE


# Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"rank_pattern": {"0": 0}}, "adapter.rank_pattern.0: must be at least 1; got 0"),
        ({"dropout": 1.0}, r"adapter.dropout: must lie in \[0, 1\); got 1.0"),
        ({"delora_lambda": 0.0}, "adapter.delora_lambda: must be finite and above 0; got 0.0"),
        ({"delora_lambda": -1.0}, "adapter.delora_lambda: must be finite and above 0; got -1.0"),
        ({"delora_lambda": math.inf}, "adapter.delora_lambda: must be finite and above 0; got inf"),
        ({"init": "zero"}, "adapter.init: must be one of residual, zero_b; got 'zero'"),
        (
            {"init": "zero_b", "residual_lambda": "current"},
            "adapter.residual_lambda: current needs init: residual; got init: zero_b",
        ),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), **options)


def test_pattern_for_no_module_is_refused():
    model = linear()
    with pytest.raises(TargetError, match="adapter.rank_pattern: 'value' matches no adapted module"):
        inject(model, replace(DeLoRASpec(targets=["0"]), rank_pattern={"0": 2, "value": 3}))
    assert isinstance(model[0], nn.Linear)
