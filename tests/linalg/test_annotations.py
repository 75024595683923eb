"""The shapes in the signatures of linalg hold when the functions run, wide and tall, in both float types."""

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from lora_lab.linalg.fourier import first_of_permutation, fourier_matrix, fourier_product, scatter
from lora_lab.linalg.norms import edited_row_norms, product_norm
from lora_lab.linalg.orthogonal import (
    butterfly,
    cayley,
    cayley_change,
    cayley_neumann,
    givens,
    givens_tree,
    neumann_change,
    orthonormal_columns,
    overlap,
    positive_qr,
    reflect_chain,
    rotate_blocks,
    skew,
    unit_columns,
)
from lora_lab.linalg.pairs import halves, map_pairs, paired, rotate_pairs
from lora_lab.linalg.rank import effective_rank, product_singular_values, stable_rank
from lora_lab.linalg.spectral import (
    contrastive_directions,
    fixed_signs,
    principal_part,
    rectified,
    singular_triplets,
)

CALLS = {
    "edited_row_norms": (edited_row_norms, [(5,), (5, 2), (5, 2), (2, 2)]),
    "edited_row_norms of orthonormal rows": (edited_row_norms, [(5,), (5, 2), (5, 2)]),
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
    "positive_qr": (positive_qr, [(2, 7, 4)]),
    "fixed_signs": (fixed_signs, [(5, 3), (3, 7)]),
    "fixed_signs of stacks": (fixed_signs, [(2, 5, 3), (2, 3, 7)]),
    "product_singular_values": (product_singular_values, [(5, 2), (2, 7)]),
    "product_singular_values of rank above both sides": (product_singular_values, [(5, 9), (9, 7)]),
    "effective_rank": (effective_rank, [(4,)]),
    "stable_rank": (stable_rank, [(4,)]),
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


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_of_mapped_pairs_are_as_annotated(shape, dtype):
    x, pairs, whole = (torch.randn(size, dtype=dtype) for size in (shape, (6,), (12,)))
    checked = [jaxtyped(typechecker=beartype)(f) for f in (map_pairs, rotate_pairs, halves, paired)]
    assert checked[0](x, whole, whole, 4).shape == shape
    assert checked[0](x.mT if x.ndim > 1 else x, whole, whole, 4, max(0, x.ndim - 2)).numel() == x.numel()
    assert checked[1](x, pairs, pairs, 4).shape == shape
    assert checked[2](x, 4, -1)[0].shape == (*shape[:-1], 3, 2)
    assert checked[3](pairs, 4).shape == (12,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_shapes_of_fourier_products_are_as_annotated(shape, dtype):
    first, whole, entries, product = (
        jaxtyped(typechecker=beartype)(f)
        for f in (first_of_permutation, fourier_matrix, scatter, fourier_product)
    )
    flat, c = first(3, 35, 0), torch.randn(3, dtype=dtype)
    indices = torch.stack((flat // 7, flat % 7))
    assert whole(c, indices, 5, 7).shape == (5, 7)
    forward, back = entries(indices, 5, 7, dtype), entries(indices.flip(0), 7, 5, dtype)
    assert product(torch.randn(shape, dtype=dtype), c, forward, back, 5).shape == (*shape[:-1], 5)


@pytest.mark.parametrize("niter", [None, 2])
def test_shapes_of_a_principal_part_are_as_annotated(niter):
    jaxtyped(typechecker=beartype)(principal_part)(torch.randn(5, 7), 3, niter)


@pytest.mark.parametrize("index", [[0], [0, 1, 4]])
def test_shapes_of_singular_triplets_are_as_annotated(index):
    jaxtyped(typechecker=beartype)(singular_triplets)(torch.randn(5, 7), torch.tensor(index))


def test_shapes_of_skew_matrices_are_as_annotated():
    jaxtyped(typechecker=beartype)(skew)(torch.randn(6), 4)


@pytest.mark.parametrize(
    ("function", "shape", "number"), [(skew, (5, 6), 4), (skew, (6,), 4), (cayley_neumann, (5, 4, 4), 5)]
)
def test_shapes_beside_a_number_are_as_annotated(function, shape, number):
    jaxtyped(typechecker=beartype)(function)(torch.randn(shape), number)


def test_a_wrong_shape_would_be_seen():
    with pytest.raises(TypeCheckError):
        jaxtyped(typechecker=beartype)(reflect_chain)(torch.randn(2, 6), torch.randn(7, 4))
