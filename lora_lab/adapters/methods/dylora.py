"""DyLoRA: nested ranks trained at once, each of them usable later (Valipour et al. 2022, arXiv:2210.07558).

    W' = W + s B[:, :k] A[:k]       s = alpha / k, or alpha / √k with rslora; k the active rank, 1 to rank

    A   (rank, in)    learned; U(±1/√in) at the start
    B   (out, rank)   learned; zeros at the start, hence W' = W at every k

A step learns the components that it uses, with `frozen` the last of them alone. All others stay bitwise as
they are, and so does the optimizer's state of them: the paper's code lets momentum and decay move them.

With `separate_ranks` nothing is shared: each of these ranks has an A and B of its own, stacked in the tensors
above to Σ ranks components, and a change of the active rank is a jump to another update.

A folder opens in PEFT as the LoRA of the active rank; the other components are in it too, for us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lora_lab.adapters.families.low_rank import LowRankAdapter, ScaledSpec
from lora_lab.adapters.maps import sizes
from lora_lab.adapters.protocols import NestedRank
from lora_lab.errors import ConfigError


@dataclass
class DyLoRASpec(ScaledSpec):
    """DyLoRA's options; the paper trains ranks 1 to 8 on query and value."""

    method: str = "dylora"

    alpha: float = 16.0
    """Strength of the update: it is scaled by alpha / active rank; 16 in the paper."""

    frozen: bool = False
    """Learn component k alone at active rank k and hold those below it, as in the paper. For runs that draw a
    rank for every step: at a rank that stays, one component is all that is ever learned."""

    separate_ranks: list[int] | None = None
    """Ranks that each have factors of their own, rising up to `rank`; null means nested ones."""

    @property
    def size_field(self) -> str | None:
        return "rank" if self.separate_ranks is None else None

    def faults(self) -> list[str]:
        found, ranks = super().faults(), self.separate_ranks
        if ranks is not None:
            if ranks != sorted(set(ranks)) or ranks[-1:] != [self.rank] or ranks[0] < 1:
                found.append(f"separate_ranks: must rise, from 1 or more to rank: {self.rank}; got {ranks}")
            if self.rank_pattern or self.frozen:
                found.append(
                    "separate_ranks: goes with neither rank_pattern nor frozen, made for nested ranks"
                )
        return found


class DyLoRA(LowRankAdapter, NestedRank):
    """The adapter of one linear map.

    Attributes:
        used: (components,), flags of those that the active rank uses; always neighbours.
    """

    used: Tensor
    convolves = True

    Spec = DyLoRASpec
    paper = "Valipour et al. 2022, arXiv:2210.07558"

    def __init__(self, base: Any, spec: DyLoRASpec):
        super().__init__(base, replace(spec, rank=sum(spec.separate_ranks or [spec.rank])))
        self.spec = spec
        self.ranks: Sequence[int] = spec.separate_ranks or range(1, spec.rank + 1)
        self.register_buffer("used", torch.zeros_like(self.kept))
        self.active_rank = spec.rank

    @classmethod
    def site_parameter_count(cls, module: Any, spec: Any) -> int:
        return sum(spec.separate_ranks or [spec.rank]) * sum(sizes(module))

    @property
    def max_rank(self) -> int:
        return self.spec.rank

    @property
    def active_rank(self) -> int:
        """The number of components in use; at the start the largest.

        Raises:
            ConfigError: if it is set to a rank that is not there.
        """
        return self._at_rank.rank

    @active_rank.setter
    def active_rank(self, rank: int) -> None:
        if rank not in self.ranks:
            allowed = list(self.ranks) if self.spec.separate_ranks else f"1 to {self.max_rank}"
            raise ConfigError(f"active_rank: must be one of {allowed} here; got {rank}")
        start = sum(smaller for smaller in self.spec.separate_ranks or () if smaller < rank)
        # Kept as Python numbers too: a forward pass would have to wait for the device to read the buffer.
        self._window, self._at_rank = slice(start, start + rank), replace(self.spec, rank=rank)
        self.used.zero_()[self._window] = True

    def tensors_changed(self) -> None:
        super().tensors_changed()
        self.active_rank = int(self.used.sum())

    @property
    def stored_spec(self) -> DyLoRASpec:
        """The active rank is what PEFT opens."""
        return self._at_rank

    @property
    def scale(self) -> float:
        """The factor s."""
        return self._at_rank.scale

    @property
    def rank(self) -> int:
        """The number of components in use and not silenced."""
        return 0 if self.dropped else int(self.kept[self._window].sum())

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Returns the components in use."""
        B, A = self.B[:, self._window], self.A[self._window]
        if not self.spec.frozen:
            return B, A
        return torch.cat([B[:, :-1].detach(), B[:, -1:]], dim=1), torch.cat([A[:-1].detach(), A[-1:]])

    def held(self) -> Bool[Tensor, " components"]:
        return self.used

    def frozen_parts(self) -> list[tuple[nn.Parameter, Bool[Tensor, ...]]]:
        """Returns flags of the components that the step does not learn."""
        learned = self.used.clone()
        if self.spec.frozen:
            learned[: self._window.stop - 1] = False
        elif len(learned) == self.active_rank:
            return []
        return [(self.A, ~learned.unsqueeze(1)), (self.B, ~learned)]

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns LoRA's tensors at the active rank, and the others under names of ours."""
        idle = {"idle_A": self.A[~self.used], "idle_B": self.B[:, ~self.used] * self.active}
        return super().peft_tensors() | (idle if len(self.used) > self.active_rank else {})

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Makes the file's rank the active one."""
        A = tensors.get("lora_A.weight")
        if A is not None and len(A) in self.ranks:
            self.active_rank = len(A)
        return tensors

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        names = {("lora_A.weight", "lora_B.weight"): self.used, ("idle_A", "idle_B"): ~self.used}
        for (A, B), flags in names.items():
            if flags.any():
                self.A[flags] = tensors[A].flatten(1).to(self.A)
                self.B[:, flags] = tensors[B].flatten(1).to(self.B)
