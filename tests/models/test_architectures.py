"""The role tables against tiny models of the installed transformers."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, T5Config, T5ForSequenceClassification

from lora_lab.models.architectures import (
    ARCHITECTURES,
    ROLES,
    find_roles,
    head_paths,
    layer_of,
    roles_of,
)
from lora_lab.models.build import ModelConfig, build_model

PLAIN = ["query", "key", "value", "attention_output", "up", "down", "block", "head"]
GATED = ["query", "key", "value", "attention_output", "up", "gate", "down", "block", "head"]
GATED_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
CROSS = ["cross_query", "cross_key", "cross_value", "cross_attention_output"]
EXPECTED = (
    {name: PLAIN for name in ARCHITECTURES}
    | {name: GATED for name in GATED_TYPES}
    | {
        "gpt2": ["query_key_value", "attention_output", "up", "down", "block", "head"],
        "t5": [*PLAIN[:4], *CROSS, *PLAIN[4:]],
    }
)
HEADS = {
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "gpt2": ["score"],
    "opt": ["score"],
    "t5": ["classification_head"],
} | {name: ["score"] for name in GATED_TYPES}


def shapes_of_role(model: nn.Module, role: str) -> set[tuple[int, ...]]:
    return {
        tuple(model.get_submodule(site.path).weight.shape) for site in find_roles(model) if site.role == role
    }


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_has_its_roles(model_type):
    model = build_model(ModelConfig(name=f"random:{model_type}"))
    assert roles_of(model) == EXPECTED[model_type]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_role_stands_once_in_every_block(model_type):
    model = build_model(ModelConfig(name=f"random:{model_type}", config={"num_hidden_layers": 3}))
    sites = find_roles(model)
    blocks = [site.path for site in sites if site.role == "block"]
    assert len(blocks) == (6 if model_type == "t5" else 3)
    for role in set(EXPECTED[model_type]) - {"block", "head", *CROSS}:
        assert [site.block for site in sites if site.role == role] == blocks


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_part_is_a_linear_layer_of_its_width(model_type):
    model = build_model(ModelConfig(name=f"random:{model_type}"))
    for site in find_roles(model):
        if site.role not in ("block", "head"):
            assert type(model.get_submodule(site.path)) is nn.Linear
    assert shapes_of_role(model, "up") == {(64, 32)}
    assert shapes_of_role(model, "down") == {(32, 64)}
    assert shapes_of_role(model, "attention_output") == {(32, 32)}
    if model_type == "gpt2":
        assert shapes_of_role(model, "query_key_value") == {(96, 32)}
    else:
        assert shapes_of_role(model, "query") == {(32, 32)}
        assert shapes_of_role(model, "value") == {(16, 32)} if model_type in GATED_TYPES else {(32, 32)}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_bare_model_has_the_same_sites_without_prefix_and_head(model_type):
    full = build_model(ModelConfig(name=f"random:{model_type}"))
    with torch.device("meta"):
        bare = AutoModel.from_config(full.config)
    prefix = f"{full.base_model_prefix}."
    expected = [site.path.removeprefix(prefix) for site in find_roles(full) if site.role != "head"]
    if model_type == "gpt2":
        assert roles_of(bare) == EXPECTED["gpt2"][:-1]
    assert [site.path for site in find_roles(bare)] == expected
    assert head_paths(bare) == []


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_heads_are_exactly_what_a_pretrained_encoder_lacks(model_type, tmp_path):
    full = build_model(ModelConfig(name=f"random:{model_type}"))
    assert head_paths(full) == HEADS.get(model_type, ["classifier"])
    if model_type == "gpt2":
        return  # saving the linearised base by its own class is not a checkpoint of GPT-2
    full.base_model.save_pretrained(tmp_path)
    _, report = type(full).from_pretrained(tmp_path, output_loading_info=True)
    missing = {key.split(".")[0] for key in report["missing_keys"]}
    assert missing == set(head_paths(full))


def test_layers_are_numbered_by_block():
    sites = find_roles(build_model(ModelConfig(name="random:bert")))
    assert [(site.path, site.layer) for site in sites if site.role == "up"] == [
        ("bert.encoder.layer.0.intermediate.dense", 0),
        ("bert.encoder.layer.1.intermediate.dense", 1),
    ]


def test_both_stacks_of_t5_count_their_own_blocks_and_only_the_decoder_crosses():
    sites = find_roles(build_model(ModelConfig(name="random:t5")))
    queries = [(site.block, site.layer) for site in sites if site.role == "query"]
    assert queries == [
        ("transformer.encoder.block.0", 0),
        ("transformer.encoder.block.1", 1),
        ("transformer.decoder.block.0", 0),
        ("transformer.decoder.block.1", 1),
    ]
    assert [site.path for site in sites if site.role == "cross_value"] == [
        f"transformer.decoder.block.{number}.layer.1.EncDecAttention.v" for number in (0, 1)
    ]


def test_gated_t5_has_the_role_gate_on_the_activated_half():
    config = T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    sites = find_roles(T5ForSequenceClassification(config))
    assert [site.path.rpartition(".")[2] for site in sites if site.role == "gate"] == ["wi_0", "wi_0"]
    assert [site.path.rpartition(".")[2] for site in sites if site.role == "up"] == ["wi_1", "wi_1"]


def test_split_gpt2_has_three_roles_in_place_of_the_fused_one():
    model = build_model(ModelConfig(name="random:gpt2", split_fused=True))
    assert roles_of(model) == PLAIN
    paths = [site.path for site in find_roles(model) if site.role == "query"]
    assert paths[0] == "transformer.h.0.attn.c_attn.query"


def test_language_modelling_head_is_no_task_head():
    for model_type in ("gpt2", "llama", "opt"):
        assert head_paths(build_model(ModelConfig(name=f"random:{model_type}", task="causal_lm"))) == []


def test_pooled_encoder_has_the_roles_of_its_encoder_and_one_head():
    model = build_model(ModelConfig(name="random:deberta-v2", pooling="mean"))
    assert roles_of(model) == PLAIN
    assert head_paths(model) == ["classifier"]


def test_plain_modules_have_no_roles():
    assert find_roles(nn.Sequential(nn.Linear(2, 2))) == []
    mlp = build_model(ModelConfig(name="random:mlp"))
    assert (roles_of(mlp), head_paths(mlp)) == ([], [])


def test_roles_are_listed_in_the_order_of_the_vocabulary():
    for architecture in ARCHITECTURES.values():
        assert list(architecture.roles) == [role for role in ROLES if role in architecture.roles]


@pytest.mark.parametrize(
    ("path", "layer"),
    [("encoder.layer.3.output.dense", 3), ("12.linear", 12), ("a.b2.c", None), ("h.1.experts.7.up", 1)],
)
def test_layer_of_unknown_models_is_the_first_number_in_the_path(path, layer):
    assert layer_of(path) == layer
