"""Models that hold, read or write their parts in unusual ways."""

import warnings

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, WhisperConfig, WhisperModel

from lora_lab import METHODS, inject
from lora_lab.errors import IncompatibleError
from tests.adapters.tiny import logits, relative, shake, tiny_bert, tiny_llama

LoRA = METHODS["lora"].Spec


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_padding_row_has_no_gradient(method, padding):
    """As torch and PEFT have it; of the others frequent ones count no more where torch says so."""
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=padding, scale_grad_by_freq=True))
    adapters = inject(model, METHODS[method].Spec(targets=["0"], modules_to_save=[]))
    shake(adapters)
    ids = torch.tensor([[1, 1, 2, padding, padding]])
    model(ids).sum().backward()
    (adapter,) = adapters
    gradient = adapter.A.grad.T if method == "lora" else adapter.trained.weight.grad
    assert not gradient[padding].any()
    torch.testing.assert_close(gradient[1], gradient[2])
    merged = adapter.merged_module()
    assert (merged.padding_idx, merged.scale_grad_by_freq) == (padding, True)
    torch.testing.assert_close(merged(ids), model(ids))


def test_adapters_lend_the_attributes_of_their_base():
    """Whisper asks its convolutions for their stride."""
    config = WhisperConfig(
        vocab_size=43,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=4,
        max_source_positions=10,
        max_target_positions=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    model = WhisperModel(config).eval()
    adapters = inject(model, LoRA(rank=2, targets=["conv1", "conv2", "q_proj"]))
    shake(adapters)
    adapter = adapters.adapters["encoder.conv2"]
    assert (adapter.stride, adapter.kernel_size) == ((2,), (3,))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = adapter.no_such_name
    inputs = {
        "input_features": torch.randn(2, 4, 20),
        "decoder_input_ids": torch.ones(2, 3, dtype=torch.long),
    }
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        with adapters.merged():
            assert relative(model(**inputs).last_hidden_state, expected) < 1e-5


def test_a_model_is_not_written_while_adapters_are_in_it(tmp_path):
    model = tiny_bert()
    adapters = inject(model, LoRA(rank=2))
    shake(adapters)
    for holder in (model, model.bert):
        with pytest.raises(IncompatibleError, match="save_adapter"):
            holder.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    expected = logits(model)
    with adapters.merged() as merged:
        merged.save_pretrained(tmp_path / "merged")
    assert relative(logits(type(model).from_pretrained(tmp_path / "merged")), expected) < 1e-5
    adapters.remove().save_pretrained(tmp_path / "base")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "base")), logits(tiny_bert()))


def test_one_module_under_two_names_is_told_and_adapted_at_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first

        def forward(self, x):
            return self.again(self.first(x))

    model = Twice()
    with pytest.warns(UserWarning, match=r"first is also again"):
        adapters = inject(model, LoRA(rank=2, targets=["first"], modules_to_save=[]))
    assert model.first is model.again
    shake(adapters)
    x = torch.randn(3, 4)
    with adapters.merged():
        merged = model(x)
    torch.testing.assert_close(merged, model(x))


@pytest.mark.parametrize("name", ["head", "fc", "anything"])
def test_a_head_that_stays_frozen_is_told(name):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(8, 8))
    model.add_module(name, nn.Linear(8, 3))
    with pytest.warns(UserWarning, match=rf"{name}, a Linear of 3 outputs, stays frozen"):
        inject(model, LoRA(rank=2, targets=["body"])).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model, LoRA(rank=2, targets=["body"], modules_to_save=[])).remove()
        adapters = inject(model, LoRA(rank=2, targets=["body"], modules_to_save=[name]))
    assert name in adapters.saved


def test_experts_in_one_parameter_are_told_with_their_share():
    config = MixtralConfig(
        vocab_size=43,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config)
    stacked = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 3}
    share = sum(stacked.values()) / sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match=rf"leaves {share:.0%}.*layers\.\*\.mlp\.experts\.gate_up_proj"):
        inject(model, LoRA(rank=2, targets="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(tiny_llama(), LoRA(rank=2, targets="all-linear"))
