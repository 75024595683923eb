"""Output evaluation: which adapters a run needs (LoRA-drop, Zhou et al. 2024, arXiv:2402.07721).

Once, after `warmup` steps of ordinary training:

    g_i = Σ_x ‖ΔW_i x‖²      x: real tokens of a sample of the training data
    I_i = g_i / Σ_j g_j      j: adapters of one group
    kept: the fewest adapters, from the largest I down, with Σ I ≥ threshold

The others of a group share one adapter, that with the largest I among them, or are dropped. The remaining
adapters then start again and train for the rest of the run; the schedule of the learning rate continues. As a
control, `choose: random` keeps as many of each group, but draws which.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.protocols import Droppable, Shareable
from lora_lab.callbacks.controllers.base import (
    Controller,
    ControllerSpec,
    controllers_of,
    from_first_process,
    in_steps,
)
from lora_lab.callbacks.controllers.output_energy import output_energy, training_sample
from lora_lab.callbacks.controllers.structure import structure_changed
from lora_lab.data.batches import seeded_generator
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.linalg.pruning import largest_share
from lora_lab.models.architectures import find_roles
from lora_lab.training.module import FineTuner

CHOICE = 2
"""Parts the stream of draws from others of the same seed, such as the order of the data."""


@dataclass
class OutputEvaluationSpec(ControllerSpec):
    """The options of output evaluation."""

    threshold: float = 0.9
    """Share T of a group's importance that is kept, in (0, 1]; 0.9 in the paper, 1 keeps every adapter."""

    warmup: float = 0.1
    """Optimizer steps before the decision, at least one; below 1 a share of all steps."""

    sample_ratio: float = 0.1
    """Share of the training data on which outputs are evaluated, in (0, 1]; at least one batch is."""

    group_by: Literal["role", "shape", "global"] = "role"
    """Which adapters are compared: those of one role (`query`) or module name; those with tensors of one
    shape; or all."""

    share: bool = True
    """Let the adapters of a group that are not kept share one, if shapes allow; else drop them."""

    choose: Literal["importance", "random"] = "importance"
    """Which adapters of a group are kept: the most important, or as many drawn by the run's seed."""

    reinit: bool = True
    """Reset adapters to the start of the run and clear their optimizer state; task heads continue to
    train."""

    def faults(self) -> list[str]:
        found = super().faults()
        for name in ("threshold", "sample_ratio"):
            if not 0 < getattr(self, name) <= 1:
                found.append(f"{name}: must lie in (0, 1]; got {getattr(self, name)}")
        if self.warmup <= 0:
            found.append(f"warmup: must be above 0; got {self.warmup}")
        return found

    def needs(self) -> type:
        return Shareable if self.share else Droppable

    def silences(self) -> bool:
        return not self.share

    def decides(self) -> str:
        return "which components are kept"


class OutputEvaluation(Controller):
    """Decides once which adapters a run needs.

    Logs `budget/kept`, the number of adapters with their own tensors, `budget/threshold`, and after the
    decision `importance/<path>`.
    """

    Spec = OutputEvaluationSpec
    name = "output_evaluation"
    paper = "Zhou et al. 2024, arXiv:2402.07721"
    trials = {
        "shared": {"threshold": 0.4, "warmup": 3, "sample_ratio": 1.0, "group_by": "shape"},
        "dropped": {"threshold": 0.4, "warmup": 3, "sample_ratio": 1.0, "group_by": "global", "share": False},
    }
    spec: OutputEvaluationSpec

    def __init__(self, spec: OutputEvaluationSpec, adapters: AdapterSet, seed: int = 0):
        super().__init__(spec, adapters, seed)
        self.importance: dict[str, float] = {}
        """I of each adapter by path, after the decision."""
        if spec.reinit and adapters.spec.reads_full_weights:
            raise IncompatibleError(
                f"controllers.output_evaluation.reinit: {adapters.spec.method} starts from weights that no "
                "longer exist after training begins. Set reinit: false, or choose another adapter.init."
            )
        if spec.share:
            for path, adapter in self.controlled.items():
                if adapter.share_key() is None:
                    raise IncompatibleError(
                        f"controllers.output_evaluation.share: {path} subtracts a start that belongs to its "
                        "base, so it cannot share. Choose a start of zero (adapter.init: default), or "
                        "share: false."
                    )

    def plan(self, total_steps: int) -> None:
        super().plan(total_steps)
        self.warmup = max(1, in_steps(self.spec.warmup, total_steps))
        if self.warmup >= total_steps:
            raise ConfigError(
                f"controllers.output_evaluation.warmup: {self.warmup} steps of a run of {total_steps} leave "
                "no step to train the kept adapters; lower it, or train longer."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plans, and checks that there are data to sample."""
        super().on_fit_start(trainer, pl_module)
        training_sample(trainer, self.spec.sample_ratio, self.name)

    @property
    def settled(self) -> bool:
        return bool(self.importance)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self.step_ended(trainer) and not self.settled and trainer.global_step >= self.warmup:
            assert isinstance(pl_module, FineTuner)
            self.decide(from_first_process(self._energy(trainer, pl_module)))
            if self.spec.reinit:
                self.adapters.restart(self.seed)
                for optimizer in trainer.optimizers:
                    for adapter in self.adapters:
                        for parameter in adapter.parameters():
                            optimizer.state.pop(parameter, None)
            structure_changed(trainer, self.adapters)

    def _energy(self, trainer: Any, module: FineTuner) -> Tensor:
        sample = training_sample(trainer, self.spec.sample_ratio, self.name)
        with ExitStack() as contexts:
            for other in controllers_of(trainer):
                contexts.enter_context(other.evaluated())
            contexts.enter_context(trainer.precision_plugin.val_step_context())
            return output_energy(module, self.controlled, sample)

    def decide(self, energy: Tensor) -> None:
        """Lets adapters share or drops them.

        Args:
            energy: (adapters,), g of each.

        Raises:
            ConfigError: if the adapters of a group have not learned anything yet.
        """
        of_path = dict(zip(self.controlled, energy.cpu(), strict=True))
        generator = seeded_generator(self.seed, 0, CHOICE)
        for group in self.groups():
            values = torch.stack([of_path[path] for path in group])
            total = float(values.sum())
            if not (total > 0 and math.isfinite(total)):
                raise ConfigError(
                    f"controllers.output_evaluation: the outputs of {group[0]} and its group have a sum of "
                    f"squares of {total} after {self.warmup} steps: there is nothing to compare. "
                    + ("Raise warmup." if total == 0 else "Training has diverged; lower the learning rate.")
                )
            self.importance |= {path: float(of_path[path]) / total for path in group}
            chosen = largest_share(values, self.spec.threshold)
            if self.spec.choose == "random":
                chosen = chosen[torch.randperm(len(chosen), generator=generator)]
            kept = chosen.tolist()
            self._leave([path for path, stays in zip(group, kept, strict=True) if not stays])

    def groups(self) -> list[list[str]]:
        """Returns the paths of the adapters that are compared with each other."""
        roles = {site.path: site.role for site in find_roles(self.adapters.model)}
        groups: dict[Hashable, list[str]] = {}
        for path, adapter in self.controlled.items():
            key: Hashable = None
            if self.spec.group_by == "role":
                key = roles.get(path, path.rpartition(".")[2])
            elif self.spec.group_by == "shape":
                key = tuple(tensor.shape for tensor in adapter.adapter_tensors().values())
            groups.setdefault(key, []).append(path)
        return list(groups.values())

    def _leave(self, paths: list[str]) -> None:
        """Drops adapters, or lets them share the tensors of the most important one that fits."""
        if not self.spec.share:
            for path in paths:
                self.controlled[path].drop()
            return
        owners: dict[Hashable, str] = {}
        for path in sorted(paths, key=self.importance.__getitem__, reverse=True):
            owner = owners.setdefault(self.controlled[path].share_key(), path)
            if owner != path:
                self.adapters.share(path, owner)

    def statistics(self) -> dict[str, float]:
        dropped = sum(adapter.dropped for adapter in self.controlled.values())
        kept = len(self.controlled) - dropped - len(self.adapters.owners)
        importance = {f"importance/{path}": value for path, value in self.importance.items()}
        return {"budget/kept": kept, "budget/threshold": self.spec.threshold, **importance}

    def state_dict(self) -> dict[str, object]:
        return {"importance": self.importance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.importance = state_dict["importance"]
