"""`nn.MultiheadAttention` with linear layers that are called, so that adapters on them work.

Torch's module holds the projections of query, key and value as one tensor, and reads the weight of its output
layer without calling it.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.errors import IncompatibleError


def split_attention(model: nn.Module) -> nn.Module:
    """Gives every `nn.MultiheadAttention` four linear layers `query`, `key`, `value`, `output`, in place.

    Load pretrained weights first: the names of the parameters change. This turns off torch's fast inference
    of `nn.TransformerEncoder`, which does not call its modules; padded positions, which it sets to zero, then
    have the same values as in training.

    Args:
        model: Any module, not yet adapted; one without `nn.MultiheadAttention` stays as it is.

    Returns:
        The same model, or its replacement if the model itself is an `nn.MultiheadAttention`. Values,
        device, dtype, `requires_grad` and mode are kept.

    Raises:
        IncompatibleError: if a part is a subclass of `nn.MultiheadAttention`; the model is unchanged then.
    """
    found = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    for attention in found:
        if type(attention) is not nn.MultiheadAttention:
            raise IncompatibleError(
                f"{type(attention).__name__} is a subclass of nn.MultiheadAttention; its changes would be "
                "lost. Call split_attention on the other parts of the model."
            )
    split = {id(attention): SplitMultiheadAttention(attention) for attention in found}
    for module in list(model.modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        # By child, not by path, so that a module at several paths is replaced at all of them.
        for name, child in list(module._modules.items()):
            if id(child) in split:
                module._modules[name] = split[id(child)]
    return split.get(id(model), model)


def linear_of(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Linear:
    """Returns a linear layer with copies of these values, trainable if they are."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            copy = tensor.detach().clone(memory_format=torch.contiguous_format)
            setattr(linear, name, nn.Parameter(copy, tensor.requires_grad))
    return linear


class SplitMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` whose projections are four linear layers that are called.

    Same call and same results, with all of its options: softmax(Q Kᵀ / √d) V, with d the width of a head.

    Args:
        attention: Gives options, values, device, dtype, `requires_grad` and mode; it is not changed.
    """

    # nn.TransformerEncoderLayer reads these, and skips its modules only if they are set.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.embed_dim = attention.embed_dim
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        bias = attention.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        self.query, self.key, self.value = (linear_of(*part) for part in zip(weights, biases, strict=True))
        self.output = linear_of(attention.out_proj.weight, attention.out_proj.bias)
        self.bias_k, self.bias_v = (
            None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
            for bias in (attention.bias_k, attention.bias_v)
        )
        self.train(attention.training)

    def forward(
        self,
        query: Float[Tensor, "... embed_dim"],
        key: Float[Tensor, "... kdim"],
        value: Float[Tensor, "... vdim"],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from `query` to `key` and `value`, as `nn.MultiheadAttention` does.

        Args:
            query: (batch, L, embed_dim), (L, batch, embed_dim) without `batch_first`, or (L, embed_dim).
            key: The same with S and `kdim` instead of L and `embed_dim`.
            value: The same with S and `vdim`.
            key_padding_mask: (batch, S), or (S,) without a batch; true is hidden, a float is added.
            need_weights: Whether to return the weights, which takes memory and time.
            attn_mask: (L, S) or (batch · heads, L, S); true is hidden, a float is added.
            average_attn_weights: Whether the weights are the mean over the heads.
            is_causal: Says that `attn_mask`, which must be given, is the causal one.

        Returns:
            Output in the layout of `query`; weights (batch, [heads,] L, S), without a batch where `query` has
            none, or None.

        Raises:
            ValueError: if inputs or masks have other shapes.
        """
        if query.is_nested or {x.dim() for x in (query, key, value)} not in ({2}, {3}):
            raise ValueError("attention: query, key, value must all have 2 or all 3 dimensions, not nested")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        causal = is_causal and key_padding_mask is None and not need_weights
        Q, K, V = self.query(query), self.key(key), self.value(value)
        if self.bias_k is not None and self.bias_v is not None:
            K, V = (
                torch.cat((x, bias.expand(len(x), 1, -1)), 1)
                for x, bias in ((K, self.bias_k), (V, self.bias_v))
            )
        if self.add_zero_attn:
            K, V = (F.pad(x, (0, 0, 0, 1)) for x in (K, V))
        mask = None if causal else self._mask(attn_mask, key_padding_mask, Q.dtype)
        if mask is not None:
            mask = F.pad(mask, (0, K.shape[1] - key.shape[1]))  # added keys are never hidden
        # (batch, length, embed_dim) → (batch, heads, length, width)
        Q, K, V = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (Q, K, V))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = Q * math.sqrt(1 / Q.shape[-1]) @ K.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ V
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            weights = None
            mixed = F.scaled_dot_product_attention(Q, K, V, mask, dropout, causal)
        # As in torch, the output is in memory with the length first: dropout after it draws in that order.
        output = self.output(mixed.permute(2, 0, 1, 3).flatten(2))  # (L, batch, embed_dim)
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights

    def fused_tensors(self, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the values under the names that `nn.MultiheadAttention` gives them.

        Args:
            own: Tensors by name in place of the state dict's.
        """
        given = dict(self.state_dict() if own is None else own)
        weights = [given[f"{part}.weight"] for part in ("query", "key", "value")]
        tensors: dict[str, Tensor] = {name: given[name] for name in ("bias_k", "bias_v") if name in given}
        tensors["out_proj.weight"] = given["output.weight"]
        if "output.bias" in given:
            tensors["out_proj.bias"] = given["output.bias"]
        if self.kdim == self.vdim == self.embed_dim:
            tensors["in_proj_weight"] = torch.cat(weights)
        else:
            tensors |= {f"{name}_proj_weight": weight for name, weight in zip("qkv", weights, strict=True)}
        names = [f"{part}.bias" for part in ("query", "key", "value")]
        biases = {name: given[name] for name in names if name in given}
        # Some of them alone, which an adapter added, have no name there.
        return tensors | ({"in_proj_bias": torch.cat([*biases.values()])} if len(biases) == 3 else biases)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype
    ) -> Float[Tensor, "batch heads L S"] | None:
        """Returns what is added to the scores; an axis has size 1 if it has equal rows."""
        masks = []
        if attn_mask is not None:
            mask = _additive(attn_mask, dtype)
            masks.append(mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            masks.append(_additive(key_padding_mask, dtype)[:, None, None])
        return sum(masks[1:], masks[0]) if masks else None

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Raises for inputs and masks that do not fit, all with the batch first."""
        batch, length, _ = query.shape
        source = key.shape[1]
        for name, given, allowed in (
            ("query", query, [(batch, length, self.embed_dim)]),
            ("key", key, [(batch, source, self.kdim)]),
            ("value", value, [(batch, source, self.vdim)]),
            ("key_padding_mask", key_padding_mask, [(batch, source)]),
            ("attn_mask", attn_mask, [(length, source), (batch * self.num_heads, length, source)]),
        ):
            if given is not None and tuple(given.shape) not in allowed:
                wanted = " or ".join(map(str, allowed))
                raise ValueError(f"attention: {name} must have the shape {wanted}; got {tuple(given.shape)}")
        if is_causal and attn_mask is None:
            raise ValueError("attention: is_causal only says what attn_mask is; also give the causal mask")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a mask to add to scores: minus infinity where a boolean mask is true."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
