"""From a config to a model and its tokenizer: from the hub, embedded, from a folder, or random and tiny.

Every model returns `.logits`, holds `nn.Linear` where GPT-2 has `Conv1D`, and is built without touching
`requires_grad`. Weights come from safetensors only.
"""

import inspect
import json
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from omegaconf import MISSING
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
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
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

from lora_lab.assets import ASSETS, fetch, hub_reachable
from lora_lab.errors import CheckpointError, ConfigError, LabError, suggest
from lora_lab.models.architectures import ARCHITECTURES, find_roles

EMBEDDED = tuple(name for name, asset in ASSETS.items() if asset.kind == "model")
"""Models that `embedded:<name>` fetches by themselves."""

MLP = "lora_lab_mlp"

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
    # RoBERTa begins to count positions behind the number of its padding token.
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
"""Vocabulary of random models, most useful first: a small `vocab_size` keeps the beginning."""


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
    """Whether GPT-2's fused attention projection becomes three linear layers `query`, `key`, `value`."""


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
    elif _is_folder_name(config.name):
        faults = _folder_faults(config, Path(config.name).expanduser())
    elif value:
        faults = [f"name: no source '{kind}' for '{config.name}'{suggest(kind, ('embedded', 'random'))}"]
    else:
        faults = []
    if config.revision is not None and (kind in ("random", "embedded") or _is_folder_name(config.name)):
        faults.append(f"revision: only hub repositories have revisions, '{config.name}' is none; remove it")
    if config.pooling == "mean" and config.task == "causal_lm":
        faults.append("pooling: mean pools tokens for a classifier; task causal_lm needs pooling 'model'")
    model_type = _known_type(config)
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
    if _known_type(config) in ("vit", "mlp", MLP):
        return None
    if config.name.startswith("random:"):
        return _character_tokenizer(_transformers_config(config))
    with _translated(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(_source(config), **_source_options(config))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"model.name: the tokenizer of '{config.name}' has neither a padding nor an end token"
        )
    return tokenizer


def build_model(config: ModelConfig, num_labels: int = 1) -> PreTrainedModel:
    """Builds the model, on the CPU, as its class leaves it (random weights follow torch's global seed).

    Args:
        config: What to build.
        num_labels: Number of classes; regression always has one output, language modelling none.

    Returns:
        A model with `config`, whose output has `logits`: (batch, num_labels), or (batch, time, vocabulary)
        for causal language modelling.

    Raises:
        ConfigError: If the config is faulty or the model does not exist.
        CheckpointError: If weights are damaged, missing or of other shapes.
        AssetError: If an embedded model cannot be fetched.
    """
    _raise_faults(config)
    with _translated(config, "model"):
        hub_config = _transformers_config(config)
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
            _restore_pooled_classifier(config, model)
    linearise(model)
    if config.split_fused:
        split_fused_projections(model)
    return model


def linearise(model: nn.Module) -> nn.Module:
    """Replaces every `Conv1D` (GPT-2's transposed linear layer) by the equal `nn.Linear`, in place.

    Returns:
        The same model; outputs agree up to the rounding of one matrix product.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(
                path, _linear(module.weight.data.T, module.bias.data)
            )  # (in, out) → (out, in)
    return model


def split_fused_projections(model: nn.Module) -> nn.Module:
    """Replaces every fused query-key-value layer by three linear layers, in place.

    Returns:
        The same model, which now has the roles query, key and value.

    Raises:
        ConfigError: If the model has no fused projection.
    """
    sites = [site for site in find_roles(model) if site.role == "query_key_value"]
    if not sites:
        raise ConfigError(
            f"model.split_fused: {type(model).__name__} has no fused query-key-value projection; set it to"
            " false"
        )
    for site in sites:
        fused = cast(nn.Linear, model.get_submodule(site.path))
        model.set_submodule(site.path, FusedProjection(fused))
    return model


def save_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes config and weights as a folder that `from_pretrained` and `ModelConfig.name` open.

    GPT-2's layers get back the layout of its own checkpoints; saved as linear layers, its square matrices
    would be read transposed without a complaint.

    Args:
        model: A model of `build_model` without adapters (merged or never injected).
        folder: Created where it does not exist.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    weights = model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, FusedProjection):
            for tensor in ("weight", "bias"):
                parts = [weights.pop(f"{path}.{part}.{tensor}") for part in ("query", "key", "value")]
                weights[f"{path}.{tensor}"] = torch.cat(parts)
    for path in _transposed_layers(model):
        weights[f"{path}.weight"] = weights[f"{path}.weight"].T.contiguous()
    try:
        model.save_pretrained(folder, state_dict=weights)
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be written to {folder}: {error}; choose another folder"
        ) from error


class FusedProjection(nn.Module):
    """A query-key-value projection as three linear layers whose outputs are joined again.

    It has no `weight` of its own, so that the role of the fused layer passes to its parts.

    Args:
        fused: Linear layer whose output is query, key and value of equal width side by side.
    """

    def __init__(self, fused: nn.Linear):
        super().__init__()
        biases = fused.bias.data.chunk(3) if fused.bias is not None else (None,) * 3
        parts = [_linear(*part) for part in zip(fused.weight.data.chunk(3), biases, strict=True)]
        self.query, self.key, self.value = parts

    def forward(self, hidden: Tensor) -> Tensor:
        """Projects (..., width) to (..., 3 · width)."""
        return torch.cat((self.query(hidden), self.key(hidden), self.value(hidden)), dim=-1)


class PooledEncoder(PreTrainedModel):
    """An encoder, the mean over its unpadded tokens, dropout and one linear classifier.

    The encoder is held under its own prefix ("bert"), so parameter names equal those of the architecture's
    model for sequence classification.

    Args:
        config: The encoder's config, with `num_labels`.
        encoder: Bare model without a task head.
    """

    supports_gradient_checkpointing = True
    # Attention is the encoder's business; it has already checked what it supports.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PretrainedConfig, encoder: PreTrainedModel):
        super().__init__(config)
        config.lora_lab_pooling = "mean"
        if hasattr(encoder, "pooler"):
            encoder.register_module(
                "pooler", None
            )  # never used here: it would count as trainable and get no gradient
        self.encoder_name = encoder.base_model_prefix
        self.all_tied_weights_keys = {}
        self.add_module(self.encoder_name, encoder)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels), dtype=encoder.dtype)
        nn.init.normal_(self.classifier.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)
        self._takes_token_types = "token_type_ids" in inspect.signature(encoder.forward).parameters

    @property
    def body(self) -> PreTrainedModel:
        """The encoder, whatever its prefix."""
        return cast(PreTrainedModel, self.get_submodule(self.encoder_name))

    def get_input_embeddings(self) -> nn.Module:
        """Returns the encoder's token embeddings."""
        return self.body.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classifies a batch.

        Args:
            input_ids: (batch, time)
            attention_mask: (batch, time), 1 for tokens, 0 for padding; None means no padding.
            token_type_ids: (batch, time), for encoders that tell the first text from the second.

        Returns:
            Output with `logits`, (batch, num_labels).
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None and self._takes_token_types:
            inputs["token_type_ids"] = token_type_ids
        hidden = self.body(**inputs).last_hidden_state  # (batch, time, width)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, time, 1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # (batch, width)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(mean)))


class MultiLayerPerceptronConfig(PretrainedConfig):
    """Config of `MultiLayerPerceptron`.

    Args:
        sizes: Width of the input and of each hidden layer; the output has `num_labels`.
        **kwargs: The common fields of transformers, whose loading code requires this.
    """

    model_type = MLP

    def __init__(self, sizes: list[int] | None = None, **kwargs: Any):
        self.sizes = list(TINY["mlp"]["sizes"] if sizes is None else sizes)
        super().__init__(**kwargs)


class MultiLayerPerceptron(PreTrainedModel):
    """Linear layers `layer1`, `layer2`, ... with ReLU between: the smallest model to try an adapter on.

    Args:
        config: The widths.
    """

    config_class = MultiLayerPerceptronConfig
    main_input_name = "features"

    def __init__(self, config: MultiLayerPerceptronConfig):
        super().__init__(config)
        sizes = [*config.sizes, config.num_labels]
        for number, (width_in, width_out) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
            self.add_module(f"layer{number}", nn.Linear(width_in, width_out))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> SequenceClassifierOutput:
        """Maps features (batch, sizes[0]) to an output with `logits`, (batch, num_labels)."""
        hidden = features
        for number in range(1, len(self.config.sizes) + 1):
            hidden = self.get_submodule(f"layer{number}")(hidden if number == 1 else hidden.relu())
        return SequenceClassifierOutput(logits=hidden)


AutoConfig.register(MLP, MultiLayerPerceptronConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MultiLayerPerceptronConfig, MultiLayerPerceptron, exist_ok=True)


# Loading


def _source(config: ModelConfig) -> str:
    """Returns what `from_pretrained` takes: a folder or a hub name."""
    kind, _, value = config.name.partition(":")
    if kind == "embedded":
        return str(fetch(value))
    return str(Path(config.name).expanduser()) if _is_folder_name(config.name) else config.name


def _source_options(config: ModelConfig) -> dict[str, Any]:
    local = config.name.startswith("embedded:") or _is_folder_name(config.name)
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
    hub_config = AutoConfig.from_pretrained(_source(config), **_source_options(config))
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
        _source(config),
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


def _restore_pooled_classifier(config: ModelConfig, model: PooledEncoder) -> None:
    """Loads the classifier of a folder which `save_model` wrote from a `PooledEncoder`."""
    if not _is_folder_name(config.name) or not _saved_with_mean_pooling(Path(config.name).expanduser()):
        return
    for path in Path(config.name).expanduser().glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found = {key for key in file.keys() if key.startswith("classifier.")}  # noqa: SIM118
            for key in found:
                model.get_parameter(key).data.copy_(
                    _same_shape(file.get_tensor(key), model.get_parameter(key), key)
                )


def _same_shape(saved: Tensor, parameter: Tensor, key: str) -> Tensor:
    if saved.shape != parameter.shape:
        raise CheckpointError(
            f"model.name: {key} was saved with shape {tuple(saved.shape)}, the data need"
            f" {tuple(parameter.shape)}; use data with as many classes or the model it was made from"
        )
    return saved


def _transposed_layers(model: PreTrainedModel) -> list[str]:
    """Returns the paths of linear layers that the architecture's own class holds as `Conv1D`."""
    if getattr(model.config, "model_type", None) != "gpt2":
        return []
    with torch.device("meta"):
        prefix = f"{model.encoder_name}." if isinstance(model, PooledEncoder) else ""
        original = AutoModel.from_config(model.config) if prefix else type(model)(model.config)
    return [prefix + path for path, module in original.named_modules() if isinstance(module, Conv1D)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Returns a linear layer with these values, weight (out, in)."""
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def _head_dropout(config: PretrainedConfig) -> float:
    """Returns the dropout which the architecture puts before its own classifier, 0 where it has none."""
    names = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")
    rates = (getattr(config, name, None) for name in names)
    return next((rate for rate in rates if rate is not None), 0.0)


def _first(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token


def _character_tokenizer(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of single characters that fits the vocabulary of a random model."""
    words = [*SPECIAL_TOKENS, *CHARACTERS][: config.vocab_size]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    kind = ARCHITECTURES[config.model_type].kind
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
        hint = "" if _is_local(config) or hub_reachable() else " (the hub is not reachable from here)"
        raise ConfigError(
            f"model.name: no {what} can be built from '{config.name}'{hint}: {_one_line(error)}."
            f" Check name, revision and model.config. Allowed: {known}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(". ")


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


def _folder_faults(config: ModelConfig, folder: Path) -> list[str]:
    if not folder.is_dir():
        return [f"name: the folder '{folder}' does not exist; a hub repository is written 'owner/name'"]
    if (folder / "adapter_config.json").exists():
        return [f"name: '{folder}' holds an adapter, not a model; give the model which it was trained on"]
    try:
        json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return [f"name: '{folder}' has no config.json, so it is no model folder"]
    except (OSError, ValueError) as error:
        return [f"name: {folder / 'config.json'} cannot be read: {error}"]
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        reason = f"only {pickles[0]}, a pickle that may run code" if pickles else "no weights"
        return [f"name: '{folder}' holds {reason}; safetensors are needed: convert with save_pretrained"]
    if _saved_with_mean_pooling(folder) and config.pooling != "mean":
        return [f"pooling: '{folder}' was saved with mean pooling; set pooling to 'mean'"]
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
    return faults


def _known_type(config: ModelConfig) -> str | None:
    """Returns the model type where it is known without a download."""
    kind, _, value = config.name.partition(":")
    if kind == "random":
        return value
    if kind == "embedded":
        return {"minilm": "bert", "smollm2": "llama"}.get(value)
    try:
        return json.loads((Path(config.name).expanduser() / "config.json").read_text()).get("model_type")
    except (OSError, ValueError):
        return None


def _saved_with_mean_pooling(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text()).get("lora_lab_pooling") == "mean"


def _is_folder_name(name: str) -> bool:
    """Tells a folder from a hub repository, which is written "name" or "owner/name"."""
    return Path(name).expanduser().is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _is_local(config: ModelConfig) -> bool:
    return config.name.startswith(("random:", "embedded:")) or _is_folder_name(config.name)
