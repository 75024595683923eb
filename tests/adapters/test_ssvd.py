"""SSVD: the worked examples, what a rotation keeps, refusals."""

import pytest
import torch

from lora_lab.adapters import inject
from lora_lab.adapters.methods.ssvd import SSVD, SSVDSpec
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, reached, relative, shake

test_contract = contract(
    SSVD,
    Variant(trained=6 * 7 // 2),
    Variant("first order", {"rotation": "first_order"}, trained=6 * 7 // 2),
    Variant("free", {"rank": 3, "rotation_ratio": None, "rotation": "free"}, trained=3 * 3 + 3),
)


def adapt(model=None, **options):
    model = linear(dtype=torch.float64) if model is None else model
    if "rank" in options:
        options.setdefault("rotation_ratio", None)
    adapters = inject(model, SSVDSpec(targets=["0"], modules_to_save=[], **options))
    return model, adapters, model[0]


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        ("cayley", [[2.4, -3.2, 0], [1.6, 1.2, 0], [0, 0, 1]]),
        ("first_order", [[4.0, -4, 0], [2, 2, 0], [0, 0, 1]]),
    ],
)
def test_worked_examples(rotation, expected):
    model = linear(3, 3, bias=False)
    model[0].weight.data.copy_(torch.diag(torch.tensor([3.0, 2, 1])))
    _, _, adapter = adapt(model, rank=2, rotation=rotation)
    adapter.theta.data.fill_(0.5)
    adapter.dsigma.data.copy_(torch.tensor([1.0, 0]))
    assert relative(adapter.adapted_weight(adapter.base.weight), torch.tensor(expected)) < 1e-6
    x = torch.randn(4, 3)
    assert relative(model(x), x @ torch.tensor(expected).T) < 1e-6


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (9, 9)])
def test_rotation_keeps_outputs_the_other_inputs_and_the_spectrum_but_its_shifts(shape):
    _, adapters, adapter = adapt(linear(*shape, dtype=torch.float64), rank=4)
    shake(adapters)
    adapter.dsigma.data[0] = -2 * adapter.S[0]  # a value below zero comes back as its size
    weight = adapter.base.weight
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    edited = adapter.adapted_weight(weight)
    expected = torch.cat([(adapter.S + adapter.dsigma).abs(), S[4:]]).sort(descending=True).values
    assert relative(torch.linalg.svdvals(edited), expected) < 1e-12
    assert relative(U @ (U.T @ edited), edited) < 1e-12
    assert relative(edited @ Vh[4:].T, weight @ Vh[4:].T) < 1e-12
    left = edited.T @ adapter.U / (adapter.S + adapter.dsigma)  # V_k Gᵀ
    assert relative(left.T @ left, torch.eye(4, dtype=torch.float64)) < 1e-12
    assert relative(left, adapter.Vh.T) > 1e-2


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
@pytest.mark.parametrize("rotation", ["cayley", "first_order", "free"])
def test_output_is_the_papers_formula(shape, rotation):
    """U (Σ + ΔΣ) Ĝ Vᵀ, with the whole decomposition and Ĝ the identity beyond the rank."""
    model = linear(*shape, dtype=torch.float64)
    _, adapters, adapter = adapt(model, rank=5, rotation=rotation)
    shake(adapters)
    U, S, Vh = torch.linalg.svd(adapter.base.weight, full_matrices=False)
    sign = (U[:, :5] * adapter.U).sum(0).sign()
    U[:, :5] *= sign
    Vh[:5] *= sign.unsqueeze(1)
    identity = torch.eye(5, dtype=torch.float64)
    if rotation == "free":
        G = adapter.G
    else:
        K = torch.zeros(5, 5, dtype=torch.float64)
        K[tuple(torch.triu_indices(5, 5, 1))] = adapter.theta.detach()
        K = K - K.T
        G = (identity - K) @ torch.linalg.inv(identity + K) if rotation == "cayley" else identity - 2 * K
    S[:5] += adapter.dsigma.detach()
    G = torch.block_diag(G, torch.eye(len(S) - 5, dtype=torch.float64))
    x = torch.randn(2, 5, shape[1], dtype=torch.float64)
    assert relative(model(x), x @ (U @ S.diag() @ G @ Vh).T + adapter.base.bias) < 1e-12


@pytest.mark.parametrize("rotation", ["cayley", "first_order", "free"])
def test_starts_bitwise_as_the_base_and_learns_all(rotation):
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    _, adapters, _ = adapt(model, rotation=rotation)
    assert torch.equal(model(x), before)
    assert reached(model, adapters, x) == {"G" if rotation == "free" else "theta", "dsigma"}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"rank": 1}, 1),
        ({"rank": 16}, 136),
        ({"rotation_ratio": 0.4}, 21),
        ({"rotation_ratio": 1.0}, 136),
        ({"rank": 6, "rotation": "free"}, 42),
    ],
)
def test_count_of_trained_numbers_is_the_formulas(options, count):
    model, adapters, adapter = adapt(**options)
    assert adapters.trainable_count() == count
    assert adapter.rank == len(adapter.S)
    shake(adapters)
    x = torch.randn(3, 24, dtype=torch.float64)
    model(x).sum().backward()
    assert relative(model(x), x @ adapter.adapted_weight(adapter.base.weight).T + adapter.base.bias) < 1e-12


@pytest.mark.parametrize("rotation", ["cayley", "first_order", "free"])
def test_gradients(rotation):
    _, adapters, adapter = adapt(linear(6, 8, dtype=torch.float64), rank=3, rotation=rotation)
    shake(adapters)
    x = torch.randn(3, 8, dtype=torch.float64)
    names = [name for name, p in adapter.named_parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,)),
        tuple(getattr(adapter, name) for name in names),
    )


def test_a_step_keeps_nothing_of_the_weights_size():
    """Bytes for the backward pass: the k numbers a token has between the vectors, and small cores."""
    model = linear(300, 400)
    _, adapters, adapter = adapt(model, rank=10)
    base = {t.data_ptr() for t in (adapter.base.weight, adapter.U, adapter.Vh)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(7, 400, requires_grad=True))  # as behind other adapted maps
    assert max(t.numel() for t in kept if t.data_ptr() not in base) <= 100


def test_weight_decay_spares_a_free_mixture():
    adapter = adapt(rotation="free")[2]
    assert [id(p) for p in adapter.decay_exempt()] == [id(adapter.G)]
    assert adapt()[2].decay_exempt() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "rotation_ratio": 0.4}, "rank, rotation_ratio: exactly one must be given.*got 4, 0.4"),
        ({"rotation_ratio": None}, "rank, rotation_ratio: exactly one must be given.*got None, None"),
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"rotation_ratio": 1.5}, r"adapter.rotation_ratio: must lie in \(0, 1\]; got 1.5"),
        ({"rotation_ratio": 0.0}, r"adapter.rotation_ratio: must lie in \(0, 1\]; got 0.0"),
        ({"rotation": "givens"}, "adapter.rotation: must be one of cayley, first_order, free; got 'givens'"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 17}, "a map from 24 to 16 has 16 singular values; got rank 17"),
        ({"rotation_ratio": 0.05}, "0.05 of 16 singular values is less than one. Give at least 1 / 16"),
    ],
)
def test_ranks_that_the_map_has_no_room_for_are_refused(options, message):
    with pytest.raises(IncompatibleError, match=message):
        adapt(**options)
