"""Updates of linear maps as products of thin factors: exact sums, and best approximations of a rank.

    ΔW = L R       L (out, k), R (k, in)       Δb (out,)

QR of both factors leaves a (k, k) core with the same singular values, so that the best approximation of any
rank (Eckart and Young 1936) needs no decomposition of an (out, in) matrix. The maps of a stack are treated
one by one and get one rank, the largest that one of them needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_lab.linalg.rank import widened


@dataclass(frozen=True)
class Update:
    """What is added to one linear map, or to each of a stack of them."""

    left: Float[Tensor, "*maps out k"]
    """L, in float32 or wider."""

    right: Float[Tensor, "*maps k in"]
    """R."""

    bias: Float[Tensor, " out"] | None = None
    """Δb; None if the bias stays as it is."""

    @classmethod
    def of_matrix(
        cls, delta: Float[Tensor, "*maps out in"], bias: Float[Tensor, " out"] | None = None
    ) -> Update:
        """Returns the factors of a matrix, without singular values that are only rounding."""
        U, S, Vh = torch.linalg.svd(widened(delta), full_matrices=False)
        count = _most(S > S[..., :1] * max(delta.shape[-2:]) * torch.finfo(S.dtype).eps)
        return cls(U[..., :count] * S[..., None, :count], Vh[..., :count, :], bias)

    @classmethod
    def sum(cls, updates: Sequence[Update], weights: Sequence[float]) -> Update:
        """Returns the exact sum of updates of one map, of the sum of their ranks: factors side by side.

        Args:
            updates: at least one, all of the same (out, in).
            weights: the factor of each.
        """
        left = torch.cat([update.left * weight for update, weight in zip(updates, weights, strict=True)], -1)
        shifts = [
            update.bias * weight
            for update, weight in zip(updates, weights, strict=True)
            if update.bias is not None
        ]
        bias = torch.stack(shifts).sum(0) if shifts else None
        return cls(left, torch.cat([update.right for update in updates], -2), bias)

    @property
    def rank(self) -> int:
        """k, which may be larger than the product's rank."""
        return self.left.shape[-1]

    def matrix(self) -> Float[Tensor, "*maps out in"]:
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
            The approximation, and its error ‖ΔW − L R‖_F / ‖ΔW‖_F, of a stack over all of its maps.
        """
        # In double precision: the core's small singular values would be lost in the QR's rounding.
        left_basis, left_core = torch.linalg.qr(self.left.double())
        right_basis, right_core = torch.linalg.qr(self.right.double().mT)
        U, S, Vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
        noise = max(self.left.shape[-2], self.right.shape[-1]) * torch.finfo(self.left.dtype).eps
        count = _most(S > S[..., :1] * noise)
        held = S.square().cumsum(-1)
        if energy < 1 and count:
            count = min(count, _most(held < energy * held[..., -1:]) + 1)
        if rank is not None:
            count = min(count, rank)
        root = S[..., :count].sqrt()
        left = left_basis @ (U[..., :count] * root[..., None, :])
        right = (root[..., None] * Vh[..., :count, :]) @ right_basis.mT
        total = held[..., -1:].sum()
        error = (S[..., count:].square().sum() / total).sqrt() if total else total
        return Update(left.to(self.left.dtype), right.to(self.right.dtype), self.bias), float(error)


def _most(flags: Bool[Tensor, "*maps k"]) -> int:
    """Returns the largest number of flags that one map has."""
    return int(flags.sum(-1).max())
