"""What a controller is: a callback that changes adapters while they train, only through their protocols.

Where a controller can act, in Lightning's order:

    plan                     before anything is trained or written: checks that the schedule fits the run
    prepare                  once, before the first step; can call the model, see `over_inputs`
    on_train_batch_start     a step begins with the first of its batches, see `step_begins`
    on_before_optimizer_step gradients are complete, averaged over processes, not yet clipped
    on_train_batch_end       after a step, see `step_ended`: new weights, but still the gradients of the step

Lightning restores the model first, then the callbacks, then builds the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch.distributed as distributed
from torch import Tensor

from lora_lab.adapters import METHODS, AdapterSet
from lora_lab.adapters.protocols import Prunable
from lora_lab.adapters.spec import choice_faults
from lora_lab.errors import ConfigError, IncompatibleError


@dataclass
class ControllerSpec:
    """The options that every controller has."""

    def faults(self) -> list[str]:
        """Returns every fault that shows without a model, as `field: what is wrong, what is allowed`."""
        return choice_faults(self)

    def needs(self) -> type:
        """Returns the class of `adapters.protocols` that every adapter has to inherit."""
        raise NotImplementedError

    def faults_beside(self, others: Mapping[str, ControllerSpec]) -> list[str]:
        """Returns what is wrong with the run's other controllers, given by name."""
        return []

    def silences(self) -> bool:
        """Whether the controller silences components or drops adapters, whose memory can then be freed."""
        return False

    def decides(self) -> str | None:
        """Returns what only one controller of a run may decide; None if it does not conflict with others."""
        return None


class Controller(L.Callback):
    """Changes adapters while they train.

    Args:
        spec: the controller's options.
        adapters: the run's adapters.
        seed: seed of its random decisions.

    Raises:
        ConfigError: if the spec is invalid.
        IncompatibleError: if an adapter does not have the protocol that the controller needs.
    """

    Spec: ClassVar[type[Any]]
    name: ClassVar[str]
    """The controller's key in CONTROLLERS and in configs."""
    paper: ClassVar[str] = "-"
    """Authors, year and arXiv id."""
    trials: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}}
    """Options with which the contract tests it in runs of 12 steps, by name of the variant."""

    def __init__(self, spec: Any, adapters: AdapterSet, seed: int = 0):
        if faults := spec.faults():
            raise ConfigError("\n".join(f"controllers.{self.name}.{fault}" for fault in faults))
        needs = spec.needs()
        self.spec, self.adapters, self.seed = spec, adapters, seed
        self.controlled: dict[str, Any] = adapters.implementing(needs)
        """The adapters, by path."""
        others = [path for path in adapters.adapters if path not in self.controlled]
        if others or not self.controlled:
            where = f"; {others[0]} is none" if self.controlled else ""
            raise IncompatibleError(misfit(self.name, needs, adapters.spec.method) + where)
        self.total_steps: int | None = None
        """Optimizer steps of the run; None before `plan`."""
        self._seen_step = 0

    def plan(self, total_steps: int) -> None:
        """Fits the schedule into a run.

        Args:
            total_steps: optimizer steps of the whole run.

        Raises:
            ConfigError: if the run ends before the schedule does.
        """
        self.total_steps = total_steps

    @property
    def settled(self) -> bool:
        """Whether the controller will no longer remove, add or share anything."""
        return True

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside the context the adapters are in the state in which they are evaluated."""
        yield

    def statistics(self) -> dict[str, float]:
        """Returns what is to be logged now, by name: `budget/…`, `importance/…`."""
        return {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plans with the trainer's number of steps."""
        self.plan(int(trainer.estimated_stepping_batches))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continues to count where a resumed run stopped; prepares a new run."""
        self._seen_step = trainer.global_step
        if trainer.global_step == 0:
            self.prepare(trainer, pl_module)

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sets up the adapters before the first step of a new run, after a pass over data if necessary."""

    def step_begins(self, trainer: L.Trainer, batch_idx: int) -> bool:
        """Whether a batch is the first one of an optimizer step."""
        return batch_idx % trainer.accumulate_grad_batches == 0

    def step_ended(self, trainer: L.Trainer) -> bool:
        """Whether there was an optimizer step since the last call; to be called at the end of every batch."""
        ended, self._seen_step = trainer.global_step != self._seen_step, trainer.global_step
        return ended


def controllers_of(trainer: L.Trainer) -> list[Controller]:
    """Returns the controllers of a run, in the order in which they act."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Controller)]


def require(pl_module: Any, setting: str, names: Sequence[str], instead: str) -> None:
    """Checks that a LightningModule has what a callback calls; lora_lab's FineTuner has everything.

    Args:
        pl_module: any LightningModule.
        setting: what needs it, for the message.
        names: attributes and methods.
        instead: what a user of another module can do.

    Raises:
        IncompatibleError: if one is missing.
    """
    missing = [name for name in names if not hasattr(pl_module, name)]
    if missing:
        raise IncompatibleError(
            f"{setting}: uses {', '.join(missing)} of the LightningModule, which {type(pl_module).__name__} "
            f"does not have. Train with lora_lab.FineTuner, or {instead}."
        )


def require_below_components(setting: str, rank: int, adapters: Iterable[Prunable], otherwise: str) -> None:
    """Checks that the largest adapter has more components than a rank.

    Args:
        setting: what holds the rank, for the message.
        rank: the rank.
        adapters: the controlled adapters.
        otherwise: what the setting would mean for the run, for the message.

    Raises:
        ConfigError: if it has not.
    """
    most = max(adapter.initial_components for adapter in adapters)
    if rank >= most:
        raise ConfigError(
            f"{setting}: must be below {most}, the components that the largest adapter has, or {otherwise}; "
            f"got {rank}."
        )


def misfit(name: str, needs: type, method: str) -> str:
    """Returns the message that a method does not have what a controller needs, and which methods do."""
    fitting = sorted(known for known, kind in METHODS.items() if issubclass(kind, needs))
    return (
        f"controllers.{name}: needs adapters that are {needs.__name__}; those of method '{method}' are not. "
        f"Methods that are: {', '.join(fitting)}"
    )


def in_steps(duration: float, total_steps: int) -> int:
    """Returns a duration in optimizer steps: below 1 it is a share of all steps, rounded up."""
    return math.ceil(duration * total_steps) if duration < 1 else round(duration)


def from_first_process(decision: Tensor) -> Tensor:
    """Returns the first process's tensor in all processes, as they must not differ even in the last bit."""
    if distributed.is_initialized():
        decision = decision.contiguous()
        distributed.broadcast(decision, src=0)
    return decision
