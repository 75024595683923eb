"""VeRA: vectors that scale one random projection shared by all maps (Kopiczko et al. 2023, arXiv:2310.11454).

    W' = W + diag(λ_b) B diag(λ_d) A
    y  = base(x) + λ_b ⊙ (B (λ_d ⊙ (A drop(x))))

    A     (rank, in)    frozen, the first columns of one A for all sites; U(±√(6 / largest in))
    B     (out, rank)   frozen, the first rows of one B for all sites; U(±√(6 / rank))
    λ_b   (out,)        learned; zeros at the start, hence W' = W
    λ_d   (rank,)       learned; d_initial at the start

A and B follow from `projection_prng_key`, the rank and the largest sizes among the sites, and equal PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, AdditiveAdapter, PeftLayout
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec, probability_fault
from lora_lab.linalg.rank import product_singular_values, widened


@dataclass
class VeRASpec(AdapterSpec):
    """VeRA's options; the paper's learning rate is about ten times that of LoRA."""

    method: str = "vera"

    rank: int = 256
    """Number of rows of A; at least 1, 256 to 1024 in the paper. Each map trains as many numbers, and one per
    output."""

    dropout: float = 0.0
    """Probability of zeroing an input of the adapter's branch while training, in [0, 1)."""

    d_initial: float = 0.1
    """Start of every number of λ_d, not 0; 0.1 in the paper, where 1.0 and 1e-7 did worse."""

    projection_prng_key: int = 0
    """Seed of A and B, at least 0; the run's own seed does not touch them."""

    save_projection: bool = True
    """Store A and B, once. Without them files are small, and need a torch that draws the same numbers."""

    def faults(self) -> list[str]:
        """See `AdapterSpec.faults`."""
        found = super().faults() + probability_fault("dropout", self.dropout)
        if self.rank < 1:
            found.append(f"rank: must be at least 1; got {self.rank}")
        if not math.isfinite(self.d_initial) or self.d_initial == 0:
            found.append(f"d_initial: must be finite and not 0; got {self.d_initial}")
        if self.projection_prng_key < 0:
            found.append(f"projection_prng_key: must be at least 0; got {self.projection_prng_key}")
        return found


class Projections(nn.Module):
    """The frozen pair that all adapters of a model share.

    Attributes:
        A: (rank, largest in).
        B: (largest out, rank).
        sizes: (largest in, largest out, 0): no numbers, only a shape, by which a checkpoint without A and B
            shows that it was made with other slices of them. None if A and B are stored.
    """

    A: Tensor
    B: Tensor
    sizes: Tensor | None

    def __init__(self, sites: list[Site], spec: VeRASpec):
        super().__init__()
        modules: list[Any] = [site.module for site in sites]
        columns = max(module.in_features for module in modules)
        rows = max(module.out_features for module in modules)
        generator = torch.Generator().manual_seed(spec.projection_prng_key)
        # PEFT's basis: drawn in float32 whatever the model's type, A first.
        A = _kaiming_uniform(spec.rank, columns, generator)
        B = _kaiming_uniform(rows, spec.rank, generator)
        dtype = torch.promote_types(modules[0].weight.dtype, torch.float32)
        self.register_buffer("A", A.to(dtype), persistent=spec.save_projection)
        self.register_buffer("B", B.to(dtype), persistent=spec.save_projection)
        self.register_buffer("sizes", None if spec.save_projection else torch.empty(columns, rows, 0))


def _kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


class VeRA(AdditiveAdapter):
    """The adapter of one linear map."""

    Spec = VeRASpec
    family = "low-rank"
    paper = "Kopiczko et al. 2023, arXiv:2310.11454"
    peft = PeftLayout(
        "VERA",
        tensors={"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"},
        config=lambda spec: {
            "r": spec.rank,
            "vera_dropout": spec.dropout,
            "d_initial": spec.d_initial,
            "projection_prng_key": spec.projection_prng_key,
            "save_projection": spec.save_projection,
        },
        spec=lambda config: {
            "rank": config["r"],
            "dropout": config.get("vera_dropout", 0.0),
            "d_initial": config.get("d_initial", 0.1),
            "projection_prng_key": config["projection_prng_key"],
            "save_projection": config.get("save_projection", True),
        },
        shared={
            "base_model.vera_A": "stored_A",
            "base_model.vera_B": "stored_B",
            "base_model.vera_sizes": "sizes",
        },
    )

    def __init__(self, base: Any, spec: VeRASpec, projections: Projections):
        super().__init__(base)
        self.spec = spec
        self.projections = projections
        self.lambda_b = nn.Parameter(torch.zeros(self.out_features, dtype=self.dtype))
        self.lambda_d = nn.Parameter(torch.full((spec.rank,), spec.d_initial, dtype=self.dtype))
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()

    @classmethod
    def build(cls, sites: list[Site], spec: Any) -> dict[str, Adapter]:
        """See `Adapter.build`: all sites share one pair of projections."""
        projections = Projections(sites, spec)
        return {site.path: cls.at(site, spec, projections) for site in sites}

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.spec.rank

    @property
    def A(self) -> Float[Tensor, "rank in"]:
        """This map's columns of the shared A."""
        return self.projections.A[:, : self.in_features]

    @property
    def B(self) -> Float[Tensor, "out rank"]:
        """This map's rows of the shared B."""
        return self.projections.B[: self.out_features]

    @property
    def stored_A(self) -> Tensor | None:
        """The shared A, where files hold it."""
        return self.projections.A if self.spec.save_projection else None

    @property
    def stored_B(self) -> Tensor | None:
        """The shared B, where files hold it."""
        return self.projections.B if self.spec.save_projection else None

    @property
    def sizes(self) -> Tensor | None:
        """See `Projections`."""
        return self.projections.sizes

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Returns diag(λ_b) B and diag(λ_d) A."""
        return self.lambda_b.unsqueeze(1) * self.B, self.lambda_d.unsqueeze(1) * self.A

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """See `AdditiveAdapter.delta_weight`."""
        left, right = self.factors()
        return widened(left) @ widened(right)

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """See `AdditiveAdapter.delta_output`."""
        # λ_d stays outside A, so that the backward pass needs no x; λ_b goes onto B, so that it needs nothing
        # of the output's size.
        hidden = F.linear(self.dropout(x), self.A) * self.lambda_d
        return F.linear(hidden, self.lambda_b.unsqueeze(1) * self.B)

    def singular_values(self) -> Float[Tensor, " k"]:
        """See `LinearAdapter.singular_values`."""
        return product_singular_values(*self.factors())

    def loraplus_parameters(self) -> list[nn.Parameter]:
        """See `Adapter.loraplus_parameters`."""
        return [self.lambda_b, self.lambda_d]
