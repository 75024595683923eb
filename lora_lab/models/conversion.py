"""One kind of linear layer for every model: `nn.Linear` in memory, the architecture's own layout on disk."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.serialization._base import parse_size_to_int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lora_lab.documents.writing import sync
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from lora_lab.linalg.lazy import LazyTensor, now
from lora_lab.models.architectures import find_roles, head_width, widths
from lora_lab.models.attention import SplitMultiheadAttention, linear_of, split_attention
from lora_lab.models.pooled_encoder import PooledEncoder
from lora_lab.models.quantization import QuantizedLinear
from lora_lab.models.weight_files import mapped_weights, write_weights


def linearise(model: nn.Module) -> nn.Module:
    """Replaces every `Conv1D` (GPT-2's transposed linear layer) by an equal `nn.Linear`, in place.

    Returns:
        The same model; outputs agree up to the rounding of one matrix product.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = linear_of(module.weight.T, module.bias)
            linear.__dict__["from_conv1d"] = True  # files that name its parameter hold the transposed one
            model.set_submodule(path, linear)
    return model


def split_fused_projections(model: nn.Module) -> nn.Module:
    """Replaces every fused query-key-value projection by linear layers `query`, `key`, `value`, in place.

    Returns:
        The same model, which now has the roles query, key and value; for `nn.MultiheadAttention` see
        `split_attention`.

    Raises:
        ConfigError: if the model has no fused projection.
        IncompatibleError: if it is not known which rows of it are which, or as `split_attention`.
    """
    fused = [site.path for site in find_roles(model) if site.role == "query_key_value"]
    if not fused and not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        raise ConfigError(
            f"model.split_fused: {type(model).__name__} has no fused query-key-value projection; set it to"
            " false"
        )
    layouts = {path: _layout(model, path) for path in fused}
    for path, (groups, rows) in layouts.items():
        projection = cast(nn.Linear, model.get_submodule(path))
        model.set_submodule(path, FusedProjection(projection, groups, rows))
    return split_attention(model)


SIDE_BY_SIDE = ("gpt2", "openai-gpt", "mpt", "phi3", "phi4_multimodal", "modernbert", "dbrx")
"""Model types whose fused projection has all rows of queries first, then those of keys, then of values."""
HEAD_BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "fuyu")
"""Model types whose fused projection has the query, key and value of one head after another."""
SPLITTABLE = (*SIDE_BY_SIDE, *HEAD_BY_HEAD, "falcon", "gpt_bigcode", "codegen")
"""Model types whose fused projections can be split. Shapes do not say which rows are which."""


def _layout(model: nn.Module, path: str) -> tuple[int, dict[str, int]]:
    """Returns the number of groups of rows in a fused projection, and the rows of each part in a group."""
    config: Any = model.config
    kind = config.model_type
    width, heads = head_width(model), config.num_attention_heads
    found = widths(model.get_submodule(path))
    if kind not in SPLITTABLE or width is None or found is None:
        raise IncompatibleError(
            f"model.split_fused: it is not known which rows of {path} are queries, keys and values ({kind});"
            " set it to false and target query_key_value"
        )
    pairs = (found[1] // width - heads) // 2  # heads of keys, as many as of values
    if kind == "codegen":  # four parts for four devices; values come before keys
        return 4, {"query": heads * width // 4, "value": heads * width // 4, "key": heads * width // 4}
    grouped = kind == "falcon" and config.new_decoder_architecture
    single = kind in ("falcon", "gpt_bigcode") and config.multi_query
    if kind in SIDE_BY_SIDE or (single and not grouped):
        return 1, {"query": heads * width, "key": pairs * width, "value": pairs * width}
    return pairs, {"query": heads // pairs * width, "key": width, "value": width}


def save_model(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    shard_size: str = "50GB",
    dtype: torch.dtype | None = None,
    changed: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes config and weights as a folder that `from_pretrained` and `ModelConfig.name` open.

    Split projections are joined again, and quantised maps are written dequantised. GPT-2's layers get the
    layout of its checkpoints; saved as linear layers, its square matrices would be read transposed without an
    error.

    Memory holds two tensors at a time in addition to the model; a model that transformers has mapped from
    safetensors files takes none.

    Args:
        model: A model from `build_model` without adapters (merged or never injected).
        folder: Created if it does not exist.
        shard_size: Size of the largest file, "500MB".
        dtype: Type of the floating numbers; None keeps each tensor's.
        changed: Tensors by name, instead of the model's or in addition to them; lazy ones are computed when
            they are written.

    Raises:
        ConfigError: if the size cannot be read.
        CheckpointError: if the folder cannot be written.
        IncompatibleError: if the model has a tensor that the architecture does not have, such as a bias
            of an adapter; nothing is written then.
    """
    check_shard_size(shard_size)
    weights = _weights(model, changed or {})
    if dtype is not None:
        weights = {name: _cast(tensor, dtype) for name, tensor in weights.items()}
    mapped = mapped_weights()
    try:
        model.save_pretrained(folder, state_dict={})  # config, generation config, code of the model's own
        if dtype is not None:
            model.config.dtype = dtype
            model.config.save_pretrained(folder)
        split = split_torch_state_dict_into_shards(
            weights, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
        )
        with ThreadPoolExecutor(1) as disk:  # gets each file while the next one is computed
            for file, names in split.filename_to_tensors.items():
                path = Path(folder) / file
                write_weights(path, {name: weights.pop(name) for name in names}, mapped)
                disk.submit(sync, path)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (Path(folder) / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be written to {folder}: {error}; choose another folder"
        ) from error


def check_shard_size(text: str) -> None:
    """Checks the size of the largest file.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        size = parse_size_to_int(text)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"--shard-size: must be a number and a unit, like 500MB or 5GB; got {text!r}")


def _weights(model: PreTrainedModel, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a model's tensors by their names on the disk, lazy if they are computed."""
    weights: dict[str, Tensor] = model.state_dict()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear):
            for name in module.state_dict():
                del weights[f"{path}.{name}"]
            shape = (module.out_features, module.in_features)
            weights[f"{path}.weight"] = LazyTensor.of(partial(getattr, module, "weight"), shape, module.dtype)
            if module.bias is not None:
                weights[f"{path}.bias"] = module.bias
    weights |= changed
    # Tied weights are written once. Computed ones are none: what an adapter changes is no longer tied.
    held = {name: tensor for name, tensor in weights.items() if not isinstance(tensor, LazyTensor)}
    kept = remove_tied_weights_from_state_dict(dict(held), model)
    weights = {
        name: kept.get(name, tensor) for name, tensor in weights.items() if name not in held.keys() - kept
    }
    for path, module in model.named_modules():
        if isinstance(module, FusedProjection):
            for tensor in ("weight", "bias"):
                names = [f"{path}.{part}.{tensor}" for part in module.rows]
                if all(name in weights for name in names):
                    weights[f"{path}.{tensor}"] = module.joined([weights.pop(name) for name in names], 0)
        if isinstance(module, SplitMultiheadAttention):
            own = {name: weights.pop(f"{path}.{name}") for name in module.state_dict()}
            weights |= {f"{path}.{name}": tensor for name, tensor in module.fused_tensors(own).items()}
    prefix = f"{model.encoder_name}." if isinstance(model, PooledEncoder) else ""
    plain = _plain(model)
    _check_known(model, weights, {prefix + name for name in plain.state_dict()})
    for path, module in plain.named_modules():
        if isinstance(module, Conv1D):
            weights[f"{prefix}{path}.weight"] = weights[f"{prefix}{path}.weight"].T
    for name in model._keys_to_ignore_on_save or ():
        weights.pop(name, None)
    return cast(dict[str, Tensor], revert_weight_conversion(model, weights))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    return LazyTensor.of(lambda: now(tensor).to(dtype), tensor.shape, dtype)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model, or its encoder, as the architecture's class builds it, without values."""
    own = model.body if isinstance(model, PooledEncoder) else model
    with torch.device("meta"):
        return type(own)(model.config)


def _check_known(model: PreTrainedModel, weights: Mapping[str, Tensor], known: set[str]) -> None:
    """Raises for a tensor that transformers would drop when it opens the folder."""
    if isinstance(model, PooledEncoder):
        known = known | {f"classifier.{name}" for name in ("weight", "bias")}
    if unknown := [name for name in weights if name not in known]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise IncompatibleError(
            f"{unknown[0]}{more}: {type(model).__name__} has no such tensor, and transformers would drop it "
            "when it opens the folder. A bias that an adapter adds (lora_bias) to a map without one cannot "
            "be merged: keep the adapter apart, or export it as a LoRA, which is exact."
        )


class FusedProjection(nn.Module):
    """A query-key-value projection as three linear layers whose outputs are joined again.

    It has no `weight`, so its parts have the roles and not the fused layer.

    Args:
        fused: Linear layer whose output is query, key and value.
        groups: Number of groups of its rows, each with all three parts.
        rows: The rows of each part in a group, in their order.
    """

    def __init__(self, fused: nn.Linear, groups: int, rows: dict[str, int]):
        super().__init__()
        self.groups, self.rows = groups, rows
        weights = self._parts(fused.weight)
        biases = self._parts(fused.bias) if fused.bias is not None else (None,) * 3
        for name, weight, bias in zip(rows, weights, biases, strict=True):
            self.add_module(name, linear_of(weight, bias))

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        grouped = tensor.unflatten(0, (self.groups, -1)).split(list(self.rows.values()), 1)
        return [part.flatten(0, 1) for part in grouped]

    def joined(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Joins the parts along an axis in the order of the fused layer's rows."""
        axis = axis % parts[0].dim()
        grouped = [part.unflatten(axis, (self.groups, -1)) for part in parts]
        return torch.cat(grouped, axis + 1).flatten(axis, axis + 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Projects (..., width) to (..., rows)."""
        return self.joined([self.get_submodule(name)(hidden) for name in self.rows], -1)
