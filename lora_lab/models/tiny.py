"""Random models: their sizes, and the tokenizer of single characters that they read with."""

import string
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from lora_lab.models.architectures import kind_of

_NARROW = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_ENCODER = _NARROW | {"intermediate_size": 64}
_LLAMA = _ENCODER | {"num_key_value_heads": 2}

TINY: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    # RoBERTa counts positions from its padding token's index on.
    "roberta": _ENCODER | {"max_position_embeddings": 129},
    "xlm-roberta": _ENCODER | {"max_position_embeddings": 129},
    "electra": _ENCODER | {"embedding_size": 16},
    "distilbert": _NARROW | {"hidden_dim": 64},
    "deberta-v2": _ENCODER
    | {
        "relative_attention": True,
        "position_buckets": 16,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "norm_rel_ebd": "layer_norm",
    },
    "vit": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
    },
    "gpt2": _NARROW | {"n_inner": 64},
    "opt": _NARROW | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
    "gemma": _LLAMA | {"head_dim": 8},
    "gemma2": _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "t5": {
        "vocab_size": 128,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 3,
        "decoder_start_token_id": 0,
    },
    "mlp": {"sizes": [10, 64, 64]},
}
"""Sizes of `random:<type>`; two layers of width 32 and a character vocabulary of 128 where it applies."""

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
CHARACTERS = " " + string.ascii_lowercase + string.digits + string.punctuation + string.ascii_uppercase + "\n"
"""Vocabulary of random models, most useful first, since a small `vocab_size` keeps only the beginning."""


def character_tokenizer(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of single characters that fits the vocabulary of a random model.

    Args:
        config: Of a random text model; its type decides which special tokens frame a text.
    """
    words = [*SPECIAL_TOKENS, *CHARACTERS][: config.vocab_size]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    kind = kind_of(config.model_type)
    if kind != "decoder":
        start = "<s> " if kind == "encoder" else ""
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start}$A </s>",
            pair=f"{start}$A </s> $B:1 </s>:1",
            special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])],
        )
    names = ["input_ids", "attention_mask"]
    if getattr(config, "type_vocab_size", 0) > 1:
        names.insert(1, "token_type_ids")
    positions = getattr(config, "max_position_embeddings", None)
    if positions and "roberta" in config.model_type:
        positions -= config.pad_token_id + 1
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_input_names=names,
        model_max_length=positions or 512,
        clean_up_tokenization_spaces=False,
    )
