"""Roles found by structure, against lists written by hand, on tiny models of the installed transformers."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, T5Config, T5ForSequenceClassification

from lora_lab.adapters import LoRASpec, inject
from lora_lab.bench.tiny_architectures import tiny_inputs, tiny_model
from lora_lab.errors import TargetError
from lora_lab.models.architectures import (
    ROLES,
    find_roles,
    head_paths,
    kind_of,
    layer_of,
    position_limit,
    roles_of,
)
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.models.tiny import TINY

ARCHITECTURES = [name for name in TINY if name != "mlp"]

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


LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NEOX = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
BLOOM = NEOX | {
    "query_key_value": "self_attention.query_key_value",
    "attention_output": "self_attention.dense",
}
ATTENTION = {role: LLAMA[role] for role in ("query", "key", "value", "attention_output")}
CAUSAL = {
    "olmo2": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "cohere": LLAMA,
    "stablelm": LLAMA,
    "phi3": {
        "query_key_value": "self_attn.qkv_proj",
        "attention_output": "self_attn.o_proj",
        "gate_up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
    },
    # The experts are parameters of three dimensions, the router's map is not a gate of a feed-forward part.
    "qwen3_moe": ATTENTION,
    "gpt_neox": NEOX
    | {"query_key_value": "attention.query_key_value", "attention_output": "attention.dense"},
    "falcon": BLOOM,
    "bloom": BLOOM,
    "mpt": {
        "query_key_value": "attn.Wqkv",
        "attention_output": "attn.out_proj",
        "up": "ffn.up_proj",
        "down": "ffn.down_proj",
    },
    "gpt_bigcode": {
        "query_key_value": "attn.c_attn",
        "attention_output": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    "phi": ATTENTION | {"attention_output": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"},
    "deepseek_v3": {
        "query": "self_attn.q_b_proj",
        "key_value": "self_attn.kv_b_proj",
        **{role: LLAMA[role] for role in ("attention_output", "gate", "up", "down")},
    },
    "biogpt": ATTENTION | {"attention_output": "self_attn.out_proj", "up": "fc1", "down": "fc2"},
    # A state-space model has neither attention nor feed-forward part.
    "mamba": {},
}


@pytest.mark.parametrize("model_type", CAUSAL)
def test_roles_are_found_by_structure(model_type):
    sites = find_roles(tiny_model("causal_lm", model_type))
    (first, *_) = [site.path for site in sites if site.role == "block"]
    found = {site.role: site.path.removeprefix(f"{first}.") for site in sites if site.block == first}
    assert found == {"block": first} | CAUSAL[model_type]
    assert len(sites) == len({site.path for site in sites})


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name != "mamba"])
def test_default_targets_are_the_attention_of_every_block(model_type):
    model = tiny_model("causal_lm", model_type)
    adapters = inject(model, LoRASpec(rank=2))
    ends = [end for role, end in CAUSAL[model_type].items() if set(role.split("_")) & {"query", "value"}]
    assert len(adapters) == 2 * len(ends)
    assert all(path.endswith(tuple(ends)) for path in adapters.adapters)


def test_a_part_of_a_fused_map_is_no_target_of_its_own():
    model = tiny_model("causal_lm", "phi3")
    with pytest.raises(TargetError, match="query is a part of query_key_value: name that, or"):
        inject(model, LoRASpec(targets=["query"]))
    assert len(inject(model, LoRASpec(targets=["query_key_value"]))) == 2


def test_default_targets_of_a_model_without_attention_are_refused_with_what_there_is():
    with pytest.raises(TargetError, match="mamba has no 'query' .*name what it has.*all-linear.*in_proj"):
        inject(tiny_model("causal_lm", "mamba"), LoRASpec())


def test_fused_roles_stay_with_the_parts_of_other_attentions():
    """Longformer's global projections, which only some tokens use, are not queries, keys or values."""
    sites = find_roles(tiny_model("sequence_to_sequence", "led"))
    encoder = {site.role: site.path.rpartition(".")[2] for site in sites if "encoder.layers.0." in site.path}
    assert encoder == {
        "query": "query",
        "key": "key",
        "value": "value",
        "attention_output": "output",
        "up": "fc1",
        "down": "fc2",
    }


@pytest.mark.parametrize("model_type", ["albert", "convbert", "xlm", "funnel", "modernbert", "mobilebert"])
def test_encoders_have_their_roles_and_fresh_heads(model_type, tmp_path):
    model = tiny_model("sequence_classification", model_type)
    roles = roles_of(model)
    assert {"attention_output", "down", "block", "head"} <= set(roles)
    assert "query" in roles or "query_key_value" in roles
    model.base_model.save_pretrained(tmp_path)
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    missing = {key.split(".")[0] for key in report["missing_keys"]}
    assert missing == set(head_paths(model))


def test_roles_are_the_same_with_adapters_in_place():
    model = tiny_model("causal_lm", "phi3")
    before = find_roles(model)
    inject(model, LoRASpec(rank=2, targets="all-linear"))
    assert find_roles(model) == before
    logits = model(**tiny_inputs(model)).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("bert", "encoder"),
        ("canine", "encoder"),
        ("gpt_neox", "decoder"),
        ("bart", "encoder_decoder"),
        ("beit", "vision"),
        ("no_such_type", None),
    ],
)
def test_kinds_are_those_of_the_installed_transformers(model_type, kind):
    assert kind_of(model_type) == kind


def test_roles_are_listed_in_the_order_of_the_vocabulary():
    for name in ("gpt2", "t5"):
        roles = roles_of(build_model(ModelConfig(name=f"random:{name}")))
        assert roles == [role for role in ROLES if role in roles]


@pytest.mark.parametrize(
    ("path", "layer"),
    [("encoder.layer.3.output.dense", 3), ("12.linear", 12), ("a.b2.c", None), ("h.1.experts.7.up", 1)],
)
def test_layer_of_unknown_models_is_the_first_number_in_the_path(path, layer):
    assert layer_of(path) == layer


TEXT_MODELS = sorted({*TINY} - {"vit", "mlp"})


@pytest.mark.parametrize("changes", [{}, {"max_position_embeddings": 40}])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_models_positions_are_as_many_tokens_as_it_reads(name, changes):
    if name == "t5" and changes:
        return  # it counts distances, and has no such setting
    model = build_model(ModelConfig(name=f"random:{name}", config=changes), 2).eval()
    limit = position_limit(model)

    def read(tokens: int) -> None:
        ids = torch.full((1, tokens), 7)
        ids[0, -1] = model.config.eos_token_id or 3
        model(input_ids=ids)

    with torch.no_grad():
        if limit is None:
            read(300)
            return
        assert 38 <= limit <= 128
        read(limit)
        with pytest.raises((IndexError, RuntimeError)):
            read(limit + 1)
