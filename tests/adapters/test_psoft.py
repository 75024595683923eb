"""PSOFT: its formula, PEFT's layer, the gauge of singular vectors, and what is stored of them."""

import math

import peft
import pytest
import torch
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods import psoft
from lora_lab.adapters.methods.psoft import PSOFT, PSOFTSpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.callbacks.saved_tensors import SavedTensors
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, relative, shake

test_contract = contract(
    PSOFT,
    Variant("", {"rank": 4}, trained=4 * 3 // 2 + 2 * 4),
    Variant("pissa", {"rank": 4, "ab_svd_init": "pissa_init", "psoft_mag_b": False}, trained=4 * 3 // 2 + 4),
    Variant("free", {"rank": 4, "psoft_orth": False}, trained=4 * 4 + 2 * 4),
    Variant(
        "neumann",
        {"rank": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 6, "cayley_neumann_eps": 0.1},
    ),
    Variant("niter", {"rank": 4, "niter": 3, "save_basis": False}),
    Variant("random", {"rank": 4, "init": "random"}, start="other"),
)


TOLERANCE = 1e-6
PLAIN = {"psoft_mag_a": False, "psoft_mag_b": False}
MODES = {
    "default": {},
    "without a": {"psoft_mag_a": False},
    "without b": {"psoft_mag_b": False},
    "rotation alone": PLAIN,
    "pissa": {"ab_svd_init": "pissa_init"},
    "free": {"psoft_orth": False},
}
all_modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def adapt(model, **options):
    adapters = inject(model, PSOFTSpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def by_hand(adapter, weight):
    """W' with every matrix formed, from this test's own decomposition's outer products."""
    spec, rank = adapter.spec, adapter.spec.rank
    identity = torch.eye(rank, dtype=weight.dtype)
    R = adapter.q
    if spec.psoft_orth:
        Q = torch.zeros_like(identity)
        entries = iter(adapter.q)
        for i in range(rank):
            for j in range(i + 1, rank):
                value = next(entries)
                Q[i, j], Q[j, i] = value, -value
        R = (identity + Q) @ torch.linalg.inv(identity - Q)
    a, b = (torch.ones(rank, dtype=weight.dtype) if x is None else x for x in (adapter.a, adapter.b))
    change = torch.diag(b) @ R @ torch.diag(a) - identity
    U, Vh, S = adapter.U, adapter.Vh, torch.diag(adapter.S)
    if spec.ab_svd_init == "pissa_init":
        return weight + U @ S.sqrt() @ change @ S.sqrt() @ Vh
    return weight + U @ S @ change @ Vh


@torch.no_grad()
def test_worked_example():
    expected = [[1.8, 2.4, 0.0], [-1.6, 1.2, 0.0], [0.0, 0.0, 1.0]]
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    model[0].weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    adapter, _ = adapt(model, rank=2, **PLAIN)
    adapter.q.fill_(0.5)
    torch.testing.assert_close(adapter.adapted_weight(adapter.base.weight), torch.tensor(expected))
    torch.testing.assert_close(model(torch.eye(3)).T, torch.tensor(expected))


def test_paper_counts_560_numbers_at_rank_32():
    _, adapters = adapt(linear(40, 50), rank=32)
    assert adapters.trainable_count() == 560


@pytest.mark.parametrize("sizes", [(16, 24, 5), (25, 7, 7), (7, 25, 6), (9, 9, 2)])
@all_modes
@torch.no_grad()
def test_output_is_the_formula(mode, sizes):
    rows, columns, rank = sizes
    model, x = linear(rows, columns, dtype=torch.float64), torch.randn(2, 5, columns, dtype=torch.float64)
    adapter, adapters = adapt(model, rank=rank, **mode)
    shake(adapters)
    weight = adapter.base.weight
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(adapter.S, values[:rank])
    part = adapter.U @ torch.diag(adapter.S) @ adapter.Vh
    torch.testing.assert_close(torch.linalg.matrix_norm(weight - part, 2), (*values, values[0] * 0)[rank])
    expected = by_hand(adapter, weight)
    assert relative(adapter.adapted_weight(weight), expected) < 1e-12
    assert relative(model(x), nn.functional.linear(x, expected, adapter.base.bias)) < 1e-12
    assert relative(adapter.singular_values(), torch.linalg.svdvals(expected - weight)[:rank]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@all_modes
def test_start_is_exactly_no_change(mode, dtype):
    model, x = linear(dtype=dtype), torch.randn(5, 24, dtype=dtype)
    before = model(x)
    adapter, adapters = adapt(model, rank=5, **mode)
    assert torch.equal(model(x), before)
    assert not adapter.core().any()
    adapters.merge()
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_rotation_alone_keeps_lengths_and_angles_of_the_rows_as_the_roots_do_not():
    for mode, kept in ((PLAIN, True), ({**PLAIN, "ab_svd_init": "pissa_init"}, False)):
        adapter, adapters = adapt(linear(dtype=torch.float64), rank=5, **mode)
        shake(adapters, by=1.0)
        weight = adapter.base.weight
        adapted = adapter.adapted_weight(weight)
        assert (relative(adapted @ adapted.T, weight @ weight.T) < 1e-12) == kept
        assert relative(adapted, weight) > 0.1


KINDS = ["default", "without a", "without b", "rotation alone", "pissa", "free"]
SHAPES = [(16, 24, 4), (25, 7, 7), (3, 9, 2)]
PEFTS = [
    *((kind, None, *shape) for kind in KINDS for shape in SHAPES),
    *(("default", terms, 25, 7, 7) for terms in range(1, 9)),
    *((kind, 5, 16, 24, 4) for kind in KINDS[1:]),
]
"""Every kind on every shape; the polynomial at every length on one, and with every kind."""


@pytest.mark.parametrize(("mode", "terms", "rows", "columns", "rank"), PEFTS)
def test_is_pefts_layer_with_its_gradients(mode, terms, rows, columns, rank):
    neumann = {} if terms is None else {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms}
    ours, theirs = linear(rows, columns), linear(rows, columns)
    adapter, adapters = adapt(ours, rank=rank, **MODES[mode], **neumann)
    shake(adapters)
    config = peft.PsoftConfig(r=rank, psoft_alpha=7, target_modules=["0"], **MODES[mode], **neumann)
    other = peft.get_peft_model(theirs, config)
    rotation = other.base_model.model[0].psoft_R["default"]
    pairs = {adapter.q: rotation.weight, adapter.a: rotation.vector_a, adapter.b: rotation.vector_b}
    pairs = {own: foreign for own, foreign in pairs.items() if own is not None}
    for own, foreign in pairs.items():
        foreign.data.copy_(own.data)
    x = torch.randn(5, columns, requires_grad=True)
    wanted = other(x)
    assert relative(ours(x), wanted) < TOLERANCE
    probe = torch.randn_like(wanted)
    found = torch.autograd.grad((ours(x) * probe).sum(), [x, *pairs])
    expected = torch.autograd.grad((wanted * probe).sum(), [x, *pairs.values()], allow_unused=True)
    for given, gradient in zip(found, expected, strict=True):
        assert given.any() if gradient is not None else not given.any()
        assert gradient is None or relative(given, gradient) < 2e-5


@torch.no_grad()
def test_rotation_is_orthogonal_in_float32_whatever_autocast_says():
    model = linear(70, 80)
    adapter, adapters = adapt(model, rank=64, **PLAIN)
    shake(adapters)
    with torch.autocast("cpu", torch.bfloat16):
        R = adapter.core() / adapter.S.unsqueeze(1) + torch.eye(64)
    assert R.dtype == torch.float32
    assert (R @ R.T - torch.eye(64)).abs().max() < 1e-5


@torch.no_grad()
def test_flipped_singular_vectors_ask_for_flipped_entries_of_q():
    model, x = linear(), torch.randn(5, 24)
    adapter, adapters = adapt(model, rank=4)
    shake(adapters)
    expected = model(x)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    adapter.U.mul_(signs)
    adapter.Vh.mul_(signs.unsqueeze(1))
    assert relative(model(x), expected) > 1e-2
    rows, columns = torch.triu_indices(4, 4, 1)
    adapter.q.mul_(signs[rows] * signs[columns])
    assert relative(model(x), expected) < TOLERANCE


NAMES = ("q", "a", "b")


@pytest.mark.parametrize(
    "mode",
    [*MODES.values(), {"use_cayley_neumann": True, "cayley_neumann_eps": 0.3}],
    ids=[*MODES, "neumann"],
)
def test_gradients(mode):
    model = linear(6, 8, dtype=torch.float64)
    adapter, adapters = adapt(model, rank=3, **mode)
    shake(adapters, by=0.3)
    names = [f"0.{name}" for name in NAMES if getattr(adapter, name) is not None]
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def output(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *(model.get_parameter(name) for name in names)))


def test_backward_pass_keeps_little_but_the_projected_input():
    model = linear(40, 48)
    _, adapters = adapt(model, rank=4)
    shake(adapters)
    x = torch.randn(1000, 48, requires_grad=True)
    saved = SavedTensors()
    saved.start()
    output = model(x)
    saved.stop()
    assert saved.count([x, *model.parameters(), *model.buffers()]) < 4 * 1000 * 4 + 300
    output.sum().backward()


@pytest.mark.parametrize(
    ("mode", "expected"), [("default", {"a", "b"}), ("without a", {"b"}), ("free", {"q", "a", "b"})]
)
def test_weight_decay_spares_what_is_no_change_away_from_zero(mode, expected):
    adapter, _ = adapt(linear(), rank=4, **MODES[mode])
    own = {id(parameter): name for name, parameter in adapter.named_parameters()}
    assert {own[id(parameter)] for parameter in adapter.decay_exempt()} == expected


# What is stored -----------------------------------------------------------------------------------------


def flipped(weight, rank, niter=None):
    """Another machine's decomposition: some signs differ."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    signs = torch.where(torch.arange(rank) % 2 == 0, -1.0, 1.0)
    return U[:, :rank] * signs, S[:rank], Vh[:rank] * signs.unsqueeze(1)


@pytest.mark.parametrize("save_basis", [True, False])
@all_modes
@torch.no_grad()
def test_folder_means_the_same_where_singular_vectors_have_other_signs(
    mode, save_basis, tmp_path, monkeypatch
):
    model, x = linear(), torch.randn(5, 24)
    _, adapters = adapt(model, rank=4, save_basis=save_basis, **mode)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    monkeypatch.setattr(psoft, "principal_part", flipped)
    fresh = linear()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert relative(fresh(x), model.eval()(x)) < TOLERANCE
    assert next(iter(loaded)).spec.save_basis == save_basis


@torch.no_grad()
def test_folder_without_basis_refuses_another_base_and_leaves_it_alone(tmp_path):
    _, adapters = adapt(linear(), rank=4, save_basis=False)
    save_adapter(adapters, tmp_path / "adapter")
    other = linear(seed=1)
    with pytest.raises(CheckpointError, match="psoft: the folder holds no singular vectors"):
        load_adapter(other, tmp_path / "adapter", any_base=True)
    assert isinstance(other[0], nn.Linear)


def test_folder_without_basis_is_small():
    _, adapters = adapt(linear(), rank=4, save_basis=False)
    assert sum(x.numel() for x in next(iter(adapters)).peft_tensors().values()) == 6 + 2 * 4 + 3 * 4


def test_pefts_options_come_back_as_ours(tmp_path):
    config = {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 4, "random_seed": 9, "psoft_dropout": 0.1}
    theirs = peft.get_peft_model(
        linear(), peft.PsoftConfig(r=3, target_modules=["0"], init_weights=False, **config)
    )
    theirs.save_pretrained(tmp_path)
    model, x = linear(), torch.randn(5, 24)
    spec = load_adapter(model, tmp_path).spec
    assert (spec.niter, spec.random_seed, spec.dropout, spec.init) == (4, 9, 0.1, "random")
    assert relative(model.eval()(x), theirs.eval()(x)) < TOLERANCE


def test_a_bound_that_peft_ignores_is_not_taken_over(tmp_path):
    with pytest.warns(UserWarning, match="cayley_neumann_eps"):
        config = peft.PsoftConfig(r=3, target_modules=["0"], cayley_neumann_eps=0.5)
    peft.get_peft_model(linear(), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="cayley_neumann_eps"):
        peft.PsoftConfig.from_pretrained(tmp_path)
    assert load_adapter(linear(), tmp_path).spec.cayley_neumann_eps is None


# Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"rank": 1, **PLAIN}, "adapter.rank: must be at least 2 without psoft_mag_a and psoft_mag_b"),
        ({"dropout": 1.0}, r"adapter.dropout: must lie in \[0, 1\); got 1.0"),
        ({"ab_svd_init": "svd"}, "adapter.ab_svd_init: must be one of psoft_init, pissa_init; got 'svd'"),
        ({"niter": -1}, "adapter.niter: must be at least 0, or null for an exact SVD; got -1"),
        (
            {"use_cayley_neumann": True, "num_cayley_neumann_terms": 0},
            "adapter.num_cayley_neumann_terms: must be at least 1; got 0",
        ),
        (
            {"use_cayley_neumann": True, "cayley_neumann_eps": 1.0},
            r"adapter.cayley_neumann_eps: must lie in \(0, 1\), or null; got 1.0",
        ),
        ({"cayley_neumann_eps": 0.5}, "adapter.cayley_neumann_eps: needs use_cayley_neumann: true"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), **options)


def test_rank_above_the_map_is_refused():
    with pytest.raises(IncompatibleError, match="a map from 24 to 16 has 16 singular values; got rank 17"):
        adapt(linear(), rank=17)


def test_weight_that_is_not_finite_is_refused():
    model = linear()
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(IncompatibleError, match="psoft: the base's weight has numbers that are not finite"):
        adapt(model, rank=4)
    assert isinstance(model[0], nn.Linear)
