"""The shapes in the signatures of linalg hold when the functions run, wide and tall, in both float types."""

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from lora_lab.linalg.norms import product_norm, squared_row_norms
from lora_lab.linalg.orthogonal import (
    butterfly,
    cayley,
    cayley_neumann,
    givens,
    givens_all_pairs,
    givens_tree,
    orthonormal_columns,
    overlap,
    reflect_chain,
    rotate_blocks,
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
    "overlap": (overlap, [(7, 4)]),
    "cayley": (cayley, [(5, 4, 4)]),
    "cayley of one matrix": (cayley, [(4, 4)]),
    "rotate_blocks": (rotate_blocks, [(2, 3, 20), (5, 4, 4)]),
    "butterfly": (butterfly, [(2, 3, 24), (3, 12, 2, 2)]),
    "givens": (givens, [(6,)]),
    "givens_tree": (givens_tree, [(2, 3, 7), (6, 2, 2)]),
    "rotate_blocks of one block": (rotate_blocks, [(20,), (1, 4, 4)]),
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


def test_shapes_of_all_pairs_are_as_annotated():
    jaxtyped(typechecker=beartype)(givens_all_pairs)(4, torch.randn(6, 2, 2))


@pytest.mark.parametrize(
    ("function", "shape", "number"), [(skew, (5, 6), 4), (skew, (6,), 4), (cayley_neumann, (5, 4, 4), 5)]
)
def test_shapes_beside_a_number_are_as_annotated(function, shape, number):
    jaxtyped(typechecker=beartype)(function)(torch.randn(shape), number)


def test_a_wrong_shape_would_be_seen():
    with pytest.raises(TypeCheckError):
        jaxtyped(typechecker=beartype)(reflect_chain)(torch.randn(2, 6), torch.randn(7, 4))
