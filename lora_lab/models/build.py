"""From a config to a model and its tokenizer: from the hub, embedded, from a folder, or random and tiny.

Every model returns `.logits`, holds `nn.Linear` where GPT-2 has `Conv1D`, and is built without touching
`requires_grad`. Weights come from safetensors only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from omegaconf import MISSING
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_lab.errors import ConfigError
from lora_lab.models.architectures import kind_of
from lora_lab.models.conversion import SPLITTABLE, linearise, split_fused_projections
from lora_lab.models.perceptron import MLP
from lora_lab.models.pooled_encoder import PooledEncoder, restore_classifier, was_mean_pooled
from lora_lab.models.quantization import Quantization, QuantizationOptions, quantization_faults, quantize
from lora_lab.models.sources import AutoClass, Source, parse_source
from lora_lab.models.tiny import TINY
from lora_lab.tasks import TASKS, name_classes, task_faults


@dataclass
class ModelConfig:
    """Which model, for which task."""

    name: str = MISSING
    """"embedded:minilm", "embedded:smollm2", "random:<architecture>", "random:mlp", a local folder, or a hub
    repository such as "FacebookAI/roberta-base"."""
    task: str = "sequence_classification"
    """What the head predicts: a class (`sequence_classification`), a real number (`regression`), or the next
    token (`causal_lm`)."""
    pooling: Literal["model", "mean"] = "model"
    """How tokens become one vector: by the architecture's pooling, or by the mean over the unpadded tokens
    and one linear classifier (for encoders without a trained pooler)."""
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
    """Whether fused attention projections (GPT-2, Phi-3, GPT-NeoX, Bloom, Falcon and others), and those of
    `nn.MultiheadAttention`, become linear layers `query`, `key`, `value`."""
    quantization: Quantization = "none"
    """Quantisation of the linear maps of the blocks, under any adapter: `nf4` or `fp4` (4 bits a
    weight), `int8`, or none. Embeddings, norms and heads stay in `dtype`."""
    quantization_options: QuantizationOptions = field(default_factory=QuantizationOptions)
    """Options of the quantisation."""

    def source(self) -> Source:
        """Returns the source that `name` names."""
        return parse_source(self.name, self.revision, self.trust_remote_code)


def check_model(config: ModelConfig) -> list[str]:
    """Returns the faults of a config, without downloading or building anything.

    Returns:
        One message for each fault, each starting with its key; empty if none was found.
    """
    source = config.source()
    if faults := task_faults(config.task) + source.faults(config.config):
        return faults
    stored = source.stored_config()
    faults = quantization_faults(config.quantization, config.quantization_options)
    if config.pooling == "mean" and TASKS[config.task].causal:
        faults.append(f"pooling: mean pools tokens for a classifier; {config.task} needs pooling 'model'")
    if config.pooling != "mean" and was_mean_pooled(stored):
        faults.append(f"pooling: '{config.name}' was saved with mean pooling; set pooling to 'mean'")
    if config.quantization != "none" and "quantization_config" in stored:
        faults.append(_quantized_already(config))
    model_type = source.model_type
    return faults + (_task_faults(config, model_type) if model_type and not faults else [])


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """Builds the tokenizer that belongs to a model.

    Returns:
        The tokenizer, with a padding token (the end token if the model has none, so labels must be masked by
        position); None for models that do not read text. Random models read single characters.

    Raises:
        ConfigError: if the config is invalid or no tokenizer can be loaded.
        AssetError: if an embedded model cannot be fetched.
    """
    source = _checked_source(config)
    seen = source.model_type == MLP or (source.model_type and kind_of(source.model_type) == "vision")
    return None if seen else source.tokenizer(config.config)


def build_model(
    config: ModelConfig, num_labels: int = 1, keep_weights: bool = False, label_names: Sequence[str] = ()
) -> PreTrainedModel:
    """Builds the model on the CPU, as its class does (random weights depend on torch's global seed).

    Args:
        config: What to build.
        num_labels: Number of classes; regression always has one output, language modelling none.
        keep_weights: Whether quantised maps keep their full-precision weight next to the codes, for starts
            that need it; see `quantization.forget_weights`.
        label_names: Names of the classes in the order of their ids, for `id2label` and `label2id`.

    Returns:
        A model with `config`, whose output has `logits`: (batch, num_labels), or (batch, time, vocabulary)
        for causal language modelling.

    Raises:
        ConfigError: if the config is invalid or the model does not exist.
        CheckpointError: if weights are damaged, missing or have other shapes.
        IncompatibleError: if the model cannot be quantised.
        AssetError: if an embedded model cannot be fetched.
    """
    source = _checked_source(config)
    hub_config = source.config(config.config)
    if config.quantization != "none" and getattr(hub_config, "quantization_config", None):
        raise ConfigError(f"model.{_quantized_already(config)}")
    task = TASKS[config.task]
    if not task.causal:
        hub_config.num_labels = task.outputs(num_labels)
    name_classes(hub_config, label_names)
    if getattr(hub_config, "pad_token_id", None) is None:
        # Decoders classify by the last token that is not padding, so they need to know the padding token.
        hub_config.pad_token_id = _first(getattr(hub_config, "eos_token_id", None))
    pooled = config.pooling == "mean"
    auto_class = AutoModel if pooled else _auto_class(config, hub_config)
    model = source.weights(auto_class, hub_config, getattr(torch, config.dtype))
    if pooled:
        model = PooledEncoder(hub_config, model)
        if source.folder and was_mean_pooled(source.stored_config()):
            restore_classifier(model, source.folder)
    linearise(model)
    if config.split_fused:
        split_fused_projections(model)
    if config.quantization != "none":
        quantize(model, config.quantization, config.quantization_options, keep_weights)
    return model


def _checked_source(config: ModelConfig) -> Source:
    if faults := check_model(config):
        raise ConfigError("; ".join(f"model.{fault}" for fault in faults))
    return config.source()


def _auto_class(config: ModelConfig, hub_config: PretrainedConfig) -> AutoClass:
    if TASKS[config.task].causal:
        return AutoModelForCausalLM
    if kind_of(hub_config.model_type) == "vision":
        return AutoModelForImageClassification
    return AutoModelForSequenceClassification


def _first(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token


def _quantized_already(config: ModelConfig) -> str:
    return (
        f"quantization: '{config.name}' is stored quantised already; set it to none, or give the model of"
        " full precision"
    )


def _task_faults(config: ModelConfig, model_type: str) -> list[str]:
    faults = []
    kind = kind_of(model_type)
    name = model_type.removeprefix("lora_lab_")
    reads_text = model_type != MLP
    if TASKS[config.task].causal and (kind not in (None, "decoder") or not reads_text):
        faults.append(
            f"task: {name} does not model text from left to right; {config.task} needs a decoder like llama"
        )
    if config.pooling == "mean" and (kind in ("encoder_decoder", "vision") or not reads_text):
        faults.append(f"pooling: {name} has no masked tokens of one stack to average; use 'model'")
    if config.split_fused and (not reads_text or (model_type in TINY and model_type not in SPLITTABLE)):
        faults.append(f"split_fused: {name} has no fused query-key-value projection; set it to false")
    if config.quantization != "none" and not reads_text:
        faults.append(f"quantization: {name} has no blocks with maps to quantise; set it to none")
    return faults
