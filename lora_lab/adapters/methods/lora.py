"""LoRA: a low-rank update beside the frozen map (Hu et al. 2021, arXiv:2106.09685).

    W' = W + s B A       s = alpha / rank, or alpha / √rank with rslora
    y  = base(x) + s (drop(x) Aᵀ) Bᵀ  [+ s c]

    A   (rank, in)    learned; U(±1/√in) at the start
    B   (out, rank)   learned; zeros at the start, hence W' = W
    c   (out,)        learned, with lora_bias; zeros at the start

`olora` starts with B A ≠ 0 and subtracts that start, see `low_rank`. Embeddings: see `embedding`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.embedding import LowRankEmbedding
from lora_lab.adapters.low_rank import (
    LowRankAdapter,
    ScaledSpec,
    read_lora_config,
    refuse_rank_above,
    write_lora_config,
)
from lora_lab.adapters.sites import Site
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.start import kaiming_uniform


@dataclass
class LoRASpec(ScaledSpec):
    """LoRA's options; the paper uses rank 4 to 8 on query and value."""

    method: str = "lora"

    lora_bias: bool = False
    """Learn a bias c beside B."""

    init: Literal["default", "gaussian", "scaled_gaussian", "orthogonal", "olora", "random"] = "default"
    """Start of A: `default` U(±1/√in), `gaussian` N(0, 1/rank²), `scaled_gaussian` N(0, 1/rank), B = 0 in
    each; `orthogonal` (even rank) starts both with B A = 0 up to rounding; `olora` (QR of W; Büyükakyüz 2024,
    arXiv:2406.01775) starts both and subtracts the start; `random` starts both and is not the identity."""

    def faults(self) -> list[str]:
        """See `AdapterSpec.faults`."""
        found = super().faults()
        if self.init == "orthogonal":
            odd = {name: rank for name, rank in self.ranks().items() if rank % 2}
            found += [f"{name}: must be even for init: orthogonal; got {rank}" for name, rank in odd.items()]
        if self.lora_bias and self.init not in ("default", "random"):
            found.append(f"lora_bias: goes with init: default or random; got init: {self.init}")
        return found


def start(base: Any, spec: LoRASpec) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Returns A and B as `spec.init` says.

    Raises:
        IncompatibleError: if `olora` is asked for a rank above min(in, out).
    """
    rank, rows, columns = spec.rank, base.out_features, base.in_features
    dtype = torch.promote_types(base.weight.dtype, torch.float32)
    zeros = torch.zeros(rows, rank, dtype=dtype)
    match spec.init:
        case "default":
            return kaiming_uniform(rank, columns, dtype=dtype), zeros
        case "random":
            return kaiming_uniform(rank, columns, dtype=dtype), kaiming_uniform(rows, rank, dtype=dtype)
        case "gaussian":
            return torch.randn(rank, columns, dtype=dtype) / rank, zeros
        case "scaled_gaussian":
            return torch.randn(rank, columns, dtype=dtype) / math.sqrt(rank), zeros
        case "orthogonal":
            # A's and B's rows lie in complementary halves of one random basis, so that B A is zero.
            basis = torch.linalg.qr(torch.randn(rank, rank, dtype=dtype)).Q
            A = (torch.randn(columns, rank // 2, dtype=dtype) @ basis[0::2]).T / 10
            return A, torch.randn(rank // 2, rows, dtype=dtype).T @ basis[1::2] / 10
        case "olora":
            refuse_rank_above(rank, base, "init: olora")
            Q, R = torch.linalg.qr(base.weight.to(dtype))
            return R[:rank].contiguous(), Q[:, :rank].contiguous()


def _write_config(spec: LoRASpec) -> dict[str, Any]:
    return {**write_lora_config(spec, 2 if spec.init == "olora" else 1), "lora_bias": spec.lora_bias}


def _read_config(config: dict[str, Any]) -> dict[str, Any] | None:
    fields = read_lora_config(config, "lora")
    return None if fields is None else {**fields, "lora_bias": config.get("lora_bias", False)}


class LoRA(LowRankAdapter):
    """The adapter of one linear map."""

    Spec = LoRASpec
    family = "low-rank"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    peft = PeftLayout(
        "LORA",
        tensors={"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "c"},
        config=_write_config,
        spec=_read_config,
    )

    def __init__(self, base: Any, spec: LoRASpec):
        super().__init__(base, spec, *start(base, spec), subtract=spec.init == "olora")
        self.c = nn.Parameter(torch.zeros(self.out_features, dtype=self.dtype)) if spec.lora_bias else None

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Linear maps and plain embeddings."""
        return super().accepts(module) or LowRankEmbedding.accepts(module)

    @classmethod
    def at(cls, site: Site, spec: LoRASpec, *shared: Any) -> Adapter:
        """See `Adapter.at`: an embedding has an adapter of its own."""
        if not LowRankEmbedding.accepts(site.module):
            return super().at(site, spec, *shared)
        if spec.lora_bias or spec.dropout or spec.init not in ("default", "gaussian"):
            raise IncompatibleError(
                "LoRA on an embedding has no dropout, no lora_bias and one start (init: default); "
                "drop the embedding from targets, or those options."
            )
        return LowRankEmbedding.at(site, spec)

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """See `AdditiveAdapter.delta_output`."""
        delta = super().delta_output(x)
        return delta if self.c is None else delta + self.scale * self.active * self.c

    def adapted_bias(self, bias: Float[Tensor, " out"] | None) -> Float[Tensor, " out"] | None:
        """See `LinearAdapter.adapted_bias`."""
        if self.c is None:
            return bias
        shift = self.scale * self.active * self.c
        return shift if bias is None else bias + shift

    def loraplus_parameters(self) -> list[nn.Parameter]:
        """See `Adapter.loraplus_parameters`."""
        return [self.B] if self.c is None else [self.B, self.c]
