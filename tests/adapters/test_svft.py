"""SVFT: patterns, the formula, what it does to singular values, what is stored, refusals."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.svft import SVFT, SVFTSpec
from lora_lab.adapters.protocols import RankAllocatable
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.linalg.spectral import fixed_signs
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, reached, relative, shake

test_contract = contract(
    SVFT,
    Variant(trained=3 * 16 - 2),
    Variant("plain", {"pattern": "plain", "rank": 5}, trained=5),
    Variant("random", {"pattern": "random", "k": 9}, trained=9),
    Variant("top_k", {"pattern": "top_k", "targets": ["query", "value"]}, linear="is not square"),
    Variant("rank", {"off_diag": 3, "rank": 7}),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
ALL = pytest.mark.parametrize(
    "options",
    [
        {"pattern": "plain"},
        {"pattern": "banded", "off_diag": 2, "rank": 5},
        {"pattern": "random", "k": 7},
        {"pattern": "top_k", "k": 9},
    ],
)


def adapt(model, **options):
    adapters = inject(model, SVFTSpec(targets=["0"], **options))
    return next(iter(adapters)), adapters


def places(svft):
    return list(zip(svft.rows.tolist(), svft.cols.tolist(), strict=True))


@ALL
def test_output_is_the_sum_of_products_of_singular_vectors(options):
    model, x = linear(12, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    svft, adapters = adapt(model, **options)
    shake(adapters, by=1.0)
    weight = sum(
        c * torch.outer(svft.U[:, i], svft.Vh[j])
        for c, (i, j) in zip(svft.c.tolist(), places(svft), strict=True)
    )
    torch.testing.assert_close(svft.delta_weight(), weight)
    torch.testing.assert_close(model(x), svft.base(x) + x @ weight.T)
    assert torch.linalg.matrix_rank(weight) <= svft.rank
    values = torch.linalg.svdvals(weight)[: len(svft.Vh)]
    torch.testing.assert_close(svft.singular_values(), values)


@ALL
def test_gradients_are_those_of_finite_differences(options):
    model = linear(8, 8, dtype=torch.float64)
    svft, adapters = adapt(model, **options)
    shake(adapters, by=1.0)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(own, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *own.values()))


@pytest.mark.parametrize("sizes", [(6, 8), (8, 6)])
def test_wide_and_tall_maps_have_gradients_of_finite_differences(sizes):
    model = linear(*sizes, dtype=torch.float64)
    svft, adapters = adapt(model)
    shake(adapters)
    x = torch.randn(3, sizes[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, c: torch.func.functional_call(model, {"0.c": c}, (x,)), (x, svft.c)
    )


def test_plain_shifts_the_singular_values_and_nothing_else():
    svft, _ = adapt(linear(9, 12, dtype=torch.float64), pattern="plain")
    U, S, Vh = torch.linalg.svd(svft.base.weight, full_matrices=False)
    shift = torch.linspace(0.0, 0.1, 9, dtype=torch.float64).flip(0)
    svft.c.data.copy_(shift)
    adapted = torch.linalg.svd(svft.adapted_weight(svft.base.weight), full_matrices=False)
    torch.testing.assert_close(adapted.S, S + shift)
    torch.testing.assert_close((adapted.U.T @ U).diagonal().abs(), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close((adapted.Vh @ Vh.T).diagonal().abs(), torch.ones(9, dtype=torch.float64))


def test_all_pairs_of_a_square_map_reach_any_weight():
    svft, _ = adapt(linear(7, 7, dtype=torch.float64), pattern="random", k=49)
    assert places(svft) == [(i, j) for i in range(7) for j in range(7)]
    target = torch.randn(7, 7, dtype=torch.float64)
    svft.c.data.copy_((svft.U.T @ (target - svft.base.weight) @ svft.Vh.T).flatten())
    torch.testing.assert_close(svft.adapted_weight(svft.base.weight), target)


def test_twelve_directions_with_two_diagonals_have_54_pairs():
    svft, _ = adapt(linear(12, 15), off_diag=2)
    assert places(svft) == [(i, j) for i in range(12) for j in range(12) if abs(i - j) <= 2]
    assert len(svft.c) == 54


def test_no_diagonals_are_the_plain_pattern():
    band, _ = adapt(linear(), off_diag=0)
    plain, _ = adapt(linear(), pattern="plain", off_diag=5)
    assert places(band) == places(plain) == [(i, i) for i in range(16)]


def test_random_pairs_are_torchs_permutation_without_repeats():
    svft, _ = adapt(linear(), pattern="random")
    generator = torch.Generator().manual_seed(0)
    expected = torch.randperm(256, generator=generator)[:46].sort().values
    assert places(svft) == [(int(flat) // 16, int(flat) % 16) for flat in expected]
    assert len(set(places(svft))) == 46


def test_top_k_takes_the_best_aligned_pairs_whatever_their_signs():
    svft, _ = adapt(linear(12, 12), pattern="top_k", k=20)
    aligned = {(i, j): abs(float(svft.U[:, i] @ svft.Vh[j])) for i in range(12) for j in range(12)}
    assert set(places(svft)) == set(sorted(aligned, key=aligned.get)[-20:])
    assert places(svft) == sorted(places(svft))


def test_signs_are_fixed_by_the_largest_number_of_each_right_vector():
    svft, _ = adapt(linear())
    largest = svft.Vh.gather(1, svft.Vh.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    U, S, Vh = torch.linalg.svd(svft.base.weight, full_matrices=False)
    flips = torch.tensor([1.0, -1.0] * 8)
    for given in (fixed_signs(U, Vh), fixed_signs(U * flips, Vh * flips.unsqueeze(1))):
        assert torch.equal(given[0], svft.U)
        assert torch.equal(given[1], svft.Vh)
    torch.testing.assert_close(svft.U * S @ svft.Vh, svft.base.weight)


@ALL
def test_start_is_bitwise_the_base_and_reached_through_c(options):
    model, x = linear(12, 12), torch.randn(5, 12)
    before = model(x)
    _, adapters = adapt(model, **options)
    assert torch.equal(model(x), before)
    assert reached(model, adapters, x) == {"c"}


def test_pairs_are_components_that_can_be_silenced_and_grow_back():
    svft, adapters = adapt(linear(), pattern="plain")
    shake(adapters)
    assert isinstance(svft, RankAllocatable)
    assert svft.rank_components() == [(svft.c, 0)]
    keep = torch.arange(16) % 4 == 0
    svft.keep_components(keep)
    assert torch.equal(svft.kept_components(), keep)
    assert svft.rank == 4
    assert torch.linalg.matrix_rank(svft.delta_weight()) == 4
    assert not svft.c[~keep].any()


@ALL
def test_folder_and_checkpoint_hold_basis_and_pattern(options, tmp_path):
    model, x = linear(12, 12), torch.randn(5, 12)
    svft, adapters = adapt(model, **options)
    shake(adapters)
    # As another machine might have decomposed W: other signs, so another meaning of c.
    svft.U.mul_(-1)
    svft.U[:, 0] *= -1
    save_adapter(adapters, tmp_path / "adapter")
    names = {
        name.rpartition(".")[2] for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }
    assert names == {"svft_c", "svft_rows", "svft_cols", "svft_U", "svft_Vh"}
    fresh = linear(12, 12)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model(x))
    again = linear(12, 12)
    inject(again, adapters.spec).load_state_dict(adapters.state_dict())
    assert torch.equal(again(x), model(x))


def test_other_patterns_of_as_many_pairs_are_taken_from_the_folder(tmp_path):
    model, x = linear(12, 12), torch.randn(5, 12)
    svft, adapters = adapt(model, pattern="random", k=9)
    shake(adapters)
    svft.rows.copy_(torch.arange(9))
    svft.cols.copy_(torch.arange(9).flip(0))
    svft.tensors_changed()
    save_adapter(adapters, tmp_path / "adapter")
    fresh = linear(12, 12)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model(x))


def test_half_precision_is_decomposed_in_float32():
    model, x = linear(dtype=torch.bfloat16), torch.randn(5, 24).bfloat16()
    svft, adapters = adapt(model)
    shake(adapters)
    assert svft.U.dtype == torch.float32
    expected = svft.base(x).float() + x.float() @ svft.delta_weight().T
    assert relative(model(x).float(), expected) < 2**-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"off_diag": -1}, "adapter.off_diag: must be at least 0; got -1"),
        ({"pattern": "random", "k": 0}, "adapter.k: must be at least 1; got 0"),
        ({"k": 5}, "adapter.k: needs pattern: random or top_k; got pattern: banded"),
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"pattern": "diagonal"}, "adapter.pattern: must be one of plain, banded, random, top_k"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 17}, r"adapter.rank: must be at most min\(in, out\) = 16 here; got 17"),
        ({"off_diag": 16}, "adapter.off_diag: must be below q = 16 here; got 16"),
        ({"off_diag": 4, "rank": 4}, "adapter.off_diag: must be below q = 4 here; got 4"),
        ({"pattern": "random", "k": 17, "rank": 4}, "adapter.k: must be at most q² = 16 here; got 17"),
        ({"pattern": "top_k"}, "top_k needs as many outputs as inputs for u_iᵀ v_j; here 16 and 24"),
    ],
)
def test_options_that_do_not_fit_the_map_are_refused_before_anything_is_placed(options, message):
    model = linear()
    with pytest.raises(IncompatibleError, match=message):
        adapt(model, **options)
    assert type(model[0]) is nn.Linear


def test_weights_that_are_not_finite_are_refused():
    model = linear()
    model[0].weight.data[2, 3] = math.nan
    with pytest.raises(IncompatibleError, match="svft: the base's weight has numbers that are not finite"):
        adapt(model)
