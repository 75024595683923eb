"""What LoRA and its relatives share: the update s B A, its spec, and how PEFT's files of type LORA are read.

    ΔW = s (B A − B₀ A₀)       s = alpha / rank, or alpha / √rank with rslora

A method whose start is not zero freezes a copy A₀, B₀ of it and learns the difference: W' = W at the start,
and the base's tensors stay as they are. PEFT rewrites the base instead and its file holds A and B alone; ours
holds the stacked factors [B, −B₀] and [A; A₀], and opens there as a plain LoRA of rank 2·rank.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import TypeVar

from lora_lab.adapters.base import AdditiveAdapter, PeftLayout
from lora_lab.adapters.maps import LinearMap, is_convolution, mix, pointwise, project, sizes
from lora_lab.adapters.protocols import Droppable, Growable, Prunable, Shareable
from lora_lab.adapters.spec import LowRankSpec
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.kaiming import kaiming_uniform
from lora_lab.linalg.rank import product_singular_values, widened
from lora_lab.linalg.updates import Update


@dataclass
class ScaledSpec(LowRankSpec):
    """Adds the scale of B A."""

    rslora: bool = False
    """Scale by alpha / √rank, which keeps the update's size as the rank grows (Kalajdzievski 2023,
    arXiv:2312.03732)."""

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


ScaledT = TypeVar("ScaledT", bound=ScaledSpec, default=Any)


class LowRankAdapter(AdditiveAdapter[ScaledT], Droppable):
    """ΔW = s (B A − B₀ A₀), from a start A, B; by default LoRA's, U(±1/√in) and zeros.

    It has the methods of `RankAllocatable`, `Truncatable` and `Shareable`; a method to which they apply
    inherits them too.

    Attributes:
        A: (rank, in), learned.
        B: (out, rank), learned.
        start_A: (rank, in), frozen; None if the update starts at zero.
        start_B: (out, rank), frozen; None if the update starts at zero.
        kept: (rank,), flags of the components that no controller has silenced.
        active: scalar, 1; 0 after the adapter was dropped.
    """

    family = "low-rank"
    trained_faster: ClassVar[tuple[str, ...]] = ("B",)
    components: dict[str, int] = {"A": 0, "B": 1, "start_A": 0, "start_B": 1, "kept": 0}
    # A folder opens in PEFT as plain LoRA; PEFT's own files of that type are LoRA's.
    peft = PeftLayout(
        "LORA",
        tensors={"lora_A.weight": "A", "lora_B.weight": "B"},
        config=lambda spec: write_lora_config(spec),
        spec=lambda config: None,
    )

    start_A: Tensor | None
    start_B: Tensor | None
    kept: Tensor
    active: Tensor

    def __init__(
        self,
        base: LinearMap,
        spec: ScaledT,
        start: tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]] | None = None,
        subtract: bool = False,
    ):
        super().__init__(base)
        self.spec = spec
        if start is None:
            A = kaiming_uniform(spec.rank, self.in_features, dtype=self.dtype)
            start = A, torch.zeros(self.out_features, spec.rank, dtype=self.dtype)
        self.A, self.B = (nn.Parameter(factor) for factor in start)
        self.register_buffer("start_A", start[0].clone() if subtract else None)
        self.register_buffer("start_B", start[1].clone() if subtract else None)
        self.register_buffer("kept", torch.ones(spec.rank, dtype=torch.bool))
        self.initial_components = spec.rank
        self.register_buffer("active", torch.ones((), dtype=self.dtype))
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: ScaledT) -> int:
        """Counts A and B, rank · (out + in) numbers."""
        return spec.rank * sum(sizes(module))

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.spec.scale

    @property
    def rank(self) -> int:
        """The number of components in use."""
        return int(self.components_in_use().sum())

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Returns L and R with ΔW = s L R; k is 2·rank where a start is subtracted."""
        if self.start_A is None or self.start_B is None:
            return self.B, self.A
        # B A − B₀ A₀ as (B − B₀) A + B₀ (A − A₀): exactly zero at the start, and nothing large cancels later.
        shift_A, shift_B = self.A - self.start_A, self.B - self.start_B
        return torch.cat([shift_B, self.start_B], dim=1), torch.cat([self.A, shift_A])

    def delta_weight(self) -> Float[Tensor, "out in"]:
        left, right = self.factors()
        return self.scale * self.active * (widened(left) @ widened(right))

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Returns W + ΔW in one pass over W."""
        left, right = self.factors()
        return torch.addmm(weight, widened(left) * (self.scale * self.active), widened(right))

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        left, right = self.factors()
        # The (..., rank) product is scaled: a pass over the (..., out) output costs far more.
        hidden = project(self.base, self.dropout(x), right) * (self.scale * self.active)
        return mix(self.base, hidden, left)

    @torch.no_grad()
    def update(self) -> Update:
        """Returns the factors as they are."""
        left, right = self.factors()
        return Update(widened(left) * (self.scale * self.active), widened(right), self._bias_shift())

    def singular_values(self) -> Float[Tensor, " k"]:
        return abs(self.scale) * self.active * product_singular_values(*self.factors())

    def decay_exempt(self) -> list[nn.Parameter]:
        """Returns A and B where a start is subtracted, since no change is then that start."""
        return [] if self.start_A is None else [self.A, self.B]

    def without_gradient_at_start(self) -> tuple[str, ...]:
        """Returns A where B starts at zero."""
        return ("A",) if self.start_B is None else ()

    @torch.no_grad()
    def keep_components(self, keep: Bool[Tensor, " rank"]) -> None:
        """Zeroes B's columns but not A: if both were zero, nothing could grow back."""
        self.kept.copy_(keep)
        self.B.masked_fill_(~keep, 0)
        if self.start_B is not None:
            self.start_B.masked_fill_(~keep, 0)

    def new_components(self, count: int) -> dict[str, Tensor]:
        """Returns rows of A as LoRA starts them, and columns of B that are zero."""
        A = kaiming_uniform(count, self.in_features, dtype=self.dtype)
        B = torch.zeros(self.out_features, count, dtype=self.dtype)
        return {"A": A, "B": B, "start_A": A, "start_B": B}

    @torch.no_grad()
    def take_update(self, update: Update) -> None:
        """Divides L by s. A start that was subtracted becomes zero: ΔW holds all of it."""
        left, right = filled(update.left / self.scale, update.right, len(self.A))
        self.A.copy_(right)
        self.B.copy_(left)
        if self.start_A is not None and self.start_B is not None:
            self.start_A.zero_()
            self.start_B.zero_()
        self.kept.fill_(True)
        self.tensors_changed()

    def drop(self) -> None:
        """Sets a flag instead of zeroing B, which the optimizer's next step would fill again."""
        self.active.zero_()
        self.zero_grad()
        self.tensors_changed()

    def tensors_changed(self) -> None:
        """Stops training what was dropped."""
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(not self.dropped)

    @property
    def dropped(self) -> bool:
        return not self.active

    def share_key(self) -> Hashable | None:
        """Returns None if a start is subtracted, which belongs to its own base."""
        shapes = tuple(tuple(tensor.shape) for tensor in self.parameters(recurse=False))
        return (type(self), self.scale, shapes) if self.start_A is None else None

    def share(self, owner: Shareable) -> None:
        assert isinstance(owner, type(self))
        for name, tensor in owner.named_parameters(recurse=False):
            setattr(self, name, tensor)

    def components_in_use(self) -> Bool[Tensor, " rank"]:
        return (self.kept | self.nonzero_components()) & self.active.bool()

    def nonzero_components(self) -> Bool[Tensor, " rank"]:
        """Returns flags of the components that are not zero."""
        return self.B.any(0)

    def held(self) -> Bool[Tensor, " rank"]:
        """Returns flags of the components in files: those in use, or one for a rank of 0."""
        flags = self.components_in_use() if isinstance(self, Prunable) else self.kept.clone()
        flags[:1] |= ~flags.any()  # PEFT has no rank 0
        return flags

    @property
    def stored_spec(self) -> ScaledT:
        """Returns the spec of the components in files."""
        return resized(self.spec, self.stored_rank(int(self.held().sum())))

    def stored_rank(self, count: int) -> int:
        """Returns how many components a file has for this many held: for none, one of zeros."""
        return max(1, count)

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the held part of [B, −B₀] and [A; A₀]; after `drop` everything except A is 0."""
        held = self.held()
        rank = self.stored_rank(int(held.sum()))
        left, right = filled(self.B[:, held], self.A[held], rank)
        if self.start_A is not None and self.start_B is not None:
            starts = filled(self.start_B[:, held], self.start_A[held], rank)
            left, right = torch.cat([left, -starts[0]], dim=1), torch.cat([right, starts[1]])
        others = {**super().peft_tensors(), "lora_B.weight": left}
        tensors = {name: tensor * self.active for name, tensor in others.items()} | {"lora_A.weight": right}
        return in_pefts_shapes(self.base, tensors)

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Makes as many components as the file has."""
        if (A := tensors.get("lora_A.weight")) is not None:
            self._resize_to_rows(A)
        return tensors

    def _resize_to_rows(self, A: Tensor) -> None:
        count = len(A) // (1 if self.start_A is None else 2)
        used = int(A[:count].flatten(1).any(1).sum())
        self._resize_to_file(used if self.stored_rank(used) == count else count)  # see `filled`

    def _resize_to_file(self, count: int) -> None:
        # Any other number belongs to another adapter, which is reported later.
        if isinstance(self, Growable) or (isinstance(self, Prunable) and count < self.initial_components):
            self.resize_components(count)

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Splits what `peft_tensors` stacks."""
        left, right = tensors["lora_B.weight"].flatten(1), tensors["lora_A.weight"].flatten(1)
        rank, stored = len(self.A), len(right) // 2
        super().load_peft_tensors({**tensors, "lora_A.weight": right[:rank], "lora_B.weight": left[:, :rank]})
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(right[stored : stored + rank])
            self.start_B.copy_(-left[:, stored : stored + rank])


def resized(spec: ScaledT, rank: int) -> ScaledT:
    """Returns a low-rank spec for another number of components of the same scale: alpha falls with it."""
    if rank == spec.rank:
        return spec
    stored = replace(spec, rank=rank)
    return replace(stored, alpha=spec.alpha * (spec.scale / stored.scale))


def filled(
    left: Float[Tensor, "out k"], right: Float[Tensor, "k in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Returns factors with components of zeros added at the end, up to a rank."""
    missing = rank - len(right)
    return F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))


def in_pefts_shapes(base: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns PEFT's tensors of one LoRA on this base: A and B of a convolution are convolutions there."""
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    if is_convolution(base):
        A, B = A.reshape(-1, *base.weight.shape[1:]), pointwise(base, B)
    return {**tensors, "lora_A.weight": A, "lora_B.weight": B}


# PEFT's config ------------------------------------------------------------------------------------------

STARTS_ON_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""PEFT's `init_lora_weights` that do not change the base: A and B in their files are enough."""

VARIANTS = (
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "layer_replication",
    "trainable_token_indices",
)
"""PEFT's options under which a file's A and B mean another function than LoRA's."""


def write_lora_config(spec: ScaledSpec, factor: int = 1) -> dict[str, Any]:
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


def read_lora_config(config: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """Returns our spec's fields for a PEFT file type LORA, which is the type of three methods.

    Args:
        config: PEFT's fields.
        kind: the method, `lora`, `dora` or `pissa`.

    Returns:
        The fields that the three share; None if the file is of another method.

    Raises:
        IncompatibleError: if the file computes something that A and B do not determine.
    """
    init = config.get("init_lora_weights", True)
    start = "pissa" if str(init).startswith("pissa") else "lora"
    if kind != ("dora" if config.get("use_dora") else start):
        return None
    if init not in STARTS_ON_THE_BASE and (kind, init) != ("pissa", "pissa"):
        why = (
            "started from a random SVD, which PEFT's file does not hold"
            if kind == "pissa"
            else "changed the base model when PEFT made this adapter, and the file does not hold that base"
        )
        raise IncompatibleError(
            f"init_lora_weights: {init!r} {why}. Convert it in PEFT: "
            "save_pretrained(path_initial_model_for_weight_conversion=…)."
        )
    config.get("target_parameters")  # where adapters are placed, which is read with the tensors
    for name in VARIANTS if kind == "lora" else ("target_parameters", *VARIANTS):
        if config.get(name):
            raise IncompatibleError(
                f"{name}: {config[name]!r} of the PEFT config has no counterpart in lora_lab."
            )
    return {
        "rank": config["r"],
        "alpha": float(config["lora_alpha"]),
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": {key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
    }
