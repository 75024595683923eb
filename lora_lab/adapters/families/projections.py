"""What methods on frozen random projections share: one pair A, B for all maps of a model, scaled per map.

The pair is drawn once, for the largest sizes among the sites; each map uses its first rows and columns. It
follows from `projection_prng_key`, the rank and those sizes, and equals PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import TypeVar

from lora_lab.adapters.base import Adapter, AdditiveAdapter, PeftLayout
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec, least_fault, probability_fault
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.autograd import Context, TensorFunction
from lora_lab.linalg.rank import product_singular_values, widened


@dataclass
class ProjectedSpec(AdapterSpec):
    """Adds the fields that the methods share."""

    rank: int = 32
    """Number of rows of A; at least 1."""

    dropout: float = 0.0
    """Probability of zeroing an input of the adapter's branch while training, in [0, 1)."""

    projection_prng_key: int = 0
    """Seed of A and B, at least 0; the run's own seed does not touch them."""

    save_projection: bool = True
    """Store A and B, once. Without them files are small, but need a torch version that draws the same
    numbers."""

    @property
    def resolved(self) -> Self:
        """This spec, with the value that each null stands for."""
        return self

    @property
    def size_field(self) -> str | None:
        return "rank"

    def faults(self) -> list[str]:
        return [
            *super().faults(),
            *least_fault("rank", self.rank, 1),
            *probability_fault("dropout", self.dropout),
            *least_fault("projection_prng_key", self.projection_prng_key, 0),
        ]


class Projections(nn.Module):
    """The frozen pair that all adapters of a model share.

    Attributes:
        A: the smaller matrix or matrices, in PEFT's shape.
        B: the larger ones, in PEFT's shape.
        sizes: empty, of shape (largest in, largest out, 0). In a checkpoint without A and B it shows whether
            other slices of them were used. None if A and B are stored.
    """

    A: Tensor
    B: Tensor
    sizes: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, columns: int, rows: int, stored: bool):
        super().__init__()
        self.register_buffer("A", A, persistent=stored)
        self.register_buffer("B", B, persistent=stored)
        self.register_buffer("sizes", None if stored else torch.empty(columns, rows, 0))

    def stored(self, method: str) -> dict[str, Tensor]:
        """Returns what files hold, by its name there."""
        found = {"A": self.A, "B": self.B} if self.sizes is None else {"sizes": self.sizes}
        return {f"base_model.{method}_{name}": tensor for name, tensor in found.items()}


ProjectedT = TypeVar("ProjectedT", bound=ProjectedSpec, default=Any)


class ProjectedAdapter(AdditiveAdapter[ProjectedT]):
    """The adapter of one linear map, ΔW = L R with L and R made of the shared pair and learned vectors."""

    family = "low-rank"

    def __init__(self, base: LinearMap, spec: ProjectedT, projections: Projections):
        super().__init__(base)
        self.spec = spec
        self.projections = projections
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()

    @classmethod
    def draw(
        cls, rows: int, columns: int, spec: ProjectedT, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns A and B as PEFT draws them.

        Args:
            rows: the largest number of outputs among the sites.
            columns: the largest number of inputs.
            spec: the method's spec.
            generator: on the CPU, at the start of its stream.
        """
        raise NotImplementedError

    @classmethod
    def build(cls, sites: list[Site], spec: ProjectedT) -> dict[str, Adapter]:
        """Makes the adapters, which share one pair of projections.

        Raises:
            IncompatibleError: if the pair cannot be normalised.
        """
        rows, columns = (
            max(numbers) for numbers in zip(*(sizes(site.module) for site in sites), strict=True)
        )
        dtype = torch.promote_types(cast(LinearMap, sites[0].module).weight.dtype, torch.float32)
        generator = torch.Generator().manual_seed(spec.projection_prng_key)
        A, B = cls.draw(rows, columns, spec, generator)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise IncompatibleError(
                "adapter.projection_prng_key: this key draws projections without any spread for maps so "
                "small; use another key, or a higher rank."
            )
        projections = Projections(A.to(dtype), B.to(dtype), columns, rows, spec.save_projection)
        return {site.path: cls.at(site, spec, projections) for site in sites}

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Returns L and R with ΔW = L R."""
        raise NotImplementedError

    def delta_weight(self) -> Float[Tensor, "out in"]:
        left, right = self.factors()
        return widened(left) @ widened(right)

    def singular_values(self) -> Float[Tensor, " k"]:
        return product_singular_values(*self.factors())

    def loraplus_parameters(self) -> list[nn.Parameter]:
        """Returns all that is learned, which are vectors."""
        return list(self.parameters(recurse=False))

    @classmethod
    def file_names(cls) -> set[str]:
        """Adds RandLoRA's pair, which PEFT writes for every map."""
        return {*cls.peft.tensors, *(f"{cls.Spec().method}_{name}" for name in "AB")}

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out RandLoRA's pair, which PEFT writes again for every map."""
        pair = {f"{self.spec.method}_{name}" for name in "AB"}
        return {name: tensor for name, tensor in tensors.items() if name not in pair}


class ScaledLinear(TensorFunction):
    """x Mᵀ with M = left ⊙ frozen ⊙ right, which is computed again in the backward pass instead of kept."""

    @staticmethod
    def forward(x: Tensor, left: Tensor, frozen: Tensor, right: Tensor) -> Tensor:
        """Returns the product; see `scaled_linear`."""
        return F.linear(x, (left * frozen * right).reshape(-1, x.shape[-1]))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps the inputs alone."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, left and right."""
        (gradient,) = gradients
        x, left, frozen, right = ctx.saved_tensors
        scaled = left * frozen
        M = scaled * right
        # Under autocast the output, and so its gradient, has another type than M.
        grad_x = gradient @ M.reshape(-1, x.shape[-1]).to(gradient) if ctx.needs_input_grad[0] else None
        grad_M = torch.einsum("...o,...i->oi", gradient, x.to(gradient)).reshape(M.shape).to(M)
        grad_left = (grad_M * (frozen * right)).sum_to_size(left.shape)
        return grad_x, grad_left, None, (grad_M * scaled).sum_to_size(right.shape)


def scaled_linear(
    x: Float[Tensor, "... in"], left: Tensor, frozen: Tensor, right: Tensor
) -> Float[Tensor, "... out"]:
    """Applies a frozen tensor scaled by two learned ones; the backward pass keeps only these three and x.

    Args:
        x: the activation; the gradients of `left` and `right` need it.
        left: broadcasts with `frozen`.
        frozen: without a gradient.
        right: broadcasts with `frozen`.

    Returns:
        x Mᵀ with M = left ⊙ frozen ⊙ right, its entries taken in their order as an (out, in) matrix.
    """
    return ScaledLinear.apply(x, left, frozen, right)


def peft_layout(method: str, tensors: Mapping[str, str], fields: Mapping[str, str]) -> PeftLayout:
    """Returns the layout of a method whose type, tensors and fields PEFT prefixes with its name.

    Args:
        method: the method's id.
        tensors: PEFT's tensor name without the method's → attribute of the adapter.
        fields: PEFT's names of the method's own fields → ours.
    """
    shared = {"r": "rank", f"{method}_dropout": "dropout"}
    names = shared | {name: name for name in ("projection_prng_key", "save_projection")} | dict(fields)
    return PeftLayout(
        method.upper(),
        tensors={f"{method}_{name}": attribute for name, attribute in tensors.items()},
        fields=names,
        config=lambda spec: {theirs: getattr(spec.resolved, ours) for theirs, ours in names.items()},
        shared=lambda adapter: adapter.projections.stored(method),
    )
