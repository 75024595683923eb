"""Importance pruning: a falling budget of components (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512).

After every optimizer step t = 0, 1, …, T − 1, from each number p as the step has left it and its gradient g
before clipping,

    I ← β1 I + (1 − β1) |p g|,   U ← β2 U + (1 − β2) ||p g| − I|            until t = T − tfinal
    score of a component = Σ over its parts of the mean of their I U

and of all components of the model, the b(t) with the largest scores are kept and the others silenced:

    t ≤ tinit               b = b0, all components
    tinit < t < T − tfinal  b = ⌊(b0 − bT) (1 − (t − tinit) / (T − tfinal − tinit))³ + bT⌋, every deltaT steps
    t = T − tfinal          b = bT = target_rank · adapters, from then on; at T − 1 where tfinal is 0

Until then a silenced component can grow back and be kept again; afterwards it is silenced after every step.
Between two decisions it is in the weights again; the logged ranks count it, `budget/kept` does not.

Budget and order are those of the authors' code, which also uses p after the step: Algorithm 1 of the paper
uses p before it. The final cut is at T − tfinal as in PEFT; in the authors' code it is one step later unless
deltaT divides T − tfinal, and with tfinal = 0 there is none. Their trainer measures clipped gradients; the
paper's |w ∇L| has no clipping, which would make steps with large gradients count less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.protocols import RankAllocatable
from lora_lab.adapters.spec import least_fault
from lora_lab.callbacks.controllers.base import ControllerSpec, from_first_process, in_steps
from lora_lab.callbacks.controllers.sensitivity import SensitivityController
from lora_lab.errors import ConfigError, LabError
from lora_lab.linalg.pruning import strongest
from lora_lab.linalg.rank import widened


@dataclass
class ImportancePruningSpec(ControllerSpec):
    """The options of importance pruning."""

    target_rank: int = 8
    """Mean number of components per adapter at the end, at least 1; in the paper two thirds of those at the
    start. For svft it counts pairs of singular directions, of which an adapter has more than its `rank`."""

    tinit: float = 0.1
    """Optimizer steps before the budget falls; below 1 a share of all steps. 0.09 to 0.18 in the paper."""

    tfinal: float = 0.3
    """Optimizer steps with the final components; below 1 a share of all steps. 0.44 to 0.58 in the paper; its
    authors recommend a falling budget during about half of all steps."""

    deltaT: int = 10
    """Optimizer steps from one decision to the next, at least 1; 1 to 100 in the paper."""

    beta1: float = 0.85
    """Decay rate β1 of the sensitivity I, in (0, 1)."""

    beta2: float = 0.85
    """Decay rate β2 of the uncertainty U, in (0, 1)."""

    importance: Literal["sensitivity", "magnitude", "norm"] = "sensitivity"
    """Score of a component: the smoothed `sensitivity` I U; its `magnitude` |λ|, or in methods without such a
    coefficient the product of its vectors' L1 norms; `norm`, |λ| + norm_weight · ‖p‖ ‖q‖, with λ = 0 where
    there is none."""

    norm_weight: float = 1.0
    """Weight of the vectors' norms in `importance: norm`; above 0."""

    def faults(self) -> list[str]:
        found = super().faults()
        for name, least in {"target_rank": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}.items():
            found += least_fault(name, getattr(self, name), least)
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                found.append(f"{name}: must lie in (0, 1); got {getattr(self, name)}")
        if not (math.isfinite(self.norm_weight) and self.norm_weight > 0):
            found.append(f"norm_weight: must be finite and above 0; got {self.norm_weight}")
        return found

    def needs(self) -> type:
        return RankAllocatable

    def silences(self) -> bool:
        return True

    def decides(self) -> str:
        return "which components are kept"


class ImportancePruning(SensitivityController):
    """Keeps a falling number of components, in the adapters in which they matter most.

    Logs `budget/total`, b(t); `budget/kept`, the components that the last decision kept; and of that decision
    `budget/threshold`, the smallest score kept, and the mean scores `importance/mean` and
    `importance/<path>`.

    A step with gradients that are not finite, which mixed precision skips, does not change the averages.
    """

    Spec = ImportancePruningSpec
    name = "importance_pruning"
    paper = "Zhang et al. 2023, arXiv:2303.10512"
    trials = {
        "": {"target_rank": 2, "deltaT": 2},
        "by magnitude": {"target_rank": 3, "importance": "magnitude"},
    }
    spec: ImportancePruningSpec

    def __init__(self, spec: ImportancePruningSpec, adapters: AdapterSet, seed: int = 0):
        super().__init__(spec, adapters, seed)
        self.target = spec.target_rank * len(self.controlled)
        if self.target > self.stacks.count:
            raise ConfigError(
                f"controllers.importance_pruning.target_rank: {spec.target_rank} for each of "
                f"{len(self.controlled)} adapters makes {self.target} components; they start with "
                f"{self.stacks.count}. Lower it, or give the adapters a larger rank."
            )
        self._scores: Tensor | None = None
        self._threshold: Tensor | None = None

    def plan(self, total_steps: int) -> None:
        super().plan(total_steps)
        self.begin = in_steps(self.spec.tinit, total_steps)
        self.end = total_steps - in_steps(self.spec.tfinal, total_steps)
        self.last = min(self.end, total_steps - 1)
        if self.begin >= self.end:
            raise ConfigError(
                f"controllers.importance_pruning: tinit ends at step {self.begin} and tfinal begins at step "
                f"{self.end} of a run of {total_steps}; the budget needs steps between them to fall. Lower "
                "tinit or tfinal, or train longer."
            )

    def budget(self, step: int) -> int:
        """Returns b(t), the number of components allowed at a step counted from 0."""
        if step >= self.last:
            return self.target
        if step <= self.begin:
            return self.stacks.count
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return int((self.stacks.count - self.target) * left**3 + self.target)

    @property
    def settled(self) -> bool:
        return self._seen_step > self.last

    def measures(self, step: int) -> bool:
        return step < self.end and self.spec.importance == "sensitivity"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self.step_ended(trainer):
            return
        step = trainer.global_step - 1
        if step > self.last:
            for adapter in self.controlled.values():
                adapter.keep_components(adapter.kept_components())
            return
        if self.measures(step):
            self.measure()
        if step == self.last or (step > self.begin and step % self.spec.deltaT == 0):
            self.allocate(self.budget(step))
        if step == self.last:
            self._averages.clear()

    @torch.no_grad()
    def allocate(self, budget: int) -> None:
        """Keeps the components with the largest scores, as many as the budget allows."""
        self._scores = scores = self.scores()
        flags = from_first_process(strongest(scores, budget))
        self._threshold = scores.where(flags, math.inf).min()
        for adapter, own in zip(self.controlled.values(), flags.split(self.stacks.sizes), strict=True):
            adapter.keep_components(own)

    @torch.no_grad()
    def scores(self) -> Float[Tensor, " count"]:
        """Returns the importance of every component of the model."""
        if self.spec.importance == "sensitivity":
            return self.sensitivity_scores()
        row = widened(torch.cat([tensor.flatten() for tensor in self.stacks.tensors()]))
        coefficients: Tensor
        vectors: Tensor
        coefficients, vectors = row.new_ones(2, self.stacks.count)
        has_coefficient = torch.zeros_like(vectors, dtype=torch.bool)
        for stack, numbers in self.stacks.parts(row):
            places = stack.places.to(row.device)
            sizes = torch.linalg.vector_norm(numbers, 1 if self.spec.importance == "magnitude" else 2, dim=2)
            if len(stack.shape) == 1:
                coefficients[places] *= sizes
                has_coefficient[places] = True
            else:
                vectors[places] *= sizes
        if self.spec.importance == "magnitude":
            return torch.where(has_coefficient, coefficients, vectors)
        return coefficients * has_coefficient + self.spec.norm_weight * vectors

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks that the target was met.

        Raises:
            LabError: if training ended before the budget had reached its target.
        """
        if not self.settled or self._kept() != self.target:
            raise LabError(
                f"controllers.importance_pruning: training ended after {trainer.global_step} of "
                f"{self.total_steps} steps; the {self.target} components asked for are chosen after "
                f"step {self.last + 1}. Continue the run, or plan a shorter one."
            )

    def _kept(self) -> int:
        return int(torch.cat([adapter.kept_components() for adapter in self.controlled.values()]).sum())

    def statistics(self) -> dict[str, float]:
        found: dict[str, float] = {
            "budget/total": self.budget(self._seen_step - 1),
            "budget/kept": self._kept(),
        }
        if self._scores is None or self._threshold is None:
            return found
        scores = self._scores.cpu()
        found |= {"budget/threshold": float(self._threshold), "importance/mean": float(scores.mean())}
        each = zip(self.controlled, scores.split(self.stacks.sizes), strict=True)
        return found | {f"importance/{path}": float(own.mean()) for path, own in each}

    def state_dict(self) -> dict[str, object]:
        return super().state_dict() | {"scores": self._scores, "threshold": self._threshold}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._scores, self._threshold = state_dict["scores"], state_dict["threshold"]
