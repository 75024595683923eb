"""AdaLoRA: an update P Λ Q whose components can be removed one by one (Zhang et al. 2023, arXiv:2303.10512).

    W' = W + s P diag(Λ) Q       s = alpha / (rank + 1e-5)
    y  = base(x) + s P (Λ ⊙ Q drop(x))
    penalty = γ · mean of ‖QQᵀ − I‖_F and ‖PᵀP − I‖_F over all sites

    A = Q   (rank, in)    learned; N(0, 0.02²) at the start
    E = Λ   (rank,)       learned; zeros at the start, so W' = W
    B = P   (out, rank)   learned; N(0, 0.02²) at the start

A silenced component has Λ_i = 0 and keeps its gradients, so it can grow back. s does not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.families.low_rank import LowRankAdapter
from lora_lab.adapters.maps import LinearMap
from lora_lab.adapters.protocols import RankAllocatable, Shareable
from lora_lab.adapters.sites import Site, site_spec
from lora_lab.adapters.spec import LowRankSpec
from lora_lab.linalg.orthogonal import row_overlaps


@dataclass
class AdaLoRASpec(LowRankSpec):
    """AdaLoRA's options; the paper adapts all linear maps."""

    method: str = "adalora"

    rank: int = 12
    """Number of components at the start; in the paper 1.5 times the average rank at the end."""

    orth_reg_weight: float = 0.5
    """Weight γ of the penalty, at least 0; 0.1 to 0.5 in the paper."""

    orth_reg_squared: bool = False
    """Whether the penalty is the sum of the squared norms, as in the paper; its code averages the norms."""

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / (self.rank + 1e-5)

    def faults(self) -> list[str]:
        found = super().faults()
        found += [f"{name}: must be above 0; got {a}" for name, a in self.alphas().items() if a < 0]
        if not (math.isfinite(self.orth_reg_weight) and self.orth_reg_weight >= 0):
            found.append(f"orth_reg_weight: must be finite and at least 0; got {self.orth_reg_weight}")
        return found


def _site_config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Returns PEFT's single rank and, if components are left out, which of them each site has in the file."""
    rank = next(iter(adapters.values())).file_spec.rank
    held = {path: adapter.held().tolist() for path, adapter in adapters.items()}
    pattern = {f"{path}.lora_E": flags + [False] * (rank - len(flags)) for path, flags in held.items()}
    whole = all(all(flags) for flags in pattern.values())
    return {"init_r": rank, "rank_pattern": None if whole else pattern, "alpha_pattern": {}}


def _ranks(config: dict[str, Any]) -> dict[str, int]:
    """Counts the components that each site has by PEFT's budget."""
    pattern = config.get("rank_pattern") or {}
    return {name.removesuffix(".lora_E"): sum(map(bool, flags)) for name, flags in pattern.items()}


class AdaLoRA(LowRankAdapter, RankAllocatable, Shareable):
    """The adapter of one linear map."""

    convolves = True
    components: dict[str, int] = {"E": 0, **LowRankAdapter.components}

    Spec = AdaLoRASpec
    spec: AdaLoRASpec
    paper = "Zhang et al. 2023, arXiv:2303.10512"
    peft = PeftLayout(
        "ADALORA",
        tensors={"lora_A": "A", "lora_B": "B", "lora_E": "E"},
        fields={
            "init_r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "orth_reg_weight": "orth_reg_weight",
        },
        # PEFT opens no file without a total_step, which belongs to a schedule.
        config=lambda spec: {"total_step": 1},
        ranks=_ranks,
        site_config=_site_config,
    )

    def __init__(self, base: LinearMap, spec: AdaLoRASpec, file_spec: AdaLoRASpec):
        super().__init__(base, spec)
        self.file_spec, self.file_ratio = file_spec, spec.scale / file_spec.scale
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        self.E = nn.Parameter(torch.zeros(spec.rank, dtype=self.dtype))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: AdaLoRASpec) -> int:
        return super().site_parameter_count(module, spec) + spec.rank

    @classmethod
    def build(cls, sites: list[Site], spec: AdaLoRASpec) -> dict[str, Adapter]:
        """PEFT's files have one rank and one alpha for all sites."""
        specs = {site.path: site_spec(spec, site) for site in sites}
        file_spec = replace(spec, rank=max(own.rank for own in specs.values()))
        return {site.path: cls.at(site, specs[site.path], file_spec) for site in sites}

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Returns P and diag(Λ) Q."""
        return self.B, self.E.unsqueeze(1) * self.A

    @classmethod
    def total_penalty(cls, adapters: Iterable[Adapter]) -> Tensor | float:
        adapters = list(adapters)
        spec = adapters[0].spec
        if not spec.orth_reg_weight:
            return 0.0
        errors: Tensor = row_overlaps(rows for own in adapters for rows in (own.A, own.B.T))
        error: Tensor = errors.square().sum() if spec.orth_reg_squared else errors.mean()
        weight: float = spec.orth_reg_weight
        return weight * error

    def without_gradient_at_start(self) -> tuple[str, ...]:
        """Returns A and B without a penalty: while Λ is zero, only the penalty gives them a gradient."""
        return () if self.spec.orth_reg_weight else ("A", "B")

    @torch.no_grad()
    def keep_components(self, keep: Bool[Tensor, " rank"]) -> None:
        """Writes zeros into Λ only."""
        self.kept.copy_(keep)
        self.E.masked_fill_(~keep, 0)

    def held(self) -> Bool[Tensor, " rank"]:
        """Returns flags of the components in files; PEFT's files of this type can have rank 0."""
        return self.components_in_use()

    def nonzero_components(self) -> Bool[Tensor, " rank"]:
        return self.E != 0

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the components held, with Λ for the scale of a file."""
        held = self.held()
        E = (self.active * self.file_ratio * self.E)[held].unsqueeze(1)
        return {"lora_A": self.A[held], "lora_B": self.B[:, held], "lora_E": E}

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Makes as many components as a file has."""
        self._resize_to_file(len(tensors.get("lora_E", self.E)))
        return tensors

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.A.copy_(tensors["lora_A"])
        self.B.copy_(tensors["lora_B"])
        self.E.copy_(tensors["lora_E"].flatten() / self.file_ratio)
