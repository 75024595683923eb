"""LoRA: a low-rank update added to the frozen map (Hu et al. 2021, arXiv:2106.09685).

    W' = W + s B A       s = alpha / rank, or alpha / √rank with rslora
    y  = base(x) + s (drop(x) Aᵀ) Bᵀ  [+ s c]

    A   (rank, in)    learned; U(±1/√in) at the start, see `starts` for others
    B   (out, rank)   learned; zeros at the start, so W' = W
    c   (out,)        learned, with lora_bias; zeros at the start

For embeddings see `embedding`, for experts stacked in one parameter `experts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.families.embedding import LowRankEmbedding
from lora_lab.adapters.families.experts import LowRankExperts, target_parameters
from lora_lab.adapters.families.low_rank import LowRankAdapter, read_lora_config, write_lora_config
from lora_lab.adapters.families.starts import FROM_ZERO, SUBTRACTED, StartedSpec, start
from lora_lab.adapters.maps import LinearMap, pointwise, sizes
from lora_lab.adapters.protocols import Growable, RankAllocatable, Shareable, Truncatable
from lora_lab.adapters.sites import Site, site_spec
from lora_lab.errors import IncompatibleError


@dataclass
class LoRASpec(StartedSpec):
    """LoRA's options; the paper uses rank 4 to 8 on query and value."""

    names_parts = True

    method: str = "lora"

    lora_bias: bool = False
    """Learn a bias c in addition to B."""

    def faults(self) -> list[str]:
        found = super().faults()
        if self.lora_bias and self.init not in ("default", "random"):
            found.append(f"lora_bias: needs init: default or random; got init: {self.init}")
        return found


class LoRA(LowRankAdapter[LoRASpec], RankAllocatable, Growable, Truncatable, Shareable):
    """The adapter of one linear map."""

    convolves = True
    trained_faster = ("B", "c")

    Spec = LoRASpec
    paper = "Hu et al. 2021, arXiv:2106.09685"
    peft = PeftLayout(
        "LORA",
        tensors={"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "c"},
        fields={"lora_bias": "lora_bias"},
        config=lambda spec: write_lora_config(spec, 2 if spec.init in SUBTRACTED else 1),
        spec=lambda config: read_lora_config(config, "lora"),
        site_config=target_parameters,
    )

    def __init__(self, base: LinearMap, spec: LoRASpec):
        super().__init__(base, spec, start(base, spec), subtract=spec.init in SUBTRACTED)
        self.c = nn.Parameter(torch.zeros(self.out_features, dtype=self.dtype)) if spec.lora_bias else None

    @classmethod
    def parameter_count(cls, model: nn.Module, sites: list[Site], spec: LoRASpec) -> int:
        experts = [site for site in sites if LowRankExperts.accepts(site.module)]
        others = [site for site in sites if site not in experts]
        counts = (LowRankExperts.count(site, site_spec(spec, site)) for site in experts)
        return super().parameter_count(model, others, spec) + sum(counts)

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: LoRASpec) -> int:
        if LowRankEmbedding.accepts(module):
            return LowRankEmbedding.site_parameter_count(module, spec)
        return super().site_parameter_count(module, spec) + (sizes(module)[0] if spec.lora_bias else 0)

    @classmethod
    def file_names(cls) -> set[str]:
        return {*cls.peft.tensors, *LowRankEmbedding.peft.tensors}

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Linear maps, convolutions, plain embeddings, experts stacked in parameters and their routers."""
        special = LowRankEmbedding.accepts(module) or LowRankExperts.accepts(module)
        return super().accepts(module) or special

    @classmethod
    def at(cls, site: Site, spec: LoRASpec, *shared: object) -> Adapter:
        """Makes the adapter; embeddings have another class."""
        if LowRankExperts.accepts(site.module):
            return LowRankExperts.at(site, spec)
        if not LowRankEmbedding.accepts(site.module):
            return super().at(site, spec, *shared)
        if spec.lora_bias or spec.dropout or spec.init not in ("default", "gaussian"):
            raise IncompatibleError(
                "LoRA on an embedding has no dropout, no lora_bias and one start (init: default); "
                "remove the embedding from targets, or these options."
            )
        return LowRankEmbedding.at(site, spec)

    def without_gradient_at_start(self) -> tuple[str, ...]:
        return ("A",) if self.spec.init in FROM_ZERO else ()

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        delta, shift = super().delta_output(x), self.adapted_bias(None)
        return delta if shift is None else delta + pointwise(self.base, shift)

    def adapted_bias(self, bias: Float[Tensor, " out"] | None) -> Float[Tensor, " out"] | None:
        if self.c is None:
            return bias
        shift = self.scale * self.active * self.c
        return shift if bias is None else bias + shift
