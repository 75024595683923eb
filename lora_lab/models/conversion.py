"""One kind of linear layer for every model: `nn.Linear` in memory, the architecture's own layout on disk."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.models.architectures import find_roles
from lora_lab.models.pooled_encoder import PooledEncoder
from lora_lab.models.quantization import QuantizedLinear


def linearise(model: nn.Module) -> nn.Module:
    """Replaces every `Conv1D` (GPT-2's transposed linear layer) by the equal `nn.Linear`, in place.

    Returns:
        The same model; outputs agree up to the rounding of one matrix product.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            weight = module.weight.data.T  # (in, out) → (out, in)
            model.set_submodule(path, _linear(weight, module.bias.data))
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
    would be read transposed without a complaint. Quantised maps are written dequantised.

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
