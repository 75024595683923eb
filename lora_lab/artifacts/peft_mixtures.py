"""Mixtures of LoRA as PEFT's `add_weighted_adapter` computes them: `peft_<its combination_type>`.

PEFT mixes each A and each B by itself, weighted by ±√|w s| and √|w s| (s is the source's scale), or with
`_svd` each ΔW, weighted by w. Of one such matrix T, with n numbers:

    linear           Σ wᵢ Tᵢ
    magnitude_prune  Σ wᵢ T̂ᵢ            T̂ holds the ⌊density · n⌋ largest numbers of T
    dare_linear      Σ wᵢ T̂ᵢ            T̂ holds each number with probability density, divided by it
    ties             Σ wᵢ T̂ᵢ / count    of the numbers whose sign is that of Σ T̂ᵢ, + where this is 0
    dare_ties        the same, of the numbers that dare leaves

So the product of mixed factors holds terms BᵢAⱼ of different sources. The papers choose the largest numbers
among all modules together, let weights take part in the election, and never touch factors. PEFT's `cat` and
`svd` are those of `combining`.

Different from PEFT on purpose: the result has a scale of 1, where PEFT's is √rank times too large if the
first source uses rsLoRA; each module keeps the rank of its sources, where PEFT would allocate the largest;
and biases are refused, which PEFT leaves out.

Source: `peft/tuners/lora/model.py` and `peft/utils/merge_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.adapters.injection import AdapterSet
from lora_lab.adapters.maps import stacked
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.rank import widened
from lora_lab.linalg.updates import Update

PeftMethod = Literal[
    "peft_linear",
    "peft_ties",
    "peft_dare_linear",
    "peft_dare_ties",
    "peft_magnitude_prune",
    "peft_ties_svd",
    "peft_dare_linear_svd",
    "peft_dare_ties_svd",
    "peft_magnitude_prune_svd",
]


class Factors(NamedTuple):
    """One LoRA as PEFT holds it: ΔW = s B A."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float


def peft_factors(adapters: AdapterSet, source: object) -> dict[str, Factors]:
    """Returns the factors of plain LoRA, by path.

    Args:
        adapters: the adapters of one source.
        source: its name, for messages.

    Raises:
        IncompatibleError: if it is another method, has a bias, or adapts experts.
    """
    spec = adapters.spec
    if spec.method != "lora" or getattr(spec, "lora_bias", False):
        what = "with a bias (lora_bias)" if spec.method == "lora" else spec.method
        raise IncompatibleError(
            f"{source}: is {what}, and the methods peft_… mix A and B of plain LoRA alone. Take one that "
            "mixes updates (weighted, ties, dare, …), or export it as a LoRA first."
        )
    found = {}
    for path, adapter in adapters.items():
        if stacked(adapter.base):
            raise IncompatibleError(
                f"{source}: adapts the experts of {path}, which PEFT does not mix. Take a method that mixes "
                "updates (weighted, cat, svd, ties, …)."
            )
        tensors = adapter.peft_tensors()
        A, B = (widened(tensors[name].detach()).flatten(1) for name in sorted(tensors))
        found[path] = Factors(A, B, adapter.stored_spec.scale)
    return found


def peft_mixture(
    found: Sequence[Mapping[str, Factors]],
    paths: Iterable[str],
    weights: Sequence[float],
    method: PeftMethod,
    density: float | None,
    seed: int,
) -> dict[str, Update]:
    """Mixes LoRA as PEFT does.

    Args:
        found: path → factors, of each source.
        paths: the modules in the model's order, in which PEFT draws for dare.
        weights: the factor of each source.
        method: how they are mixed.
        density: the share of numbers to keep; None for `peft_linear`.
        seed: torch's seed for dare, right before the first draw.

    Raises:
        IncompatibleError: if factors of one module have different ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = method.removeprefix("peft_").removesuffix("_svd")
    mixed = {}
    for path in paths:
        own, shares = zip(
            *((lora[path], w) for lora, w in zip(found, weights, strict=True) if path in lora), strict=True
        )
        if method.endswith("_svd"):
            deltas = [scale * (B @ A) for A, B, scale in own]
            mixed[path] = Update.of_matrix(_mixed(deltas, shares, kind, density, generator))
            continue
        if len(ranks := {len(A) for A, _, _ in own}) > 1:
            raise IncompatibleError(
                f"{path}: the sources have ranks {sorted(ranks)}, and {method} adds A to A and B to B. Take "
                "a method that mixes updates: weighted, ties, dare, …, or one of peft_…_svd."
            )
        strengths = [w * factors.scale for factors, w in zip(own, shares, strict=True)]
        roots = [math.sqrt(abs(strength)) for strength in strengths]
        signed = [math.copysign(root, s) for root, s in zip(roots, strengths, strict=True)]
        A = _mixed([factors.A for factors in own], signed, kind, density, generator)
        B = _mixed([factors.B for factors in own], roots, kind, density, generator)
        mixed[path] = Update(B, A)
    return mixed


def _mixed(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    kind: str,
    density: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Mixes one matrix of each source."""
    if density is not None and density < 1:
        if kind.startswith("dare"):
            chances = [torch.full_like(tensor, density) for tensor in tensors]
            draws = [torch.bernoulli(chance, generator=generator) for chance in chances]
            tensors = [tensor * drawn / density for tensor, drawn in zip(tensors, draws, strict=True)]
        else:
            tensors = [_largest(tensor, int(density * tensor.numel())) for tensor in tensors]
    stacked = torch.stack([*tensors])
    weighted = stacked * torch.tensor(weights).reshape(-1, 1, 1)
    if not kind.endswith("ties"):
        return weighted.sum(0)
    agree = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, count: int) -> Tensor:
    """Returns a tensor with all but so many of its largest numbers zeroed."""
    kept = torch.zeros_like(tensor).flatten()
    kept[tensor.abs().flatten().topk(count).indices] = 1
    return tensor * kept.reshape(tensor.shape)
