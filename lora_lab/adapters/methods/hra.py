"""HRA: a chain of Householder reflections before the frozen map (Yuan et al. 2024, arXiv:2405.17484).

    W' = W R,   R = H_1 H_2 … H_rank,   H_i = I − 2 û_i û_iᵀ,   û_i = u_i / ‖u_i‖
    y  = base(R x)

    u         (in, rank)   learned; columns come in equal pairs at the start, whose reflections cancel: W' = W
    start_u   (in, rank)   frozen, only with `apply_GS`

With `apply_GS` the û_i are the Gram-Schmidt vectors Q of u, and the chain is G(u) = I − 2 Q Qᵀ. Orthogonal
reflections cannot cancel, so the start is random and a frozen copy cancels it: R = G(u) G(u₀). That is again
a chain, of 2·rank reflections, and as such opens in PEFT. Without `identity_start`, R = G(u) as in the paper.

R is orthogonal, so the rows of W' keep their lengths and angles; rank(R − I) ≤ rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.base import InputAdapter, PeftLayout
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.kaiming import kaiming_uniform
from lora_lab.linalg.orthogonal import orthonormal_columns, overlap, reflect_chain


@dataclass
class HRASpec(AdapterSpec):
    """HRA's options; the paper uses rank 8 on GLUE and 32 on LLaMA."""

    method: str = "hra"

    removed_fields = {"reg_squared": True}

    rank: int = 8
    """Number of reflections; at least 1, and even if they have to cancel in pairs at the start."""

    identity_start: bool = True
    """Whether W' = W at the start, PEFT's init_weights; if not, all vectors are random, and an odd rank is
    allowed."""

    apply_GS: bool = False  # noqa: N815
    """Orthogonalise the vectors by Gram-Schmidt, as in the paper: the limit of an infinite `reg_lambda`."""

    reg_lambda: float = 0.0
    """Weight of the penalty ‖I − ÛᵀÛ‖² in the loss, at least 0; the paper: 1e-4 for LLaMA, 1e-5 for GLUE."""

    @property
    def size_field(self) -> str | None:
        return "rank"

    def faults(self) -> list[str]:
        found = super().faults()
        if self.rank < 1:
            found.append(f"rank: must be at least 1; got {self.rank}")
        elif self.rank % 2 and self.identity_start and not self.apply_GS:
            found.append(
                f"rank: must be even, so that reflections cancel in pairs at the start; got {self.rank}. "
                "Use an even rank, or identity_start: false"
            )
        if not (math.isfinite(self.reg_lambda) and self.reg_lambda >= 0):
            found.append(f"reg_lambda: must be finite and at least 0; got {self.reg_lambda}")
        elif self.reg_lambda and self.apply_GS:
            found.append("reg_lambda: apply_GS already makes the vectors orthogonal; use one of the two")
        return found


def _write_config(spec: HRASpec) -> dict[str, Any]:
    doubled = spec.apply_GS and spec.identity_start
    return {
        "r": 2 * spec.rank if doubled else spec.rank,
        "apply_GS": spec.apply_GS and not doubled,
        "init_weights": spec.identity_start,
    }


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    gram_schmidt = config.get("apply_GS", False)
    # PEFT has no frozen start, and its chains of odd rank start at random.
    identity = config.get("init_weights", True) and not gram_schmidt and config["r"] % 2 == 0
    return {"rank": config["r"], "apply_GS": gram_schmidt, "identity_start": identity}


class HRA(InputAdapter[HRASpec]):
    """The reflected input of one linear map."""

    Spec = HRASpec
    family = "orthogonal"
    paper = "Yuan et al. 2024, arXiv:2405.17484"
    peft = PeftLayout("HRA", {"hra_u": "u"}, config=_write_config, spec=_read_config)

    start_u: Tensor | None
    spared_from_decay = ("u",)  # only its direction counts

    def __init__(self, base: LinearMap, spec: HRASpec):
        super().__init__(base)
        self.spec = spec
        if spec.apply_GS and spec.rank > self.in_features:
            raise IncompatibleError(
                f"adapter.rank: apply_GS needs rank <= {self.in_features}, the number of inputs here; got "
                f"{spec.rank}. Lower the rank, or leave out apply_GS."
            )
        if spec.identity_start and not spec.apply_GS:
            pairs = kaiming_uniform(self.in_features, spec.rank // 2, dtype=self.dtype)
            u = pairs.repeat_interleave(2, dim=1)  # (in, rank)
        else:
            u = kaiming_uniform(self.in_features, spec.rank, dtype=self.dtype)
        self.u = nn.Parameter(u)
        cancelled = spec.apply_GS and spec.identity_start
        self.register_buffer("start_u", orthonormal_columns(u) if cancelled else None)

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: HRASpec) -> int:
        return sizes(module)[1] * spec.rank

    def chain(self) -> Tensor:
        """Returns the vectors of all reflections (in, rank), or (in, 2·rank) where a start is cancelled."""
        if not self.spec.apply_GS:
            return self.u
        learned = orthonormal_columns(self.u)
        return learned if self.start_u is None else torch.cat([learned, self.start_u], dim=1)

    def transform_input(self, x: Tensor) -> Tensor:
        return reflect_chain(x, self.chain())

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """Returns W R, the reversed chain on the rows of W."""
        return reflect_chain(weight, self.chain().flip(1))

    def penalty(self) -> Tensor | float:
        """Returns the penalty for û_i that are not orthogonal."""
        if not self.spec.reg_lambda:
            return 0.0
        return self.spec.reg_lambda * overlap(self.u).square()

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the vectors, of the doubled chain where a start is cancelled."""
        return {"hra_u": self.u if self.start_u is None else self.chain()}

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the vectors. A doubled chain gives back u orthonormalised, with the same R."""
        self.u.copy_(tensors["hra_u"][:, : self.spec.rank])
        if self.start_u is not None:
            self.start_u.copy_(tensors["hra_u"][:, self.spec.rank :])
