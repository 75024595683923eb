"""The shapes in the signatures of linalg hold when the functions run, wide and tall, in both float types."""

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from lora_lab.linalg.norms import squared_row_norms
from lora_lab.linalg.orthogonal import orthonormal_columns, overlap, reflect_chain, unit_columns
from lora_lab.linalg.rank import effective_rank, product_singular_values, stable_rank
from lora_lab.linalg.spectral import (
    cayley_change,
    contrastive_directions,
    neumann_change,
    principal_part,
    skew,
    with_fixed_signs,
)

CALLS = {
    "squared_row_norms": (squared_row_norms, [(5, 7), (5,), (5, 2), (2, 7)]),
    "reflect_chain": (reflect_chain, [(2, 3, 7), (7, 4)]),
    "reflect_chain of one row": (reflect_chain, [(7,), (7, 4)]),
    "unit_columns": (unit_columns, [(7, 4)]),
    "overlap": (overlap, [(7, 4)]),
    "orthonormal_columns": (orthonormal_columns, [(7, 4)]),
    "product_singular_values": (product_singular_values, [(5, 2), (2, 7)]),
    "product_singular_values of rank above both sides": (product_singular_values, [(5, 9), (9, 7)]),
    "effective_rank": (effective_rank, [(4,)]),
    "stable_rank": (stable_rank, [(4,)]),
    "with_fixed_signs": (with_fixed_signs, [(5, 3), (3, 7)]),
    "skew": (skew, [(6,)], 4),
    "skew of blocks": (skew, [(2, 3)], 3),
    "cayley_change": (cayley_change, [(4, 4)]),
    "cayley_change of blocks": (cayley_change, [(2, 3, 3)]),
    "neumann_change": (neumann_change, [(4, 4)], 5),
    "contrastive_directions": (contrastive_directions, [(7,), (7,), (7,)], 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_shapes_are_as_annotated(name, dtype):
    function, shapes, *numbers = CALLS[name]
    tensors = (torch.randn(shape, dtype=dtype).abs() for shape in shapes)
    jaxtyped(typechecker=beartype)(function)(*tensors, *numbers)


@pytest.mark.parametrize("niter", [None, 2])
def test_shapes_of_a_principal_part_are_as_annotated(niter):
    jaxtyped(typechecker=beartype)(principal_part)(torch.randn(5, 7), 3, niter)


def test_a_wrong_shape_would_be_seen():
    with pytest.raises(TypeCheckError):
        jaxtyped(typechecker=beartype)(reflect_chain)(torch.randn(2, 6), torch.randn(7, 4))
