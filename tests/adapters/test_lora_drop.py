"""DropLoRA: masks of tokens, their mean, recomputation, folders, refusals."""

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
)


TOLERANCE = 1e-6  # float32, relative to the greatest output


def adapt(model, seed=0, **options):
    adapters = inject(model, LoRADropSpec(targets=["0"], modules_to_save=[], rank=4, **options), seed)
    shake(adapters)
    model.train()
    return next(iter(adapters)), adapters


def plain_lora():
    model = linear()
    shake(inject(model, LoRASpec(targets=["0"], modules_to_save=[], rank=4)))
    return model.train()


def test_a_probability_of_zero_is_bitwise_lora():
    model, x = linear(), torch.randn(3, 5, 24)
    adapt(model, drop_prob=0.0)
    assert torch.equal(model(x), plain_lora()(x))


def test_evaluation_is_bitwise_lora_and_draws_nothing():
    model, x = linear(), torch.randn(3, 5, 24)
    adapt(model)
    expected = plain_lora()(x)
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(x), expected)
    assert torch.equal(torch.get_rng_state(), state)


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


def test_masks_of_a_convolution_belong_to_its_channels():
    model, x = nn.Sequential(nn.Conv2d(3, 6, (2, 3))), torch.randn(2, 3, 7, 9)
    lora, _ = adapt(model)
    torch.manual_seed(7)
    given = model(x)
    hidden = nn.functional.conv2d(x, lora.A.reshape(4, 3, 2, 3))
    torch.manual_seed(7)
    mask = torch.empty(2, 4, 6, 7).bernoulli_(0.7)
    update = nn.functional.conv2d(hidden * mask / 0.7, lora.B.reshape(6, 4, 1, 1))
    assert relative(given, lora.base(x) + lora.scale * update) < TOLERANCE


def test_mean_over_masks_is_the_evaluation():
    model, x = linear(), torch.randn(1, 1, 24)
    lora, _ = adapt(model)
    expected = x @ lora.delta_weight().T
    mean = (model(x.expand(40_000, 1, 24)) - lora.base(x)).mean(0)
    assert relative(mean, expected[0]) < 0.015


def test_a_dropped_unit_has_a_gradient_of_zero_and_not_none():
    model, x = linear(), torch.randn(1, 24)
    lora, _ = adapt(model, drop_prob=0.5)
    torch.manual_seed(3)
    model(x).square().sum().backward()
    torch.manual_seed(3)
    kept = torch.empty(4).bernoulli_(0.5).bool()
    assert 0 < kept.sum() < 4
    assert torch.equal(lora.A.grad.any(1), kept)
    assert torch.equal(lora.B.grad.any(0), kept)


def test_recomputed_blocks_see_the_same_masks():
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
        spec = LoRADropSpec(targets="all-linear", rank=2, drop_prob=0.5)
        adapters = inject(model, spec)
        shake(adapters)
        torch.manual_seed(7)
        for _ in range(3):
            model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in adapters.trainable_parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_compiled_training_draws_the_same_masks():
    model, x = linear(), torch.randn(3, 5, 24)
    _, adapters = adapt(model)
    state = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    expected, found = [], []
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for outputs, call in ((expected, model), (found, compiled)):
        adapters.load_state_dict(state)
        torch.manual_seed(7)
        outputs += [call(x) for _ in range(12)]
    for one, other in zip(expected, found, strict=True):
        assert relative(one, other) < TOLERANCE


# The probability, folders, refusals -----------------------------------------------------------------------


def test_the_probability_may_change_in_training():
    model, x = linear(), torch.randn(2, 24)
    lora, _ = adapt(model)
    lora.drop_prob = 0.999
    assert torch.equal(model(x), lora.base(x))
    lora.drop_prob = 0.0
    assert torch.equal(model(x), plain_lora()(x))


@pytest.mark.parametrize("probability", [1.0, -0.1, float("nan")])
def test_a_probability_outside_its_range_is_refused(probability):
    message = r"adapter.drop_prob: must lie in \[0, 1\); got "
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), drop_prob=probability)
    lora, _ = adapt(linear())
    with pytest.raises(ConfigError, match=message):
        lora.drop_prob = probability
    assert lora.drop_prob == 0.3


def test_folder_opens_in_peft_and_here(tmp_path):
    model = tiny_bert()
    adapters = inject(model, LoRADropSpec(rank=4, alpha=6.0, rslora=True, rank_pattern={"value": 2}))
    shake(adapters)
    model.train()(input_ids=tokens())
    save_adapter(adapters, tmp_path / "ours", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "ours")
    assert relative(logits(theirs), logits(model)) < TOLERANCE
    fresh = tiny_bert()
    assert load_adapter(fresh, tmp_path / "ours").spec.method == "lora_drop"
    assert torch.equal(logits(fresh), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    back = tiny_bert()
    assert load_adapter(back, tmp_path / "theirs").spec.method == "lora"
    assert relative(logits(back), logits(model)) < TOLERANCE
