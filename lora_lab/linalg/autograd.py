"""Functions of autograd, with type annotations that torch does not have."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """What a function keeps for its backward pass, for annotations; subclasses add their attributes."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class TensorFunction(torch.autograd.Function):
    """A function of autograd that returns one tensor."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *arguments: object) -> Tensor:
            """Runs `forward`, and registers `backward` for the gradient."""
