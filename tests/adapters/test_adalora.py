"""AdaLoRA: the seed's example, the penalty, silenced components, files with fewer of them, refusals."""

import json
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.adalora import AdaLoRA, AdaLoRASpec
from lora_lab.adapters.storage import CONFIG, OWN, TENSORS, load_adapter, save_adapter
from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.linalg.orthogonal import row_overlaps
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, logits, reached, relative, shake, tiny_bert, tokens

test_contract = contract(
    AdaLoRA,
    Variant("", {"rank": 6}, trained=6 * (24 + 16 + 1)),
    Variant("squared", {"rank": 6, "orth_reg_squared": True}),
    Variant("unpenalised", {"rank": 6, "orth_reg_weight": 0.0}),
)


TOLERANCE = 1e-6  # float32, relative to the greatest number
P = [[0.1, 0.2], [0.3, 0.4]]
Q = [[0.6, 0.7, 0.8], [0.9, 1.0, 1.1]]
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*(rank_pattern keys|invalid shape)")
"""PEFT warns of every rank_pattern of AdaLoRA, its own included, and of a rank of 0."""


def adapt(model, **options):
    adapters = inject(model, AdaLoRASpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def example(**options):
    """The seed's matrices, at s = 1."""
    model = linear(2, 3, bias=False, dtype=torch.float64)
    adapter, adapters = adapt(model, rank=2, alpha=2.00001, **options)
    with torch.no_grad():
        adapter.base.weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
        adapter.B.copy_(torch.tensor(P, dtype=torch.float64))
        adapter.E.copy_(torch.tensor([0.5, 0.3], dtype=torch.float64))
        adapter.A.copy_(torch.tensor(Q, dtype=torch.float64))
    return model, adapter, adapters


def assert_equal(given, expected):
    torch.testing.assert_close(given, torch.tensor(expected, dtype=given.dtype), rtol=0, atol=1e-12)


def test_seeds_example_and_its_pruned_form():
    model, adapter, adapters = example()
    assert_equal(adapter.delta_weight(), [[0.084, 0.095, 0.106], [0.198, 0.225, 0.252]])
    expected = [[1.084, 2.095, 3.106], [4.198, 5.225, 6.252]]
    assert_equal(adapter.adapted_weight(adapter.base.weight), expected)
    assert_equal(model(torch.eye(3, dtype=torch.float64)).T, expected)
    adapter.keep_components(torch.tensor([True, False]))
    assert_equal(adapter.delta_weight(), [[0.03, 0.035, 0.04], [0.09, 0.105, 0.12]])
    assert_equal(adapters.merge()[0].weight, [[1.03, 2.035, 3.04], [4.09, 5.105, 6.12]])


def test_update_is_scaled_by_the_rank_at_the_start_for_good():
    adapter, adapters = adapt(linear(), rank=6, alpha=9.0)
    shake(adapters)
    assert adapter.scale == 9 / 6.00001
    adapter.keep_components(torch.arange(6) < 2)
    assert adapter.rank == 2
    expected = 9 / 6.00001 * adapter.B @ torch.diag(adapter.E) @ adapter.A
    assert relative(adapter.delta_weight(), expected) < TOLERANCE


def test_start_is_random_vectors_around_zeros():
    adapter, _ = adapt(linear(400, 300), rank=50)
    assert not adapter.E.any()
    for vectors in (adapter.A, adapter.B):
        # Of n numbers the mean is off by 0.02 / √n and the deviation by 0.02 / √(2 n); four times that.
        assert abs(vectors.mean()) < 4 * 0.02 / math.sqrt(vectors.numel())
        assert abs(vectors.std() - 0.02) < 4 * 0.02 / math.sqrt(2 * vectors.numel())


@pytest.mark.parametrize(("rows", "columns", "rank"), [(16, 24, 6), (24, 16, 1), (7, 5, 9)])
def test_output_and_gradients_are_those_of_the_formula(rows, columns, rank):
    model = linear(rows, columns, dtype=torch.float64)
    adapter, adapters = adapt(model, rank=rank, alpha=3.0)
    shake(adapters, by=0.5)
    x = torch.randn(2, 5, columns, dtype=torch.float64)
    weight = adapter.base.weight + adapter.scale * adapter.B @ torch.diag(adapter.E) @ adapter.A
    expected = F.linear(x, weight, adapter.base.bias)
    torch.testing.assert_close(model(x), expected)
    trained = adapters.trainable_parameters()
    torch.testing.assert_close(
        torch.autograd.grad(model(x).square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
    )


def test_convolution_equals_pefts():
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 8, (3, 2), stride=2, padding=1)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    adapter, adapters = adapt(ours, rank=4, alpha=6.0)
    shake(adapters, by=0.5)
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=9, target_modules=["0"])
    theirs = peft.get_peft_model(theirs, config)
    tensors = {f"base_model.model.0.{name}": tensor for name, tensor in adapter.peft_tensors().items()}
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    x = torch.randn(2, 3, 9, 9)
    assert relative(ours(x), adapter.base(x)) > 0.1
    assert relative(ours(x), theirs(x)) < TOLERANCE


# Penalty --------------------------------------------------------------------------------------------------


def test_penalty_of_the_seeds_matrices_is_that_computed_by_hand():
    """PᵀP − I = [[−.9, .14], [.14, −.8]] and QQᵀ − I = [[.49, 2.12], [2.12, 2.02]]."""
    matrices = (torch.tensor(P, dtype=torch.float64).T, torch.tensor(Q, dtype=torch.float64))
    assert_equal(row_overlaps(matrices), [math.sqrt(1.4892), math.sqrt(13.3093)])
    assert example()[2].penalty().item() == pytest.approx(1.2171298, abs=5e-8)
    squared = example(orth_reg_squared=True, orth_reg_weight=0.1)[2]
    assert squared.penalty().item() == pytest.approx(0.1 * (1.4892 + 13.3093), rel=1e-12)


@pytest.mark.parametrize("weight", [0.5, 0.1])
def test_penalty_is_what_peft_adds_to_its_loss(weight):
    adapters = inject(
        tiny_bert(), AdaLoRASpec(targets=["query", "up"], rank=5, orth_reg_weight=weight, modules_to_save=[])
    )
    shake(adapters)
    losses = []
    for their_weight in (0.0, weight):
        config = peft.AdaLoraConfig(
            init_r=5,
            total_step=9,
            target_modules=["query", "intermediate.dense"],
            orth_reg_weight=their_weight,
        )
        theirs = peft.get_peft_model(tiny_bert().double(), config, autocast_adapter_dtype=False)
        tensors = {
            f"base_model.model.{path}.{name}": tensor.double()
            for path, adapter in adapters.items()
            for name, tensor in adapter.peft_tensors().items()
        }
        peft.set_peft_model_state_dict(theirs, tensors)
        losses.append(theirs.base_model(input_ids=tokens(), labels=torch.tensor([0, 1, 2])).loss)
    assert relative(adapters.penalty(), (losses[1] - losses[0]).float()) < TOLERANCE


@pytest.mark.parametrize("squared", [False, True])
def test_gradients_of_the_penalty_are_those_of_one_matrix_after_the_other(squared):
    options = {
        "targets": ["query", "value", "up"],
        "rank": 5,
        "rank_pattern": {"value": 3},
        "modules_to_save": [],
    }
    adapters = inject(tiny_bert().double(), AdaLoRASpec(orth_reg_squared=squared, **options))
    shake(adapters)
    norms = []
    for adapter in adapters:
        for gram in (adapter.A @ adapter.A.T, adapter.B.T @ adapter.B):
            norms.append((gram - torch.eye(len(gram), dtype=torch.float64)).norm())
    expected = sum(norm**2 for norm in norms) if squared else sum(norms) / len(norms)
    vectors = [parameter for a in adapters for parameter in (a.A, a.B)]
    assert len(norms) == 2 * len(adapters) == 12
    torch.testing.assert_close(
        torch.autograd.grad(adapters.penalty(), vectors), torch.autograd.grad(0.5 * expected, vectors)
    )


def test_penalty_of_orthonormal_vectors_is_zero_and_so_is_its_gradient():
    adapter, adapters = adapt(linear(), rank=4)
    with torch.no_grad():
        adapter.A.copy_(torch.eye(4, 24))
        adapter.B.copy_(torch.eye(16, 4))
    penalty = adapters.penalty()
    penalty.backward()
    assert penalty == 0
    assert not adapter.A.grad.any()
    assert not adapter.B.grad.any()


def test_penalty_is_float32_under_autocast_and_off_at_weight_zero():
    _, adapters = adapt(linear(), rank=4)
    shake(adapters)
    expected = adapters.penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapters.penalty(), expected)
    _, adapters = adapt(linear(), rank=4, orth_reg_weight=0.0)
    assert adapters.penalty() == 0.0


# Silenced components --------------------------------------------------------------------------------------


def test_first_gradient_of_the_task_reaches_the_singular_values_alone():
    model = linear()
    adapter, adapters = adapt(model, rank=6)
    assert reached(model, adapters, torch.randn(5, 24)) == {"E"}
    assert adapters.trainable_count() == 246
    assert adapter.rank_components() == [(adapter.E, 0), (adapter.A, 0), (adapter.B, 1)]


def test_silenced_components_keep_their_vectors_and_grow_back():
    model, x = linear(), torch.randn(5, 24)
    adapter, adapters = adapt(model, rank=4)
    shake(adapters)
    before = {name: tensor.clone() for name, tensor in adapters.named_parameters().items()}
    keep = torch.tensor([True, False, True, False])
    adapter.keep_components(keep)
    assert torch.equal(adapter.kept_components(), keep)
    assert torch.equal(adapter.E, torch.where(keep, before["0.E"], 0))
    assert torch.equal(adapter.A, before["0.A"])
    assert torch.equal(adapter.B, before["0.B"])
    model(x).square().sum().backward()
    assert adapter.E.grad.all()
    torch.optim.SGD(adapters.trainable_parameters(), lr=0.1).step()
    assert adapter.E.all()


def test_dropped_adapter_adds_nothing():
    model, x = linear(), torch.randn(5, 24)
    adapter, adapters = adapt(model, rank=4)
    shake(adapters)
    adapter.drop()
    assert torch.equal(model(x), adapter.base(x))
    assert adapter.rank == 0


# Files ----------------------------------------------------------------------------------------------------


def silenced(grown_back=False):
    """Adapters of a classifier, one of them without any component, all others with two or three of five."""
    adapters = inject(tiny_bert(), AdaLoRASpec(targets=["query", "value", "up"], rank=5, alpha=7.0))
    shake(adapters, by=0.5)
    for count, adapter in enumerate(adapters):
        flags = torch.tensor([False, True, True, False, count % 2 == 0])
        adapter.keep_components(flags & (count > 0))
        if grown_back:
            adapter.E.data[3] = 0.7
    return adapters


def sizes(folder):
    return [len(tensor) for name, tensor in load_file(folder / TENSORS).items() if name.endswith("lora_E")]


@PEFT_WARNS
@pytest.mark.parametrize("grown_back", [False, True])
def test_silenced_components_are_left_out_of_files_that_open_in_peft(grown_back, tmp_path):
    adapters = silenced(grown_back)
    save_adapter(adapters, tmp_path / "ours", task_type="SEQ_CLS")
    more = int(grown_back)
    assert sorted(sizes(tmp_path / "ours")) == [more, 2 + more, 2 + more, 2 + more, 3 + more, 3 + more]
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "ours")
    assert relative(logits(theirs), logits(adapters.model)) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = load_adapter(tiny_bert(), tmp_path / folder)
        assert relative(logits(back.model), logits(adapters.model)) < TOLERANCE
        for own, other in zip(adapters, back, strict=True):
            assert other.rank == own.rank  # what has grown back is in the weights, and in the file
            assert other.spec.rank == 5
            held = own.singular_values()[: own.rank]  # those of the others are 0
            torch.testing.assert_close(other.singular_values(), held)


def test_pefts_flags_name_the_components_that_were_kept(tmp_path):
    adapters = silenced()
    save_adapter(adapters, tmp_path / "adapter")
    pattern = json.loads((tmp_path / "adapter" / CONFIG).read_text())["rank_pattern"]
    flags = {f"{path}.lora_E": adapter.kept.tolist() for path, adapter in adapters.items()}
    assert pattern == flags


def test_ranks_that_peft_took_away_are_silenced_here(tmp_path):
    config = peft.AdaLoraConfig(
        init_r=5,
        target_r=2,
        total_step=9,
        tfinal=2,
        lora_alpha=7,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    theirs = peft.get_peft_model(tiny_bert(), config)
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for step in range(9):
        theirs(input_ids=tokens(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "adapter")
    adapters = load_adapter(tiny_bert(), tmp_path / "adapter")
    assert sorted(a.rank for a in adapters) == sorted(sizes(tmp_path / "adapter"))
    assert sum(a.rank for a in adapters) == 2 * 4
    assert relative(logits(adapters.model), logits(theirs)) < TOLERANCE


@PEFT_WARNS
@pytest.mark.parametrize("largest", [{"value": 2}, {"value": 9}])
def test_patterns_open_in_peft_which_has_one_rank_and_one_alpha(largest, tmp_path):
    spec = AdaLoRASpec(rank=5, alpha=7.0, rank_pattern=largest, alpha_pattern={"query": 3.0})
    adapters = inject(tiny_bert(), spec)
    shake(adapters, by=0.5)
    save_adapter(adapters, tmp_path / "adapter", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter")
    assert relative(logits(theirs), logits(adapters.model)) < TOLERANCE
    back = load_adapter(tiny_bert(), tmp_path / "adapter")
    assert relative(logits(back.model), logits(adapters.model)) < TOLERANCE
    for name, tensor in adapters.named_parameters().items():
        assert relative(back.named_parameters()[name], tensor) < TOLERANCE, name
    (tmp_path / "adapter" / OWN).unlink()
    foreign = load_adapter(tiny_bert(), tmp_path / "adapter")
    assert relative(logits(foreign.model), logits(adapters.model)) < TOLERANCE


def test_file_with_more_components_than_the_spec_is_refused(tmp_path):
    save_adapter(inject(tiny_bert(), AdaLoRASpec(rank=5)), tmp_path / "adapter")
    own = tmp_path / "adapter" / OWN
    own.write_text(own.read_text().replace("rank: 5", "rank: 4"))
    with pytest.raises(CheckpointError, match=r"lora_[ABE]' of shape \(.*5.*\), not \(.*4.*\)"):
        load_adapter(tiny_bert(), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orth_reg_weight": -0.1}, "adapter.orth_reg_weight: must be finite and at least 0; got -0.1"),
        ({"orth_reg_weight": math.inf}, "adapter.orth_reg_weight: must be finite and at least 0; got inf"),
        ({"alpha": -4.0}, "adapter.alpha: must be above 0; got -4.0"),
        ({"alpha_pattern": {"0": -4.0}}, "adapter.alpha_pattern.0: must be above 0; got -4.0"),
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
    ],
)
def test_refusals_say_what_is_allowed(options, message):
    with pytest.raises(ConfigError) as caught:
        adapt(linear(), **options)
    assert str(caught.value) == message
