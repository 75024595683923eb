"""Optimizer, parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora_lab.adapters import AdapterSet
from lora_lab.errors import IncompatibleError


@dataclass
class OptimizationConfig:
    """How the adapters are trained."""

    learning_rate: float = 1e-3
    """Peak learning rate of the adapters; above 0."""

    head_learning_rate: float | None = None
    """Peak learning rate of fully trained modules (task heads); null means `learning_rate`."""

    loraplus_ratio: float = 1.0
    """Learning rate of B divided by that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354; the paper suggests
    16); at least 1."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; 0 or more. Tensors for which 0 is not "no change" have none."""

    beta1: float = 0.9
    """AdamW's decay rate of the gradient's mean, in [0, 1)."""

    beta2: float = 0.999
    """AdamW's decay rate of the gradient's square, in [0, 1)."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after warm-up: to 0 at the last step, except for `constant`."""

    warmup: float = 0.06
    """Share of all optimizer steps in which the learning rate rises from 0, in [0, 1)."""

    gradient_clip: float | None = 1.0
    """Largest norm of all gradients together; null means no clipping."""

    def faults(self) -> list[str]:
        """Returns every fault, as `field: what is wrong and what is allowed`."""
        rules = {
            "learning_rate: must be above 0 and finite": 0 < self.learning_rate < math.inf,
            "head_learning_rate: must be above 0 and finite, or null": self.head_learning_rate is None
            or 0 < self.head_learning_rate < math.inf,
            "loraplus_ratio: must be at least 1 and finite": 1 <= self.loraplus_ratio < math.inf,
            "weight_decay: must be 0 or more, and finite": 0 <= self.weight_decay < math.inf,
            "beta1: must lie in [0, 1)": 0 <= self.beta1 < 1,
            "beta2: must lie in [0, 1)": 0 <= self.beta2 < 1,
            "warmup: must lie in [0, 1)": 0 <= self.warmup < 1,
            "gradient_clip: must be above 0 and finite, or null": self.gradient_clip is None
            or 0 < self.gradient_clip < math.inf,
        }
        return [
            f"{rule}; got {getattr(self, rule.partition(':')[0])}"
            for rule, holds in rules.items()
            if not holds
        ]


def parameter_groups(adapters: AdapterSet, config: OptimizationConfig) -> list[dict[str, Any]]:
    """Groups the trainable tensors by learning rate and weight decay.

    Args:
        adapters: the adapters, which say which tensors have no decay.
        config: rates and decay.

    Raises:
        IncompatibleError: if there is a LoRA+ ratio and the method has no B.
    """
    spared = {id(p) for adapter in adapters.everything() for p in adapter.decay_exempt()}
    faster = {id(p) for adapter in adapters for p in adapter.loraplus_parameters()}
    if config.loraplus_ratio != 1 and not faster:
        raise IncompatibleError(
            f"optimization.loraplus_ratio: {adapters.spec.method} has no factor B to train faster; "
            "set it to 1, or choose a method of the LoRA family."
        )
    heads = {id(p) for module in adapters.saved.values() for p in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in adapters.trainable_parameters():
        rate = config.learning_rate
        if id(parameter) in heads:
            rate = config.head_learning_rate or rate
        elif id(parameter) in faster:
            rate *= config.loraplus_ratio
        decay = 0.0 if id(parameter) in spared else config.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizationConfig, fused: bool = True
) -> Optimizer:
    """Makes AdamW over groups of tensors.

    Args:
        groups: what `parameter_groups` returned.
        config: decay rates of the moments.
        fused: one kernel for all tensors.
    """
    return AdamW(groups, betas=(config.beta1, config.beta2), fused=fused)


def keep_frozen_parts(optimizer: Optimizer, adapters: AdapterSet) -> None:
    """Makes every step skip what adapters hold frozen (`Adapter.frozen_parts`), including its moments.

    Works with any optimizer whose state has tensors of the parameter's shape, such as AdamW's moments.
    """
    before: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def numbers_of(parameter: Tensor) -> dict[str, Tensor]:
        state = optimizer.state.get(parameter, {})
        moments = {name: x for name, x in state.items() if getattr(x, "shape", None) == parameter.shape}
        return {"": parameter.detach(), **moments}

    def remember(*_: object) -> None:
        before.clear()  # a skipped step has restored nothing
        for adapter in adapters:
            for parameter, frozen in adapter.frozen_parts():
                old = {name: x.clone() for name, x in numbers_of(parameter).items()}
                before.append((parameter, frozen, old))

    def restore(*_: object) -> None:
        for parameter, frozen, old in before:
            for name, x in numbers_of(parameter).items():
                # Moments that this step has created started at zero.
                x.copy_(torch.where(frozen, old.get(name, torch.zeros_like(x)), x))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)


def build_schedule(optimizer: Optimizer, config: OptimizationConfig, steps: int) -> LambdaLR:
    """Makes the schedule over `steps` optimizer steps; it scales all groups equally."""
    warmup = math.ceil(config.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, steps - warmup)
        if config.schedule == "linear":
            return max(0.0, 1 - progress)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if config.schedule == "cosine" else 1.0

    return LambdaLR(optimizer, factor)
