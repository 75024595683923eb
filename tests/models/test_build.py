"""Building models and tokenizers; everything here is tiny and random but the tests marked `assets`."""

import copy
import json
import os
import pickle
import shutil
import time

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from lora_lab import assets
from lora_lab.bench.tiny_architectures import tiny_config, tiny_model
from lora_lab.errors import AssetError, CheckpointError, ConfigError, IncompatibleError
from lora_lab.models import sources
from lora_lab.models.architectures import find_roles, kind_of, roles_of
from lora_lab.models.build import ModelConfig, build_model, build_tokenizer, check_model
from lora_lab.models.conversion import FusedProjection, linearise, save_model, split_fused_projections
from lora_lab.models.perceptron import MultiLayerPerceptron
from lora_lab.models.sources import EmbeddedSource, FolderSource, HubSource, RandomSource
from lora_lab.models.tiny import TINY

TEXT_TYPES = [name for name in TINY if name not in ("vit", "mlp")]
DECODERS = [name for name in TEXT_TYPES if kind_of(name) == "decoder"]
POOLED_TYPES = [name for name in TEXT_TYPES if name != "t5"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _seeded_and_offline(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)


def tiny(name: str, **fields) -> ModelConfig:
    return ModelConfig(name=f"random:{name}", **fields)


def batch(config: ModelConfig) -> dict[str, torch.Tensor]:
    texts = ["a short text", "tiny"]
    return dict(build_tokenizer(config)(texts, padding=True, return_tensors="pt"))


def tiny_gpt2(model_class=GPT2LMHeadModel):
    return model_class(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def fault_of(config: ModelConfig) -> str:
    (fault,) = check_model(config)
    return fault


# Every random model


@pytest.mark.parametrize("name", TEXT_TYPES)
def test_text_models_classify_what_their_own_tokenizer_gives(name):
    config = tiny(name)
    assert build_model(config, num_labels=3)(**batch(config)).logits.shape == (2, 3)


@pytest.mark.parametrize("name", TEXT_TYPES)
def test_padding_does_not_change_a_prediction(name):
    config = tiny(name)
    model = build_model(config, num_labels=3).eval()
    alone = dict(build_tokenizer(config)(["tiny"], return_tensors="pt"))
    torch.testing.assert_close(model(**batch(config)).logits[1:], model(**alone).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_model_language_over_their_vocabulary(name):
    config = tiny(name, task="causal_lm")
    inputs = batch(config)
    assert build_model(config)(**inputs).logits.shape == (*inputs["input_ids"].shape, 128)


@pytest.mark.parametrize("name", TEXT_TYPES)
def test_regression_has_one_output_whatever_the_number_of_labels(name):
    config = tiny(name, task="regression")
    assert build_model(config, num_labels=5)(**batch(config)).logits.shape == (2, 1)


@pytest.mark.parametrize("name", TINY)
def test_parameters_stay_trainable_and_follow_the_global_seed(name):
    torch.manual_seed(7)
    first = build_model(tiny(name), num_labels=2)
    torch.manual_seed(7)
    second = build_model(tiny(name), num_labels=2)
    assert all(parameter.requires_grad for parameter in first.parameters())
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["bert", "gpt2", "mlp"])
def test_weights_have_the_configured_type(name):
    model = build_model(tiny(name, dtype="bfloat16"), num_labels=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_vision_model_classifies_images_and_reads_no_text():
    assert build_tokenizer(tiny("vit")) is None
    logits = build_model(tiny("vit"), num_labels=10)(pixel_values=torch.randn(2, 1, 8, 8)).logits
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("name", ["vit_msn", "beit"])
def test_folders_of_other_vision_models_classify_images_too(name, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model(name, **sizes, image_size=8, patch_size=2, num_labels=3)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    assert build_tokenizer(ModelConfig(name=str(tmp_path))) is None
    model = build_model(ModelConfig(name=str(tmp_path)), num_labels=3)
    assert model(pixel_values=torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)
    assert {"query", "value", "block", "head"} <= set(roles_of(model))


@pytest.mark.parametrize("name", ["gpt2", "distilbert", "t5", "bert"])
def test_common_config_keys_reach_every_architecture(name):
    changes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_model(tiny(name, config=changes), num_labels=2)
    assert model.config.hidden_size == 16
    assert max(site.layer for site in find_roles(model) if site.role == "block") == 0


# Tokenizers of random models


def test_characters_survive_encoding_and_decoding():
    tokenizer = build_tokenizer(tiny("llama"))
    text = "Copy: 17+25 = 42!\n\\end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id == 0
    assert tokenizer.eos_token_id == 3


def test_encoders_frame_their_texts_and_number_them():
    encoded = build_tokenizer(tiny("bert"))("ab", "c")
    assert encoded["input_ids"][0] == 2
    assert [token for token in encoded["input_ids"] if token < 5] == [2, 3, 3]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_decoders_add_no_tokens_and_t5_adds_its_end():
    assert len(build_tokenizer(tiny("gpt2"))("ab")["input_ids"]) == 2
    assert build_tokenizer(tiny("t5"))("ab")["input_ids"][-1] == 3


@pytest.mark.parametrize("name", TEXT_TYPES)
def test_longest_text_still_has_positions(name):
    config = tiny(name)
    tokenizer = build_tokenizer(config)
    inputs = tokenizer(["x" * 1000], truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == (512 if name == "t5" else 128)
    assert build_model(config, num_labels=2)(**inputs).logits.isfinite().all()


def test_small_vocabulary_keeps_the_common_characters():
    tokenizer = build_tokenizer(tiny("bert", config={"vocab_size": 12}))
    assert max(tokenizer(" abcxyz")["input_ids"]) < 12
    assert tokenizer("z", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_decoder_without_padding_token_pads_with_its_end(tmp_path):
    backend = build_tokenizer(tiny("gpt2")).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    model = build_model(tiny("gpt2", config={"pad_token_id": None}), num_labels=3)
    model.config.pad_token_id = None
    save_model(model, tmp_path)
    config = ModelConfig(name=str(tmp_path))
    model, tokenizer = build_model(config, num_labels=3).eval(), build_tokenizer(config)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 3
    both = model(**tokenizer(["a short text", "tiny"], padding=True, return_tensors="pt")).logits
    alone = model(**tokenizer(["tiny"], return_tensors="pt")).logits
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


# Linear layers


def test_linearised_gpt2_equals_the_original():
    original = tiny_gpt2()
    tokens = torch.randint(32, (2, 9))
    expected = original(tokens).logits
    model = linearise(copy.deepcopy(original))
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    torch.testing.assert_close(model(tokens).logits, expected, **TOLERANCE)
    fused, conv = model.transformer.h[0].attn.c_attn, original.transformer.h[0].attn.c_attn
    assert torch.equal(fused.weight, conv.weight.T)
    assert torch.equal(fused.bias, conv.bias)


def test_split_projections_equal_the_fused_one():
    model = linearise(tiny_gpt2())
    tokens = torch.randint(32, (2, 9))
    expected = model(tokens).logits
    attention = model.transformer.h[1].attn
    weight = attention.c_attn.weight.detach().clone()
    split_fused_projections(model)
    parts = (attention.c_attn.query, attention.c_attn.key, attention.c_attn.value)
    assert torch.equal(torch.cat([part.weight for part in parts]), weight)
    assert all(type(part) is nn.Linear and part.weight.shape == (16, 16) for part in parts)
    torch.testing.assert_close(model(tokens).logits, expected, **TOLERANCE)


FUSED = {
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "bloom": {},
    "persimmon": {},
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "falcon by heads": {"multi_query": False, "new_decoder_architecture": False, "num_kv_heads": 4},
    "falcon in groups": {"new_decoder_architecture": True},
    "phi3": {},
    "mpt": {},
    "codegen": {},
    "gpt_bigcode": {"multi_query": True},
    "gpt_bigcode by heads": {"multi_query": False},
    "openai-gpt": {},
}


def fused_model(name):
    """A model whose heads of keys are fewer than those of queries where it can be."""
    torch.manual_seed(0)
    model_type = name.split()[0]
    config = tiny_config(model_type)
    for key, value in FUSED[name].items():
        setattr(config, key, value)
    model = linearise(AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_split_projections_are_the_query_the_key_and_the_value(name, tmp_path):
    """The first token of a causal model attends to itself alone: its query and key do nothing to it."""
    model = fused_model(name)
    tokens = torch.randint(3, 90, (2, 5))
    expected = model(tokens).logits
    split_fused_projections(model)
    assert {"query", "key", "value", "attention_output"} <= set(roles_of(model))
    torch.testing.assert_close(model(tokens).logits, expected, **TOLERANCE)
    moved = {}
    for role in ("query", "key", "value"):
        handles = [
            model.get_submodule(site.path).register_forward_hook(
                lambda _, __, y: torch.cat((y[:, :1] + torch.linspace(-3, 2, y.shape[-1]), y[:, 1:]), dim=1)
            )
            for site in find_roles(model)
            if site.role == role
        ]
        assert len(handles) == 2
        difference = (model(tokens).logits - expected).abs().amax(dim=(0, 2)) > 1e-4
        moved[role] = difference.tolist()
        for handle in handles:
            handle.remove()
    assert moved == {"query": [False] * 5, "key": [False] + [True] * 4, "value": [True] * 5}
    save_model(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens).logits, expected, **TOLERANCE)


def test_a_fused_projection_of_unknown_layout_stays_whole():
    model = tiny_model("sequence_classification", "deberta")
    with pytest.raises(IncompatibleError, match="not known which rows of .*in_proj are queries"):
        split_fused_projections(model)
    assert not any(isinstance(module, FusedProjection) for module in model.modules())


def test_models_without_fused_projection_cannot_be_split():
    assert "bert has no fused query-key-value projection" in fault_of(tiny("bert", split_fused=True))
    with pytest.raises(ConfigError, match="has no fused query-key-value projection"):
        split_fused_projections(build_model(tiny("bert")))


# Mean pooling


@pytest.mark.parametrize("name", POOLED_TYPES)
def test_pooled_encoder_classifies_the_masked_mean(name):
    config = tiny(name, pooling="mean")
    model = build_model(config, num_labels=3).eval()
    inputs = batch(config)
    hidden = model.body(**inputs).last_hidden_state
    means = []
    for states, mask in zip(hidden, inputs["attention_mask"], strict=True):
        means.append(states[mask.bool()].mean(dim=0))
    expected = torch.stack(means) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", POOLED_TYPES)
def test_pooled_encoder_has_the_parameter_names_of_the_task_model(name):
    pooled = dict(build_model(tiny(name, pooling="mean")).named_parameters())
    usual = dict(build_model(tiny(name)).named_parameters())
    assert {key for key in pooled if not key.startswith("classifier")} <= usual.keys()


def test_every_parameter_of_a_pooled_encoder_gets_a_gradient():
    config = tiny("bert", pooling="mean")
    model = build_model(config, num_labels=2)
    model(**batch(config)).logits.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradient_checkpointing_gives_the_same_gradients():
    config = tiny(
        "bert", pooling="mean", config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    model = build_model(config, num_labels=2).train()
    inputs = batch(config)
    plain = torch.autograd.grad(model(**inputs).logits.sum(), model.bert.encoder.layer[0].output.dense.weight)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again = torch.autograd.grad(model(**inputs).logits.sum(), model.bert.encoder.layer[0].output.dense.weight)
    torch.testing.assert_close(again, plain, **TOLERANCE)


@pytest.mark.parametrize(
    "config", [tiny("bert", pooling="mean"), tiny("gpt2", split_fused=True), tiny("mlp")]
)
def test_models_can_be_copied_and_pickled(config):
    model = build_model(config, num_labels=2).eval()
    inputs = {"features": torch.randn(2, 10)} if config.name == "random:mlp" else batch(config)
    expected = model(**inputs).logits
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, expected)


# Multi-layer perceptron


def test_perceptron_has_the_layers_of_its_sizes():
    model = build_model(tiny("mlp"))
    assert {name: module.weight.shape for name, module in model.named_children()} == {
        "layer1": (64, 10),
        "layer2": (64, 64),
        "layer3": (1, 64),
    }
    features = torch.randn(5, 10)
    hidden = model.layer2(model.layer1(features).relu()).relu()
    assert torch.equal(model(features).logits, model.layer3(hidden))


def test_saved_perceptron_is_opened_as_a_folder(tmp_path):
    model = build_model(tiny("mlp", config={"sizes": [3, 8]}), num_labels=4)
    save_model(model, tmp_path)
    features = torch.randn(2, 3)
    config = ModelConfig(name=str(tmp_path))
    assert build_tokenizer(config) is None
    opened = build_model(config, num_labels=4)
    assert isinstance(opened, MultiLayerPerceptron)
    assert torch.equal(opened(features).logits, model(features).logits)


# Saving


@pytest.mark.parametrize(
    "config",
    [
        tiny("gpt2"),
        tiny("gpt2", split_fused=True),
        tiny("gpt2", task="causal_lm"),
        tiny("gpt2", pooling="mean", split_fused=True),
        tiny("bert"),
        tiny("bert", pooling="mean"),
        tiny("llama", task="causal_lm"),
        tiny("t5"),
    ],
    ids=lambda config: f"{config.name}-{config.task}-{config.pooling}-{config.split_fused}",
)
def test_saved_model_opened_again_gives_the_same_logits(config, tmp_path):
    model = build_model(config, num_labels=3).eval()
    save_model(model, tmp_path)
    folder = ModelConfig(name=str(tmp_path), task=config.task, pooling=config.pooling)
    inputs = batch(config)
    expected = model(**inputs).logits
    opened = build_model(folder, num_labels=3).eval()
    torch.testing.assert_close(opened(**inputs).logits, expected, **TOLERANCE)


def test_saved_gpt2_has_the_layout_that_other_programs_expect(tmp_path):
    config = tiny("gpt2", split_fused=True)
    model = build_model(config, num_labels=3).eval()
    save_model(model, tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(theirs.transformer.h[0].attn.c_attn, Conv1D)
    inputs = batch(config)
    torch.testing.assert_close(theirs(**inputs).logits, model(**inputs).logits, **TOLERANCE)


def test_pretrained_gpt2_is_linearised_when_loaded(tmp_path):
    original = tiny_gpt2()
    original.save_pretrained(tmp_path)
    model = build_model(ModelConfig(name=str(tmp_path), task="causal_lm")).eval()
    tokens = torch.randint(32, (2, 9))
    torch.testing.assert_close(model(tokens).logits, original(tokens).logits, **TOLERANCE)


def test_bare_encoder_gets_a_fresh_head(tmp_path):
    tiny_gpt2(GPT2Model).save_pretrained(tmp_path)
    model = build_model(ModelConfig(name=str(tmp_path)), num_labels=5)
    assert model.score.weight.shape == (5, 16)


# Faults


@pytest.mark.parametrize("name", TINY)
def test_default_random_models_have_no_fault(name):
    assert check_model(tiny(name)) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ModelConfig(name="embedded:minlm"), "no embedded model 'minlm'; did you mean 'minilm'?"),
        (ModelConfig(name="random:bart"), "no random model 'bart'; did you mean 'bert'?"),
        (ModelConfig(name="rnadom:bert"), "no source 'rnadom' for 'rnadom:bert'; did you mean 'random'?"),
        (ModelConfig(name="./nowhere"), "the folder 'nowhere' does not exist"),
        (tiny("bert", task="causal_lm"), "task: bert does not model text from left to right"),
        (tiny("mlp", task="causal_lm"), "task: mlp does not model text from left to right"),
        (tiny("t5", pooling="mean"), "pooling: t5 has no masked tokens"),
        (tiny("vit", pooling="mean"), "pooling: vit has no masked tokens"),
        (tiny("llama", task="causal_lm", pooling="mean"), "pooling: mean pools tokens for a classifier"),
        (tiny("bert", revision="main"), "revision: only hub repositories have revisions"),
        (tiny("bert", config={"hiden_size": 8}), "has no key 'hiden_size'; did you mean 'hidden_size'?"),
        (tiny("bert", config={"hidden_size": "wide"}), "expected int, got str"),
        (tiny("bert", config={"num_labels": 3}), "the number of classes comes from the data"),
        (tiny("bert", config={"vocab_size": 4}), "config.vocab_size: must be at least 6"),
        (tiny("mlp", config={"sizes": [10, 0]}), "config.sizes: must be whole numbers above 0"),
        (tiny("mlp", config={"sizes": []}), "config.sizes: must be whole numbers above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fault_is_found_before_anything_is_built(config, expected):
    assert expected in fault_of(config)
    with pytest.raises(ConfigError, match="^model\\."):
        build_model(config)


def test_widths_that_do_not_divide_are_one_message():
    with pytest.raises(ConfigError, match=r"hidden size \(30\).*number of attention heads"):
        build_model(tiny("bert", config={"hidden_size": 30}))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{"}, "config.json: is not valid JSON"),
        ({"config.json": '{"model_type": "bert"}'}, "holds no weights"),
        ({"config.json": '{"model_type": "bert"}', "pytorch_model.bin": ""}, "a pickle that may run code"),
        ({"adapter_config.json": "{}"}, "holds an adapter, not a model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_folder_that_is_no_model_is_refused(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert expected in fault_of(ModelConfig(name=str(tmp_path)))


def saved_bert(folder, num_labels=2, **fields):
    save_model(build_model(tiny("bert", **fields), num_labels=num_labels), folder)
    return folder


@pytest.mark.parametrize("files", [(), ("tokenizer_config.json", "special_tokens_map.json")], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "deberta-v2"])
def test_a_folder_without_a_vocabulary_is_refused(name, files, tmp_path):
    save_model(build_model(tiny(name)), tmp_path / "model")
    build_tokenizer(tiny(name)).save_pretrained(tmp_path / "tokenizer")
    for file in files:
        if (tmp_path / "tokenizer" / file).exists():
            shutil.copy(tmp_path / "tokenizer" / file, tmp_path / "model")
    with pytest.raises(ConfigError, match="^model.name: .*tokenizer"):
        build_tokenizer(ModelConfig(name=str(tmp_path / "model")))
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", tmp_path / "model")
    shutil.copy(tmp_path / "tokenizer" / "tokenizer_config.json", tmp_path / "model")
    assert build_tokenizer(ModelConfig(name=str(tmp_path / "model")))("ab")["input_ids"]


@pytest.mark.parametrize("kind", ["T5Tokenizer", "MBartTokenizer", "NougatTokenizer", "PhobertTokenizer"])
def test_a_tokenizer_of_marks_and_added_tokens_is_refused(kind, tmp_path):
    saved_bert(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{kind}", "pad_token": "<pad>"}}')
    with pytest.raises(ConfigError, match="^model.name: .*tokenizer"):
        build_tokenizer(ModelConfig(name=str(tmp_path)))


def test_a_config_that_is_not_a_plain_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert "is not a plain file" in fault_of(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "kind", "public", "model_type"),
    [
        ("random:llama", RandomSource, None, "llama"),
        ("random:mlp", RandomSource, None, "lora_lab_mlp"),
        ("embedded:minilm", EmbeddedSource, "sentence-transformers/all-MiniLM-L6-v2", "bert"),
        ("embedded:smollm2", EmbeddedSource, None, "llama"),
        ("./nowhere", FolderSource, "./nowhere", None),
        ("~/nowhere", FolderSource, "~/nowhere", None),
        ("a/b/c", FolderSource, "a/b/c", None),
        ("owner/name", HubSource, "owner/name", None),
        ("gpt2", HubSource, "gpt2", None),
    ],
)
def test_a_name_is_parsed_into_its_source(name, kind, public, model_type):
    source = ModelConfig(name=name).source()
    assert (type(source), source.public_name, source.model_type) == (kind, public, model_type)


def test_a_name_of_an_existing_folder_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(saved_bert(tmp_path / "owner" / "name").parent.parent)
    source = ModelConfig(name="owner/name").source()
    assert isinstance(source, FolderSource)
    assert source.model_type == "bert"


def test_mean_pooled_folder_is_not_opened_with_another_pooling(tmp_path):
    saved_bert(tmp_path, pooling="mean")
    assert "was saved with mean pooling" in fault_of(ModelConfig(name=str(tmp_path)))


def test_truncated_weights_are_one_message(tmp_path):
    weights = saved_bert(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="weights of .* are damaged"):
        build_model(ModelConfig(name=str(tmp_path)), num_labels=2)


def test_other_sizes_than_the_weights_are_one_message(tmp_path):
    saved_bert(tmp_path)
    with pytest.raises(CheckpointError, match="do not fit"):
        build_model(ModelConfig(name=str(tmp_path), config={"intermediate_size": 48}), num_labels=2)


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_another_number_of_classes_than_was_trained_is_one_message(pooling, tmp_path):
    saved_bert(tmp_path, num_labels=3, pooling=pooling)
    with pytest.raises(CheckpointError, match="classes"):
        build_model(ModelConfig(name=str(tmp_path), pooling=pooling), num_labels=2)


def test_weights_of_another_architecture_are_refused(tmp_path):
    saved_bert(tmp_path)
    other = tmp_path / "other"
    save_model(build_model(tiny("llama")), other)
    shutil.copy(other / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        build_model(ModelConfig(name=str(tmp_path)), num_labels=2)


def test_unknown_key_of_a_folder_model_is_refused(tmp_path):
    saved_bert(tmp_path)
    with pytest.raises(ConfigError, match="has no key 'hidden_dropout'; did you mean 'hidden_dropout_prob'"):
        build_model(ModelConfig(name=str(tmp_path), config={"hidden_dropout": 0.0}))


def test_config_changes_reach_a_folder_model(tmp_path):
    saved_bert(tmp_path)
    model = build_model(ModelConfig(name=str(tmp_path), config={"hidden_dropout_prob": 0.25}), num_labels=2)
    assert model.dropout.p == 0.25


def test_unknown_model_type_is_one_message(tmp_path):
    saved_bert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ConfigError, match="no model can be built from .*no_such_type"):
        build_model(ModelConfig(name=str(tmp_path)))


def test_hub_model_without_hub_is_one_quick_message():
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"no model can be built from 'nobody/nothing' \(the hub is not"):
        build_model(ModelConfig(name="nobody/nothing"))
    with pytest.raises(ConfigError, match="no tokenizer can be built from 'nobody/nothing'"):
        build_tokenizer(ModelConfig(name="nobody/nothing"))
    assert time.monotonic() - start < 5


# Embedded models


def embedded(name: str, **fields) -> ModelConfig:
    try:
        assets.fetch(name)
    except AssetError as error:
        pytest.skip(str(error))
    return ModelConfig(name=f"embedded:{name}", **fields)


@pytest.mark.assets
def test_minilm_places_similar_sentences_together():
    config = embedded("minilm", pooling="mean")
    model, tokenizer = build_model(config, num_labels=2).eval(), build_tokenizer(config)
    assert sum(parameter.numel() for parameter in model.bert.parameters()) == 22_565_376
    texts = ["A man is eating food.", "A man eats bread.", "The stock market fell."]
    means = []
    model.classifier.register_forward_hook(lambda _, inputs, __: means.append(inputs[0]))
    with torch.no_grad():
        model(**tokenizer(texts, padding=True, return_tensors="pt"))
    food, bread, market = nn.functional.normalize(means[0])
    assert food @ bread > 0.6
    assert abs(food @ market) < 0.3


@pytest.mark.assets
def test_smollm2_knows_a_capital():
    config = embedded("smollm2", task="causal_lm")
    model, tokenizer = build_model(config).eval(), build_tokenizer(config)
    assert tokenizer.pad_token_id is not None
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
