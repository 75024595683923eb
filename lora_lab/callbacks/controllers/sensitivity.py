"""How sensitive the loss is to each component, smoothed over steps as in AdaLoRA (arXiv:2303.10512).

After an optimizer step, from each number p as the step has left it and its gradient g before clipping,

    I ← β1 I + (1 − β1) |p g|,   U ← β2 U + (1 − β2) ||p g| − I|
    score of a component = Σ over its parts of the mean of their I U
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import get_total_norm

from lora_lab.adapters import AdapterSet
from lora_lab.callbacks.controllers.base import Controller
from lora_lab.callbacks.controllers.component_stacks import ComponentStacks
from lora_lab.linalg.pruning import smoothed
from lora_lab.linalg.rank import widened

AVERAGES = ("sensitivity", "uncertainty")
"""Names of I and U in checkpoints."""


class SensitivityController(Controller):
    """A controller that measures components; its spec has `beta1` and `beta2`.

    A step with gradients that are not finite, which mixed precision skips, does not change the averages.
    """

    def __init__(self, spec: Any, adapters: AdapterSet, seed: int = 0):
        super().__init__(spec, adapters, seed)
        self.stacks = ComponentStacks(self.controlled)
        self._averages: dict[str, Tensor] = {}
        self._others: list[Tensor] = []
        self._gradients: Tensor | None = None  # of the current step, before clipping

    def measures(self, step: int) -> bool:
        """Whether a step, counted from 0, is measured."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        measured = {id(tensor) for tensor in self.stacks.tensors()}
        self._others = [p for p in self.adapters.trainable_parameters() if id(p) not in measured]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.measures(trainer.global_step):
            self._gradients = self._gradient_row()

    @torch.no_grad()
    def measure(self) -> None:
        """Adds |p g| of the step just made to the averages."""
        gradients = self._gradient_row() if self._gradients is None else self._gradients
        self._gradients = None
        measured = gradients.mul_(torch.cat([tensor.flatten() for tensor in self.stacks.tensors()])).abs_()
        others = [p.grad for p in self._others if p.grad is not None]
        valid = get_total_norm([measured, *others], math.inf).isfinite()
        if not self._averages:
            self._averages = {kind: torch.zeros_like(measured) for kind in AVERAGES}
        sensitivity, uncertainty = (self._averages[kind].to(measured) for kind in AVERAGES)
        new = smoothed(sensitivity, uncertainty, measured, self.spec.beta1, self.spec.beta2, valid)
        self._averages = dict(zip(AVERAGES, new, strict=True))

    def _gradient_row(self) -> Float[Tensor, " numbers"]:
        tensors = self.stacks.tensors()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in tensors]
        return widened(torch.cat([gradient.flatten() for gradient in gradients]))

    def sensitivity_scores(self) -> Float[Tensor, " count"]:
        """Returns the score of every component of the model."""
        sensitivity, uncertainty = (self._averages[kind] for kind in AVERAGES)
        products = sensitivity * uncertainty
        scores = products.new_zeros(self.stacks.count)
        for stack, numbers in self.stacks.parts(products):
            scores[stack.places.to(scores.device)] += numbers.mean(2)
        return scores

    def state_dict(self) -> dict[str, object]:
        return {"averages": {kind: self.stacks.by_name(row) for kind, row in self._averages.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._averages = {kind: self.stacks.row(named) for kind, named in state_dict["averages"].items()}
