"""Models that are cast after adapters were put in: half precision, bfloat16 and double, for every method."""

import pytest
import torch

from lora_lab import METHODS, inject
from tests.adapters.tiny import logits, relative, shake, tiny_bert, tokens

OPTIONS = {
    "oft": {"oft_block_size": 5},
    "boft": {"boft_block_size": 5},
    "road": {"group_size": 10},
    "randlora": {"rank": 3},
    "fourierft": {"n_frequency": 30},
    "salt": {"rank": 3, "r_lora": 2},
    "psoft": {"rank": 4},
    "antipasto": {"rank": 4},
    "pissa": {"mode": "residual", "rank": 3},
    "full": {"targets": ["word_embeddings", "query"]},
    "lora": {"rank": 3, "targets": ["query", "word_embeddings"]},
}
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float64: 1e-5}


def adapted(method):
    model = tiny_bert()
    adapters = inject(model, METHODS[method].Spec(**OPTIONS.get(method, {})))
    shake(adapters, by=0.02)
    return model, adapters


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_cast_model_runs_learns_and_merges(method, dtype):
    model, adapters = adapted(method)
    expected = logits(model)
    model.to(dtype)
    found = logits(model)
    assert found.dtype == dtype
    assert relative(found.double(), expected.double()) < TOLERANCES[dtype]
    model.train()
    (model(input_ids=tokens()).logits.float().square().sum() + adapters.penalty()).backward()
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in adapters.named_parameters().items():
        assert parameter.dtype == wide, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert any(parameter.grad.any() for parameter in adapters.trainable_parameters())
    if METHODS[method].mergeable:
        adapters.merge()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert relative(logits(model).double(), found.double()) < TOLERANCES[dtype]


def test_what_is_trained_keeps_its_digits():
    model, adapters = adapted("lora")
    before = {name: tensor.clone() for name, tensor in adapters.named_parameters().items()}
    model.half().float()
    for name, tensor in adapters.named_parameters().items():
        assert torch.equal(tensor, before[name]), name


def test_full_fine_tuning_in_half_precision_makes_steps_that_bfloat16_cannot_hold():
    model = tiny_bert().bfloat16()
    expected = logits(model)
    adapters = inject(model, METHODS["full"].Spec())
    assert torch.equal(logits(model), expected)
    optimizer = torch.optim.SGD(adapters.trainable_parameters(), lr=1e-5)
    weight = adapters.named_parameters()["bert.encoder.layer.0.attention.self.value.trained.weight"]
    before = weight.detach().clone()
    model(input_ids=tokens()).logits.square().sum().backward()
    optimizer.step()
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, before)
    assert torch.equal(weight.bfloat16(), before.bfloat16())
    found = logits(model)
    assert torch.equal(logits(adapters.merge()), found)
