import torch
from torch import nn

from lora_lab.adapters import METHODS, Head, inject
from lora_lab.adapters.trained import TrainedCopy
from lora_lab.testing import Variant, contract
from lora_lab.testing.methods import logits_of

test_contract = contract(
    Head,
    Variant(
        on={
            "llama": "its head is pretrained",
            "gpt2": "its head is pretrained",
            "plain": {"modules_to_save": ["output"]},
        }
    ),
)


def test_heads_of_a_double_precision_base_stay_double(make_model, make_batch):
    model = make_model("bert").double()
    inject(model, METHODS["head"].Spec())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert logits_of(model, make_batch("bert")).dtype == torch.float64


def test_a_merged_half_precision_model_has_one_type(make_model, make_batch):
    model = make_model("bert").bfloat16()
    with inject(model, METHODS["lora"].Spec()).merged():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert logits_of(model, make_batch("bert")).dtype == torch.bfloat16


def test_a_half_precision_head_may_be_called_by_keyword():
    head = TrainedCopy(nn.Bilinear(3, 4, 2).bfloat16(), {})
    one, two = torch.randn(5, 3).bfloat16(), torch.randn(5, 4).bfloat16()
    assert torch.equal(head(input1=one, input2=two), head(one, two))
