"""Updates of linear maps as products of thin factors: exact sums, and best approximations of a rank.

    ΔW = L R       L (out, k), R (k, in)       Δb (out,)

QR of both factors leaves a (k, k) core with the same singular values, so that the best approximation of any
rank (Eckart and Young 1936) needs no decomposition of an (out, in) matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.linalg.rank import widened


@dataclass(frozen=True)
class Update:
    """What is added to one linear map."""

    left: Float[Tensor, "out k"]
    """L, in float32 or wider."""

    right: Float[Tensor, "k in"]
    """R."""

    bias: Float[Tensor, " out"] | None = None
    """Δb; None if the bias stays as it is."""

    @classmethod
    def of_matrix(cls, delta: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None) -> Update:
        """Returns the factors of a matrix, without singular values that are only rounding."""
        U, S, Vh = torch.linalg.svd(widened(delta), full_matrices=False)
        kept = S > S.max() * max(delta.shape) * torch.finfo(S.dtype).eps if S.numel() else S > 0
        return cls(U[:, kept] * S[kept], Vh[kept], bias)

    @classmethod
    def sum(cls, updates: Sequence[Update], weights: Sequence[float]) -> Update:
        """Returns the exact sum of updates of one map, of the sum of their ranks: factors side by side.

        Args:
            updates: at least one, all of the same (out, in).
            weights: the factor of each.
        """
        left = torch.cat([update.left * weight for update, weight in zip(updates, weights, strict=True)], 1)
        shifts = [
            update.bias * weight
            for update, weight in zip(updates, weights, strict=True)
            if update.bias is not None
        ]
        bias = torch.stack(shifts).sum(0) if shifts else None
        return cls(left, torch.cat([update.right for update in updates]), bias)

    @property
    def rank(self) -> int:
        """k, which may be larger than the product's rank."""
        return self.left.shape[1]

    def matrix(self) -> Float[Tensor, "out in"]:
        """Returns ΔW."""
        return self.left @ self.right

    @torch.no_grad()
    def truncated(self, rank: int | None = None, energy: float = 1.0) -> tuple[Update, float]:
        """Returns the best approximation of at most this rank, its singular values shared by both factors.

        Args:
            rank: the largest number of components; None sets no limit.
            energy: the share of ‖ΔW‖²_F that the smallest sufficient number of components must hold, in
                (0, 1]; 1 leaves out nothing but rounding.

        Returns:
            The approximation, and its error ‖ΔW − L R‖_F / ‖ΔW‖_F.
        """
        # In double precision: the core's small singular values would be lost in the QR's rounding.
        left_basis, left_core = torch.linalg.qr(self.left.double())
        right_basis, right_core = torch.linalg.qr(self.right.double().T)
        U, S, Vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
        noise = max(len(self.left), self.right.shape[1]) * torch.finfo(self.left.dtype).eps
        count = int((S > S[:1] * noise).sum())
        held = S.square().cumsum(0)
        total = held[-1:].sum()
        if energy < 1 and count:
            count = min(count, int((held < energy * total).sum()) + 1)
        if rank is not None:
            count = min(count, rank)
        root = S[:count].sqrt()
        left = left_basis @ (U[:, :count] * root)
        right = (root.unsqueeze(1) * Vh[:count]) @ right_basis.T
        error = (S[count:].square().sum() / total).sqrt() if total else total
        return Update(left.to(self.left.dtype), right.to(self.right.dtype), self.bias), float(error)
