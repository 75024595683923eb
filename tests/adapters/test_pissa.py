"""PiSSA: principal part and residual, both modes, the randomised SVD, files, refusals."""

import json

import pytest
import torch
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.pissa import PiSSA, PiSSASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, logits, reached, relative, shake, tiny_bert, train

test_contract = contract(
    PiSSA,
    Variant("", {"rank": 4, "alpha": 4.0}, trained=4 * (24 + 16)),
    Variant("residual", {"rank": 4, "alpha": 4.0, "mode": "residual"}, start="rounded", dropout=False),
    Variant("niter", {"rank": 4, "alpha": 4.0, "niter": 4}),
)


TOLERANCE = 2e-6  # float32, relative to the greatest number; a start from an SVD is not bitwise the base
MODES = pytest.mark.parametrize("mode", ["subtract", "residual"])


def adapt(model, **options):
    adapters = inject(model, PiSSASpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


@MODES
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"alpha": 3.0}, {"niter": 2}])
def test_start_is_the_identity_at_any_scale(mode, options):
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    pissa, _ = adapt(model, rank=4, mode=mode, **options)
    assert relative(model(x), before) < TOLERANCE
    assert pissa.delta_weight().abs().max() < TOLERANCE


def test_start_is_the_best_approximation_of_its_rank():
    model = linear()
    weight = model[0].weight.clone()
    singular = torch.linalg.svdvals(weight)
    pissa, _ = adapt(model, rank=4, alpha=6.0)
    principal = pissa.scale * pissa.B @ pissa.A
    error = torch.linalg.matrix_norm(weight - principal)
    assert relative(error, singular[4:].square().sum().sqrt()) < TOLERANCE
    share = torch.diag(singular[:4] / pissa.scale)
    assert relative(pissa.A @ pissa.A.T, share) < TOLERANCE
    assert relative(pissa.B.T @ pissa.B, share) < TOLERANCE


def test_residual_has_the_remaining_singular_values():
    model = linear()
    singular = torch.linalg.svdvals(model[0].weight)
    pissa, _ = adapt(model, rank=4, alpha=6.0, mode="residual")
    expected = torch.cat([singular[4:], torch.zeros(4)])
    assert relative(torch.linalg.svdvals(pissa.residual), expected) < TOLERANCE


def test_both_modes_are_one_function_of_their_factors():
    outputs = []
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    for mode in ("subtract", "residual"):
        model = linear()
        pissa, adapters = adapt(model, rank=4, mode=mode)
        train(model, adapters, x)
        weight = pissa.adapted_weight(pissa.base.weight)
        assert relative(model(x), nn.functional.linear(x, weight, pissa.base.bias)) < TOLERANCE
        outputs.append(model(x))
    assert relative(outputs[0], outputs[1]) < 1e-4  # three steps of Adam magnify rounding


@MODES
def test_first_gradient_reaches_a_and_b(mode):
    model = linear()
    _, adapters = adapt(model, rank=4, mode=mode)
    assert reached(model, adapters, torch.randn(5, 24)) == {"A", "B"}
    assert adapters.trainable_count() == 4 * (16 + 24)


@MODES
def test_base_is_never_written_to_and_comes_back_bitwise(mode):
    model, x = linear(), torch.randn(5, 24)
    weight, before = model[0].weight.clone(), model(x)
    pissa, adapters = adapt(model, rank=4, mode=mode)
    train(model, adapters, x)
    assert torch.equal(pissa.base.weight, weight)
    adapters.remove()
    assert torch.equal(model(x), before)


def test_residual_is_not_stored_and_follows_a_loaded_start():
    model, x = linear(), torch.randn(5, 24)
    _, adapters = adapt(model, rank=4, mode="residual", niter=0)
    shake(adapters)
    state = adapters.state_dict()
    assert sorted(state) == ["0.A", "0.B", "0.active", "0.kept", "0.start_A", "0.start_B"]
    fresh = linear()
    others = inject(
        fresh, PiSSASpec(targets=["0"], modules_to_save=[], rank=4, mode="residual", niter=0), seed=1
    )
    assert relative(fresh(x), model(x)) > 0.01
    others.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))


@MODES
def test_silenced_and_dropped_components_give_the_base_back(mode):
    model, x = linear(), torch.randn(5, 24)
    pissa, adapters = adapt(model, rank=4, mode=mode)
    shake(adapters)
    keep = torch.tensor([True, True, False, False])
    left = torch.cat([pissa.B[:, keep], -pissa.start_B[:, keep]], dim=1)
    right = torch.cat([pissa.A[keep], pissa.start_A[keep]])
    expected = pissa.base.weight + pissa.scale * left @ right
    pissa.keep_components(keep)
    assert relative(pissa.adapted_weight(pissa.base.weight), expected) < TOLERANCE
    assert relative(model(x), nn.functional.linear(x, expected, pissa.base.bias)) < TOLERANCE
    pissa.drop()
    assert torch.equal(model(x), pissa.base(x))


def test_randomised_start_depends_on_the_seed_alone():
    def start(seed):
        torch.manual_seed(99)
        torch.rand(seed)
        adapters = inject(linear(), PiSSASpec(targets=["0"], rank=4, niter=1), seed=seed)
        return next(iter(adapters)).A

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_file_of_a_patterned_rslora_pissa_is_a_lora_of_twice_the_rank(tmp_path):
    model = tiny_bert()
    spec = PiSSASpec(rank=4, alpha=3.0, rslora=True, rank_pattern={"value": 2}, alpha_pattern={"query": 5.0})
    adapters = inject(model, spec)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["init_lora_weights"]) == ("LORA", 8, True)
    for folder_without_spec in (False, True):
        if folder_without_spec:
            (tmp_path / "adapter" / "lora_lab.yaml").unlink()
        fresh = tiny_bert()
        loaded = load_adapter(fresh, tmp_path / "adapter")
        assert loaded.spec.method == ("lora" if folder_without_spec else "pissa")
        assert relative(logits(fresh), logits(model)) < TOLERANCE


@MODES
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_a_folder_of_half_the_components_is_not_taken_for_pefts(mode, sliced, kept, tmp_path):
    """[A; A₀] of half of them has as many rows as the A alone that PEFT writes."""
    model, x = linear(), torch.randn(5, 24)
    adapter, adapters = adapt(model, rank=4, mode=mode)
    shake(adapters)
    adapter.keep_components(torch.arange(4) >= 4 - kept)
    if sliced:
        adapter.select_components(adapter.kept.nonzero().flatten())
    save_adapter(adapters, tmp_path / "adapter")
    fresh = linear()
    (loaded,) = load_adapter(fresh, tmp_path / "adapter")
    assert len(loaded.A) == kept
    assert relative(fresh(x), model(x)) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "adapter.alpha: must be above 0 for pissa"),
        ({"alpha_pattern": {"0": -2.0}}, "adapter.alpha_pattern.0: must be above 0 for pissa"),
        ({"niter": -1}, "adapter.niter: must be at least 0, or null for an exact SVD; got -1"),
        ({"mode": "residual", "dropout": 0.1}, "adapter.dropout: must be 0 for mode: residual"),
        ({"mode": "other"}, "adapter.mode: must be one of subtract, residual; got 'other'"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), rank=4, **options)


def test_dropout_keeps_the_start_the_identity_while_the_base_is_whole():
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    adapt(model, rank=4, dropout=0.5)
    assert relative(model.train()(x), before) < TOLERANCE


def test_rank_above_the_smaller_side_is_refused():
    with pytest.raises(IncompatibleError, match=r"pissa takes its start from W .* = 16 here; got 17"):
        adapt(linear(), rank=17)


def test_weight_that_is_not_finite_is_refused():
    model = linear()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(IncompatibleError, match="not finite"):
        adapt(model, rank=4)


def test_residual_refuses_a_base_whose_weight_is_computed():
    class Lent(nn.Linear):
        """Returns its weight as a quantised map does."""

        def __init__(self):
            super().__init__(24, 16)
            self.codes = self._parameters.pop("weight")

        @property
        def weight(self):
            return self.codes * 1.0

    with pytest.raises(IncompatibleError, match="undo the base's quantisation"):
        adapt(nn.Sequential(Lent()), rank=4, mode="residual")
    model, x = nn.Sequential(Lent()), torch.randn(5, 24)
    before = model(x)
    adapt(model, rank=4)
    assert relative(model(x), before) < TOLERANCE


@pytest.mark.parametrize(("mode", "tolerance"), [("subtract", 0.0), ("residual", 1e-2)])
def test_half_precision_start_is_exact_where_the_base_is_whole(mode, tolerance):
    model, x = linear(dtype=torch.bfloat16), torch.randn(5, 24, dtype=torch.bfloat16)
    before = model(x)
    pissa, _ = adapt(model, rank=4, mode=mode)
    assert pissa.A.dtype == torch.float32
    assert relative(model(x).float(), before.float()) <= tolerance
