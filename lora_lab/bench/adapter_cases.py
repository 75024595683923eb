"""What `adapter_cost` compares: shapes of models, and each method with our options and with PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import peft
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from lora_lab.adapters import METHODS
from lora_lab.adapters.spec import AdapterSpec


class Task(nn.Module):
    """A model with a loss, between embeddings and a fixed direction of the output.

    The loss is linear, so autograd keeps only a buffer for it.
    """

    direction: Tensor

    def __init__(self, model: nn.Module, takes: str, rows: int, length: int, width: int):
        super().__init__()
        self.model, self.takes = model, takes
        direction = torch.randn(rows, length, width) / (rows * length * width) ** 0.5
        self.register_buffer("direction", direction, persistent=False)

    def forward(self, embeddings: Float[Tensor, "rows length width"]) -> SimpleNamespace:
        """Returns `output` and `loss`; PEFT's AdaLoRA adds its penalty to the latter."""
        output = self.model(**{self.takes: embeddings}).last_hidden_state
        return SimpleNamespace(output=output, loss=torch.dot(output.flatten(), self.direction.flatten()))


@dataclass(frozen=True)
class Shapes:
    """A model's shapes and its batch."""

    model: Callable[[], nn.Module]
    """Makes the model, with random weights and without dropout."""
    takes: str
    """Name of its argument that is the embeddings."""
    linears: list[str]
    """Names of all its linear maps, as PEFT takes them."""
    down: str
    """Pattern of the paths of the last maps of feed-forward parts, for IA3."""
    rows: int
    length: int
    width: int = 768

    def task(self) -> Task:
        """Makes the model with its loss, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            task = Task(self.model(), self.takes, self.rows, self.length, self.width)
        return task.requires_grad_(False).train()

    def embeddings(self) -> Float[Tensor, "rows length width"]:
        """Draws the model's input, the same every time."""
        return torch.randn(self.rows, self.length, self.width, generator=torch.Generator().manual_seed(1))


def bert(width: int = 768, inner: int = 3072, layers: int = 3, heads: int = 12) -> nn.Module:
    """Makes the blocks of a BERT, of the base model's shapes unless others are given."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    silent: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=8, num_attention_heads=heads, **sizes, **silent)
    return BertModel(config).encoder


def llama() -> LlamaModel:
    """Makes a decoder of the shapes of a Llama of 160 million parameters."""
    sizes: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 3}
    return LlamaModel(LlamaConfig(vocab_size=8, num_attention_heads=12, use_cache=False, **sizes))


BERT_LINEARS = ["query", "key", "value", "dense"]
BERT_DOWN = r".*\.\d+\.output\.dense"
SHAPES = {
    "bert": Shapes(bert, "hidden_states", BERT_LINEARS, BERT_DOWN, rows=8, length=128),
    "llama": Shapes(
        llama,
        "inputs_embeds",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        r".*\.down_proj",
        rows=2,
        length=256,
    ),
}


@dataclass(frozen=True)
class Case:
    """One method with our options and with PEFT's, and the goals for its cost, as ours / PEFT's."""

    method: str
    ours: Mapping[str, Any]
    config: str
    """Name of PEFT's config class."""
    theirs: Mapping[str, Any]
    time: float
    """Goal for a step's time."""
    saved: float
    """Goal for the bytes kept between forward and backward, on BERT's shapes."""
    stacked: bool = field(default=False, kw_only=True)
    """Whether our files also hold frozen tensors, which PEFT's modules do not have."""

    def spec(self, shapes: Shapes) -> AdapterSpec:
        """Returns our spec."""
        fields: dict[str, Any] = {"targets": "all-linear", "modules_to_save": [], **self.ours}
        if self.method == "ia3":
            fields["feedforward_modules"] = [f"regex:{shapes.down}"]
        return METHODS[self.method].Spec(**fields)

    def peft(self, shapes: Shapes) -> peft.PeftConfig:
        """Returns PEFT's config."""
        fields = {"target_modules": shapes.linears, **self.theirs}
        if self.method == "ia3":
            fields["feedforward_modules"] = shapes.down
        return getattr(peft, self.config)(**fields)


LORA, R16, DROP, PEFT_DROP = "LoraConfig", {"rank": 16}, {"dropout": 0.1}, {"lora_dropout": 0.1}
ALLOCATED = {"init_r": 12, "target_r": 8, "total_step": 1000}
CASES = {
    "lora": Case("lora", R16, LORA, {"r": 16}, 0.97, 0.66),
    "lora_dropout": Case("lora", R16 | DROP, LORA, {"r": 16} | PEFT_DROP, 0.92, 0.40),
    "dora": Case("dora", R16, LORA, {"r": 16, "use_dora": True}, 0.80, 0.37),
    "dora_dropout": Case("dora", R16 | DROP, LORA, {"r": 16, "use_dora": True} | PEFT_DROP, 0.55, 0.30),
    "pissa": Case("pissa", R16, LORA, {"r": 16, "init_lora_weights": "pissa"}, 0.97, 0.66, stacked=True),
    "pissa_residual": Case(
        "pissa",
        R16 | {"mode": "residual"},
        LORA,
        {"r": 16, "init_lora_weights": "pissa"},
        0.97,
        0.66,
        stacked=True,
    ),
    "adalora": Case("adalora", {"rank": 12}, "AdaLoraConfig", ALLOCATED, 0.93, 0.65),
    "loha": Case("loha", {"rank": 8}, "LoHaConfig", {"r": 8}, 0.52, 0.48),
    "lokr": Case("lokr", {"rank": 8}, "LoKrConfig", {"r": 8}, 0.55, 0.42),
    "ia3": Case("ia3", {}, "IA3Config", {}, 1.00, 0.50),
    "oft": Case("oft", {"auto_adjust": True}, "OFTConfig", {}, 1.00, 0.67),
    "boft": Case("boft", {"boft_block_size": 8}, "BOFTConfig", {"boft_block_size": 8}, 0.11, 0.23),
    "road": Case("road", {}, "RoadConfig", {}, 0.97, 0.45),
    "hra": Case("hra", {"rank": 8}, "HRAConfig", {"r": 8}, 0.13, 0.07),
    "psoft": Case("psoft", R16, "PsoftConfig", {"r": 16}, 1.00, 1.01, stacked=True),
    "vera": Case("vera", {"rank": 256}, "VeraConfig", {"r": 256}, 1.02, 0.57),
    "fourierft": Case("fourierft", {"scaling": 15.0}, "FourierFTConfig", {"scaling": 15.0}, 0.54, 0.42),
    # With the default alpha of 640 the updates are far larger than W, and rounding decides where attention
    # goes.
    "randlora": Case(
        "randlora",
        {"rank": 32, "alpha": 8.0},
        "RandLoraConfig",
        {"r": 32, "randlora_alpha": 8},
        1.00,
        0.75,
    ),
    "delora": Case("delora", {"rank": 8, "init": "zero_b"}, "DeloraConfig", {"r": 8}, 0.97, 0.55),
}
"""Every method that both libraries have, by the name of its row."""
