"""PiSSA: LoRA on the principal part of a weight (Meng et al. 2024, arXiv:2404.02948).

    W  = U diag(S) Vᵀ,   A₀ = diag(√(S_r / s)) V_rᵀ,   B₀ = U_r diag(√(S_r / s))       s as in LoRA
    W' = W + s (B A − B₀ A₀)

    A    (rank, in)   learned; A₀ at the start
    B    (out, rank)  learned; B₀ at the start, so W' = W
    A₀, B₀            frozen copies

`mode: subtract` is LoRA with init: pissa. `mode: residual` computes W' as the paper does: W_res + s B A with
W_res = W − s B₀ A₀ (out, in), frozen, of W's own type. W is kept too, so that the adapter can be removed.

PEFT's file holds only A and B, and PEFT decomposes W again; ours opens there as a LoRA of rank 2·rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lora_lab.adapters.base import PeftLayout
from lora_lab.adapters.families.low_rank import LowRankAdapter, read_lora_config, write_lora_config
from lora_lab.adapters.families.starts import StartedSpec, start
from lora_lab.adapters.maps import LinearMap, matrix, mix, project
from lora_lab.adapters.protocols import RankAllocatable, Truncatable
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.rank import widened


@dataclass
class PiSSASpec(StartedSpec):
    """PiSSA's options; the paper uses alpha = rank, no dropout and all linear maps."""

    method: str = "pissa"

    init: Literal["pissa"] = "pissa"
    """Always the SVD of W, as in the paper."""

    mode: Literal["subtract", "residual"] = "subtract"
    """`subtract` does not change the base and costs a second product of this rank; `residual`, the paper's
    form, costs the memory of W again, and rounds at the start in half precision."""

    def faults(self) -> list[str]:
        found = super().faults()
        if self.mode == "residual" and self.dropout:
            found.append(
                "dropout: must be 0 for mode: residual, in which it would also drop the principal part of W; "
                f"got {self.dropout}. Use mode: subtract"
            )
        return found


class PiSSA(LowRankAdapter[PiSSASpec], RankAllocatable, Truncatable):
    """The adapter of one linear map."""

    start_A: Tensor
    start_B: Tensor
    residual: Tensor | None

    Spec = PiSSASpec
    paper = "Meng et al. 2024, arXiv:2404.02948"
    peft = PeftLayout(
        "LORA",
        tensors={"lora_A.weight": "A", "lora_B.weight": "B"},
        config=lambda spec: write_lora_config(spec, 2),
        spec=lambda config: read_lora_config(config, "pissa"),
    )

    def __init__(self, base: LinearMap, spec: PiSSASpec):
        if spec.mode == "residual" and not isinstance(base.weight, nn.Parameter):
            raise IncompatibleError(
                "adapter.mode: residual holds W − s·B·A as a dense weight, which would undo the base's "
                "quantisation. Use mode: subtract."
            )
        super().__init__(base, spec, start(base, spec), subtract=True)
        self.register_buffer("residual", None, persistent=False)  # follows from W, A₀ and B₀
        self.tensors_changed()

    @torch.no_grad()
    def tensors_changed(self) -> None:
        """Computes W_res, which follows the frozen start and gets back what is silenced."""
        super().tensors_changed()
        if self.spec.mode == "residual":
            start = self.scale * self.active * (self.start_B @ self.start_A)
            self.residual = (widened(matrix(self.base)) - start).to(self.base.weight.dtype)

    @torch.no_grad()
    def keep_components(self, keep: Bool[Tensor, " rank"]) -> None:
        """Controllers silence the same components after every step, which leaves W_res be."""
        changes = self.residual is not None and not torch.equal(keep, self.kept)
        super().keep_components(keep)
        if changes:
            self.tensors_changed()

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.residual is None:
            return super().forward(x)
        y = project(self.base, x, self.residual.to(x.dtype), self.base.bias)
        hidden = project(self.base, self.cast(x), self.A) * (self.scale * self.active)
        return (y + mix(self.base, hidden, self.B)).to(y.dtype)

    def stored_rank(self, count: int) -> int:
        """Adds one where A and A₀ have as many rows as PEFT's A."""
        rank = super().stored_rank(count)
        return rank + (2 * rank == self.spec.rank)

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the start, which follows from W: PEFT's file has only A and B."""
        A, B = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
        if A is None or B is None or A.shape != self.A.shape or B.shape != self.B.shape:
            return super().complete_peft_tensors(tensors)
        left, right = torch.cat([B, -self.start_B.to(B)], dim=1), torch.cat([A, self.start_A.to(A)])
        return {**tensors, "lora_A.weight": right, "lora_B.weight": left}
