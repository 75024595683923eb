"""A frozen base in 4 or 8 bits, under any adapter (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

    nf4, fp4   W ≈ code[k] · m   k one of 16 numbers in [−1, 1], m the largest |w| of a block of W
    int8       W ≈ k / 127 · m   k in −127 … 127, m the largest |w| of a row (arXiv:2208.07339)
    y = x Wᵀ + b

    codes           k; uint8 (out · in / 2, 1) with two in a byte, or int8 (out, in)
    absmax          m; float32 (blocks,) or (out,)
    absmax          uint8 (blocks,) with double quantisation: m ≈ map[absmax] · nested_absmax + offset
    nested_absmax   float32 (blocks / 256,)
    offset          float32 (), the mean of m

Everything is frozen, and computed by bitsandbytes. Activations are not quantised, also with int8.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.linalg.autograd import Context, TensorFunction
from lora_lab.models.architectures import find_roles, head_paths

Quantization = Literal["none", "nf4", "fp4", "int8"]
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass
class QuantizationOptions:
    """How the base is quantised; the defaults are QLoRA's."""

    use_double_quant: bool = True
    """Whether the scales of nf4 and fp4 are quantised too: 4.127 bits a weight instead of 4.5."""
    blocksize: int = 64
    """How many weights share a scale of nf4 and fp4: a power of two, 32 to 4096."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type in which products with W are computed; null takes the inputs' own. The paper's: bfloat16."""


def quantization_faults(kind: Quantization, options: QuantizationOptions) -> list[str]:
    """Returns the faults of a config, each starting with its key."""
    found = []
    plain = QuantizationOptions()
    if kind != "none" and importlib.util.find_spec("bitsandbytes") is None:
        found.append(f"quantization: {kind} needs bitsandbytes: pip install 'lora_lab[quant]'")
    if options.blocksize not in BLOCKSIZES:
        allowed = ", ".join(map(str, BLOCKSIZES))
        found.append(f"quantization_options.blocksize: must be one of {allowed}; got {options.blocksize}")
    for name in ("use_double_quant", "blocksize", "compute_dtype"):
        ignored = kind == "none" or (kind == "int8" and name != "compute_dtype")
        if ignored and getattr(options, name) != getattr(plain, name):
            found.append(f"quantization_options.{name}: has no meaning with quantization: {kind}; remove it")
    return found


def quantize(
    model: nn.Module, kind: Quantization, options: QuantizationOptions, keep_weights: bool = False
) -> nn.Module:
    """Replaces the linear maps of a model's blocks by `QuantizedLinear`, in place.

    Embeddings, norms, task heads and output embeddings stay. In a model without known roles, every linear map
    except the heads is quantised.

    Args:
        model: in full precision.
        kind: type of quantisation.
        options: options of the quantisation.
        keep_weights: keep each W for starts that need it, until `forget_weights`.

    Returns:
        The same model.

    Raises:
        ConfigError: if the options are invalid, or bitsandbytes is missing.
        IncompatibleError: if the model is already quantised, or has nothing to quantise.
    """
    if faults := quantization_faults(kind, options):
        raise ConfigError("; ".join(f"model.{fault}" for fault in faults))
    if getattr(model, "is_quantized", False) or holds_codes(model):
        raise IncompatibleError(
            "model.quantization: the model is already quantised; set it to none, or load the model in full "
            "precision."
        )
    linears = _linear_maps(model)
    if not linears:
        raise IncompatibleError(f"model.quantization: {type(model).__name__} has no linear map to quantise.")
    for path, linear in linears.items():
        if linear.weight.dtype == torch.float64:
            raise IncompatibleError("model.quantization: needs weights of float32 or narrower, not float64.")
        if not linear.weight.isfinite().all():
            raise IncompatibleError(
                f"model.quantization: {path} has numbers that are not finite; load the model again."
            )
    made: dict[int, QuantizedLinear] = {}
    for path, linear in linears.items():
        if id(linear) not in made:
            made[id(linear)] = QuantizedLinear(linear, kind, options, keep_weights)
        model.set_submodule(path, made[id(linear)])
    return model


def holds_codes(module: nn.Module) -> bool:
    """Whether a module is, or has inside it, a quantised linear map."""
    return any(isinstance(part, QuantizedLinear) for part in module.modules())


def forget_weights(model: nn.Module) -> None:
    """Frees the weights that `quantize` has kept."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.full_weight = None


def _linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the maps to quantise, by each path under which they are reached."""
    blocks = [site.path for site in find_roles(model) if site.role == "block"]
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    spared = head_paths(model)
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        # Weights of subclasses may be read without a call, as in nn.MultiheadAttention.
        if type(module) is nn.Linear
        and module is not output
        and not _inside(path, spared)
        and (not blocks or _inside(path, blocks))
    }


def _inside(path: str, parents: list[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


class QuantizedLinear(nn.Module):
    """A quantised linear map. It has only buffers, so that nothing of it can be trained.

    Args:
        linear: The map in full precision.
        kind: Type of quantisation.
        options: Options of the quantisation.
        keep_weight: Whether `full_weight` keeps W.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: Tensor | None
    full_weight: Tensor | None
    """W, (out, in), for starts that need it; not in the state dict, in copies and in pickles."""

    def __init__(
        self, linear: nn.Linear, kind: Quantization, options: QuantizationOptions, keep_weight: bool = False
    ):
        from bitsandbytes import functional

        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.blocksize = kind, options.blocksize
        self.compute_dtype = getattr(torch, options.compute_dtype) if options.compute_dtype else None
        weight = linear.weight.detach()
        self.dtype = weight.dtype
        nested = offset = None
        if kind == "int8":
            codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
        else:
            codes, state = functional.quantize_4bit(
                weight,
                blocksize=options.blocksize,
                compress_statistics=options.use_double_quant,
                quant_type=kind,
            )
            absmax, offset = state.absmax, state.offset
            nested = state.state2.absmax if state.nested else None
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested)
        self.register_buffer("offset", offset)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.full_weight = weight if keep_weight else None
        self.train(linear.training)

    def numel(self) -> int:
        """Returns how many numbers the map has, its bias included."""
        return self.out_features * (self.in_features + (self.bias is not None))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """W from its codes, in the type of the rest of the model."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Returns W from its codes in a floating type."""
        from bitsandbytes import functional

        if self.kind == "int8":
            return functional.int8_vectorwise_dequant(self.codes, self.absmax).to(dtype)
        absmax = self.absmax
        if self.nested_absmax is not None and self.offset is not None:
            absmax = functional.dequantize_blockwise(absmax, absmax=self.nested_absmax, blocksize=256)
            absmax = absmax + self.offset
        # As one row: the library's kernel for AVX-512 is wrong if rows are not a multiple of the block size.
        narrow = torch.float32 if dtype == torch.float64 else dtype
        shape = (1, 2 * self.codes.numel())
        state = functional.QuantState(absmax, shape, None, self.blocksize, self.kind, narrow)
        numbers = functional.dequantize_4bit(self.codes, state).flatten()
        return numbers[: self.out_features * self.in_features].view(self.out_features, -1).to(dtype)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Applies the map."""
        if self.compute_dtype is None:
            return _Product.apply(x, self)
        return _Product.apply(x.to(self.compute_dtype), self).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # A cast changes only the bias and the dequantised weight: rounded scales would change every W.
        scales = {name: getattr(self, name) for name in ("absmax", "nested_absmax", "offset")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, scale in scales.items():
            if scale is not None:
                setattr(self, name, scale.to(self.codes.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "full_weight": None}


class _Map(Context):
    module: QuantizedLinear


class _Product(TensorFunction):
    """x Wᵀ + b. W is dequantised in each pass, as keeping it until backward would take the memory saved."""

    @staticmethod
    def forward(ctx: _Map, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return F.linear(x, module.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: _Map, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.module.dequantized(gradient.dtype), None
