"""LoRA-Drop: masks of tokens, samples and batches, their mean, resumption, recomputation, refusals."""

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.methods.lora_drop import LoRADrop, LoRADropSpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, logits, relative, shake, tiny_bert, tokens

test_contract = contract(
    LoRADrop,
    Variant("", {"rank": 4}, trained=4 * (24 + 16)),
    Variant("samples", {"rank": 4, "drop_granularity": "sample"}),
    Variant("batches", {"rank": 4, "drop_granularity": "batch"}),
    Variant("modules", {"rank": 4, "drop_unit": "module", "drop_rescale": False}),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
UNITS = pytest.mark.parametrize("unit", ["rank", "module"])
GRANULARITIES = pytest.mark.parametrize("granularity", ["token", "sample", "batch"])


def adapt(model, seed=0, **options):
    adapters = inject(model, LoRADropSpec(targets=["0"], modules_to_save=[], rank=4, **options), seed)
    shake(adapters)
    model.train()
    return next(iter(adapters)), adapters


def plain_lora():
    model = linear()
    shake(inject(model, LoRASpec(targets=["0"], modules_to_save=[], rank=4)))
    return model.train()


@GRANULARITIES
@UNITS
def test_a_probability_of_zero_is_bitwise_lora(unit, granularity):
    model, x = linear(), torch.randn(3, 5, 24)
    adapt(model, drop_prob=0.0, drop_unit=unit, drop_granularity=granularity)
    assert torch.equal(model(x), plain_lora()(x))


@GRANULARITIES
@UNITS
def test_evaluation_is_bitwise_lora_and_draws_nothing(unit, granularity):
    model, x = linear(), torch.randn(3, 5, 24)
    lora, _ = adapt(model, drop_unit=unit, drop_granularity=granularity)
    expected = plain_lora()(x)
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(x), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not lora.batches


def test_output_is_the_papers_formula():
    model, x = linear(), torch.randn(3, 5, 24)
    lora, _ = adapt(model, drop_prob=0.4, alpha=6.0, dropout=0.1)
    torch.manual_seed(7)
    given = model(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.1)
    mask = torch.empty(3, 5, 4).bernoulli_(0.6)
    expected = lora.base(x) + 6 / 4 * (dropped @ lora.A.T * mask / 0.6) @ lora.B.T
    assert relative(given, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("granularity", "unit", "shape"),
    [
        ("token", "rank", (3, 5, 4)),
        ("token", "module", (3, 5, 1)),
        ("sample", "rank", (3, 1, 4)),
        ("sample", "module", (3, 1, 1)),
        ("batch", "rank", (4,)),
        ("batch", "module", (1,)),
    ],
)
def test_a_mask_has_one_number_for_each_of_its_units(granularity, unit, shape):
    model, x = linear(), torch.randn(3, 5, 24)
    lora, _ = adapt(model, drop_granularity=granularity, drop_unit=unit)
    model(x)
    mask = lora.mask_of(x @ lora.A.T)
    assert mask.shape == shape
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_masks_of_a_convolution_belong_to_its_channels():
    x = torch.randn(2, 3, 7, 9)
    for granularity, unit, shape in [
        ("token", "rank", (2, 4, 6, 7)),
        ("token", "module", (2, 1, 6, 7)),
        ("sample", "rank", (2, 4, 1, 1)),
        ("sample", "module", (2, 1, 1, 1)),
        ("batch", "rank", (4, 1, 1)),
        ("batch", "module", (1, 1, 1)),
    ]:
        model = nn.Sequential(nn.Conv2d(3, 6, (2, 3)))
        lora, _ = adapt(model, drop_granularity=granularity, drop_unit=unit)
        torch.manual_seed(7)
        given = model(x)
        hidden = nn.functional.conv2d(x, lora.A.reshape(4, 3, 2, 3))
        torch.manual_seed(7)
        mask = lora.mask_of(hidden)
        assert mask.shape == shape
        update = nn.functional.conv2d(hidden * mask / 0.7, lora.B.reshape(6, 4, 1, 1))
        assert relative(given, lora.base(x) + lora.scale * update) < TOLERANCE


@UNITS
@pytest.mark.parametrize(("rescale", "share"), [(True, 1.0), (False, 0.7)])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_mean_over_masks_is_the_evaluation_or_the_kept_share_of_it(granularity, rescale, share, unit):
    model, x = linear(), torch.randn(1, 1, 24)
    lora, _ = adapt(model, drop_unit=unit, drop_rescale=rescale, drop_granularity=granularity)
    expected = x @ lora.delta_weight().T
    mean = (model(x.expand(40_000, 1, 24)) - lora.base(x)).mean(0)
    assert relative(mean, share * expected[0]) < 0.015


@UNITS
@pytest.mark.parametrize(("rescale", "share"), [(True, 1.0), (False, 0.7)])
def test_mean_over_batches_is_that_too(rescale, share, unit):
    model, x = linear(), torch.randn(1, 24)
    lora, _ = adapt(model, drop_unit=unit, drop_rescale=rescale, drop_granularity="batch")
    expected = x @ lora.delta_weight().T
    with torch.no_grad():
        mean = torch.stack([model(x) - lora.base(x) for _ in range(10_000)]).mean(0)
    assert relative(mean, share * expected) < 0.03


@pytest.mark.parametrize("granularity", ["sample", "batch"])
def test_a_dropped_unit_of_one_sample_has_no_gradient(granularity):
    model, x = linear(), torch.randn(1, 5, 24)
    lora, _ = adapt(model, drop_prob=0.5, drop_granularity=granularity)
    torch.manual_seed(3)
    model(x).square().sum().backward()
    torch.manual_seed(3)
    kept = lora.mask_of(x @ lora.A.T).flatten().bool()
    assert 0 < kept.sum() < 4
    assert torch.equal(lora.A.grad.any(1), kept)
    assert torch.equal(lora.B.grad.any(0), kept)


def test_a_dropped_module_has_gradients_of_zero_and_not_none():
    model, x = linear(), torch.randn(1, 24)
    lora, _ = adapt(model, drop_prob=0.999, drop_unit="module", drop_granularity="sample")
    model(x).sum().backward()
    assert not lora.A.grad.any()
    assert not lora.B.grad.any()


def test_mask_of_the_slides_is_one_of_a_sample_and_scales_its_mean():
    """The slide multiplies its mask (batch, rank) onto the output; between A and B it has its place."""
    model, random = linear(rows=768, columns=768, dtype=torch.float64), np.random.default_rng(0)
    options = {"alpha": 4.0, "drop_granularity": "sample", "drop_rescale": False}
    lora, _ = adapt(model, **options)
    A, B = random.standard_normal((768, 4)) / 2, random.standard_normal((4, 768)) / 2
    with torch.no_grad():
        lora.A.copy_(torch.from_numpy(A).T)
        lora.B.copy_(torch.from_numpy(B).T)
    x = random.standard_normal((32, 768))
    torch.manual_seed(7)
    given = model(torch.from_numpy(x)) - lora.base(torch.from_numpy(x))
    torch.manual_seed(7)
    mask = lora.mask_of(torch.empty(32, 4, dtype=torch.float64)).numpy()
    assert relative(given, torch.from_numpy((x @ A * mask) @ B)) < 1e-12
    assert lora.mask_of(torch.empty(100_000, 4)).mean() == pytest.approx(0.7, abs=0.005)


# One mask for a batch -------------------------------------------------------------------------------------


def batches(adapter, model, count):
    """The masks of so many batches."""
    found = []
    for _ in range(count):
        model(torch.randn(2, 24))
        found.append(adapter.mask)
    return torch.stack(found)


def test_batches_have_masks_of_their_own_that_no_process_draws_for_itself():
    model = linear()
    lora, _ = adapt(model, drop_granularity="batch")
    first = batches(lora, model, 20)
    assert len({tuple(mask.tolist()) for mask in first}) > 4
    other = linear()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    lora, _ = adapt(other, drop_granularity="batch")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batches(lora, other, 20), first)
    another = linear()
    lora, _ = adapt(another, seed=1, drop_granularity="batch")
    assert not torch.equal(batches(lora, another, 20), first)


def test_masks_of_sites_and_of_batches_are_independent():
    adapters = inject(tiny_bert().train(), LoRADropSpec(rank=64, drop_prob=0.5, drop_granularity="batch"))
    one, other = list(adapters)[:2]
    found = []
    for _ in range(400):
        for adapter in (one, other):
            adapter.begin_batch()
        found.append(torch.stack([one.mask, other.mask]))
    signs = 2 * torch.stack(found) - 1  # (batch, site, unit)
    deviation = (400 * 64) ** -0.5
    assert abs(float(signs[:, 0].mean())) < 4 * deviation
    for pair in (signs[:, 0] * signs[:, 1], signs[1:, 0] * signs[:-1, 0], signs[:, 0, 1:] * signs[:, 0, :-1]):
        assert abs(float(pair.mean())) < 4 * deviation


def test_a_resumed_run_goes_on_with_the_masks_that_were_next():
    model = linear()
    lora, adapters = adapt(model, drop_granularity="batch")
    batches(lora, model, 3)
    state = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    expected = batches(lora, model, 5)
    fresh = linear()
    again, others = adapt(fresh, drop_granularity="batch")
    others.load_state_dict(state)
    assert torch.equal(batches(again, fresh, 5), expected)
    assert int(again.batches) == 8


def test_evaluation_between_batches_does_not_count():
    model, x = linear(), torch.randn(2, 24)
    lora, _ = adapt(model, drop_granularity="batch")
    batches(lora, model, 3)
    before = lora.mask
    model.eval()(x)
    assert lora.mask is before
    assert int(lora.batches) == 3


@pytest.mark.parametrize("granularity", ["token", "sample", "batch"])
def test_recomputed_blocks_see_the_same_masks(granularity):
    class Blocks(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.recompute = recompute

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
                x = x.tanh()
            return x

    gradients, x = [], torch.randn(3, 5, 6)
    for recompute in (False, True):
        model = Blocks(recompute).train()
        spec = LoRADropSpec(targets="all-linear", rank=2, drop_prob=0.5, drop_granularity=granularity)
        adapters = inject(model, spec)
        shake(adapters)
        torch.manual_seed(7)
        for _ in range(3):
            model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in adapters.trainable_parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_two_batches_before_one_backward_pass_keep_their_masks():
    model, x = linear(), torch.randn(3, 24)
    lora, _ = adapt(model, drop_prob=0.5, drop_granularity="batch")
    outputs, masks = [], []
    for _ in range(2):
        outputs.append(model(x))
        masks.append(lora.mask)
    assert not torch.equal(*masks)
    sum(output.sum() for output in outputs).backward()
    expected = sum(2 * lora.scale * mask.unsqueeze(1) * (x @ lora.A.T).sum(0).unsqueeze(1) for mask in masks)
    assert relative(lora.B.grad, expected.expand(4, 16).T) < TOLERANCE


def test_hooks_go_with_the_adapters():
    model = linear()
    _, adapters = adapt(model, drop_granularity="batch")
    assert len(model._forward_pre_hooks) == 1
    adapters.remove()
    assert not model._forward_pre_hooks
    model = linear()
    assert not model._forward_pre_hooks
    _, adapters = adapt(model, drop_granularity="token")
    assert not model._forward_pre_hooks


@GRANULARITIES
def test_compiled_training_draws_the_same_masks(granularity):
    model, x = linear(), torch.randn(3, 5, 24)
    _, adapters = adapt(model, drop_granularity=granularity)
    state = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    expected, found = [], []
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=granularity != "batch")
    for outputs, call in ((expected, model), (found, compiled)):
        adapters.load_state_dict(state)
        torch.manual_seed(7)
        outputs += [call(x) for _ in range(12)]
    for one, other in zip(expected, found, strict=True):
        assert relative(one, other) < TOLERANCE


# The probability, folders, refusals -----------------------------------------------------------------------


def test_the_probability_may_change_in_training():
    model, x = linear(), torch.randn(2, 24)
    for granularity in ("token", "batch"):
        lora, adapters = adapt(model, drop_granularity=granularity)
        lora.drop_prob = 0.999
        assert torch.equal(model(x), lora.base(x))
        lora.drop_prob = 0.0
        assert torch.equal(model(x), plain_lora()(x))
        adapters.remove()


@pytest.mark.parametrize("probability", [1.0, -0.1, float("nan")])
def test_a_probability_outside_its_range_is_refused(probability):
    message = r"adapter.drop_prob: must lie in \[0, 1\); got "
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), drop_prob=probability)
    lora, _ = adapt(linear())
    with pytest.raises(ConfigError, match=message):
        lora.drop_prob = probability
    assert lora.drop_prob == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_unit": "layer"}, "adapter.drop_unit: must be one of rank, module; got 'layer'"),
        ({"drop_granularity": "step"}, "adapter.drop_granularity: must be one of token, sample, batch"),
        ({"alpha": 0.0}, "adapter.alpha: must be finite and not 0"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), **options)


@GRANULARITIES
def test_folder_opens_in_peft_and_here(granularity, tmp_path):
    model = tiny_bert()
    spec = LoRADropSpec(
        rank=4, alpha=6.0, rslora=True, drop_granularity=granularity, rank_pattern={"value": 2}
    )
    adapters = inject(model, spec)
    shake(adapters)
    model.train()(input_ids=tokens())
    save_adapter(adapters, tmp_path / "ours", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "ours")
    assert relative(logits(theirs), logits(model)) < TOLERANCE
    fresh = tiny_bert()
    assert load_adapter(fresh, tmp_path / "ours").spec.drop_granularity == granularity
    assert torch.equal(logits(fresh), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    back = tiny_bert()
    assert load_adapter(back, tmp_path / "theirs").spec.method == "lora"
    assert relative(logits(back), logits(model)) < TOLERANCE
