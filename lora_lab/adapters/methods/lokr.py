"""LoKr: a Kronecker product as the update (KronA, Edalati et al. 2022, arXiv:2212.10650; in LyCORIS' form).

    W' = W + s W1 ⊗ W2              s = alpha / rank;  out = l·k and in = p·q, see `factorization`
    y  = base(x) + s W1 X W2ᵀ       X (p, q) is x, and the product (l, k) the update, written as a matrix

    W1   (l, p)            learned: w1, or with decompose_both, if rank < max(l, p) / 2, w1_a w1_b
    W2   (k, q, *kernel)   learned: w2, or where rank < max(k, q) / 2, w2_a w2_b

    w1_a (l, rank), w1_b (rank, p), w2_a (k, rank), w2_b (rank, q · kernel); with use_effective_conv2d
    t2 (rank, rank, *kernel), w2_a (rank, k) and w2_b (rank, q)

At the start w1 or w1_a is zero, so W' = W; with init: lycoris it is w2 or w2_b. All others are drawn from
U(±1/√n), n counting the numbers in a row.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.families.lycoris import (
    FIELDS,
    LycorisAdapter,
    LycorisSpec,
    core_shape,
    factorization,
    product,
    read_lycoris_config,
    recomputed,
    write_lycoris_config,
)
from lora_lab.adapters.maps import LinearMap, is_convolution, mix, pointwise, project, sizes
from lora_lab.adapters.sites import Site
from lora_lab.linalg.rank import product_singular_values


@dataclass
class LoKrSpec(LycorisSpec):
    """LoKr's options; a larger rank and a smaller factor train more parameters."""

    method: str = "lokr"

    decompose_both: bool = False
    """Whether W1 may also be a product of two factors."""

    decompose_factor: int = -1
    """Bound of W1's sides: l is the largest divisor of out up to it and to √out, p that of in; -1 sets only √
    as the bound. If it divides a side, it is used itself, even above √."""

    rank_dropout_scale: bool = False
    """Divide by the share of outputs that rank_dropout keeps."""

    def faults(self) -> list[str]:
        found = super().faults()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            found.append(f"decompose_factor: must be at least 1, or -1; got {self.decompose_factor}")
        return found


class LoKr(LycorisAdapter[LoKrSpec]):
    """The adapter of one linear map."""

    w1: Any
    w1_a: Any
    w1_b: Any
    w2: Any
    w2_a: Any
    w2_b: Any
    t2: Any

    Spec = LoKrSpec
    family = "low-rank"
    paper = "Edalati et al. 2022, arXiv:2212.10650; Yeh et al. 2023, arXiv:2309.14859"
    peft = PeftLayout(
        "LOKR",
        tensors={f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        fields=FIELDS | {name: name for name in ("decompose_both", "decompose_factor", "rank_dropout_scale")},
        config=write_lycoris_config,
        spec=read_lycoris_config,
    )

    def __init__(self, base: LinearMap, spec: LoKrSpec):
        super().__init__(base, spec)
        rank, kernel = spec.rank, base.weight.shape[2:]
        self.spatial = len(kernel)
        self.l, self.k = factorization(self.out_features, spec.decompose_factor)
        self.p, self.q = factorization(base.weight.shape[1], spec.decompose_factor)
        self.w1 = self.w1_a = self.w1_b = self.w2 = self.w2_a = self.w2_b = self.t2 = None
        if spec.decompose_both and rank < max(self.l, self.p) / 2:
            self.w1_a, self.w1_b = self.started(self.l, rank), self.started(rank, self.p)
        else:
            self.w1 = self.started(self.l, self.p)
        if rank >= max(self.k, self.q) / 2:
            self.w2 = self.started(self.k, self.q, *kernel)
        elif self.core is None:
            self.w2_a, self.w2_b = self.started(self.k, rank), self.started(rank, self.q * math.prod(kernel))
        else:
            self.w2_a, self.w2_b = self.started(rank, self.k), self.started(rank, self.q)
            self.t2 = self.started(*self.core)
        self.zeros = {"default": ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), "random": ()}[spec.init]
        for name in self.zeros:
            if getattr(self, name) is not None:
                nn.init.zeros_(getattr(self, name))
        # In PEFT's files these mean W2 ⊗ W1.
        self.swapped = isinstance(base, nn.Conv1d) and self.w2 is not None

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: LoKrSpec) -> int:
        out, columns = sizes(module)
        kernel = math.prod(module.kernel_size) if is_convolution(module) else 1
        rows, k = factorization(out, spec.decompose_factor)
        p, q = factorization(columns // kernel, spec.decompose_factor)
        rank, shape = spec.rank, core_shape(module, spec)
        first = rank * (rows + p) if spec.decompose_both and rank < max(rows, p) / 2 else rows * p
        if rank >= max(k, q) / 2:
            return first + k * q * kernel
        return first + rank * (k + q * kernel if shape is None else k + q) + math.prod(shape or (0,))

    @classmethod
    def build(cls, sites: list[Site], spec: LoKrSpec) -> dict[str, Adapter]:
        """Makes the adapters. Warns once of sides that no divisor splits."""
        adapters = super().build(sites, spec)
        whole = [path for path, adapter in adapters.items() if (adapter.l, adapter.p) == (1, 1)]
        if whole and spec.decompose_factor != 1:
            named = ", ".join(whole[:3]) + (f" and {len(whole) - 3} more" if len(whole) > 3 else "")
            warnings.warn(
                f"adapter.decompose_factor: {spec.decompose_factor} splits no side of {named}: "
                "there W1 is a single number and W2 as large as W. Use lora on such modules.",
                stacklevel=3,
            )
        return adapters

    def W1(self) -> Float[Tensor, "l p"]:
        """Returns s W1."""
        W1: Tensor = self.w1 if self.w1_a is None else self.w1_a @ self.w1_b
        return self.spec.scale * W1

    def W2(self) -> tuple[Float[Tensor, "k rank"] | None, Float[Tensor, "rank columns"]]:
        """Returns the factors of W2 with its kernel in the columns; the left one is None if there is one."""
        return (None, self.w2.flatten(1)) if self.w2_a is None else product(self.w2_a, self.w2_b, self.t2)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        left, right = self.W2()
        W2 = (right if left is None else left @ right).unflatten(1, (self.q, -1))  # (k, q, kernel)
        order = "klqpn" if self.swapped else "lkpqn"
        return torch.einsum(f"lp,kqn->{order}", self.W1(), W2).reshape(self.out_features, self.in_features)

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Returns x ΔWᵀ; W1 ⊗ W2 is never formed."""
        kept = self.kept_outputs(x, self.spec.rank_dropout_scale)
        y = recomputed(self._mapped, x)
        return y if kept is None else y * pointwise(self.base, kept)

    def _mapped(self, x: Tensor) -> Tensor:
        if self.swapped:
            return project(self.base, x, self.delta_weight())
        left, right = self.W2()
        axis = x.ndim - 1 - self.spatial  # of the channels
        groups = x.reshape(-1, self.q, *x.shape[axis + 1 :])
        h = project(self.base, groups, right)  # (tokens · p, rank, *size)
        size = h.shape[2:]
        h = self.W1() @ h.reshape(-1, self.p, math.prod(h.shape[1:]))  # (tokens, l, rank · size)
        h = h.reshape(-1, len(right), *size)
        y = h if left is None else mix(self.base, h, left)
        return y.reshape(*x.shape[:axis], self.out_features, *size)

    def singular_values(self) -> Float[Tensor, " k"]:
        """Returns the singular values of W1 times those of W2."""
        left, right = self.W2()
        second = torch.linalg.svdvals(right) if left is None else product_singular_values(left, right)
        return torch.outer(torch.linalg.svdvals(self.W1()), second).flatten().sort(descending=True).values
