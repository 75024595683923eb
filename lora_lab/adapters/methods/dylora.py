"""DyLoRA: nested ranks trained together, each usable later (Valipour et al. 2022, arXiv:2210.07558).

    W' = W + s B[:, :k] A[:k]       s = alpha / k, or alpha / √k with rslora; k the active rank, 1 to rank

    A   (rank, in)    learned; U(±1/√in) at the start
    B   (out, rank)   learned; zeros at the start, so W' = W at every k

A step trains the components that it uses, with `frozen` only the last of them. All others, and their
optimizer state, stay bitwise unchanged; in the paper's code momentum and decay move them.

A folder opens in PEFT as the LoRA of the active rank; the other components are stored in it for lora_lab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lora_lab.adapters.families.low_rank import LowRankAdapter, ScaledSpec
from lora_lab.adapters.maps import LinearMap
from lora_lab.adapters.protocols import NestedRank
from lora_lab.errors import ConfigError


@dataclass
class DyLoRASpec(ScaledSpec):
    """DyLoRA's options; the paper trains ranks 1 to 8 on query and value."""

    method: str = "dylora"

    removed_fields = {"separate_ranks": None}

    alpha: float = 16.0
    """Strength of the update: it is scaled by alpha / active rank; 16 in the paper."""

    frozen: bool = False
    """At active rank k train only component k, as in the paper. For runs that draw a rank for every step:
    with a fixed rank only one component would ever be trained."""


class DyLoRA(LowRankAdapter[DyLoRASpec], NestedRank):
    """The adapter of one linear map.

    Attributes:
        used: (rank,), flags of the components that the active rank uses, the first ones.
    """

    used: Tensor
    convolves = True

    Spec = DyLoRASpec
    paper = "Valipour et al. 2022, arXiv:2210.07558"

    def __init__(self, base: LinearMap, spec: DyLoRASpec):
        super().__init__(base, spec)
        self.ranks: Sequence[int] = range(1, spec.rank + 1)
        self.register_buffer("used", torch.zeros_like(self.kept))
        self.active_rank = spec.rank

    @property
    def max_rank(self) -> int:
        return self.spec.rank

    @property
    def active_rank(self) -> int:
        """The number of components in use; at the start the largest.

        Raises:
            ConfigError: if it is set to a rank that does not exist.
        """
        return self._at_rank.rank

    @active_rank.setter
    def active_rank(self, rank: int) -> None:
        if rank not in self.ranks:
            raise ConfigError(f"active_rank: must be one of 1 to {self.max_rank} here; got {rank}")
        # Also kept as Python numbers: reading the buffer in a forward pass would wait for the device.
        self._at_rank = replace(self.spec, rank=rank)
        self.used.zero_()[:rank] = True

    def tensors_changed(self) -> None:
        super().tensors_changed()
        self.active_rank = int(self.used.sum())

    @property
    def stored_spec(self) -> DyLoRASpec:
        """Returns the spec with the active rank, which PEFT opens."""
        return self._at_rank

    @property
    def scale(self) -> float:
        """The factor s."""
        return self._at_rank.scale

    @property
    def rank(self) -> int:
        """The number of components in use and not silenced."""
        return 0 if self.dropped else int(self.kept[: self.active_rank].sum())

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Returns the components in use."""
        B, A = self.B[:, : self.active_rank], self.A[: self.active_rank]
        if not self.spec.frozen:
            return B, A
        return torch.cat([B[:, :-1].detach(), B[:, -1:]], dim=1), torch.cat([A[:-1].detach(), A[-1:]])

    def held(self) -> Bool[Tensor, " components"]:
        return self.used

    def frozen_parts(self) -> list[tuple[nn.Parameter, Bool[Tensor, ...]]]:
        """Returns flags of the components that the step does not train."""
        learned = self.used.clone()
        if self.spec.frozen:
            learned[: self.active_rank - 1] = False
        elif len(learned) == self.active_rank:
            return []
        return [(self.A, ~learned.unsqueeze(1)), (self.B, ~learned)]

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns LoRA's tensors at the active rank, and the others under our own names."""
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
