import warnings

import peft
import pytest
import torch
from peft.tuners.boft import layer as pefts_layer

from lora_lab.adapters import inject
from lora_lab.adapters.methods.boft import BOFT, BOFTSpec
from lora_lab.adapters.methods.oft import OFTSpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.linalg import orthogonal
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, relative, shake, train

test_contract = contract(
    BOFT,
    Variant(
        "",
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        trained=2 * 24 * 2 + 16,
        rounded=("checkpointing",),
    ),
    Variant("one factor", trained=24 * 4 + 16),
    Variant("blocks", {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3}),
    Variant("unscaled", {"boft_n_butterfly_factor": 2, "train_scale": False}, trained=2 * 24 * 4),
)


TOLERANCE = 1e-6
SHAPES = [(8, 4, 1), (16, 4, 3), (24, 4, 2), (64, 4, 5), (48, 8, 2), (64, 8, 4), (12, 2, 2), (64, 2, 6)]
SHAPES += [(64, 16, 2), (15, 3, 1), (128, 8, 5)]
"""Inputs, size of a block, factors."""


def options_of(size, factors):
    return {"boft_block_size": size, "boft_n_butterfly_factor": factors}


def one(rows=16, columns=24, dtype=torch.float32, **options):
    model = linear(rows, columns, dtype=dtype)
    adapters = inject(model, BOFTSpec(targets=["0"], **options))
    return model, adapters, model[0]


@pytest.fixture
def emulated(monkeypatch):
    """PEFT with what its CUDA extension computes; without it PEFT would silently train one factor."""

    class Extension:
        """Stands for the compiled module."""

    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(pefts_layer, "_FBD_CUDA", Extension())
    monkeypatch.setattr(pefts_layer.FastBlockDiag, "apply", apply)


def pefts(rows, columns, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(linear(rows, columns), peft.BOFTConfig(target_modules=["0"], **options))


def rotation(adapter):
    """R, by its action on unit rows."""
    return adapter.transform_input(torch.eye(adapter.in_features, dtype=adapter.dtype)).detach()


def test_worked_example():
    model, _, adapter = one(4, 4, **options_of(2, 2))
    adapter.base.weight.data.copy_(torch.eye(4))
    adapter.base.bias.data.zero_()
    adapter.A.data[0, 0] = torch.tensor([[0, 0.5], [-0.5, 0]])
    adapter.A.data[1, 0] = torch.tensor([[0, 1.0], [-1, 0]])
    expected = torch.tensor([[0, 0, -1, 0], [0.8, 0.6, 0, 0], [0.6, -0.8, 0, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(rotation(adapter), expected)
    torch.testing.assert_close(model(torch.tensor([[1.0, 2, 3, 4]])), torch.tensor([[3.4, -1.2, -1, 4]]))


def test_worked_count():
    assert one(32, 64, **options_of(4, 3))[1].trainable_count() == 800


@pytest.mark.parametrize("widest", [1, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_peft(shape, widest, emulated, monkeypatch):
    monkeypatch.setattr(orthogonal, "WIDEST_JOINED", widest)  # stages one by one, and joined
    columns, *rest = shape
    options = options_of(*rest)
    model, adapters, adapter = one(7, columns, **options)
    shake(adapters, 0.3)
    theirs = pefts(7, columns, **options)
    layer = theirs.base_model.model[0]
    layer.boft_R["default"].data.copy_(adapter.A)
    layer.boft_s["default"].data.copy_(adapter.s)
    x = torch.randn(2, 5, columns)
    assert relative(model(x), theirs(x)) < TOLERANCE
    weight = theirs.merge_and_unload()[0].weight
    assert relative(adapter.adapted_weight(adapter.base.weight), weight) < TOLERANCE


@pytest.mark.parametrize("factors", [1, 2])
def test_training_takes_the_same_path_as_pefts(factors, emulated):
    options = options_of(4, factors)
    model, adapters, adapter = one(16, 24, **options)
    theirs, x = pefts(16, 24, **options), torch.randn(9, 24)
    train(model, adapters, x, steps=8)

    class Trained:
        def trainable_parameters(self):
            return [parameter for parameter in theirs.parameters() if parameter.requires_grad]

    train(theirs, Trained(), x, steps=8)
    layer = theirs.base_model.model[0]
    assert adapter.A.abs().max() > 0.1
    torch.testing.assert_close(adapter.A, layer.boft_R["default"], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(adapter.s, layer.boft_s["default"], atol=2e-6, rtol=1e-4)


def test_one_factor_without_scale_is_oft():
    model, adapters, adapter = one(boft_block_size=4, train_scale=False)
    shake(adapters)
    twin = linear()
    inject(twin, OFTSpec(targets=["0"], oft_block_size=4, use_cayley_neumann=False))
    rows, columns = torch.triu_indices(4, 4, 1)
    upper = ((adapter.A - adapter.A.mT) / 2)[0][:, rows, columns]
    twin[0].q.data.copy_(upper)
    x = torch.randn(3, 24)
    torch.testing.assert_close(twin(x), model(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trained_rotation_is_orthogonal_and_keeps_lengths_and_angles(shape):
    columns, *rest = shape
    model, adapters, adapter = one(16, columns, **options_of(*rest))
    train(model, adapters, torch.randn(32, columns), steps=20)
    R, weight = rotation(adapter), adapter.base.weight
    assert (R - torch.eye(columns)).abs().max() > 0.1
    assert torch.linalg.matrix_norm(R @ R.T - torch.eye(columns)) < 1e-5
    turned = adapter.adapted_weight(weight) / adapter.s
    torch.testing.assert_close(turned.norm(dim=1), weight.norm(dim=1), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(turned @ turned.T, weight @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("factors", "full"), [(1, 4), (2, 8), (3, 16), (4, 32)])
def test_every_factor_doubles_what_an_input_reaches(factors, full):
    _, adapters, adapter = one(4, 32, **options_of(4, factors))
    shake(adapters, 0.5)
    assert ((rotation(adapter) != 0).sum(1) == full).all()


@pytest.mark.parametrize("widest", [1, 64])
def test_stages_pair_half_blocks_that_are_further_and_further_apart(widest, monkeypatch):
    monkeypatch.setattr(orthogonal, "WIDEST_JOINED", widest)
    pairs = {
        0: [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
        1: [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
        2: [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]],
    }
    for stage, blocks in pairs.items():
        R = torch.eye(4).repeat(3, 4, 1, 1)
        R[stage] = torch.randn(4, 4, 4)
        dense = orthogonal.butterfly(torch.eye(16), R)
        expected = torch.zeros(16, 16)
        for block, places in zip(R[stage], blocks, strict=True):
            expected[torch.tensor(places)[:, None], torch.tensor(places)] = block
        torch.testing.assert_close(dense, expected)


def test_factors_are_multiplied_in_single_precision_under_autocast():
    R = orthogonal.cayley(orthogonal.skew(torch.randn(3, 8, 6), 4))
    expected = orthogonal._join_stages(R)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonal._join_stages(R), expected)


@pytest.mark.parametrize("factors", [1, 3])
def test_dropout_makes_a_share_of_one_factor_the_identity(factors):
    _, adapters, adapter = one(4, 32, dropout=0.5, **options_of(4, factors))
    shake(adapters)
    adapter.eval()
    candidates, seen = rotation(adapter), set()
    adapter.train()
    with pytest.MonkeyPatch.context() as patch:
        found = []
        patch.setattr("lora_lab.adapters.methods.boft.butterfly", lambda x, R: (found.append(R), x)[1])
        for _ in range(30):
            rotation(adapter)
    identity = torch.eye(4)
    for R in found:
        dropped = (R == identity).flatten(2).all(2)
        assert sorted(dropped.sum(1).tolist()) == [0] * (factors - 1) + [4]
        seen.add(tuple(dropped.flatten().tolist()))
    assert len(seen) > 10
    assert not torch.equal(candidates, torch.eye(32))


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("widest", [1, 64])
def test_gradients(factors, widest, monkeypatch):
    monkeypatch.setattr(orthogonal, "WIDEST_JOINED", widest)
    model, adapters, adapter = one(6, 8, dtype=torch.float64, **options_of(2, factors))
    shake(adapters, 0.3)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def call(A, s, x):
        return torch.func.functional_call(model, {"0.A": A, "0.s": s}, (x,))

    assert torch.autograd.gradcheck(call, (adapter.A, adapter.s, x))


@pytest.mark.parametrize(
    "options", [options_of(4, 1), options_of(4, 3), {"boft_block_size": 0, "boft_block_num": 8}]
)
@pytest.mark.parametrize("scaled", [True, False])
def test_folders_open_both_ways(options, scaled, emulated, tmp_path):
    x = torch.randn(3, 32)
    model, adapters, _ = one(7, 32, train_scale=scaled, **options)
    shake(adapters, 0.2)
    save_adapter(adapters, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(linear(7, 32), tmp_path / "ours")
    assert relative(theirs(x), model(x)) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("theirs", "ours"):
        (tmp_path / folder / "lora_lab.yaml").unlink(missing_ok=True)
        back = linear(7, 32)
        assert load_adapter(back, tmp_path / folder).spec.train_scale
        assert relative(back(x), model(x)) < TOLERANCE


def test_injection_makes_nothing_of_the_size_of_the_inputs_squared():
    _, _, adapter = one(8, 1024, **options_of(8, 2))
    assert sum(tensor.numel() for tensor in adapter.adapter_tensors().values()) == 2 * 1024 * 8 + 8
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        adapter(torch.randn(2, 1024))
    assert max(kept) < 1024**2 / 16


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"boft_block_num": 6}, "boft_block_size: give it or boft_block_num, and 0 for the other"),
        ({"boft_block_size": 0}, "boft_block_size: give it or boft_block_num"),
        ({"boft_block_size": 1}, "boft_block_size: must be at least 2"),
        (options_of(4, 0), "boft_n_butterfly_factor: must be at least 1; got 0"),
        (options_of(3, 2), "boft_block_size: must be even for more than one factor, .* got 3"),
        ({"dropout": -0.1}, r"dropout: must lie in \[0, 1\)"),
    ],
)
def test_faulty_specs_are_refused(options, fault):
    with pytest.raises(ConfigError, match=f"adapter.{fault}"):
        one(**options)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (options_of(5, 1), "boft_block_size: 5 does not divide the 24 inputs of 0. Use 4, the nearest"),
        (options_of(4, 3), r"boft_n_butterfly_factor: 3 needs .* 0 has 6 of 4, which allow at most 2"),
        (options_of(8, 2), r"boft_n_butterfly_factor: 2 needs .* 0 has 3 of 8, which allow at most 1"),
        (
            {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 2},
            r"boft_n_butterfly_factor: 2 needs .* 0 has 8 of 3, which allow at most 1",
        ),
    ],
)
def test_inputs_that_cannot_be_divided_are_refused(options, fault):
    with pytest.raises(IncompatibleError, match=f"adapter.{fault}"):
        one(**options)
