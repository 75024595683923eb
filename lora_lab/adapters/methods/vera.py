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
from lora_lab.adapters.spec import AdapterSpec, least_fault, probability_fault, zero_fault
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
        return [
            *super().faults(),
            *least_fault("rank", self.rank, 1),
            *probability_fault("dropout", self.dropout),
            *zero_fault("d_initial", self.d_initial),
            *least_fault("projection_prng_key", self.projection_prng_key, 0),
        ]


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
        dtype = torch.promote_types(modules[0].weight.dtype, torch.float32)
        for name, shape in {"A": (spec.rank, columns), "B": (rows, spec.rank)}.items():
            bound = math.sqrt(6 / shape[1])
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(dtype), persistent=spec.save_projection)
        self.register_buffer("sizes", None if spec.save_projection else torch.empty(columns, rows, 0))

    def stored(self) -> dict[str, Tensor]:
        """Returns what files hold, by its name there."""
        found = {"A": self.A, "B": self.B} if self.sizes is None else {"sizes": self.sizes}
        return {f"base_model.vera_{name}": tensor for name, tensor in found.items()}


FIELDS = {
    "r": "rank",
    "vera_dropout": "dropout",
    "d_initial": "d_initial",
    "projection_prng_key": "projection_prng_key",
    "save_projection": "save_projection",
}
"""PEFT's fields and ours."""


class VeRA(AdditiveAdapter):
    """The adapter of one linear map."""

    Spec = VeRASpec
    family = "low-rank"
    paper = "Kopiczko et al. 2023, arXiv:2310.11454"
    peft = PeftLayout(
        "VERA",
        tensors={"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"},
        config=lambda spec: {name: getattr(spec, own) for name, own in FIELDS.items()},
        spec=lambda config: {own: config[name] for name, own in FIELDS.items() if name in config},
        shared=lambda adapter: adapter.projections.stored(),
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
    def A(self) -> Float[Tensor, "rank in"]:
        """This map's columns of the shared A."""
        return self.projections.A[:, : self.in_features]

    @property
    def B(self) -> Float[Tensor, "out rank"]:
        """This map's rows of the shared B."""
        return self.projections.B[: self.out_features]

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Returns diag(λ_b) B and diag(λ_d) A."""
        return self.lambda_b.unsqueeze(1) * self.B, self.lambda_d.unsqueeze(1) * self.A

    def delta_weight(self) -> Float[Tensor, "out in"]:
        left, right = self.factors()
        return widened(left) @ widened(right)

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        # λ_d stays outside A, so that the backward pass needs no x; λ_b goes onto B, so that it needs nothing
        # of the output's size.
        hidden = F.linear(self.dropout(x), self.A) * self.lambda_d
        return F.linear(hidden, self.lambda_b.unsqueeze(1) * self.B)

    def singular_values(self) -> Float[Tensor, " k"]:
        return product_singular_values(*self.factors())

    def loraplus_parameters(self) -> list[nn.Parameter]:
        return [self.lambda_b, self.lambda_d]
