"""Every adapter on the embedded encoder in 4 bits: real weights, real codes, each method's own defaults."""

import copy

import pytest
import torch

from lora_lab import assets
from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.base import Adapter, LinearAdapter
from lora_lab.errors import AssetError
from lora_lab.models.build import ModelConfig, build_model, build_tokenizer
from lora_lab.models.quantization import QuantizedLinear, holds_codes
from tests.adapters.tiny import relative, shake

TOLERANCE = 1e-5
SENTENCES = ["A man is eating food.", "The stock market fell, and nobody had seen it coming."]


@pytest.fixture(scope="module")
def built():
    try:
        assets.fetch("minilm")
    except AssetError as error:
        pytest.skip(str(error))
    config = ModelConfig(name="embedded:minilm", pooling="mean", quantization="nf4")
    torch.manual_seed(0)
    model, tokenizer = build_model(config, num_labels=2).eval(), build_tokenizer(config)
    return model, tokenizer(SENTENCES, padding=True, return_tensors="pt")


@pytest.fixture
def encoder(built):
    return copy.deepcopy(built)


@pytest.mark.assets
@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if issubclass(method, LinearAdapter)]
)
def test_starts_at_the_codes_trains_alone_merges_to_plain_maps_and_leaves_no_trace(name, encoder):
    model, batch = encoder
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    expected = model(**batch).logits.detach()
    spec = METHODS[name].Spec(modules_to_save=[], layers=[0, 5])  # all six are made alike
    adapters = inject(model, spec)
    assert all(holds_codes(adapter.base) for adapter in adapters)
    if METHODS[name].identity_at_start:
        assert relative(model(**batch).logits, expected) < TOLERANCE
    shake(adapters, by=0.05)
    moved = model(**batch).logits
    assert relative(moved, expected) > 1e-3
    (moved.square().sum() + adapters.penalty()).backward()
    own = {id(parameter) for parameter in adapters.trainable_parameters()}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters.trainable_parameters())
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    with torch.no_grad(), adapters.merged():
        assert relative(model(**batch).logits, moved) < TOLERANCE
        assert not any(isinstance(module, Adapter) for module in model.modules())
    adapters.remove()
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 36
    after = model.state_dict()
    assert all(torch.equal(after[path], tensor) for path, tensor in before.items())
