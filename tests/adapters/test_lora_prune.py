"""Pruned LoRA: importance, permanent death, what a step leaves alone, compact folders, the slides' layer."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora_prune import LoRAPrune, LoRAPruneSpec
from lora_lab.adapters.protocols import Prunable
from lora_lab.adapters.storage import CONFIG, OWN, TENSORS, load_adapter, save_adapter
from lora_lab.callbacks.adapter_rows import sparsity
from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.linalg.pruning import alive, l1_importance
from lora_lab.testing import Variant, contract
from lora_lab.training.optimization import keep_frozen_parts
from tests.adapters.tiny import linear, logits, relative, shake, tiny_bert, train

test_contract = contract(
    LoRAPrune,
    Variant("", {"rank": 4}, trained=4 * (24 + 16)),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
KEEP = torch.tensor([True, False, True, False])


def adapt(model, rank=4, **options):
    adapters = inject(model, LoRAPruneSpec(targets=["0"], modules_to_save=[], rank=rank, **options))
    return next(iter(adapters)), adapters


def importance(lora):
    return l1_importance(lora.rank_components())


def survivors(lora):
    return alive(importance(lora), lora.kept_components(), 0.1, importance(lora).max())


def shaken(**options):
    model = linear()
    lora, adapters = adapt(model, **options)
    shake(adapters)
    return model, lora, adapters


def test_worked_example_gives_the_printed_importance_and_survivors():
    lora, _ = adapt(nn.Sequential(nn.Linear(2, 2, dtype=torch.float64)), rank=3)
    with torch.no_grad():
        lora.A.copy_(torch.tensor([[1, -2], [0.1, 0.1], [0, 3]]))
        lora.B.copy_(torch.tensor([[1, 0.2, -1], [1, -0.1, 2]]))
    torch.testing.assert_close(importance(lora), torch.tensor([6, 0.06, 9], dtype=torch.float64))
    keep = alive(
        importance(lora),
        lora.kept_components(),
        0.1,
        importance(lora).max(),
    )
    assert keep.tolist() == [True, False, True]
    lora.keep_components(keep)
    torch.testing.assert_close(importance(lora), torch.tensor([6, 0, 9], dtype=torch.float64))
    again = alive(
        importance(lora),
        lora.kept_components(),
        0.1,
        importance(lora).max(),
    )
    assert torch.equal(again, keep)


def test_nothing_dies_at_the_start_where_all_importance_is_zero():
    lora, adapters = adapt(linear())
    assert not importance(lora).any()
    assert alive(importance(lora), lora.kept, 0.1, importance(lora).max()).all()
    assert list(adapters.implementing(Prunable)) == ["0"]


def test_dead_units_leave_the_update_and_the_scale_stays():
    model, lora, adapters = shaken(alpha=6.0)
    x = torch.randn(5, 24)
    expected = lora.base(x) + 6 / 4 * x @ lora.A[KEEP].T @ lora.B[:, KEEP].T
    lora.keep_components(KEEP)
    assert relative(model(x), expected) < TOLERANCE
    assert not lora.A[~KEEP].any()
    assert not lora.B[:, ~KEEP].any()
    assert lora.rank == 2
    assert sparsity(lora) == 0.5
    with adapters.merged():
        assert relative(model(x), expected) < TOLERANCE


def test_the_dead_do_not_come_back():
    _, lora, _ = shaken()
    lora.keep_components(KEEP)
    lora.keep_components(torch.tensor([False, True, True, True]))
    assert lora.kept_components().tolist() == [False, False, True, False]
    assert lora.rank == 1


@pytest.mark.parametrize("factor", ["A", "B"])
def test_dead_units_have_no_gradient_even_if_something_fills_one_factor(factor):
    model, lora, _ = shaken()
    lora.keep_components(KEEP)
    x = torch.randn(5, 24)
    expected = model(x)
    with torch.no_grad():
        getattr(lora, factor)[...] += ~KEEP if factor == "B" else ~KEEP.unsqueeze(1)
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    assert torch.equal(lora.A.grad.any(1), KEEP)
    assert torch.equal(lora.B.grad.any(0), KEEP)


def test_dead_units_stay_zero_through_steps_with_decay_and_momentum():
    model, lora, adapters = shaken()
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=0.1, weight_decay=0.5)
    keep_frozen_parts(optimizer, adapters)

    def step():
        optimizer.zero_grad()
        model(torch.randn(5, 24)).square().sum().backward()
        optimizer.step()

    step()  # momentum that would move them
    lora.keep_components(KEEP)
    before = optimizer.state[lora.A]["exp_avg"].clone()
    living = lora.A[KEEP].clone()
    for _ in range(5):
        step()
    assert not lora.A[~KEEP].any()
    assert not lora.B[:, ~KEEP].any()
    assert torch.equal(optimizer.state[lora.A]["exp_avg"][~KEEP], before[~KEEP])
    assert (lora.A[KEEP] != living).all()


def test_nothing_is_held_before_anything_is_pruned():
    _, lora, _ = shaken()
    assert lora.frozen_parts() == []


def test_flags_travel_in_the_state_dict():
    model, lora, adapters = shaken()
    lora.keep_components(KEEP)
    fresh = linear()
    again, others = adapt(fresh)
    others.load_state_dict(adapters.state_dict())
    assert torch.equal(again.kept, KEEP)
    assert torch.equal(fresh(torch.ones(24)), model(torch.ones(24)))


def test_slides_layer_is_pruned_to_the_same_units_and_to_the_same_share_of_parameters():
    """The slide's rule in NumPy, on its matrices (512, 8) and (8, 512)."""
    random = np.random.default_rng(0)
    A, B = random.standard_normal((512, 8)) / np.sqrt(8), random.standard_normal((8, 512)) / np.sqrt(8)
    A[:, [1, 4, 6]] *= 0.05
    printed = np.abs(A).sum(axis=0) * np.abs(B).sum(axis=1)
    mask = printed > printed.max() * 0.1
    model = linear(rows=512, columns=512, dtype=torch.float64)
    lora, _ = adapt(model, rank=8)
    with torch.no_grad():
        lora.A.copy_(torch.from_numpy(A).T)
        lora.B.copy_(torch.from_numpy(B).T)
    assert relative(importance(lora), torch.from_numpy(printed)) < 1e-12
    lora.keep_components(alive(importance(lora), lora.kept, 0.1, importance(lora).max()))
    assert lora.kept.tolist() == mask.tolist()
    assert lora.rank == 5
    assert relative(lora.delta_weight(), torch.from_numpy((A * mask) @ (B * mask[:, None])).T) < 1e-12
    stored = sum(tensor.numel() for tensor in lora.peft_tensors().values())
    assert stored / 512**2 == pytest.approx(0.01953, abs=5e-6)


# Folders --------------------------------------------------------------------------------------------------


def pruned_bert(**options):
    """Of two layers' query and value: 3 units left, all 4, none, 1 (of 2 with a pattern for values)."""
    model = tiny_bert()
    adapters = inject(model, LoRAPruneSpec(rank=4, alpha=6.0, **options))
    shake(adapters)
    for adapter, left in zip(adapters, (3, 4, 0, 1), strict=True):
        generator = torch.Generator().manual_seed(left)
        order = torch.randperm(adapter.spec.rank, generator=generator)
        adapter.keep_components(order < left)
    return model, adapters


@pytest.mark.parametrize(
    "options",
    [{}, {"rslora": True}, {"rslora": True, "rank_pattern": {"value": 2}, "alpha_pattern": {"query": 5.0}}],
)
def test_folder_opens_in_peft_without_the_dead_and_here_with_them(options, tmp_path):
    model, adapters = pruned_bert(**options)
    save_adapter(adapters, tmp_path / "adapter", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter")
    assert relative(logits(theirs), logits(model)) < TOLERANCE
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    ranks = [len(tensor) for name, tensor in tensors.items() if "lora_A" in name]
    assert sorted(ranks) == sorted(max(1, adapter.rank) for adapter in adapters)
    fresh = tiny_bert()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert [adapter.rank for adapter in loaded] == [adapter.rank for adapter in adapters]
    assert [len(adapter.A) for adapter in loaded] == [adapter.rank for adapter in adapters]
    assert [sparsity(adapter) for adapter in loaded] == [sparsity(adapter) for adapter in adapters]
    assert [adapter.scale for adapter in loaded] == [adapter.scale for adapter in adapters]
    assert relative(logits(fresh), logits(model)) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    back = tiny_bert()
    assert load_adapter(back, tmp_path / "theirs").spec.method == "lora"
    assert relative(logits(back), logits(model)) < TOLERANCE


def test_config_of_a_pruned_folder_names_ranks_and_alphas_of_the_sites(tmp_path):
    _, adapters = pruned_bert()
    save_adapter(adapters, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6.0)
    assert list(config["rank_pattern"].values()) == [3, 1, 1]
    assert list(config["alpha_pattern"].values()) == [4.5, 1.5, 1.5]


def test_unpruned_folder_is_a_plain_lora(tmp_path):
    adapters = inject(tiny_bert(), LoRAPruneSpec(rank=3, alpha=0.1))
    save_adapter(adapters, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert all(adapter.rank == 3 for adapter in load_adapter(tiny_bert(), tmp_path / "adapter"))


def test_an_adapter_without_living_units_stays_dead_when_loaded(tmp_path):
    model, lora, adapters = shaken()
    lora.keep_components(torch.zeros(4, dtype=torch.bool))
    save_adapter(adapters, tmp_path / "adapter")
    fresh = linear()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    again = next(iter(loaded))
    assert (again.rank, sparsity(again)) == (0, 1)
    x = torch.randn(5, 24)
    assert torch.equal(fresh(x), again.base(x))
    train(fresh, loaded, x)
    assert torch.equal(fresh(x), again.base(x))


def test_pruned_convolution_opens_in_peft_and_here(tmp_path):
    def convolution():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, (2, 3)))

    model, x = convolution(), torch.randn(2, 3, 7, 9)
    lora, adapters = adapt(model)
    shake(adapters)
    lora.keep_components(KEEP)
    expected = nn.functional.conv2d(x, lora.merged_module().weight, lora.base.bias)
    assert relative(model(x), expected) < TOLERANCE
    save_adapter(adapters, tmp_path / "adapter")
    assert (
        relative(peft.PeftModel.from_pretrained(convolution(), tmp_path / "adapter")(x), expected) < TOLERANCE
    )
    fresh = convolution()
    assert next(iter(load_adapter(fresh, tmp_path / "adapter"))).rank == 2
    assert relative(fresh(x), expected) < TOLERANCE


def test_folder_with_more_units_than_its_spec_says_is_refused(tmp_path):
    save_adapter(inject(tiny_bert(), LoRAPruneSpec(rank=5)), tmp_path / "adapter")
    spec = (tmp_path / "adapter" / OWN).read_text()
    (tmp_path / "adapter" / OWN).write_text(spec.replace("rank: 5", "rank: 4"))
    with pytest.raises(CheckpointError, match=r"of shape \(5, 30\), not \(4, 30\)"):
        load_adapter(tiny_bert(), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"alpha": 0.0}, "adapter.alpha: must be finite and not 0; got 0.0"),
        ({"dropout": 1.0}, r"adapter.dropout: must lie in \[0, 1\); got 1.0"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), **options)
