"""LoRA: a low-rank update beside the frozen map (Hu et al. 2021, arXiv:2106.09685).

    W' = W + s B A       s = alpha / rank, or alpha / √rank with rslora (Kalajdzievski 2023, arXiv:2312.03732)
    y  = base(x) + s (drop(x) Aᵀ) Bᵀ  [+ s c]

    A   (rank, in)    learned; U(±1/√in) at the start
    B   (out, rank)   learned; zeros at the start, hence W' = W
    c   (out,)        learned, with lora_bias; zeros at the start

A start with B A ≠ 0 (`olora`) freezes a copy A₀ (rank, in), B₀ (out, rank) and learns
W' = W + s (B A − B₀ A₀): again W' = W, and the base's tensors stay as they are. PEFT rewrites the base and
its file holds A and B alone; ours opens there as the plain LoRA of rank 2·rank that it is.

On an embedding (vocabulary, width), ΔWᵀ = s B A with A (rank, vocabulary) = 0 and B (width, rank) ~ N(0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, AdditiveAdapter, PeftLayout
from lora_lab.adapters.protocols import Droppable, RankAllocatable
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import LowRankSpec
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.rank import product_singular_values, widened
from lora_lab.linalg.start import kaiming_uniform


@dataclass
class ScaledSpec(LowRankSpec):
    """Adds what LoRA and its relatives share: the scale of B A."""

    rslora: bool = False
    """Scale by alpha / √rank, which keeps the update's size as the rank grows."""

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


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
            ranks = {"rank": self.rank, **{f"rank_pattern.{k}": v for k, v in self.rank_pattern.items()}}
            found += [
                f"{name}: must be even for init: orthogonal; got {rank}"
                for name, rank in ranks.items()
                if rank % 2
            ]
        if self.lora_bias and self.init not in ("default", "random"):
            found.append(f"lora_bias: goes with init: default or random; got init: {self.init}")
        return found


def lora_config(spec: ScaledSpec, factor: int = 1) -> dict[str, Any]:
    """Returns PEFT's fields for a sum of `factor` updates of one scale stacked into one.

    PEFT scales by alpha / rank, so alpha grows with the stacked rank to keep s (by √factor under rsLoRA).
    """
    return {
        "r": spec.rank * factor,
        "lora_alpha": spec.alpha * (math.sqrt(factor) if spec.rslora else factor),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "init_lora_weights": True,
    }


def lora_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Returns our spec's fields for the fields that every file of PEFT's type LORA has."""
    return {
        "rank": config["r"],
        "alpha": float(config["lora_alpha"]),
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": {key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
    }


STARTS_ON_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""PEFT's `init_lora_weights` that leave the base as it is: of their files, A and B say all."""

VARIANTS = (
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
"""PEFT's options under which a file's A and B mean another function than LoRA's."""


def refuse_foreign_options(config: dict[str, Any]) -> None:
    """Raises for a LORA file of PEFT whose A and B do not say all that it computes."""
    init = config.get("init_lora_weights", True)
    if init not in STARTS_ON_THE_BASE:
        raise IncompatibleError(
            f"init_lora_weights: {init!r} changed the base model when PEFT made this adapter, and the file "
            "does not hold that base. Convert it in PEFT: "
            "save_pretrained(path_initial_model_for_weight_conversion=…)."
        )
    for name in (*VARIANTS, "layer_replication", "target_parameters", "trainable_token_indices"):
        if config.get(name):
            raise IncompatibleError(
                f"{name}: {config[name]!r} of PEFT's config has no counterpart in lora_lab."
            )


def _read_config(config: dict[str, Any]) -> dict[str, Any] | None:
    if config.get("use_dora") or str(config.get("init_lora_weights")).startswith("pissa"):
        return None
    refuse_foreign_options(config)
    return {**lora_fields(config), "lora_bias": config.get("lora_bias", False)}


class LowRankAdapter(AdditiveAdapter, RankAllocatable, Droppable):
    """ΔW = s (B A − B₀ A₀): the update that LoRA, its starts and its relatives share.

    Attributes:
        A: (rank, in), learned.
        B: (out, rank), learned.
        start_A: (rank, in), frozen; None where the update starts at zero.
        start_B: (out, rank), frozen; None where the update starts at zero.
        kept: (rank,), flags of the components that no controller has silenced.
        active: scalar, 1; 0 once the adapter was dropped.
    """

    start_A: Tensor | None
    start_B: Tensor | None
    kept: Tensor
    active: Tensor

    def __init__(self, base: Any, spec: ScaledSpec, scale: float, A: Tensor, B: Tensor, subtract: bool):
        super().__init__(base)
        self.spec = spec
        self.scale = scale
        self.A = nn.Parameter(A)  # (rank, in)
        self.B = nn.Parameter(B)  # (out, rank)
        self.register_buffer("start_A", A.clone() if subtract else None)
        self.register_buffer("start_B", B.clone() if subtract else None)
        self.register_buffer("kept", torch.ones(spec.rank, dtype=torch.bool))
        self.register_buffer("active", torch.ones((), dtype=self.dtype))
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()

    @property
    def rank(self) -> int:
        """The number of components not silenced."""
        return 0 if self.dropped else int(self.kept.sum())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns L (out, k) and R (k, in) with ΔW = s L R; k is 2·rank where a start is subtracted."""
        if self.start_A is None or self.start_B is None:
            return self.B, self.A
        return torch.cat([self.B, -self.start_B], dim=1), torch.cat([self.A, self.start_A])

    def delta_weight(self) -> Tensor:
        """See `AdditiveAdapter.delta_weight`."""
        left, right = self.factors()
        return self.scale * self.active * (widened(left) @ widened(right))

    def delta_output(self, x: Tensor) -> Tensor:
        """See `AdditiveAdapter.delta_output`."""
        left, right = self.factors()
        # The scale goes onto the (..., rank) product: a pass over the (..., out) output costs far more.
        return F.linear(F.linear(self.dropout(x), right) * (self.scale * self.active), left)

    def singular_values(self) -> Tensor:
        """See `LinearAdapter.singular_values`."""
        left, right = self.factors()
        return abs(self.scale) * self.active * product_singular_values(left, right)

    def decay_exempt(self) -> list[nn.Parameter]:
        """See `Adapter.decay_exempt`: where a start is subtracted, no change is that start."""
        return [] if self.start_A is None else [self.A, self.B]

    def loraplus_parameters(self) -> list[nn.Parameter]:
        """See `Adapter.loraplus_parameters`."""
        return [self.B]

    def rank_components(self) -> list[tuple[nn.Parameter, int]]:
        """See `RankAllocatable`."""
        return [(self.A, 0), (self.B, 1)]

    @torch.no_grad()
    def keep_components(self, keep: Tensor) -> None:
        """See `RankAllocatable`. B's columns are zeroed, A stays: from both zero nothing grows back."""
        self.kept.copy_(keep)
        self.B[:, ~keep] = 0
        if self.start_B is not None:
            self.start_B[:, ~keep] = 0

    def kept_components(self) -> Tensor:
        """See `RankAllocatable`."""
        return self.kept

    def drop(self) -> None:
        """See `Droppable`. A switch, not zeros in B, which the optimizer's next step would fill again."""
        self.active.zero_()

    @property
    def dropped(self) -> bool:
        """See `Droppable`."""
        return not self.active

    def peft_tensors(self) -> dict[str, Tensor]:
        """See `Adapter.peft_tensors`: the stacked factors where a start is subtracted."""
        left, right = self.factors()
        return {"lora_A.weight": right, "lora_B.weight": left * self.active}

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Adapter.load_peft_tensors`: takes apart what `factors` stacks."""
        left, right, rank = tensors["lora_B.weight"], tensors["lora_A.weight"], self.spec.rank
        self.A.copy_(right[:rank])
        self.B.copy_(left[:, :rank])
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(right[rank:])
            self.start_B.copy_(-left[:, rank:])


class LoRA(LowRankAdapter):
    """The adapter of one linear map."""

    Spec = LoRASpec
    family = "low-rank"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    peft = PeftLayout(
        "LORA",
        tensors={"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "c"},
        config=lambda spec: {
            **lora_config(spec, 2 if spec.init == "olora" else 1),
            "lora_bias": spec.lora_bias,
        },
        spec=_read_config,
    )

    def __init__(self, base: Any, spec: LoRASpec):
        A, B = start(base, spec)
        super().__init__(base, spec, spec.scale, A, B, subtract=spec.init == "olora")
        self.c = nn.Parameter(torch.zeros(self.out_features, dtype=self.dtype)) if spec.lora_bias else None

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Linear maps and plain embeddings: those of a subclass scale or renormalise what they look up."""
        return super().accepts(module) or (type(module) is nn.Embedding and module.max_norm is None)

    @classmethod
    def at(cls, site: Site, spec: Any, *shared: Any) -> Adapter:
        """See `Adapter.at`."""
        if isinstance(site.module, nn.Embedding):
            return LoRAEmbedding.at(site, spec)
        return super().at(site, spec, *shared)

    def delta_output(self, x: Tensor) -> Tensor:
        """See `AdditiveAdapter.delta_output`."""
        delta = super().delta_output(x)
        return delta if self.c is None else delta + self.scale * self.active * self.c

    def adapted_bias(self, bias: Tensor | None) -> Tensor | None:
        """See `LinearAdapter.adapted_bias`."""
        if self.c is None:
            return bias
        shift = self.scale * self.active * self.c
        return shift if bias is None else bias + shift

    def loraplus_parameters(self) -> list[nn.Parameter]:
        """See `Adapter.loraplus_parameters`."""
        return [self.B] if self.c is None else [self.B, self.c]

    def peft_tensors(self) -> dict[str, Tensor]:
        """See `Adapter.peft_tensors`."""
        bias = {} if self.c is None else {"lora_B.bias": self.c * self.active}
        return {**super().peft_tensors(), **bias}

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Adapter.load_peft_tensors`."""
        super().load_peft_tensors(tensors)
        if self.c is not None:
            self.c.copy_(tensors["lora_B.bias"])


def start(base: Any, spec: LoRASpec) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank) as `spec.init` says.

    Raises:
        IncompatibleError: if `olora` is asked for a rank above min(in, out).
    """
    rank, dtype = spec.rank, torch.promote_types(base.weight.dtype, torch.float32)
    rows, columns = base.out_features, base.in_features
    zeros = torch.zeros(rows, rank, dtype=dtype)
    if spec.init == "default":
        return kaiming_uniform(rank, columns, dtype=dtype), zeros
    if spec.init == "random":
        return kaiming_uniform(rank, columns, dtype=dtype), kaiming_uniform(rows, rank, dtype=dtype)
    if spec.init in ("gaussian", "scaled_gaussian"):
        deviation = 1 / rank if spec.init == "gaussian" else 1 / math.sqrt(rank)
        return torch.randn(rank, columns, dtype=dtype) * deviation, zeros
    if spec.init == "orthogonal":
        # A's and B's rows lie in complementary halves of one random basis, so that B A is zero.
        basis = torch.linalg.qr(torch.randn(rank, rank, dtype=dtype)).Q
        A = (torch.randn(columns, rank // 2, dtype=dtype) @ basis[0::2]).T / 10
        return A, torch.randn(rank // 2, rows, dtype=dtype).T @ basis[1::2] / 10
    refuse_rank_above(rank, base, "init: olora")
    Q, R = torch.linalg.qr(base.weight.to(dtype))
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def refuse_rank_above(rank: int, base: Any, what: str) -> None:
    """Raises for a rank that a decomposition of W cannot give."""
    most = min(base.in_features, base.out_features)
    if rank > most:
        raise IncompatibleError(
            f"adapter.rank: {what} takes its start from W and allows at most min(in, out) = {most} here; "
            f"got {rank}. Lower the rank, or use rank_pattern for this module."
        )


class LoRAEmbedding(Adapter, RankAllocatable):
    """The adapter of one embedding: columns of A are looked up, then mapped by B."""

    Spec = LoRASpec
    base: nn.Embedding
    kept: Tensor
    peft = PeftLayout("LORA", {"lora_embedding_A": "A", "lora_embedding_B": "B"}, LoRA.peft.config)

    def __init__(self, base: nn.Embedding, spec: LoRASpec):
        super().__init__(base)
        if spec.lora_bias or spec.dropout or spec.init not in ("default", "gaussian"):
            raise IncompatibleError(
                "LoRA on an embedding has no dropout, no lora_bias and one start (init: default); "
                "drop the embedding from targets, or those options."
            )
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.spec, self.scale = spec, spec.scale
        self.A = nn.Parameter(torch.zeros(spec.rank, base.num_embeddings, dtype=dtype))
        self.B = nn.Parameter(torch.randn(base.embedding_dim, spec.rank, dtype=dtype))
        self.register_buffer("kept", torch.ones(spec.rank, dtype=torch.bool))

    @property
    def weight(self) -> Tensor:
        """The frozen base's weight."""
        return self.base.weight

    @property
    def rank(self) -> int:
        """The number of components not silenced."""
        return int(self.kept.sum())

    def delta_weight(self) -> Tensor:
        """Returns ΔW (vocabulary, width)."""
        return self.scale * (self.B @ self.A).T

    def singular_values(self) -> Tensor:
        """Returns the singular values of ΔW in falling order."""
        return abs(self.scale) * product_singular_values(self.B, self.A)

    def forward(self, tokens: Tensor) -> Tensor:
        """Looks up base and update."""
        y = self.base(tokens)
        return (y + F.linear(F.embedding(tokens, self.A.T) * self.scale, self.B)).to(y.dtype)

    @torch.no_grad()
    def merged_module(self) -> nn.Module:
        """See `Adapter.merged_module`."""
        weight = (widened(self.base.weight) + self.delta_weight()).to(self.base.weight.dtype)
        return nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=self.base.padding_idx)

    def rank_components(self) -> list[tuple[nn.Parameter, int]]:
        """See `RankAllocatable`."""
        return [(self.A, 0), (self.B, 1)]

    @torch.no_grad()
    def keep_components(self, keep: Tensor) -> None:
        """See `RankAllocatable`."""
        self.kept.copy_(keep)
        self.A[~keep] = 0

    def kept_components(self) -> Tensor:
        """See `RankAllocatable`."""
        return self.kept
