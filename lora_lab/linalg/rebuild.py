"""Activations that the backward pass computes again, from tensors that the frozen model keeps anyway.

A frozen linear map does not keep its input x, but an adapter would keep it. Usually x is the result of a
normalization, an activation function or a product, whose backward pass keeps the tensors that x was computed
from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import Node

Hook = TypeVar("Hook", bound=Callable[..., Tensor])

Build = Callable[..., Tensor]
"""Computes x from the tensors of its `Origin`, or some rows of x from the same rows of the tensors."""


class Origin(NamedTuple):
    """What a tensor is computed from."""

    build: Build
    tensors: tuple[Tensor, ...]
    """What has to be kept for this: rows like those of x, and vectors."""


def source(x: Tensor) -> Origin:
    """Returns what x can be computed from again, up to rounding.

    This is x itself, which then has to be kept, if its origin is unknown, or if there are hooks on saved
    tensors: those that offload or recompute must not be called in the forward pass.
    """
    if not torch.compiler.is_compiling() and x.grad_fn is not None and x.ndim > 1:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        made = _made_by(x.grad_fn) if hooks is None or hooks[1] in _OBSERVERS else None
        if made is not None and all(t.shape[:-1] == x.shape[:-1] or t.ndim < 2 for t in made.tensors):
            return made
    return Origin(_itself, (x,))


def in_pieces(build: Build, tensors: Sequence[Tensor], lead: torch.Size, rows: int) -> Iterator[Tensor]:
    """Yields x as pieces of this many rows, one after the other.

    Args:
        build: that of x's origin.
        tensors: those of x's origin.
        lead: x's shape without its last axis.
        rows: length of the pieces; the last one may be shorter.
    """
    cut = (t.reshape(-1, t.shape[-1]).split(rows) if t.shape[:-1] == lead else repeat(t) for t in tensors)
    return (build(*parts) for parts in zip(*cut, strict=False))


def rows_of_pieces(x: Float[Tensor, "rows n"]) -> int:
    """Returns how many rows of x a CPU should process at once to keep them in its cache; else all."""
    # In half precision the sum over the pieces would be rounded once for each.
    whole = x.device.type != "cpu" or x.dtype.itemsize < 4 or torch.compiler.is_compiling()
    return len(x) if whole else max(PIECE // x.shape[-1], 1)


PIECE = 2**17
"""Numbers in a piece."""


_OBSERVERS = set[object]()


def observer(unpack: Hook) -> Hook:
    """Marks the second of two hooks on saved tensors that only observe, and may be called at any time."""
    _OBSERVERS.add(unpack)
    return unpack


def _itself(x: Tensor) -> Tensor:
    return x


def _made_by(node: Node | None) -> Origin | None:
    """Returns the source of what a node of autograd's graph has returned; None if it is not known."""
    maker = None if node is None else _MAKERS.get(node.name())
    return None if node is None or maker is None else maker(node)


def _saved(node: Node, name: str) -> Tensor | None:
    """Returns a tensor that a node keeps; None if it keeps none, or has changed it."""
    try:
        raw = getattr(node, f"_raw_saved_{name}")
        unpack = getattr(raw, "unpack_hook", raw)  # versions of torch that do not show the hook may have one
        return getattr(node, f"_saved_{name}") if unpack is None or unpack in _OBSERVERS else None
    except RuntimeError:  # freed by a backward pass, or overwritten
        return None


def _layer_norm(node: Node) -> Origin | None:
    kept = [_saved(node, name) for name in ("input", "result1", "result2", "weight", "bias")]
    if any(tensor is None for tensor in kept[:3]):
        return None
    steps = [
        step for step, tensor in zip((Tensor.mul_, Tensor.add_), kept[3:], strict=True) if tensor is not None
    ]

    def build(h: Tensor, mean: Tensor, rstd: Tensor, *affine: Tensor) -> Tensor:
        x = (h - mean).mul_(rstd)
        for step, tensor in zip(steps, affine, strict=True):
            step(x, tensor)
        return x.to(h.dtype)

    return Origin(build, tuple(tensor for tensor in kept if tensor is not None))


def _gelu(node: Any) -> Origin | None:
    h, approximate = _saved(node, "self"), node._saved_approximate
    return None if h is None else Origin(lambda h: F.gelu(h, approximate=approximate), (h,))


def _product(node: Node) -> Origin | None:
    factors = []
    for name, (origin, _) in zip(("self", "other"), node.next_functions, strict=True):
        kept = _saved(node, name)
        factors.append(_made_by(origin) if kept is None else Origin(_itself, (kept,)))
    left, right = factors
    if left is None or right is None:
        return None
    (make_left, own), (make_right, others) = left, right
    count = len(own)
    return Origin(lambda *kept: make_left(*kept[:count]) * make_right(*kept[count:]), own + others)


def _cast(node: Node) -> Origin | None:
    made, dtype = _made_by(node.next_functions[0][0]), node._input_metadata[0].dtype
    if made is None:
        return None
    make = made.build
    return Origin(lambda *kept: make(*kept).to(dtype), made.tensors)


_MAKERS: dict[str, Callable[[Node], Origin | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": _gelu,
    "MulBackward0": _product,  # of SwiGLU; twice in a row, of RMSNorm
    "ToCopyBackward0": _cast,  # inside of RMSNorm in half precision
}
