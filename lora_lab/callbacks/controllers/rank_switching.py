"""Rank switching: nested adapters train at another rank from step to step (DyLoRA, Valipour et al. 2022).

    uniform         k ~ U{min_rank … max_rank}                  one k for the model, drawn at every step
    geometric       p(k) ∝ (1 − p)^(k−1) over the same ranks
    gradient_norm   one of `ranks` up where ‖∇‖ > high, one down where ‖∇‖ < low; ∇ of all adapters, unclipped
    recent_loss     the same for the mean of the last `window` training losses at the current rank

The first two are the paper's, for adapters that can be used at any rank later; a draw depends only on the
seed and the step. The other two search for one rank, from the smallest up, and decide every `period` steps.

Validations, tests and the end of the run are at `final_rank`; `validation/…_rank_<k>` and `test/…_rank_<k>`
are at the other ranks of `evaluation_ranks`, which takes one more forward pass for each. An adapter with
fewer components than a rank asks for (rank_pattern) uses all of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from lora_lab.adapters import AdapterSet
from lora_lab.adapters.protocols import NestedRank
from lora_lab.adapters.spec import least_fault
from lora_lab.callbacks.controllers.base import (
    Controller,
    ControllerSpec,
    from_first_process,
    in_steps,
    require,
)
from lora_lab.data.batches import seeded_generator
from lora_lab.errors import ConfigError

ADAPTIVE = {"gradient_norm": (1.0, 0.1, 1.0), "recent_loss": (0.1, 0.05, 100.0)}
"""Policy that searches for one rank → its default high, low and period."""
DRAWS = 1
"""Separates the draws from others with the same seed, such as the order of the data."""


@dataclass
class RankSwitchingSpec(ControllerSpec):
    """The options of rank switching."""

    policy: Literal["uniform", "geometric", "gradient_norm", "recent_loss"] = "uniform"
    """What decides the rank of a step: chance (the first two), or how training goes."""

    min_rank: int | None = None
    """Smallest rank of a step, the paper's b_min; null means the smallest possible."""

    max_rank: int | None = None
    """Largest rank of a step, the paper's b_max; null means the adapters' own. Components above it are never
    trained."""

    geometric_p: float = 0.15
    """p of the geometric policy, in (0, 1); 0.15 in the paper."""

    ranks: list[int] | None = None
    """Ranks between which gradient_norm and recent_loss move, rising; null means the powers of two between
    min_rank and max_rank, and max_rank."""

    high: float | None = None
    """Norm or loss above which the rank rises; null means 1 for gradient_norm, 0.1 for recent_loss."""

    low: float | None = None
    """Norm or loss below which the rank falls; null means 0.1 for gradient_norm, 0.05 for recent_loss."""

    period: float | None = None
    """Optimizer steps between two decisions of gradient_norm or recent_loss; below 1 a share of all steps;
    null means 1 and 100 steps."""

    window: int = 10
    """Number of training losses at the current rank that recent_loss averages, one for each step; at least
    1."""

    evaluation_ranks: list[int] | None = None
    """Further ranks of every validation and test; null means the powers of two up to max_rank,
    and max_rank; [] means none."""

    final_rank: int | None = None
    """Rank in validations and at the end; null means max_rank, or the current one of gradient_norm and
    recent_loss."""

    @property
    def adaptive(self) -> bool:
        """Whether the rank depends on how training goes."""
        return self.policy in ADAPTIVE

    def decision(self) -> tuple[float, float, float]:
        """Returns high, low and period of an adaptive policy."""
        given = (self.high, self.low, self.period)
        high, low, period = (
            default if value is None else value
            for value, default in zip(given, ADAPTIVE[self.policy], strict=True)
        )
        return high, low, period

    def faults(self) -> list[str]:
        found = super().faults() + least_fault("window", self.window, 1)
        if not 0 < self.geometric_p < 1:
            found.append(f"geometric_p: must lie in (0, 1); got {self.geometric_p}")
        for name in ("min_rank", "max_rank", "final_rank"):
            rank = getattr(self, name)
            found += [] if rank is None else least_fault(name, rank, 1)
        if self.min_rank is not None and self.max_rank is not None and self.min_rank > self.max_rank:
            found.append(f"min_rank: must not exceed max_rank: {self.max_rank}; got {self.min_rank}")
        if self.ranks is not None and not (self.ranks and rises(self.ranks)):
            found.append(f"ranks: must rise, from 1 or more; got {self.ranks}")
        if self.evaluation_ranks is not None and not rises(self.evaluation_ranks):
            found.append(f"evaluation_ranks: must rise, from 1 or more; got {self.evaluation_ranks}")
        if not self.adaptive:
            options = {name: getattr(self, name) for name in ("ranks", "high", "low", "period")}
            found += [
                f"{name}: is a field of the policies {' and '.join(ADAPTIVE)}; remove it"
                for name, value in options.items()
                if value is not None
            ]
        if self.adaptive:
            high, low, period = self.decision()
            if not 0 <= low <= high:
                found.append(f"low: must lie in [0, high]; got low {low} and high {high}")
            if period <= 0:
                found.append(f"period: must be above 0; got {period}")
        return found

    def needs(self) -> type:
        return NestedRank

    def decides(self) -> str:
        return "the active rank"


class RankSwitching(Controller):
    """Chooses the rank of every step, and evaluates at several.

    Logs `rank/active`, the rank of the step, and for an adaptive policy `rank/gradient_norm` or
    `rank/recent_loss`, the number that its last decision used.
    """

    Spec = RankSwitchingSpec
    name = "rank_switching"
    paper = "Valipour et al. 2022, arXiv:2210.07558"
    trials = {
        "": {},
        "geometric": {"policy": "geometric"},
        "by gradient": {"policy": "gradient_norm"},
        "by loss": {"policy": "recent_loss", "window": 1, "period": 2},
    }
    spec: RankSwitchingSpec

    def __init__(self, spec: RankSwitchingSpec, adapters: AdapterSet, seed: int = 0):
        super().__init__(spec, adapters, seed)
        there = list(max((adapter.ranks for adapter in self.controlled.values()), key=max))
        least, most = spec.min_rank or there[0], spec.max_rank or there[-1]
        learned = [rank for rank in there if rank <= most]
        drawn = [rank for rank in learned if rank >= least]
        self._refuse("max_rank", [most], there)
        self._refuse("min_rank", [least], learned)
        self._refuse("ranks", spec.ranks or [], drawn)
        self._refuse("evaluation_ranks", spec.evaluation_ranks or [], learned)
        self._refuse("final_rank", [spec.final_rank or most], learned)
        self.ranks = (spec.ranks or doubling(drawn)) if spec.adaptive else drawn
        """The ranks of steps, rising."""
        self.evaluation_ranks = doubling(learned) if spec.evaluation_ranks is None else spec.evaluation_ranks
        """The ranks of evaluations, besides the one in use."""
        self._active = self.ranks[0]  # rank of the step
        self._index = 0  # of an adaptive policy's rank in `ranks`
        self._pending = math.nan  # what the decision at the step's end is made from
        self._measured: float | None = None  # what the last decision was made from
        self._losses: dict[int, list[Any]] = {}  # the last of each rank
        self._evaluations: dict[int, nn.Module] = {}  # metrics of each rank that is not in use

    def _refuse(self, name: str, ranks: Sequence[int], allowed: Sequence[int]) -> None:
        for rank in ranks:
            if rank not in allowed:
                raise ConfigError(
                    f"controllers.rank_switching.{name}: {rank} is not a rank that is trained here; choose "
                    f"among {', '.join(map(str, allowed))}."
                )

    def plan(self, total_steps: int) -> None:
        super().plan(total_steps)
        if self.spec.adaptive:
            self.high, self.low, period = self.spec.decision()
            self.period = max(1, in_steps(period, total_steps))
            if self.period >= total_steps:
                raise ConfigError(
                    f"controllers.rank_switching.period: the first decision is due after {self.period} steps "
                    f"of a run of {total_steps}; choose fewer, or a share of all steps below 1."
                )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.evaluation_ranks:
            names, instead = ("new_metrics", "evaluate", "results", "evaluation"), "set evaluation_ranks: []"
            require(pl_module, "controllers.rank_switching.evaluation_ranks", names, instead)
        if self.spec.policy == "recent_loss":
            require(pl_module, "controllers.rank_switching.policy", ["step_loss"], "choose another policy")

    # Ranks of steps -----------------------------------------------------------------------------------

    def draw(self, step: int) -> int:
        """Returns the rank that a random policy gives to a step, counted from 0."""
        exponent = torch.tensor(self.ranks) - self.ranks[0]
        base = 1.0 if self.spec.policy == "uniform" else 1 - self.spec.geometric_p
        generator = seeded_generator(self.seed, step, DRAWS)
        return self.ranks[int(torch.multinomial(base**exponent, 1, generator=generator))]

    def decide(self, measured: float) -> None:
        """Moves to the next rank up or down, if an adaptive policy's number requires it."""
        self._measured = measured
        if math.isfinite(measured):
            move = (measured > self.high) - (measured < self.low)
            self._index = min(max(self._index + move, 0), len(self.ranks) - 1)

    @property
    def resting_rank(self) -> int:
        """The rank between steps, which is the rank of validations and the one that the run ends with."""
        return self.spec.final_rank or (self._current if self.spec.adaptive else self.ranks[-1])

    @property
    def _current(self) -> int:
        return self.ranks[self._index]

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        with self._ranks_restored():
            self._set(self.resting_rank)
            yield

    @contextmanager
    def _ranks_restored(self) -> Iterator[None]:
        before = [(adapter, adapter.active_rank) for adapter in self.controlled.values()]
        try:
            yield
        finally:
            for adapter, rank in before:
                adapter.active_rank = rank

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._set(self.resting_rank)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        # At every batch, since a validation may come between two batches of one step.
        self._active = self._current if self.spec.adaptive else self.draw(trainer.global_step)
        self._set(self._active)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.spec.policy == "recent_loss":
            loss = trainer.strategy.reduce(pl_module.step_loss(), reduce_op="mean")
            losses = self._losses.setdefault(self._active, [])
            losses.append(from_first_process(loss))
            del losses[: -self.spec.window]
        if self.spec.adaptive and self._due(trainer.global_step + 1):
            # Here gradients are complete; the decision is applied at the step's end.
            self._pending = self._measure()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self.step_ended(trainer) and self.spec.adaptive and self._due(trainer.global_step):
            self.decide(self._pending)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set(self.resting_rank)

    def _due(self, done: int) -> bool:
        # After the last step no step is left to train at another rank.
        return done % self.period == 0 and done != self.total_steps

    def _measure(self) -> float:
        if self.spec.policy == "recent_loss":
            return fmean(float(loss) for loss in self._losses[self._active])
        parameters = [p for adapter in self.controlled.values() for p in adapter.parameters()]
        gradients = {id(p): p.grad for p in parameters if p.grad is not None}
        return float(from_first_process(torch.nn.utils.get_total_norm(gradients.values())))

    def _set(self, rank: int) -> None:
        for adapter in self.controlled.values():
            adapter.active_rank = min(rank, adapter.max_rank)

    # Evaluations at several ranks ---------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._set(self.resting_rank)
        self._begin(pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(trainer, pl_module, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module, "validation")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module, "test")

    def _begin(self, pl_module: Any) -> None:
        used = {
            rank
            for rank in self.evaluation_ranks
            if all(a.active_rank == min(rank, a.max_rank) for a in self.controlled.values())
        }
        # The module already has the numbers of the rank in use.
        self._evaluations = {
            rank: pl_module.new_metrics().to(pl_module.device)
            for rank in self.evaluation_ranks
            if rank not in used
        }

    def _evaluate(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        with self._ranks_restored(), trainer.precision_plugin.forward_context():
            for rank, metrics in self._evaluations.items():
                self._set(rank)
                pl_module.evaluate(batch, metrics)

    def _log(self, pl_module: Any, stage: str) -> None:
        for rank in self.evaluation_ranks:
            found = pl_module.results(self._evaluations.get(rank, pl_module.evaluation[stage]))
            values = {f"{stage}/{name}_rank_{rank}": value for name, value in found.items()}
            pl_module.log_dict(values, sync_dist=True)

    def statistics(self) -> dict[str, float]:
        measured = {} if self._measured is None else {f"rank/{self.spec.policy}": self._measured}
        return {"rank/active": self._active, **measured}

    def state_dict(self) -> dict[str, object]:
        losses = {rank: [float(loss) for loss in losses] for rank, losses in self._losses.items()}
        return {"index": self._index, "measured": self._measured, "losses": losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._index, self._measured = state_dict["index"], state_dict["measured"]
        self._losses = state_dict["losses"]


def rises(ranks: Sequence[int]) -> bool:
    """Whether ranks are at least 1 and ascending."""
    return all(smaller < larger for smaller, larger in zip([0, *ranks], ranks, strict=False))


def doubling(ranks: Sequence[int]) -> list[int]:
    """Returns the powers of two among ascending ranks, and the largest."""
    return [rank for rank in ranks if rank.bit_count() == 1 or rank == ranks[-1]]
