"""Folders that PEFT wrote, with odd options: they open with equal logits, or are refused by the field."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_lab import load_adapter, save_adapter
from lora_lab.adapters.storage import CONFIG, TENSORS
from lora_lab.errors import CheckpointError, IncompatibleError, LabError
from lora_lab.models.conversion import linearise
from tests.adapters.tiny import (
    VOCABULARY,
    _shaken,
    gpt_oss,
    mixtral,
    qwen3_moe,
    relative,
    tiny_bert,
    tiny_llama,
    tokens,
)

TOLERANCE = 2e-6


def tied_llama():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def tiny_roberta():
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=30, intermediate_size=50, num_hidden_layers=2, num_labels=3,
        num_attention_heads=3, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _shaken(RobertaForSequenceClassification, config, 0)


def tiny_cross_bert():
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=30, intermediate_size=50, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=16, is_decoder=True, add_cross_attention=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _shaken(BertLMHeadModel, config, 0)


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=30, d_kv=10, d_ff=50, num_layers=2, num_heads=3, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return _shaken(T5ForConditionalGeneration, config, 0)


def lora(*targets, **options):
    return peft.LoraConfig(**{"r": 4, "target_modules": list(targets) or ["q_proj", "v_proj"]} | options)


OPENS = {
    "an embedding among the targets": (tiny_llama, lora("embed_tokens", "q_proj")),
    "the head among the targets": (tiny_llama, lora("lm_head", "q_proj")),
    "tied embedding and head among the targets": (tied_llama, lora("embed_tokens", "lm_head", "q_proj")),
    "tied embedding and head saved": (tied_llama, lora(modules_to_save=["embed_tokens", "lm_head"])),
    "one of a tied pair saved": (tied_llama, lora(modules_to_save=["embed_tokens"])),
    "every linear map of a classifier": (
        tiny_roberta,
        lora(target_modules="all-linear", task_type="SEQ_CLS"),
    ),
    "some excluded": (tiny_llama, lora(target_modules="all-linear", exclude_modules=["k_proj", "o_proj"])),
    "a regex": (tiny_llama, lora(target_modules=r".*layers\.1.*(q|down)_proj")),
    "one layer": (tiny_llama, lora(layers_to_transform=1)),
    "trained biases of adapted maps": (tiny_llama, lora(bias="lora_only")),
    "trained biases of all modules": (tiny_bert, lora("query", "dense", bias="all", task_type="SEQ_CLS")),
    "trained biases in addition to a bias of LoRA": (
        tiny_bert,
        lora("query", bias="lora_only", lora_bias=True),
    ),
    "patterns that match nothing": (
        tiny_llama,
        lora(rank_pattern={"nothing": 9}, alpha_pattern={"value": 80, "query": 3}),
    ),
    "patterns that overlap": (
        tiny_llama,
        lora(
            rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3, "^model.layers.0.self_attn.v_proj": 5},
            alpha_pattern={r".*\.1\..*": 7, "v_proj": 9},
            use_rslora=True,
        ),
    ),
    "cross attention": (tiny_cross_bert, lora("query", "value")),
    "dora on every linear map": (tiny_llama, lora(target_modules="all-linear", use_dora=True)),
    "ia3 of T5": (tiny_t5, peft.IA3Config(task_type="SEQ_2_SEQ_LM")),
    "ia3 of a classifier": (tiny_bert, peft.IA3Config(task_type="SEQ_CLS")),
    "ia3 with a regex": (
        tiny_llama,
        peft.IA3Config(target_modules=r".*(k|down)_proj", feedforward_modules=r".*down_proj"),
    ),
    "boft": (tiny_llama, peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=5)),
    "boft of which PEFT's CPU makes one factor only": (
        tiny_roberta,
        peft.BOFTConfig(target_modules=["query"], boft_block_size=6, boft_n_butterfly_factor=2),
    ),
    "adalora": (tiny_llama, peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj"])),
    "vera": (tiny_llama, peft.VeraConfig(r=4, target_modules=["q_proj"])),
    "randlora": (tiny_llama, peft.RandLoraConfig(r=4, target_modules=["q_proj"])),
    "experts stacked in parameters": (
        mixtral,
        lora("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "experts with two ranks and scales, as PEFT names those of before": (mixtral, lora("w1", "w2", "w3")),
    "one parameter of the experts, and the router": (
        gpt_oss,
        lora(
            target_modules=[],
            target_parameters=["experts.down_proj", "router.weight"],
            rank_pattern={"experts.down_proj": 2},
            alpha_pattern={"router.weight": 3, "experts": 7},
            use_rslora=True,
        ),
    ),
    "every linear map and expert": (qwen3_moe, lora(target_modules="all-linear")),
    "a linear map by its parameter": (
        tiny_llama,
        lora(target_modules=[], target_parameters=["q_proj.weight"], rank_pattern={"q_proj": 9}),
    ),
    "loha with a start that only PEFT knows": (
        tiny_llama,
        peft.LoHaConfig(r=3, target_modules=["q_proj"], init_weights="abba"),
    ),
    "loha with patterns": (
        tiny_llama,
        peft.LoHaConfig(r=3, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
    ),
}

REFUSED = {
    "trainable_token_indices": lora(trainable_token_indices=[1, 2]),
    "layer_replication": lora(layer_replication=[[0, 1], [0, 2]]),
    "alora_invocation_tokens": lora(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"),
    "peft_type": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "modules_to_save": lora("down_proj", modules_to_save=["self_attn", "q_proj"]),
    "target_parameters": lora(target_modules=[], target_parameters=["embed_tokens.weight"]),
    "bias": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=5, r=0, bias="oft_only"),
}


@torch.no_grad()
def outputs(model):
    extra = {"decoder_input_ids": tokens(4)} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=tokens(), **extra).logits


@torch.no_grad()
def written(make, config, folder):
    """Writes a folder with PEFT, of tensors that have moved; returns PEFT's logits."""
    model = peft.get_peft_model(make(), config)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    expected = outputs(model)
    model.save_pretrained(folder)
    return expected


@pytest.mark.parametrize("case", OPENS)
def test_folders_of_peft_open_with_equal_logits_and_again_after_saving(case, tmp_path):
    make, config = OPENS[case]
    expected = written(make, config, tmp_path / "theirs")
    model = make()
    adapters = load_adapter(model, str(tmp_path / "theirs"))
    assert relative(outputs(model), expected) < TOLERANCE
    with adapters.merged():
        assert relative(outputs(model), expected) < 1e-5
    save_adapter(adapters, str(tmp_path / "ours"))
    again = make()
    load_adapter(again, tmp_path / "ours")
    assert relative(outputs(again), expected) < TOLERANCE
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert relative(outputs(theirs), expected) < 1e-5
    assert relative(outputs(make()), expected) > 1e-3


@pytest.mark.parametrize("field", REFUSED)
def test_what_lora_lab_does_not_have_is_refused_by_its_field(field, tmp_path):
    written(tiny_llama, REFUSED[field], tmp_path)
    model = tiny_llama()
    before = outputs(model)
    with pytest.raises(IncompatibleError, match=rf"^{field}: "):
        load_adapter(model, tmp_path)
    assert torch.equal(outputs(model), before)


def test_a_parameter_of_a_transposed_map_is_refused_though_it_is_square(tmp_path):
    def gpt2():
        return _shaken(GPT2LMHeadModel, GPT2Config(vocab_size=43, n_embd=16, n_layer=1, n_head=2), 0)

    written(gpt2, lora(target_modules=[], target_parameters=["attn.c_proj.weight"]), tmp_path)
    with pytest.raises(IncompatibleError, match=r"^target_parameters: .*attn\.c_proj\.weight"):
        load_adapter(linearise(gpt2()), tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 8}, "have 4 components, and the config says 8"),
        ({"r": 3}, "have 4 components, and the config says 3"),
        ({"r": 3_000_000}, "asks for adapters of"),
        ({"r": -1}, "rank"),
        ({"r": 10**30}, "below 2\\^63"),
        ({"r": 4.5}, "rank"),
        ({"r": [4]}, "rank"),
        ({"r": None}, "rank"),
        ({"lora_alpha": "much"}, "much"),
        ({"rank_pattern": {"q_proj": 2}}, "have 4 components, and the config says 2"),
        ({"rank_pattern": [3]}, "rank_pattern"),
        ({"rank_pattern": {"(q_proj": 2}}, "not a regular expression"),
        ({"alpha_pattern": {"(.*)*(.*)*(.*)*(.*)*x": 2}}, "takes more than a second|components|^$"),
        ({"lora_dropout": "${oc.env:HOME}"}, r"lora_dropout: '\$\{oc.env:HOME\}' is not a value"),
        ({"alpha_pattern": "q"}, "alpha_pattern: is not what PEFT writes there"),
        ({"bias": "some"}, "^bias: must be none, all or lora_only"),
        ({"modules_to_save": 3}, "not a PEFT config"),
        ({"peft_type": ["LORA"]}, "not a PEFT config"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_its_tensors_is_refused(changes, says, tmp_path):
    written(tiny_llama, lora(), tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if says.endswith("^$"):  # the engine may answer at once that it does not match
        load_adapter(tiny_llama(), tmp_path)
        return
    with pytest.raises(LabError, match=says):
        load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    "text", ['{"r": 4, "r": 4}', "[" * 100_000, '{"peft_type": ' + "[" * 60 + "]" * 60 + "}"]
)
def test_json_that_no_config_is_gets_one_message(text, tmp_path):
    written(tiny_llama, lora(), tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match="not a PEFT config"):
        load_adapter(tiny_llama(), tmp_path)


def test_a_copy_of_another_base_is_refused(tmp_path):
    written(tiny_llama, lora("embed_tokens", "q_proj"), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][3] += 1
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=r"a copy of model.embed_tokens.weight that differs"):
        load_adapter(tiny_llama(), tmp_path)


def test_a_tied_pair_of_different_tensors_stays_apart_and_keeps_both(tmp_path):
    config = lora(modules_to_save=["embed_tokens", "lm_head"])
    expected = written(tied_llama, config, tmp_path / "theirs")
    held = load_file(tmp_path / "theirs" / TENSORS)
    pair = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    assert not torch.equal(*(held[name] for name in pair))
    model = tied_llama()
    adapters = load_adapter(model, tmp_path / "theirs")
    assert relative(outputs(model), expected) < TOLERANCE
    save_adapter(adapters, tmp_path / "ours")
    kept = load_file(tmp_path / "ours" / TENSORS)
    assert all(torch.equal(kept[name], held[name]) for name in pair)


def test_a_strangers_folder_reads_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_SECRET", "swordfish")
    adapters = load_adapter_of(tmp_path)
    save_adapter(adapters, tmp_path / "own")
    own = tmp_path / "own" / "lora_lab.yaml"
    own.write_text(own.read_text().replace("method: lora", "method: lora\n  init: ${oc.env:PLANTED_SECRET}"))
    with pytest.raises(CheckpointError) as caught:
        load_adapter(tiny_llama(), tmp_path / "own")
    assert "swordfish" not in str(caught.value)


def load_adapter_of(tmp_path):
    written(tiny_llama, lora(), tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_adapter(tiny_llama(), tmp_path / "first")
