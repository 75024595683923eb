"""What methods share that train a magnitude for each output: W' = diag(g) V with g = m / ‖V‖.

    V = W + L R     L (out, rank) and R (rank, in), made by the method
    m   (out,)      learned; ‖W‖ at the start

‖V‖ holds the norms of V's rows. The bias is never scaled.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import LinearAdapter, SpecT
from lora_lab.adapters.maps import mix, pointwise, project
from lora_lab.linalg.norms import SMALLEST_NORM


def gains(m: Float[Tensor, " k"], norm: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Returns g = m / ‖V‖, and 1 where a row of V is zero.

    There g means nothing, but a huge g would multiply the rounding errors of a sum that should be zero, and m
    would be trained on them.
    """
    return (m / norm).where(norm > SMALLEST_NORM, 1.0)


class MagnitudeAdapter(LinearAdapter[SpecT]):
    """Edits the directions of a weight's rows, and possibly their lengths."""

    dropout: nn.Dropout

    def scaled(
        self,
        x: Float[Tensor, "... in"],
        gain: Float[Tensor, " out"],
        left: Float[Tensor, "out rank"],
        right: Float[Tensor, "rank in"],
    ) -> Float[Tensor, "... out"]:
        """Returns W x + b + (g − 1) ⊙ W x̃ + g ⊙ L R x̃, which is g ⊙ V x + b without dropout.

        Dropout, x̃, acts on everything but the base's own product.

        Args:
            x: the module's input.
            gain: g.
            left: L.
            right: R.
        """
        y, dropped = self.base(x), self.dropout(x)
        hidden = project(self.base, self.cast(dropped), right)
        product = self.base(dropped) if self.training and self.dropout.p else y
        # The base's output includes its bias, which −(g − 1) b removes from the product again.
        bias = None if self.base.bias is None else (1 - gain) * self.base.bias
        # The (out, rank) factor is multiplied by g: a pass over the (..., out) output costs far more.
        update = mix(self.base, hidden, gain.unsqueeze(1) * left, bias)
        return (y + pointwise(self.base, gain - 1) * product + update).to(y.dtype)
