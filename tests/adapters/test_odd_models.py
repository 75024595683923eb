"""Models that hold, read or write their parts in unusual ways."""

import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import WhisperConfig, WhisperModel

from lora_lab import METHODS, inject, load_adapter, save_adapter
from lora_lab.adapters import parameter_count
from lora_lab.bench.tiny_architectures import tiny_model
from lora_lab.errors import IncompatibleError, TargetError
from tests.adapters.tiny import (
    gpt_oss,
    logits,
    mixtral,
    qwen3_moe,
    relative,
    shake,
    tiny_bert,
    tiny_llama,
    tokens,
)

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
    adapters.remove()
    with pytest.raises(TargetError, match="'again' is the same module as 'first'"):
        inject(model, LoRA(rank=2, targets=["again"], modules_to_save=[]))
    with pytest.raises(TargetError, match="Twice has no ''"):
        inject(model, LoRA(rank=2, targets=[""], modules_to_save=[]))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("head", nn.Linear(8, 3)),
        ("fc", nn.Linear(8, 3)),
        ("anything", nn.Linear(8, 3)),
        ("top", nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))),
    ],
    ids=["head", "fc", "anything", "Sequential"],
)
def test_a_head_that_stays_frozen_is_told(name, head):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(8, 8))
    model.add_module(name, head)
    with pytest.warns(UserWarning, match=rf"{name}, a \w+ of 3 outputs, stays frozen"):
        inject(model, LoRA(rank=2, targets=["body"])).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model, LoRA(rank=2, targets=["body"], modules_to_save=[])).remove()
        adapters = inject(model, LoRA(rank=2, targets=["body"], modules_to_save=[name]))
    assert name in adapters.saved


@pytest.mark.parametrize("method", ["lora", "oft"])
def test_experts_that_all_linear_leaves_out_are_told_with_their_share(method):
    model = mixtral()
    stacked = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 3}
    share = sum(stacked.values()) / sum(p.numel() for p in model.parameters())
    way = {"lora": "Add experts to targets", "oft": "oft cannot adapt these"}[method]
    options = {"oft": {"oft_block_size": 4}}.get(method, {"rank": 2})
    with pytest.warns(
        UserWarning, match=rf"leaves {share:.0%}.*layers\.\*\.mlp\.experts\.gate_up_proj.*{way}"
    ):
        inject(model, METHODS[method].Spec(targets="all-linear", **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(tiny_llama(), LoRA(rank=2, targets="all-linear"))


@pytest.mark.parametrize("make", [mixtral, gpt_oss, qwen3_moe])
def test_lora_on_stacked_experts_learns_merges_and_opens_in_peft(make, tmp_path):
    model = make()
    spec = LoRA(rank=3, alpha=5, targets=["q_proj", "experts"])
    count = parameter_count(model, spec)
    adapters = inject(model, spec)
    assert adapters.trainable_count() == count
    start = logits(model)
    assert relative(start, logits(make())) < 1e-6
    shake(adapters)
    model.train()(tokens()).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.trainable_parameters())
    expected = logits(model)
    assert relative(expected, start) > 1e-2
    with adapters.merged():
        assert relative(logits(model), expected) < 1e-5
    save_adapter(adapters, tmp_path / "adapter")
    assert relative(logits(peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")), expected) < 1e-5
    again = make()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    model.bfloat16()
    assert relative(logits(model).float(), expected) < 0.1


def test_single_parameters_of_experts_are_left_out_or_have_their_own_rank_and_a_router_is_adapted(tmp_path):
    model = mixtral()
    start = logits(model)
    spec = LoRA(
        rank=2, targets=["experts", "mlp.gate"], exclude=["layers.0.mlp.experts.gate_up_proj"],
        rank_pattern={"experts": 4, r"layers\.1\.mlp\.experts\.gate_up_proj": 3},
        alpha_pattern={"experts.down_proj": 5.0},
    )  # fmt: skip
    adapters = inject(model, spec)
    shapes = {name: tuple(p.shape) for name, p in adapters.named_parameters().items() if ".A." in name}
    assert shapes == {
        "model.layers.0.mlp.gate.A.weight": (1, 2, 16),
        "model.layers.0.mlp.experts.A.down_proj": (4, 4, 24),
        "model.layers.1.mlp.gate.A.weight": (1, 2, 16),
        "model.layers.1.mlp.experts.A.gate_up_proj": (4, 3, 16),
        "model.layers.1.mlp.experts.A.down_proj": (4, 4, 24),
    }
    assert adapters.trainable_count() == parameter_count(mixtral(), spec)
    shake(adapters)
    expected = logits(model)
    assert relative(expected, start) > 1e-2
    save_adapter(adapters, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "adapter")
    assert relative(logits(theirs), expected) < 1e-5
    again = mixtral()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


def test_a_pattern_to_exclude_that_is_none_is_refused():
    with pytest.raises(TargetError, match=r"adapter.exclude: '\(' is not a regular expression"):
        inject(tiny_llama(), LoRA(rank=2, targets=["q_proj"], exclude=["regex:("]))


@pytest.mark.parametrize("name", ["experts.nothing", "down_proj.weight"])
def test_what_no_parameter_of_the_experts_is_called_is_refused(name):
    with pytest.raises(TargetError, match=f"exclude: '{name}'"):
        inject(mixtral(), LoRA(rank=2, targets=["experts"], exclude=[name]))
    with pytest.raises(TargetError, match=f"rank_pattern: '{name}'"):
        inject(mixtral(), LoRA(rank=2, targets=["experts"], rank_pattern={name: 3}))
    everything = ["experts.gate_up_proj", "experts.down_proj"]
    with pytest.raises(TargetError, match="leaves out everything"):
        inject(mixtral(), LoRA(rank=2, targets=["experts"], exclude=everything))


def test_a_shared_expert_that_peft_takes_for_the_experts_is_told_when_it_is_saved(tmp_path):
    def made(kind):
        return tiny_model("causal_lm", kind).eval()

    model = made("glm4_moe")
    shake(adapters := inject(model, LoRA(rank=2, targets=["q_proj", "shared_experts.down_proj"])))
    with pytest.warns(
        UserWarning, match=r"shared_experts\.down_proj: .* PEFT takes this name for the experts"
    ):
        save_adapter(adapters, tmp_path / "adapter")
    assert "shared_experts.down_proj: in models like" in (tmp_path / "adapter" / "README.md").read_text()
    again = made("glm4_moe")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(inject(made("glm4_moe"), LoRA(rank=2, targets=["q_proj"])), tmp_path / "plain")
        save_adapter(inject(tiny_llama(), LoRA(rank=2, targets=["down_proj"])), tmp_path / "no experts")
    assert "PEFT opens it as LORA" in (tmp_path / "plain" / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = logits(peft.PeftModel.from_pretrained(made("glm4_moe"), tmp_path / "adapter"))
        except (ValueError, RuntimeError):  # the day it refuses is as good
            return
    assert relative(theirs, logits(model)) > 1e-3


def test_options_without_meaning_for_stacked_experts_are_refused():
    for options in ({"dropout": 0.1}, {"lora_bias": True}, {"init": "olora"}):
        with pytest.raises(IncompatibleError, match="no dropout, no lora_bias and one start"):
            inject(mixtral(), LoRA(rank=2, targets=["experts"], **options))
