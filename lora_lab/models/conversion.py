"""One kind of linear layer for every model: `nn.Linear` in memory, the architecture's own layout on disk."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.models.architectures import find_roles
from lora_lab.models.attention import SplitMultiheadAttention, linear_of, split_attention
from lora_lab.models.pooled_encoder import PooledEncoder
from lora_lab.models.quantization import QuantizedLinear


def linearise(model: nn.Module) -> nn.Module:
    """Replaces every `Conv1D` (GPT-2's transposed linear layer) by the equal `nn.Linear`, in place.

    Returns:
        The same model; outputs agree up to the rounding of one matrix product.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(path, linear_of(module.weight.T, module.bias))
    return model


def split_fused_projections(model: nn.Module) -> nn.Module:
    """Replaces every fused query-key-value projection by linear layers `query`, `key`, `value`, in place.

    Returns:
        The same model. GPT-2 now has the roles query, key and value; see `split_attention` for what holds
        `nn.MultiheadAttention`.

    Raises:
        ConfigError: If the model has no fused projection.
        IncompatibleError: See `split_attention`.
    """
    sites = [site for site in find_roles(model) if site.role == "query_key_value"]
    if not sites and not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        raise ConfigError(
            f"model.split_fused: {type(model).__name__} has no fused query-key-value projection; set it to"
            " false"
        )
    for site in sites:
        fused = cast(nn.Linear, model.get_submodule(site.path))
        model.set_submodule(site.path, FusedProjection(fused))
    return split_attention(model)


def save_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes config and weights as a folder that `from_pretrained` and `ModelConfig.name` open.

    Split projections are joined again, and quantised maps are written dequantised. GPT-2's layers get back
    the layout of its own checkpoints; saved as linear layers, its square matrices would be read transposed
    without a complaint.

    Args:
        model: A model of `build_model` without adapters (merged or never injected).
        folder: Created where it does not exist.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    weights = model.state_dict()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear):
            for name in module.state_dict():
                del weights[f"{path}.{name}"]
            weights[f"{path}.weight"] = module.weight
            if module.bias is not None:
                weights[f"{path}.bias"] = module.bias
    for path, module in model.named_modules():
        if isinstance(module, FusedProjection):
            for tensor in ("weight", "bias"):
                parts = [weights.pop(f"{path}.{part}.{tensor}") for part in ("query", "key", "value")]
                weights[f"{path}.{tensor}"] = torch.cat(parts)
        if isinstance(module, SplitMultiheadAttention):
            for name in module.state_dict():
                del weights[f"{path}.{name}"]
            weights |= {f"{path}.{name}": tensor for name, tensor in module.fused_tensors().items()}
    for path in _transposed_layers(model):
        weights[f"{path}.weight"] = weights[f"{path}.weight"].T.contiguous()
    try:
        model.save_pretrained(folder, state_dict=weights)
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be written to {folder}: {error}; choose another folder"
        ) from error


def _transposed_layers(model: PreTrainedModel) -> list[str]:
    """Returns the paths of linear layers that the architecture's own class holds as `Conv1D`."""
    if getattr(model.config, "model_type", None) != "gpt2":
        return []
    with torch.device("meta"):
        prefix = f"{model.encoder_name}." if isinstance(model, PooledEncoder) else ""
        original = AutoModel.from_config(model.config) if prefix else type(model)(model.config)
    return [prefix + path for path, module in original.named_modules() if isinstance(module, Conv1D)]


class FusedProjection(nn.Module):
    """A query-key-value projection as three linear layers whose outputs are joined again.

    It has no `weight` of its own, so that the role of the fused layer passes to its parts.

    Args:
        fused: Linear layer whose output is query, key and value of equal width side by side.
    """

    def __init__(self, fused: nn.Linear):
        super().__init__()
        biases = fused.bias.chunk(3) if fused.bias is not None else (None,) * 3
        parts = [linear_of(*part) for part in zip(fused.weight.chunk(3), biases, strict=True)]
        self.query, self.key, self.value = parts

    def forward(self, hidden: Tensor) -> Tensor:
        """Projects (..., width) to (..., 3 · width)."""
        return torch.cat((self.query(hidden), self.key(hidden), self.value(hidden)), dim=-1)
