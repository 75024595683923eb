"""What all tests share: seeds, tiny random models with their batches, and no network."""

import copy
import os
import socket

# Of tiny tensors several threads only wait for each other, in the processes that tests start too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lora_lab.models.build import ModelConfig, build_model  # noqa: E402
from lora_lab.models.quantization import QuantizationOptions, quantize  # noqa: E402

torch.set_num_threads(1)

LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuses connections to other machines: a test that passes only online is a fault."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise OSError(f"tests run offline; connection to {address} refused")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def register(monkeypatch):
    """`lora_lab.register`, for the length of one test."""
    from lora_lab import CONTROLLERS, METHODS, register

    for table in (METHODS, CONTROLLERS):
        monkeypatch.setattr(table, "_kinds", dict(table))
    return register


class Plain(nn.Module):
    """A model that is none of transformers': a norm, one residual two-layer block, an output map."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 16)
            self.second = nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.first(x).tanh())

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.block = self.Block()
        self.output = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.block(self.norm(x)))


class Int8Linear(nn.Module):
    """Stands for any quantised linear map: `weight` is a property that dequantises."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


OPTIONS = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "llama": {},
    "opt": {"dropout": 0.0},
    "llama biased": {"attention_bias": True},
}


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "plain":
        return Plain().eval()
    if name == "nf4":
        return quantize(_build("bert"), "nf4", QuantizationOptions())
    if name == "int8":
        model = _build("bert")
        for path, module in list(model.bert.encoder.named_modules()):
            if isinstance(module, nn.Linear):
                model.bert.encoder.set_submodule(path, Int8Linear(module))
        return model.eval()
    kind = name.partition(" ")[0]
    task = "causal_lm" if kind in ("llama", "gpt2", "opt") else "sequence_classification"
    model = build_model(ModelConfig(name=f"random:{kind}", task=task, config=OPTIONS[name]), num_labels=3)
    # Random biases and norms: zeros and ones hide what a method does to them.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def make_model():
    """Returns a function from a name to a fresh model: always the same weights, eval mode, no dropout.

    `bert` and `t5` classify; `llama` (fewer key heads than query heads), `gpt2` (Conv1D made linear) and
    `opt` model language; `plain` is none of transformers'; `nf4` is bert, quantised, and `int8` a stand-in
    for it.
    """
    built: dict[str, nn.Module] = {}

    def make(name: str) -> nn.Module:
        if name not in built:
            with torch.random.fork_rng():
                built[name] = _build(name)
        return copy.deepcopy(built[name])

    return make


@pytest.fixture(scope="session")
def make_batch():
    """Returns a function: the model's name → its keyword arguments, two rows of which one is padded."""

    def make(name: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if name == "plain":
            return {"x": torch.randn(2, 5, 12, generator=generator)}
        ids = torch.randint(5, 100, (2, 6), generator=generator)
        ids[0, 5], ids[1, 4], ids[1, 5] = 3, 3, 0  # the end token, which t5 classifies by, and padding
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    return make
