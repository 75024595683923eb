"""The shapes in the signatures of linalg hold when the functions run, wide and tall, in both float types."""

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from lora_lab.linalg.norms import product_norm, squared_row_norms
from lora_lab.linalg.orthogonal import (
    cayley,
    orthonormal_columns,
    overlap,
    reflect_chain,
    skew,
    unit_columns,
)
from lora_lab.linalg.rank import effective_rank, product_singular_values, stable_rank
from lora_lab.linalg.spectral import edited_row_norms, principal_part, rectified, singular_triplets

CALLS = {
    "squared_row_norms": (squared_row_norms, [(5, 7), (5,), (5, 2), (2, 7)]),
    "edited_row_norms": (edited_row_norms, [(5,), (5, 2), (5, 2)]),
    "product_norm": (product_norm, [(5, 2), (2, 7)]),
    "rectified": (rectified, [(5, 7), (5, 7)]),
    "reflect_chain": (reflect_chain, [(2, 3, 7), (7, 4)]),
    "reflect_chain of one row": (reflect_chain, [(7,), (7, 4)]),
    "unit_columns": (unit_columns, [(7, 4)]),
    "cayley": (cayley, [(4, 4)]),
    "overlap": (overlap, [(7, 4)]),
    "orthonormal_columns": (orthonormal_columns, [(7, 4)]),
    "product_singular_values": (product_singular_values, [(5, 2), (2, 7)]),
    "product_singular_values of rank above both sides": (product_singular_values, [(5, 9), (9, 7)]),
    "effective_rank": (effective_rank, [(4,)]),
    "stable_rank": (stable_rank, [(4,)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_shapes_are_as_annotated(name, dtype):
    function, shapes = CALLS[name]
    jaxtyped(typechecker=beartype)(function)(*(torch.randn(shape, dtype=dtype).abs() for shape in shapes))


@pytest.mark.parametrize("niter", [None, 2])
def test_shapes_of_a_principal_part_are_as_annotated(niter):
    jaxtyped(typechecker=beartype)(principal_part)(torch.randn(5, 7), 3, niter)


@pytest.mark.parametrize("index", [[0], [0, 1, 4]])
def test_shapes_of_singular_triplets_are_as_annotated(index):
    jaxtyped(typechecker=beartype)(singular_triplets)(torch.randn(5, 7), torch.tensor(index))


def test_shapes_of_skew_matrices_are_as_annotated():
    jaxtyped(typechecker=beartype)(skew)(torch.randn(6), 4)


def test_a_wrong_shape_would_be_seen():
    with pytest.raises(TypeCheckError):
        jaxtyped(typechecker=beartype)(reflect_chain)(torch.randn(2, 6), torch.randn(7, 4))
