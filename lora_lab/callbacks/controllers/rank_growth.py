"""Rank growth: components move to the adapters that need them; their total number is constant.

After IncreLoRA (Zhang et al. 2023, arXiv:2308.12043), which adds ranks where the loss is sensitive, and
ElaLoRA (Chang et al. 2025, arXiv:2504.00254), which prunes and adds in turns. From the scores of AdaLoRA (see
`sensitivity`), every `period` steps from `start` to `end`:

    1. the n components with the lowest scores of the model are removed,            n = ⌈moved · total⌉
    2. n components are added, one each to the adapters with the highest mean scores, from the highest down
       and, if n is larger than their number, from the top again

Removed components are deleted from tensors, gradients and the optimizer's state. New ones start like the
adapter's first ones and change nothing at first; as their scores start at zero, they cannot be removed in
their first `grace` decisions. The scale stays that of the rank at the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.protocols import Growable
from lora_lab.adapters.sites import site_seed
from lora_lab.adapters.spec import least_fault
from lora_lab.callbacks.controllers.base import ControllerSpec, from_first_process, in_steps
from lora_lab.callbacks.controllers.component_stacks import ComponentStacks
from lora_lab.callbacks.controllers.sensitivity import SensitivityController
from lora_lab.callbacks.controllers.structure import (
    extend_components,
    select_components,
    structure_changed,
)
from lora_lab.errors import ConfigError


@dataclass
class RankGrowthSpec(ControllerSpec):
    """The options of rank growth."""

    moved: float = 0.1
    """Share of all components that each decision moves, above 0 and below 1; at least one component is."""

    start: float = 0.1
    """Optimizer steps before the first decision; below 1 a share of all steps."""

    period: float = 0.1
    """Optimizer steps from one decision to the next, at least one; below 1 a share of all steps."""

    end: float = 0.7
    """Optimizer steps after which nothing moves; below 1 a share of all steps."""

    min_rank: int = 1
    """Smallest number of components of an adapter; 0 or more."""

    max_rank: int | None = None
    """Largest number of components of an adapter; null means twice the largest number at the start."""

    grace: int = 2
    """Decisions in which a new component cannot be removed; 0 or more."""

    beta1: float = 0.85
    """Decay rate β1 of the sensitivity I, in (0, 1)."""

    beta2: float = 0.85
    """Decay rate β2 of the uncertainty U, in (0, 1)."""

    def faults(self) -> list[str]:
        found = super().faults()
        for name in ("start", "end", "min_rank", "grace"):
            found += least_fault(name, getattr(self, name), 0)
        for name in ("moved", "beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                found.append(f"{name}: must lie in (0, 1); got {getattr(self, name)}")
        if self.period <= 0:
            found.append(f"period: must be above 0; got {self.period}")
        if self.max_rank is not None:
            found += least_fault("max_rank", self.max_rank, max(1, self.min_rank))
        return found

    def needs(self) -> type:
        return Growable

    def decides(self) -> str:
        return "which components are kept"


class RankGrowth(SensitivityController):
    """Moves components between the adapters of a run.

    Logs `budget/kept`, the number of components, which is constant; `budget/moved`, those
    that the last decision moved; and of that decision the mean scores `importance/mean` and
    `importance/<path>`.
    """

    Spec = RankGrowthSpec
    name = "rank_growth"
    paper = "after Zhang et al. 2023, arXiv:2308.12043, and Chang et al. 2025, arXiv:2504.00254"
    trials = {"": {"moved": 0.3, "start": 3, "period": 3, "end": 10, "grace": 1}}
    spec: RankGrowthSpec

    def __init__(self, spec: RankGrowthSpec, adapters: AdapterSet, seed: int = 0):
        super().__init__(spec, adapters, seed)
        sizes = self.stacks.sizes
        self.max_rank = 2 * max(sizes) if spec.max_rank is None else spec.max_rank
        for path, size in zip(self.controlled, sizes, strict=True):
            if not spec.min_rank <= size <= self.max_rank:
                raise ConfigError(
                    f"controllers.rank_growth: {path} starts with {size} components; they must lie between "
                    f"min_rank: {spec.min_rank} and max_rank: {self.max_rank}."
                )
        self._done = 0
        self._moved = 0
        self._importance: dict[str, float] = {}
        self._ages = torch.full((self.stacks.count,), spec.grace)

    def plan(self, total_steps: int) -> None:
        super().plan(total_steps)
        self.start, end = (in_steps(value, total_steps) for value in (self.spec.start, self.spec.end))
        self.start = max(1, self.start)
        self.period = max(1, in_steps(self.spec.period, total_steps))
        self.last = self.start + (end - self.start) // self.period * self.period
        """The step of the last decision."""
        if not self.start <= end < total_steps:
            raise ConfigError(
                f"controllers.rank_growth: decides every {self.period} steps from step {self.start} to step "
                f"{end} of a run of {total_steps}; start must not be after end, and end must be before the "
                "end of the run."
            )

    @property
    def settled(self) -> bool:
        return self._done >= self.last

    def measures(self, step: int) -> bool:
        return step < self.last

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self.step_ended(trainer):
            return
        self._done = done = trainer.global_step
        if done > self.last:
            return
        self.measure()
        if done >= self.start and (done - self.start) % self.period == 0:
            self.move(trainer)
        if done == self.last:
            self._averages.clear()

    @torch.no_grad()
    def move(self, trainer: L.Trainer) -> None:
        """Removes the weakest components and adds as many to the adapters with the strongest ones."""
        scores = from_first_process(self.sensitivity_scores()).cpu()
        removed = self.weakest(scores)
        parts = zip(scores.split(self.stacks.sizes), removed.split(self.stacks.sizes), strict=True)
        means = {
            path: float(own[~gone].mean()) if (~gone).any() else 0.0
            for path, (own, gone) in zip(self.controlled, parts, strict=True)
        }
        grown = self.grown(means, removed)
        self._change(trainer, removed, grown)
        self._moved, self._importance = int(removed.sum()), means
        structure_changed(trainer, self.adapters)

    def weakest(self, scores: Float[Tensor, " count"]) -> Bool[Tensor, " count"]:
        """Returns flags of the components to remove: those with the lowest scores that can be removed."""
        flags = torch.zeros_like(scores, dtype=torch.bool)
        owners = torch.repeat_interleave(torch.tensor(self.stacks.sizes))
        left = list(self.stacks.sizes)
        wanted = math.ceil(self.spec.moved * len(scores))
        for number in scores.argsort(stable=True).tolist():
            owner = int(owners[number])
            if self._ages[number] < self.spec.grace or left[owner] <= self.spec.min_rank:
                continue
            if int(flags.sum()) == wanted:
                break
            flags[number], left[owner] = True, left[owner] - 1
        return flags

    def grown(self, means: dict[str, float], removed: Bool[Tensor, " count"]) -> dict[str, int]:
        """Returns, by path, how many components are added; in all as many as are removed."""
        gone = [int(own.sum()) for own in removed.split(self.stacks.sizes)]
        room = {
            path: self.max_rank - size + less
            for path, size, less in zip(self.controlled, self.stacks.sizes, gone, strict=True)
        }
        added = dict.fromkeys(self.controlled, 0)
        order = sorted(self.controlled, key=means.__getitem__, reverse=True)
        left = sum(gone)
        while left:
            # The removed ones have left space, so each round adds at least one.
            for path in [path for path in order if added[path] < room[path]][:left]:
                added[path] += 1
                left -= 1
        return added

    def _change(self, trainer: L.Trainer, removed: Bool[Tensor, " count"], grown: dict[str, int]) -> None:
        averages = {kind: self.stacks.by_name(row) for kind, row in self._averages.items()}
        ages = []
        parts = zip(removed.split(self.stacks.sizes), (self._ages + 1).split(self.stacks.sizes), strict=True)
        for (path, adapter), (gone, own) in zip(self.controlled.items(), parts, strict=True):
            count = grown[path]
            index = (~gone).nonzero().flatten().to(adapter.kept.device)
            ages.append(torch.cat([own[~gone], own.new_zeros(count)]))
            for named in averages.values():
                for name, axis in adapter.components.items():
                    if (tensor := named.get(f"{path}.{name}")) is not None:
                        left = tensor.index_select(axis, index)
                        shape = (*left.shape[:axis], count, *left.shape[axis + 1 :])
                        named[f"{path}.{name}"] = torch.cat([left, left.new_zeros(shape)], axis)
            if bool(gone.any()):
                select_components(trainer, adapter, index)
            if count:
                with torch.random.fork_rng([]):
                    torch.manual_seed(site_seed(self.seed, f"{path}@{trainer.global_step}"))
                    extend_components(trainer, adapter, count)
        self._ages = torch.cat(ages)
        self.stacks = ComponentStacks(self.controlled)
        self._averages = {kind: self.stacks.row(named) for kind, named in averages.items()}

    def statistics(self) -> dict[str, float]:
        found: dict[str, float] = {"budget/kept": self.stacks.count, "budget/moved": self._moved}
        if self._importance:
            found["importance/mean"] = sum(self._importance.values()) / len(self._importance)
        return found | {f"importance/{path}": value for path, value in self._importance.items()}

    def state_dict(self) -> dict[str, object]:
        own = {"done": self._done, "moved": self._moved, "importance": self._importance, "ages": self._ages}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stacks = ComponentStacks(self.controlled)  # with the checkpoint's components
        super().load_state_dict(state_dict)
        self._done, self._moved = state_dict["done"], state_dict["moved"]
        self._importance, self._ages = state_dict["importance"], state_dict["ages"]
