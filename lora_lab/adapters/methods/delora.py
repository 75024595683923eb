"""DeLoRA: an update of bounded, learned strength and direction (Bini et al. 2025, arXiv:2503.18225).

    W' = W + Δ(A, B, λ) − Δ(A₀, B₀, λ₀)
    Δ(A, B, λ) = λ / rank · Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) · diag(w)      so ‖Δ‖_F ≤ λ · max w

    A    (rank, in)    rows a_i, learned; U(±1/√in) at the start
    B    (out, rank)   columns b_i, learned; U(±1/√rank) at the start, or zeros with init: zero_b
    λ    (1,)          learned; delora_lambda at the start
    w    (in,)         frozen; the norms of W's columns
    A₀, B₀             frozen copies of the start, so W' = W bitwise; none with init: zero_b
    λ₀                 delora_lambda, or λ itself with residual_lambda: current

PEFT has no A₀, B₀: ours opens there as a DELORA of rank 2·rank where λ₀ is λ, else as a LORA.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.families.low_rank import LowRankAdapter, filled
from lora_lab.adapters.maps import LinearMap, matrix
from lora_lab.adapters.protocols import RankAllocatable
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec, least_fault, probability_fault
from lora_lab.linalg.kaiming import kaiming_uniform
from lora_lab.linalg.rank import widened

SMALLEST_NORM = 1e-4
"""Norms are kept at least this large, as in PEFT."""


@dataclass
class DeLoRASpec(AdapterSpec):
    """DeLoRA's options; the paper uses delora_lambda 4 to 12 on GLUE."""

    method: str = "delora"

    removed_fields = {"lambda_per_rank": False, "weight_norm_scaling": True}

    rank: int = 8
    """Number of rank-one components; at least 1."""

    delora_lambda: float = 15.0
    """Start of λ, the largest norm of an update divided by max w; above 0."""

    dropout: float = 0.0
    """Probability of zeroing an input of the adapter's branch while training, in [0, 1); PEFT calls it
    module_dropout."""

    init: Literal["residual", "zero_b"] = "residual"
    """`residual` subtracts a random start (the paper's equation 9). `zero_b`, PEFT's, starts B at zero, where
    the update jumps: on a map 24 → 16 of norm 2.3, at rank 4, B's first gradient is about 3500 and
    Adam's first step at 1e-3 makes an update of norm 3.5."""

    residual_lambda: Literal["frozen", "current"] = "frozen"
    """Strength of the subtracted start: `frozen` at delora_lambda, as in the paper, or the `current` λ, as in
    the authors' code."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank for some sites, as in PEFT: role, path ending or regex → rank."""

    @property
    def opens_as_delora(self) -> bool:
        """Whether PEFT's DELORA, whose components all have the strength λ / rank, can express the update."""
        return self.init == "zero_b" or self.residual_lambda == "current"

    @property
    def size_field(self) -> str | None:
        return "rank"

    def faults(self) -> list[str]:
        found = super().faults() + least_fault("rank", self.rank, 1)
        for key, rank in self.rank_pattern.items():
            found += least_fault(f"rank_pattern.{key}", rank, 1)
        found += probability_fault("dropout", self.dropout)
        if not (math.isfinite(self.delora_lambda) and self.delora_lambda > 0):
            found.append(f"delora_lambda: must be finite and above 0; got {self.delora_lambda}")
        if self.init == "zero_b" and self.residual_lambda == "current":
            found.append("residual_lambda: current needs init: residual; got init: zero_b")
        return found


def _write_config(spec: DeLoRASpec) -> dict[str, Any]:
    rank = spec.rank * (2 if spec.init == "residual" else 1)
    if spec.opens_as_delora:
        return {"r": rank, "delora_lambda": spec.delora_lambda, "module_dropout": spec.dropout}
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": spec.dropout}


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "rank": config["r"],
        "delora_lambda": float(config["delora_lambda"]),
        "dropout": config.get("module_dropout", 0.0),
        "init": "zero_b",
        "rank_pattern": config.get("rank_pattern") or {},
    }


class DeLoRA(LowRankAdapter, RankAllocatable):
    """The adapter of one linear map.

    A silenced component that the next step changes has its full strength again at once: see init: zero_b.
    """

    trained_faster = ("B", "lambda_")
    w: Tensor

    Spec = DeLoRASpec
    spec: DeLoRASpec
    paper = "Bini et al. 2025, arXiv:2503.18225"
    peft = PeftLayout(
        "DELORA",
        tensors={"delora_A": "A", "delora_B": "B", "delora_lambda": "lambda_", "delora_w_norm": "w"},
        config=_write_config,
        spec=_read_config,
    )

    def __init__(self, base: LinearMap, spec: DeLoRASpec):
        weight = widened(matrix(base))
        (rows, columns), residual = weight.shape, spec.init == "residual"
        A = kaiming_uniform(spec.rank, columns, dtype=weight.dtype)
        B = kaiming_uniform(rows, spec.rank, dtype=weight.dtype) if residual else A.new_zeros(rows, spec.rank)
        super().__init__(base, spec, (A, B), subtract=residual)
        self.lambda_ = nn.Parameter(torch.full((1,), spec.delora_lambda, dtype=self.dtype))
        self.register_buffer("w", torch.linalg.vector_norm(weight, dim=0))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: DeLoRASpec) -> int:
        return super().site_parameter_count(module, spec) + 1

    @classmethod
    def build(cls, sites: list[Site], spec: DeLoRASpec) -> dict[str, Adapter]:
        if spec.init == "zero_b":
            warnings.warn(
                "delora with init: zero_b starts as the identity and jumps away from it in its first step, "
                "with any learning rate: train with init: residual. Trained adapters can be kept.",
                stacklevel=3,
            )
        return super().build(sites, spec)

    @property
    def scale(self) -> float:
        """1: the strength is in the factors."""
        return 1.0

    def _left(self, A: Tensor, B: Tensor, strength: Tensor) -> Float[Tensor, "out rank"]:
        """Returns B with λ / rank and both norms on its columns; Δ is its product with A diag(w)."""
        norms: Tensor = A.norm(dim=1).clamp(min=SMALLEST_NORM) * B.norm(dim=0).clamp(min=SMALLEST_NORM)
        return B * (strength / self.spec.rank / norms)

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        # L R − L₀ R₀ as (L − L₀) R + L₀ (R − R₀): exactly zero at the start, and no cancellation after it.
        left, right = self._left(self.A, self.B, self.lambda_), self.A * self.w
        if self.start_A is None or self.start_B is None:
            return left, right
        frozen = self.spec.residual_lambda == "frozen"
        strength = torch.full_like(self.lambda_, self.spec.delora_lambda) if frozen else self.lambda_
        start = self._left(self.start_A, self.start_B, strength)
        shift = (self.A - self.start_A) * self.w
        return torch.cat([left - start, start], dim=1), torch.cat([right, shift])

    def without_gradient_at_start(self) -> tuple[str, ...]:
        """λ and the start's λ cancel if they are the same number."""
        if self.spec.init == "zero_b":
            return ("A", "lambda_")
        return ("lambda_",) if self.spec.residual_lambda == "current" else ()

    def decay_exempt(self) -> list[nn.Parameter]:
        """Returns A and B, whose start is no change, and λ, unless λ = 0 also removes the start."""
        frozen = self.start_A is not None and self.spec.residual_lambda == "frozen"
        return super().decay_exempt() + ([self.lambda_] if frozen else [])

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the held part of [A; −A₀] and [B, B₀], and 2 λ.

        Also LoRA's A and B if PEFT needs them.
        """
        held, strength = self.held(), self.lambda_.data * self._file_ratio
        rank = self.stored_rank(int(held.sum()))
        B, A = filled(self.B.data[:, held], self.A.data[held], rank)
        if self.start_A is not None and self.start_B is not None:
            start_B, start_A = filled(self.start_B[:, held], self.start_A[held], rank)
            A, B = torch.cat([A, -start_A]), torch.cat([B, start_B], dim=1)
        values = (A, B * self.active, strength, self.w)
        tensors = dict(zip(self.peft.tensors, values, strict=True))
        if self.spec.opens_as_delora:
            return tensors
        left, right = self.factors()
        stacked = held.repeat(len(right) // max(1, len(held)))
        left, right = filled(left[:, stacked], right[stacked], len(A))
        return tensors | {"lora_A.weight": right, "lora_B.weight": left * self.active}

    @property
    def stored_spec(self) -> DeLoRASpec:
        """Returns the spec of the components held."""
        return replace(self.spec, rank=self.stored_rank(int(self.held().sum())))

    @property
    def _file_ratio(self) -> float:
        """A file's λ divided by ours: PEFT's DELORA divides it by the rank of the file."""
        copies = 1 if self.start_A is None else 2
        return copies * (self.stored_spec.rank / self.spec.rank if self.spec.opens_as_delora else 1)

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Makes as many components as the file has."""
        if (A := tensors.get("delora_A")) is not None:
            self._resize_to_rows(A)
        return tensors

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Splits what `peft_tensors` stacks."""
        A, B, strength, w = (tensors[name] for name in self.peft.tensors)
        rank, stored = len(self.A), len(A) // 2
        self.A.copy_(A[:rank])
        self.B.copy_(B[:, :rank])
        self.w.copy_(w)
        self.lambda_.copy_(strength / self._file_ratio)
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(-A[stored : stored + rank])
            self.start_B.copy_(B[:, stored : stored + rank])
