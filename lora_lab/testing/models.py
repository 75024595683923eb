"""Tiny models of every kind, with random weights, and a batch for each."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.models.build import ModelConfig, build_model
from lora_lab.models.quantization import QuantizationOptions, quantize

WITHOUT_DROPOUT: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "llama": {},
    "opt": {"dropout": 0.0},
    "llama biased": {"attention_bias": True},
}


class Plain(nn.Module):
    """A model that is not from transformers: a norm, one residual two-layer block, an output map."""

    class Block(nn.Module):
        """The residual block."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(12, 16)
            self.second = nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            """Adds the two layers' output."""
            return x + self.second(self.first(x).tanh())

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.block = self.Block()
        self.output = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Returns three numbers for every row."""
        return self.output(self.block(self.norm(x)))


class Int8Linear(nn.Module):
    """Like quantised linear maps of other libraries: `weight` is a property that dequantises."""

    scale: Tensor
    codes: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The weight, dequantised."""
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Applies the map."""
        return nn.functional.linear(x, self.weight, self.bias)


class One(nn.Module):
    """A model of one linear map, `linear`, from 24 to 16."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.linear = nn.Linear(24, 16, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the map."""
        return self.linear(x)


def tiny_model(name: str) -> nn.Module:
    """Returns a fresh model: always the same weights, in eval mode, without dropout.

    Args:
        name: `bert` and `t5` classify; `llama` (fewer key heads than query heads), `llama biased`, `gpt2`
            (Conv1D made linear) and `opt` model language; `plain` is not from transformers; `nf4` is bert,
            quantised, and `int8` an imitation of it.
    """
    return copy.deepcopy(_built(name))


def tiny_batch(name: str) -> dict[str, Tensor]:
    """Returns the keyword arguments of a call of `tiny_model(name)`: two rows, of which one is padded."""
    generator = torch.Generator().manual_seed(1)
    if name == "plain":
        return {"x": torch.randn(2, 5, 12, generator=generator)}
    ids = torch.randint(5, 100, (2, 6), generator=generator)
    ids[0, 5], ids[1, 4], ids[1, 5] = 3, 3, 0  # the end token, by which t5 classifies, and padding
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(name)


def _build(name: str) -> nn.Module:
    if name == "plain":
        return Plain().eval()
    if name == "nf4":
        return quantize(tiny_model("bert"), "nf4", QuantizationOptions())
    if name == "int8":
        model = tiny_model("bert")
        encoder = model.get_submodule("bert.encoder")
        for path, module in list(encoder.named_modules()):
            if isinstance(module, nn.Linear):
                encoder.set_submodule(path, Int8Linear(module))
        return model.eval()
    kind = name.partition(" ")[0]
    task = "causal_lm" if kind in ("llama", "gpt2", "opt") else "sequence_classification"
    config = ModelConfig(name=f"random:{kind}", task=task, config=WITHOUT_DROPOUT[name])
    model = build_model(config, num_labels=3)
    # Random biases and norms: zeros and ones hide what a method does to them.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()
