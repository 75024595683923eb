"""Functions of autograd with the types that torch leaves out."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """What a function keeps for its backward pass, for annotations; subclasses name what it adds itself."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class TensorFunction(torch.autograd.Function):
    """A function of autograd that returns one tensor."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *arguments: object) -> Tensor:
            """Runs `forward`, and notes `backward` for the gradient."""
