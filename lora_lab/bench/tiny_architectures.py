"""Every text architecture of the installed transformers as a tiny random model.

The sizes below replace those of an architecture's default config if it has a field of that name, also in
nested configs; `SPECIAL` has the exceptions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from lora_lab.models.conversion import linearise
from lora_lab.models.sources import AutoClass

TASKS: dict[str, tuple[AutoClass, Mapping[str, str]]] = {
    "causal_lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "sequence_classification": (
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "sequence_to_sequence": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
"""Task → transformers' class for it and its table of architectures."""

VOCABULARY, LENGTH, CLASSES = 96, 8, 3

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "emb_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "hidden_dim": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 48,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "d_head": 8,
    "kv_channels": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "top_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "chunk_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "decoder_start_token_id": 1,
    "sliding_window": 16,
    "attention_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "use_cache": False,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 97,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.5, 0.0],
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_token": 2,
        "qk_head_dim": 16,
    },
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 8, "moe_topk": 2, "qk_head_dim": 16, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "perceiver": {
        "d_latents": 32,
        "num_cross_attention_heads": 4,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [2, 4],
        "attn_layers": ["local", "lsh"],
        "is_decoder": True,
    },
    "t5": {"decoder_start_token_id": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "mamba_dt_rank": 4,
        "num_hidden_layers": 3,
    },
    "zamba2": {
        "adapter_rank": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "hybrid_layer_ids": [1],
        "layers_block_type": ["linear_attention", "hybrid"],
        "mamba_headdim": 8,
        "num_query_groups": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """Returns the architecture's default config with small numbers."""
    return _shrunk(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}))


def _shrunk(config_class: type[PretrainedConfig], special: Mapping[str, Any]) -> PretrainedConfig:
    default = config_class()
    fields = set(default.to_dict()) | set(config_class.attribute_map)
    changes = {name: size for name, size in SIZES.items() if name in fields}
    if "qk_rope_head_dim" in fields:  # latent attention has its own widths, and as many keys as queries
        changes.pop("head_dim", None)
        changes["num_key_value_heads"] = 4
    changes = {config_class.attribute_map.get(name, name): size for name, size in changes.items()}
    inside = getattr(config_class, "sub_configs", {})
    for name in inside:
        inner = getattr(default, name, None)
        if isinstance(inner, PretrainedConfig):
            changes[name] = _shrunk(type(inner), special.get(name, {}))
    own = {name: value for name, value in special.items() if name not in inside}
    return config_class(**{**changes, **own})


def tiny_model(task: str, model_type: str, seed: int = 0) -> PreTrainedModel:
    """Builds one architecture for a task of `TASKS`, with weights moved from the usual initial 0 and 1."""
    config = tiny_config(model_type)
    config.num_labels = CLASSES
    torch.manual_seed(seed)
    model = TASKS[task][0].from_config(config)
    linearise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tiny_inputs(model: PreTrainedModel, rows: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """Returns random tokens that end with the end token, for a decoder too where the model has one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    tokens[:, -1] = 2
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    classifies = "Classification" in type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) and not classifies:
        inputs["decoder_input_ids"] = tokens.flip(0)
    return inputs
