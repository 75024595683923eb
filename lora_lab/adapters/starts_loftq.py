"""LoftQ's start of LoRA on a quantised base (Li et al. 2023, arXiv:2310.08659).

    U diag(S) Vᵀ = W − dq(Q),   A = diag(√(S_r / |s|)) V_rᵀ,   B = ± U_r diag(√(S_r / |s|)), with s's sign

The paper's first step alone: the codes Q stay as they are, so that A and B say all. dq(Q) + s B A is the best
approximation of W by an update of this rank.
"""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lora_lab.adapters.low_rank import refuse_rank_above
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.rank import widened
from lora_lab.linalg.spectral import principal_part


def loftq(base: Any, rank: int, scale: float) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Returns A and B.

    Args:
        base: a quantised linear map which has kept W, (out, in), as `full_weight`.
        rank: of the update.
        scale: its factor s.

    Raises:
        IncompatibleError: if W was not kept, or the rank is above min(in, out).
    """
    weight = getattr(base, "full_weight", None)
    if weight is None:
        raise IncompatibleError(
            "adapter.init: loftq makes up for what quantisation has taken from W, and this base holds no W "
            "beside its codes. Train with model.quantization: nf4, or build the base with "
            "build_model(config, keep_weights=True); without codes, choose another init."
        )
    refuse_rank_above(rank, base, "init: loftq")
    codes = widened(base.weight)
    U, S, Vh = principal_part(weight.to(codes) - codes, rank)
    root = (S / abs(scale)).sqrt()
    return (root.unsqueeze(1) * Vh).contiguous(), (math.copysign(1, scale) * U * root).contiguous()
