import json
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lab.adapters import inject
from lora_lab.adapters.methods.oft import OFT, OFTSpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.callbacks.saved_tensors import SavedTensors
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, relative, shake, train

test_contract = contract(
    OFT,
    Variant("", {"oft_block_size": 4}, trained=24 * 3 // 2, rounded=("checkpointing",)),
    Variant("exact", {"oft_block_size": 4, "use_cayley_neumann": False}),
    Variant("terms", {"oft_block_size": 4, "num_cayley_neumann_terms": 6}),
    Variant("shared", {"oft_block_size": 8, "block_share": True}, trained=8 * 7 // 2, dropout=False),
    Variant("adjusted", {"oft_block_size": 5, "auto_adjust": True}, trained=24 * 3 // 2),
    Variant("coft", {"oft_block_size": 4, "coft": True, "eps": 0.3}),
)


TOLERANCE = 1e-6
EXACT = {"use_cayley_neumann": False}
OPTIONS = [
    EXACT,
    *({"num_cayley_neumann_terms": terms} for terms in range(2, 9)),
    {"block_share": True},
    {"block_share": True} | EXACT,
    {"coft": True, "eps": 0.1},
    {"coft": True, "eps": 0.1} | EXACT,
    {"r": 5, "oft_block_size": 0},
]


def one(rows=16, columns=24, dtype=torch.float32, **options):
    model = linear(rows, columns, dtype=dtype)
    adapters = inject(model, OFTSpec(targets=["0"], **{"oft_block_size": 4, **options}))
    return model, adapters, model[0]


def pefts(rows, columns, **options):
    config = peft.OFTConfig(target_modules=["0"], **{"oft_block_size": 4, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(linear(rows, columns), config)


def rotation(adapter):
    """R, by its action on unit rows."""
    return adapter.transform_input(torch.eye(adapter.in_features, dtype=adapter.dtype)).detach()


WEIGHT = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [-1, 0, 1, 2]])
FIRST = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
SECOND = torch.tensor([[0.882353, 0.470588], [-0.470588, 0.882353]])


@pytest.mark.parametrize(
    ("options", "first", "second", "y"),
    [
        (EXACT, FIRST, SECOND, [25.058824, 58.282353, 8.447059]),
        ({}, torch.tensor([[0.5625, 0.75], [-0.75, 0.5625]]), None, [24.785156, 55.019531, 9.667969]),
    ],
)
def test_worked_example(options, first, second, y):
    model, _, adapter = one(3, 4, oft_block_size=2, **options)
    adapter.base.weight.data.copy_(WEIGHT)
    adapter.base.bias.data.zero_()
    adapter.q.data.copy_(torch.tensor([[0.5], [-0.25]]))
    R = rotation(adapter)
    torch.testing.assert_close(R[:2, :2], first, atol=1e-6, rtol=0)
    assert not R[:2, 2:].any()
    if second is not None:
        torch.testing.assert_close(R[2:, 2:], second, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(torch.tensor([[1.0, 2, 3, 4]])), torch.tensor([y]))


def test_worked_count():
    assert one(16, 64, oft_block_size=8)[1].trainable_count() == 224


@pytest.mark.filterwarnings("ignore:oft. a block")
@pytest.mark.parametrize("sizes", [(16, 20, 4), (7, 60, 6), (33, 15, 3), (5, 10, 10)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_peft(options, sizes):
    rows, columns, size = sizes
    options = {"oft_block_size": size, **options}
    model, adapters, adapter = one(rows, columns, **options)
    shake(adapters, 0.2)
    theirs = pefts(rows, columns, **options)
    theirs.base_model.model[0].oft_R["default"].weight.data.copy_(adapter.q)
    x = torch.randn(2, 5, columns)
    assert relative(model(x), theirs(x)) < TOLERANCE
    weight = theirs.merge_and_unload()[0].weight
    assert relative(adapter.adapted_weight(adapter.base.weight), weight) < TOLERANCE


@pytest.mark.parametrize("options", [{}, EXACT, {"block_share": True}, {"coft": True, "eps": 0.05}], ids=str)
def test_training_takes_the_same_path_as_pefts(options):
    model, adapters, adapter = one(16, 24, **options)
    theirs = pefts(16, 24, **options)
    x = torch.randn(9, 24)
    train(model, adapters, x, steps=8)
    train(theirs, type("Set", (), {"trainable_parameters": lambda _: peft_parameters(theirs)})(), x, steps=8)
    assert adapter.q.abs().max() > 1e-3
    found = theirs.base_model.model[0].oft_R["default"].weight
    torch.testing.assert_close(adapter.q, found, atol=2e-6, rtol=1e-4)


def peft_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_coft_holds_every_block_within_its_bound():
    model, adapters, adapter = one(coft=True, eps=0.05)
    x, bound = torch.randn(9, 24), 0.05 / 6**0.5
    train(model, adapters, x, steps=5)
    model.train()(x)
    norms = torch.linalg.matrix_norm(adapter.blocks_of_Q())
    torch.testing.assert_close(norms, torch.full((6,), bound))
    assert 2**0.5 * adapter.q.norm(dim=1).max() < bound * 1.001  # what is trained, not only what is used
    before = adapter.q.clone()
    model(x)
    assert torch.equal(adapter.q, before)


def test_coft_leaves_what_is_trained_alone_in_evaluation():
    model, adapters, adapter = one(coft=True, eps=0.05)
    shake(adapters)
    before = adapter.q.clone()
    model.eval()(torch.randn(3, 24))
    adapter.adapted_weight(adapter.base.weight)
    assert torch.equal(adapter.q, before)


@pytest.mark.parametrize("options", [EXACT, EXACT | {"block_share": True}], ids=str)
def test_trained_rotation_is_orthogonal_and_keeps_lengths_and_angles(options):
    model, adapters, adapter = one(**options)
    train(model, adapters, torch.randn(32, 24), steps=20)
    R, weight = rotation(adapter), adapter.base.weight
    assert (R - torch.eye(24)).abs().max() > 0.1
    assert torch.linalg.matrix_norm(R @ R.T - torch.eye(24)) < 1e-5
    assert torch.linalg.det(R).item() == pytest.approx(1, abs=1e-5)
    adapted = adapter.adapted_weight(weight)
    torch.testing.assert_close(adapted.norm(dim=1), weight.norm(dim=1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(adapted @ adapted.T, weight @ weight.T, atol=1e-5, rtol=1e-5)


def test_the_two_forms_turn_in_opposite_directions():
    polynomial, adapters, adapter = one(num_cayley_neumann_terms=8)
    shake(adapters)
    _, _, exact = one(**EXACT)
    exact.q.data.copy_(adapter.q)
    torch.testing.assert_close(rotation(exact).T, rotation(adapter), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dropout", [0.2, 0.5, 0.99])
def test_dropout_makes_a_share_of_the_blocks_the_identity(dropout):
    _, adapters, adapter = one(dropout=dropout)
    shake(adapters)
    R = rotation(adapter.eval())
    adapter.train()
    seen = set()
    for _ in range(20):
        found = blocks(rotation(adapter))
        kept = tuple(torch.equal(now, full) for now, full in zip(found, blocks(R), strict=True))
        assert sum(kept) == 6 - int(dropout * 6)
        assert sum(torch.equal(now, torch.eye(4)) for now in found) == int(dropout * 6)
        seen.add(kept)
    assert len(seen) > 3


def blocks(R):
    return R.unflatten(0, (6, 4)).unflatten(2, (6, 4)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


@pytest.mark.parametrize(
    "options", [EXACT, {}, {"num_cayley_neumann_terms": 8}, {"block_share": True}], ids=str
)
def test_gradients(options):
    model, adapters, adapter = one(6, 8, dtype=torch.float64, **options)
    shake(adapters, 0.3)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, x: torch.func.functional_call(model, {"0.q": q}, (x,)), (adapter.q, x)
    )


def behind(part, dtype=torch.float32):
    """A frozen model, the input of whose adapter can be made again."""
    model = nn.Sequential(part, nn.Linear(48, 32)).requires_grad_(False).to(dtype)
    adapters = inject(model, OFTSpec(targets=["1"], oft_block_size=16))
    shake(adapters, 0.2)
    return model, adapters


@pytest.mark.parametrize("part", [nn.LayerNorm(48), nn.GELU()])
def test_backward_pass_keeps_nothing_beyond_the_rotation_that_the_frozen_model_does_not(part):
    model, adapters = behind(part)
    h = torch.randn(5, 300, 48, requires_grad=True)
    counts = []
    for run in (nn.Sequential(model[0], model[1].base), model):
        saved = SavedTensors()
        saved.start()
        y = run(h)
        saved.stop()
        counts.append(saved.count([*model.parameters()]))
        del y
    assert counts[1] - counts[0] == 2 * 4 * 3 * 16 * 16 + 8 * 120  # Q, R, and where q's numbers stand in Q


@pytest.mark.parametrize("part", [nn.LayerNorm(48), nn.GELU()])
def test_gradients_are_those_of_the_adapted_weight_whether_or_not_the_input_is_made_again(part):
    model, _ = behind(part, torch.float64)
    adapter = model[1]
    h = torch.randn(20, 300, 48, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(20, 300, 32, dtype=torch.float64)

    def plain(h):
        return nn.functional.linear(part(h), adapter.adapted_weight(adapter.base.weight), adapter.base.bias)

    def repeated(h):
        return checkpoint(model, h, use_reentrant=False)

    def after(h):
        return adapter(checkpoint(part, h, use_reentrant=False))

    expected = torch.autograd.grad(plain(h), (h, adapter.q), direction)
    for run in (model, repeated, after):
        torch.testing.assert_close(torch.autograd.grad(run(h), (h, adapter.q), direction), expected)


@pytest.mark.parametrize(("wanted", "found"), [(32, 30), (7, 6), (100, 60), (60, 60), (13, 12)])
def test_adjusted_blocks_are_pefts(wanted, found):
    assert one(3, 60, oft_block_size=wanted, auto_adjust=True)[2].block_size == found
    assert pefts(3, 60, oft_block_size=wanted).base_model.model[0].oft_block_size["default"] == found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_folders_open_both_ways(options, tmp_path):
    x = torch.randn(3, 60)
    model, adapters, _ = one(7, 60, **options)
    shake(adapters, 0.2)
    save_adapter(adapters, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of files that it takes to be old
        theirs = peft.PeftModel.from_pretrained(linear(7, 60), tmp_path / "ours")
    assert relative(theirs(x), model(x)) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("theirs", "ours"):
        (tmp_path / folder / "lora_lab.yaml").unlink(missing_ok=True)
        back = linear(7, 60)
        load_adapter(back, tmp_path / folder)
        assert relative(back(x), model(x)) < TOLERANCE


def test_a_folder_that_peft_adjusted_opens_here(tmp_path):
    theirs, x = pefts(7, 60, oft_block_size=32), torch.randn(3, 60)
    theirs.base_model.model[0].oft_R["default"].weight.data.normal_(std=0.02)
    theirs.save_pretrained(tmp_path)
    model = linear(7, 60)
    load_adapter(model, tmp_path)
    assert relative(model(x), theirs(x)) < TOLERANCE


def saved_by_peft(folder, **changes):
    pefts(16, 24).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, value in changes.items():
        config[name] = value
        if value is None:
            del config[name]
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("version", [None, "0.17.1"])
def test_files_with_the_former_polynomial_are_warned_of(version, tmp_path):
    saved_by_peft(tmp_path, peft_version=version)
    with pytest.warns(UserWarning, match="PEFT before 0.18, which had another polynomial"):
        load_adapter(linear(), tmp_path)


@pytest.mark.filterwarnings("error")
def test_files_without_the_former_polynomial_are_not_warned_of(tmp_path):
    saved_by_peft(tmp_path, peft_version="0.17.1", use_cayley_neumann=False)
    load_adapter(linear(), tmp_path)


def test_files_of_the_former_oft_are_refused(tmp_path):
    saved_by_peft(tmp_path, oft_block_size=None)
    with pytest.raises(IncompatibleError, match="PEFT before 0.14, which had another OFT"):
        load_adapter(linear(), tmp_path)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            {"r": 2},
            "adapter.oft_block_size: give it or r, and 0 for the other; got oft_block_size: 4 and r: 2",
        ),
        ({"oft_block_size": 0}, "adapter.oft_block_size: give it or r"),
        ({"oft_block_size": -2}, "adapter.oft_block_size: must be at least 0; got -2"),
        ({"oft_block_size": 1}, "adapter.oft_block_size: must be at least 2, as a single number"),
        ({"num_cayley_neumann_terms": 1}, "adapter.num_cayley_neumann_terms: must be at least 2; got 1"),
        ({"coft": True, "eps": 0.0}, "adapter.eps: must be finite and above 0; got 0.0"),
        ({"dropout": 1.0}, r"adapter.dropout: must lie in \[0, 1\); got 1.0"),
        ({"dropout": 0.5, "block_share": True}, "adapter.dropout: drops single blocks"),
    ],
)
def test_faulty_specs_are_refused(options, fault):
    with pytest.raises(ConfigError, match=fault):
        one(**options)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"oft_block_size": 5}, "oft_block_size: 5 does not divide the 24 inputs of 0. Use 4, the nearest"),
        (
            {"oft_block_size": 0, "r": 7},
            "adapter.r: 7 does not divide the 24 inputs of 0. Use 6, the nearest",
        ),
        ({"oft_block_size": 0, "r": 24}, "adapter.r: 24 gives blocks of one input at 0, of 24"),
        (
            {"columns": 53, "oft_block_size": 8, "auto_adjust": True},
            "8 gives blocks of one input at 0, of 53",
        ),
    ],
)
def test_inputs_that_cannot_be_divided_are_refused(options, fault):
    with pytest.raises(IncompatibleError, match=fault):
        one(**options)


def test_a_dropout_that_drops_nothing_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"dropout: 0.1 of the blocks is less than one at 0: it does nothing"
    ):
        one(dropout=0.1)


def test_a_polynomial_that_diverges_is_warned_of():
    _, _, adapter = one()
    adapter.q.data.fill_(0.5)
    with pytest.warns(UserWarning, match="is not a rotation"):
        adapter.delta_weight()
