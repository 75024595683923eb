"""From a config to a model and its tokenizer: from the hub, embedded, from a folder, or random and tiny.

Every model returns `.logits`, holds `nn.Linear` where GPT-2 has `Conv1D`, and is built without touching
`requires_grad`. Weights come from safetensors only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from omegaconf import MISSING
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_lab.assets import hub_reachable
from lora_lab.errors import CheckpointError, ConfigError, LabError, suggest
from lora_lab.models.architectures import ARCHITECTURES, find_roles
from lora_lab.models.conversion import linearise, split_fused_projections
from lora_lab.models.perceptron import MLP
from lora_lab.models.pooled_encoder import PooledEncoder, restore_classifier, saved_with_mean_pooling
from lora_lab.models.quantization import Quantization, QuantizationOptions, quantization_faults, quantize
from lora_lab.models.sources import (
    EMBEDDED,
    folder_config,
    folder_faults,
    is_folder_name,
    is_local,
    known_type,
    source_of,
)
from lora_lab.models.tiny import SPECIAL_TOKENS, TINY, character_tokenizer


@dataclass
class ModelConfig:
    """Which model, for which task."""

    name: str = MISSING
    """"embedded:minilm", "embedded:smollm2", "random:<architecture>", "random:mlp", a local folder, or a hub
    repository such as "FacebookAI/roberta-base"."""
    task: Literal["sequence_classification", "regression", "causal_lm"] = "sequence_classification"
    """What the head predicts: classes, one real number, or the next token."""
    pooling: Literal["model", "mean"] = "model"
    """How tokens become one vector: as the architecture does it, or by the mean over the unpadded tokens
    followed by one linear classifier (for encoders without a trained pooler)."""
    config: dict[str, Any] = field(default_factory=dict)
    """Changes to the transformers config of the model, such as `hidden_dropout_prob: 0.0`; sizes for random
    models. `random:mlp` has `sizes`: the input width and the hidden widths (the data decide the output)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; None takes its main branch."""
    trust_remote_code: bool = False
    """Whether Python code of the repository may run. Read it first."""
    split_fused: bool = False
    """Whether the fused attention projections of GPT-2 and of `nn.MultiheadAttention` become linear layers
    `query`, `key`, `value`."""
    quantization: Quantization = "none"
    """Codes in which the linear maps of the blocks are held, under any adapter: `nf4` or `fp4` (4 bits a
    weight), `int8`, or none. Embeddings, norms and heads stay in `dtype`."""
    quantization_options: QuantizationOptions = field(default_factory=QuantizationOptions)
    """How the codes are made."""


def check_model(config: ModelConfig) -> list[str]:
    """Finds the faults of a config without downloading anything or building a model.

    Returns:
        One message for each fault, each beginning with the key it is about; empty where none was found.
    """
    kind, _, value = config.name.partition(":")
    if kind == "random":
        faults = _random_faults(config, value)
    elif kind == "embedded":
        faults = [] if value in EMBEDDED else [f"name: no embedded model '{value}'{suggest(value, EMBEDDED)}"]
    elif is_folder_name(config.name):
        faults = folder_faults(Path(config.name).expanduser(), config.pooling)
    elif value:
        faults = [f"name: no source '{kind}' for '{config.name}'{suggest(kind, ('embedded', 'random'))}"]
    else:
        faults = []
    if config.revision is not None and (kind in ("random", "embedded") or is_folder_name(config.name)):
        faults.append(f"revision: only hub repositories have revisions, '{config.name}' is none; remove it")
    if config.pooling == "mean" and config.task == "causal_lm":
        faults.append("pooling: mean pools tokens for a classifier; task causal_lm needs pooling 'model'")
    faults += quantization_faults(config.quantization, config.quantization_options)
    if config.quantization != "none" and "quantization_config" in folder_config(config.name):
        faults.append(_quantized_already(config))
    model_type = known_type(config.name)
    return faults + (_task_faults(config, model_type) if model_type and not faults else [])


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """Builds the tokenizer that belongs to a model.

    Returns:
        The tokenizer, with a padding token (the end token where the model has none of its own, so labels must
        be masked by position); None for models that do not read text. Random models read single characters.

    Raises:
        ConfigError: If the config is faulty or no tokenizer can be loaded.
        AssetError: If an embedded model cannot be fetched.
    """
    _raise_faults(config)
    if known_type(config.name) in ("vit", "mlp", MLP):
        return None
    if config.name.startswith("random:"):
        return character_tokenizer(_transformers_config(config))
    with _translated(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source_of(config.name), **_source_options(config))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"model.name: the tokenizer of '{config.name}' has neither a padding nor an end token"
        )
    return tokenizer


def build_model(config: ModelConfig, num_labels: int = 1, keep_weights: bool = False) -> PreTrainedModel:
    """Builds the model, on the CPU, as its class leaves it (random weights follow torch's global seed).

    Args:
        config: What to build.
        num_labels: Number of classes; regression always has one output, language modelling none.
        keep_weights: Whether quantised maps keep their full-precision weight beside the codes, for starts
            that read it; see `quantization.forget_weights`.

    Returns:
        A model with `config`, whose output has `logits`: (batch, num_labels), or (batch, time, vocabulary)
        for causal language modelling.

    Raises:
        ConfigError: If the config is faulty or the model does not exist.
        CheckpointError: If weights are damaged, missing or of other shapes.
        IncompatibleError: If the model cannot be quantised.
        AssetError: If an embedded model cannot be fetched.
    """
    _raise_faults(config)
    with _translated(config, "model"):
        hub_config = _transformers_config(config)
        if config.quantization != "none" and getattr(hub_config, "quantization_config", None):
            raise ConfigError(f"model.{_quantized_already(config)}")
        if config.task != "causal_lm":
            hub_config.num_labels = 1 if config.task == "regression" else num_labels
        if getattr(hub_config, "pad_token_id", None) is None:
            # Decoders classify by the last token which is not padding, so they have to know it.
            hub_config.pad_token_id = _first(getattr(hub_config, "eos_token_id", None))
        pooled = config.pooling == "mean"
        auto_class = AutoModel if pooled else _auto_class(config, hub_config)
        model = _instantiate(config, hub_config, auto_class)
        if pooled:
            model = PooledEncoder(hub_config, model)
            folder = Path(config.name).expanduser()
            if is_folder_name(config.name) and saved_with_mean_pooling(folder):
                restore_classifier(model, folder)
    linearise(model)
    if config.split_fused:
        split_fused_projections(model)
    if config.quantization != "none":
        quantize(model, config.quantization, config.quantization_options, keep_weights)
    return model


# Loading


def _source_options(config: ModelConfig) -> dict[str, Any]:
    local = config.name.startswith("embedded:") or is_folder_name(config.name)
    return {
        "revision": config.revision or "main",
        "trust_remote_code": config.trust_remote_code,
        # Without the hub its cache may still hold the model; the client would retry for half a minute first.
        "local_files_only": local or not hub_reachable(),
    }


def _transformers_config(config: ModelConfig) -> PretrainedConfig:
    """Returns the config of transformers with the user's changes, each key checked."""
    kind, _, model_type = config.name.partition(":")
    if kind == "random":
        plain = CONFIG_MAPPING[MLP if model_type == "mlp" else model_type]
        changes = _native(plain, TINY[model_type]) | _native(plain, config.config)
        _raise_unknown_keys(config, plain(), known=set(TINY[model_type]))
        return plain(**changes)
    hub_config = AutoConfig.from_pretrained(source_of(config.name), **_source_options(config))
    _raise_unknown_keys(config, hub_config, known=set())
    for key, value in config.config.items():
        setattr(hub_config, key, value)
    return hub_config


def _native(config_class: type[PretrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """Renames common keys to the architecture's own ("hidden_size" → "n_embd")."""
    return {config_class.attribute_map.get(key, key): value for key, value in changes.items()}


def _raise_unknown_keys(config: ModelConfig, hub_config: PretrainedConfig, known: set[str]) -> None:
    known = known | hub_config.to_dict().keys() | hub_config.attribute_map.keys()
    for key in config.config:
        if key in ("num_labels", "id2label", "label2id"):
            raise ConfigError(f"model.config.{key}: the number of classes comes from the data; remove it")
        if key not in known:
            near = get_close_matches(key, known, n=5, cutoff=0.4) or known
            raise ConfigError(
                f"model.config: {type(hub_config).__name__} has no key '{key}'{suggest(key, near)}"
            )


def _auto_class(config: ModelConfig, hub_config: PretrainedConfig) -> Any:
    if config.task == "causal_lm":
        return AutoModelForCausalLM
    if hub_config.model_type == "vit":
        return AutoModelForImageClassification
    return AutoModelForSequenceClassification


def _instantiate(config: ModelConfig, hub_config: PretrainedConfig, auto_class: Any) -> PreTrainedModel:
    dtype = getattr(torch, config.dtype)
    if config.name.startswith("random:"):
        return auto_class.from_config(hub_config, dtype=dtype)
    model, report = auto_class.from_pretrained(
        source_of(config.name),
        config=hub_config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **_source_options(config),
    )
    parts = [site.path for site in find_roles(model) if site.role not in ("block", "head")]
    missing = [key for key in sorted(report["missing_keys"]) if key.rpartition(".")[0] in parts]
    if missing:
        raise CheckpointError(
            f"model.name: '{config.name}' lacks {len(missing)} weights of {type(model).__name__}, for example"
            f" {missing[0]}; config.json and the weights do not belong together"
        )
    return model


def _first(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token


# Faults


@contextmanager
def _translated(config: ModelConfig, what: str) -> Iterator[None]:
    """Turns the faults of loading into one message each."""
    known = f"embedded:{'|'.join(EMBEDDED)}, random:<architecture>, a local folder or a hub repository"
    try:
        yield
    except LabError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"model.name: the weights of '{config.name}' are damaged ({_one_line(error)}); download or copy"
            " them again"
        ) from error
    except StrictDataclassError as error:
        raise ConfigError(f"model.config: {_one_line(error)}") from error
    except RuntimeError as error:
        raise CheckpointError(
            f"model.name: the weights of '{config.name}' do not fit ({_one_line(error)}); remove the sizes"
            " from model.config, or use data with as many classes as the model was trained for"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, ImportError, ZeroDivisionError) as error:
        hint = "" if is_local(config.name) or hub_reachable() else " (the hub is not reachable from here)"
        raise ConfigError(
            f"model.name: no {what} can be built from '{config.name}'{hint}: {_one_line(error)}."
            f" Check name, revision and model.config. Allowed: {known}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(". ")


def _quantized_already(config: ModelConfig) -> str:
    return (
        f"quantization: '{config.name}' is stored quantised already; set it to none, or give the model of"
        " full precision"
    )


def _raise_faults(config: ModelConfig) -> None:
    if faults := check_model(config):
        raise ConfigError("; ".join(f"model.{fault}" for fault in faults))


def _random_faults(config: ModelConfig, model_type: str) -> list[str]:
    if model_type not in TINY:
        return [f"name: no random model '{model_type}'{suggest(model_type, TINY)}"]
    try:
        with _translated(config, "model"):
            hub_config = _transformers_config(config)
    except LabError as error:
        return [str(error).removeprefix("model.")]
    smallest = len(SPECIAL_TOKENS) + 1
    if getattr(hub_config, "vocab_size", smallest) < smallest:
        return [f"config.vocab_size: must be at least {smallest}, for the special tokens and one character"]
    sizes = getattr(hub_config, "sizes", [1])
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        return [f"config.sizes: must be whole numbers above 0, the input width first; got {sizes}"]
    return []


def _task_faults(config: ModelConfig, model_type: str) -> list[str]:
    faults = []
    kind = ARCHITECTURES[model_type].kind if model_type in ARCHITECTURES else None
    name = model_type.removeprefix("lora_lab_")
    reads_text = model_type not in ("mlp", MLP)
    if config.task == "causal_lm" and (kind not in (None, "decoder") or not reads_text):
        faults.append(
            f"task: {name} does not model text from left to right; causal_lm needs a decoder like llama"
        )
    if config.pooling == "mean" and (kind in ("encoder_decoder", "vision") or not reads_text):
        faults.append(f"pooling: {name} has no masked tokens of one stack to average; use 'model'")
    fused = kind is None or "query_key_value" in ARCHITECTURES[model_type].roles
    if config.split_fused and not (fused and reads_text):
        faults.append(f"split_fused: {name} has no fused query-key-value projection; set it to false")
    if config.quantization != "none" and not reads_text:
        faults.append(f"quantization: {name} has no blocks whose maps could become codes; set it to none")
    return faults
