"""Tiny models of odd shapes, and what the tests of adapters do with them."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 41


def tiny_bert(seed=0, **changes):
    """A classifier with 30 → 30, 30 → 50 and 50 → 30 maps, all with biases that are not zero."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 30,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 16,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return _shaken(BertForSequenceClassification, BertConfig(**sizes | changes), seed)


def tiny_llama(seed=0):
    """A language model with 35 → 30 queries, 35 → 6 keys and values and 35 → 53 feed-forward maps."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=35,
        intermediate_size=53,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=6,
        attention_bias=True,
        pad_token_id=0,
    )
    return _shaken(LlamaForCausalLM, config, seed)


EXPERTS = {
    "vocab_size": 43,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}


def mixtral():
    """Experts as (experts, out, in)."""
    return shaken(MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=4)))


def gpt_oss():
    """Experts as (experts, in, out), with biases."""
    config = GptOssConfig(**EXPERTS, num_local_experts=3, head_dim=8, layer_types=["full_attention"] * 2)
    return shaken(GptOssForCausalLM(config))


def qwen3_moe():
    config = Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=16, num_experts=4, head_dim=8)
    return shaken(Qwen3MoeForCausalLM(config))


@torch.no_grad()
def shaken(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


MODELS = {"bert": tiny_bert, "llama": tiny_llama}


def _shaken(model_class, config, seed):
    """Biases and norms start at 0 and 1, which would hide faults."""
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def linear(rows=16, columns=24, bias=True, dtype=torch.float32, seed=0):
    """A model of one linear map, `0`: 24 → 16, as in the specification's table of counts."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(columns, rows, bias=bias, dtype=dtype))


def tokens(seed=1):
    return torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tokens()).logits


@torch.no_grad()
def shake(adapters, by=0.1, seed=2):
    """Moves every trained tensor away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.trainable_parameters():
        parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))


def train(model, adapters, x, steps=3, learning_rate=0.05):
    """Takes a few steps towards a random target."""
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=learning_rate)
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(3)).to(x)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    model.eval()


def reached(model, adapters, x):
    """Names of the trained tensors that the first step's gradient reaches; the base must be spared."""
    model.train()
    model(x).square().sum().backward()
    own = {id(parameter) for parameter in adapters.trainable_parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    named = adapters.named_parameters().items()
    return {name.rpartition(".")[2] for name, p in named if p.grad is not None and p.grad.abs().max() > 0}


def relative(given, expected):
    """max |Δ| / max |expected|: how far apart outputs are, in units of the largest of them."""
    return float((given - expected).detach().abs().max() / expected.detach().abs().max())
