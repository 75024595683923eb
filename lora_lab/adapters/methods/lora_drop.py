"""DropLoRA: dropout on the rank units between A and B (Zhang 2025, arXiv:2508.17337).

    z = drop(x) Aᵀ
    y = base(x) + s (z ⊙ M / (1 − p)) Bᵀ       training; M is 0 with probability p = drop_prob, else 1
    W' = W + s B A                             evaluation and merging

    A   (rank, in)    learned; U(±1/√in) at the start
    B   (out, rank)   learned; zeros at the start, hence W' = W
    M   (…, rank)     drawn anew, as drop_unit and drop_granularity say

A branch is multiplied by 0, never skipped: every tensor has a gradient in every step and process. Masks of
tokens and samples come from torch's own generator, that of a batch from the site's seed and a count of the
training batches, so that it is one for all processes, after a resumption, and when a block is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lab.adapters.families.low_rank import LowRankAdapter, ScaledSpec
from lora_lab.adapters.maps import is_convolution, mix, pointwise, project
from lora_lab.adapters.protocols import Growable, RandomlyDropped, RankAllocatable, Shareable
from lora_lab.adapters.spec import probability_fault
from lora_lab.errors import ConfigError


@dataclass
class LoRADropSpec(ScaledSpec):
    """DropLoRA's options; the paper has p = 0.5 and a mask for every token."""

    method: str = "lora_drop"

    drop_prob: float = 0.3
    """Probability p of zeroing a unit while training, in [0, 1); 0.5 in the paper, 0 is LoRA."""

    drop_unit: Literal["rank", "module"] = "rank"
    """What is dropped: single rank units, or the whole update of a module."""

    drop_granularity: Literal["token", "sample", "batch"] = "token"
    """What has a mask of its own: each token, each sample, or each batch, the same one in all processes."""

    drop_rescale: bool = True
    """Divide by 1 − p: the mean over masks is what evaluation computes, and not 1 − p times that."""

    def faults(self) -> list[str]:
        return super().faults() + probability_fault("drop_prob", self.drop_prob)


class LoRADrop(LowRankAdapter, RankAllocatable, Growable, Shareable, RandomlyDropped):
    """The adapter of one linear map.

    Attributes:
        mask: (rank,) or (1,), the mask of the present batch, for `drop_granularity: batch`.
        batches: scalar, the number of training batches so far; None for the others.
    """

    mask: Tensor
    batches: Tensor | None
    convolves = True

    Spec = LoRADropSpec
    paper = "Zhang 2025, arXiv:2508.17337"

    def __init__(self, base: Any, spec: LoRADropSpec):
        super().__init__(base, spec)
        self.drop_prob = spec.drop_prob
        self.seed, self.count = torch.initial_seed(), 0  # `Adapter.at` has set the site's seed
        batch = spec.drop_granularity == "batch"
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64) if batch else None)
        self.register_buffer("mask", None, persistent=False)
        self.tensors_changed()

    @property
    def drop_prob(self) -> float:
        """The probability p, which may change during training.

        Raises:
            ConfigError: if it is set to a number outside [0, 1).
        """
        return self._drop_prob

    @drop_prob.setter
    def drop_prob(self, probability: float) -> None:
        for fault in probability_fault("drop_prob", probability):
            raise ConfigError(f"adapter.{fault}")
        self._drop_prob = probability

    @property
    def rests_by_chance(self) -> bool:
        return self.drop_prob > 0

    @classmethod
    def watch(cls, model: nn.Module, adapters: Mapping[str, Any]) -> list[RemovableHandle]:
        """Begins a batch where the model is called."""
        counting = [adapter for adapter in adapters.values() if adapter.batches is not None]
        return [model.register_forward_pre_hook(adapter.begin_batch) for adapter in counting]

    def begin_batch(self, *_: Any) -> None:
        """Draws the mask of a training batch."""
        if self.training and self.batches is not None:
            self.count += 1
            self.batches.fill_(
                self.count
            )  # reading `count` waits for no device, which reading the buffer would
            generator = torch.Generator().manual_seed(self.seed + self.count)
            keep = torch.full(self.mask.shape, 1 - self.drop_prob)
            # A new tensor: the backward pass of the last batch may still need the old one.
            self.mask = torch.bernoulli(keep, generator=generator).to(self.mask)

    def tensors_changed(self) -> None:
        """Makes a resumed run count on, for as many units as there are."""
        super().tensors_changed()
        self.mask = self.A.new_ones(len(self.A) if self.spec.drop_unit == "rank" else 1)
        self.count = 0 if self.batches is None else int(self.batches)

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if not self.training or not self.drop_prob:
            return super().delta_output(x)
        left, right = self.factors()
        scale = self.scale / (1 - self.drop_prob if self.spec.drop_rescale else 1)
        hidden = project(self.base, self.dropout(x), right) * (scale * self.active)
        return mix(self.base, hidden * self.mask_of(hidden), left)

    def mask_of(self, hidden: Tensor) -> Tensor:
        """Returns M, which broadcasts to what `project` returned."""
        if self.spec.drop_granularity == "batch":
            return pointwise(self.base, self.mask).to(hidden.dtype)
        axis = -1 - len(self.base.kernel_size) if is_convolution(self.base) else -1
        units = hidden.shape[axis] if self.spec.drop_unit == "rank" else 1
        shape = list(hidden.shape)
        if self.spec.drop_granularity == "sample":
            shape[1:] = [1] * (hidden.ndim - 1)
        shape[axis] = units
        return hidden.new_empty(shape).bernoulli_(1 - self.drop_prob)
