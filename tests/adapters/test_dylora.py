"""DyLoRA: every rank is a LoRA, what a step leaves alone, folders, refusals."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.dylora import DyLoRA, DyLoRASpec
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.protocols import NestedRank
from lora_lab.adapters.storage import CONFIG, OWN, TENSORS, load_adapter, save_adapter
from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.testing import Variant, contract
from lora_lab.training.optimization import keep_frozen_parts
from tests.adapters.tiny import linear, logits, relative, shake, tiny_bert

test_contract = contract(
    DyLoRA,
    Variant("", {"rank": 4}, trained=4 * (24 + 16)),
    Variant("frozen", {"rank": 4, "frozen": True, "rslora": True}),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
RANKS = range(1, 5)


def adapt(model, rank=4, **options):
    adapters = inject(model, DyLoRASpec(targets=["0"], modules_to_save=[], rank=rank, **options))
    return next(iter(adapters)), adapters


def shaken(**options):
    model = linear()
    dylora, adapters = adapt(model, **options)
    shake(adapters)
    return model, dylora, adapters


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_is_the_lora_of_the_first_components(rank, rslora):
    model, dylora, adapters = shaken(alpha=6.0, rslora=rslora)
    x = torch.randn(5, 24)
    dylora.active_rank = rank
    plain = linear()
    lora = next(iter(inject(plain, LoRASpec(targets=["0"], rank=rank, alpha=6.0, rslora=rslora))))
    with torch.no_grad():
        lora.A.copy_(dylora.A[:rank])
        lora.B.copy_(dylora.B[:, :rank])
    assert relative(model(x), plain(x)) < TOLERANCE
    assert dylora.rank == rank
    assert relative(dylora.singular_values(), lora.singular_values()) < TOLERANCE
    with adapters.merged():
        assert relative(model(x), plain(x)) < TOLERANCE


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_does_not_see_the_components_above_it(rank):
    model, dylora, _ = shaken()
    x = torch.randn(5, 24)
    dylora.active_rank = rank
    before = model(x)
    with torch.no_grad():
        dylora.A[rank:] = torch.inf
        dylora.B[:, rank:] = torch.inf
    assert torch.equal(model(x), before)


def test_the_largest_rank_is_active_at_the_start_and_is_lora():
    model, dylora, adapters = shaken()
    assert (dylora.max_rank, dylora.active_rank, dylora.scale) == (4, 4, 16 / 4)
    assert dylora.frozen_parts() == []
    assert list(adapters.implementing(NestedRank)) == ["0"]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_the_components_in_use_or_the_last_of_them(frozen, rank):
    model, dylora, _ = shaken(frozen=frozen)
    dylora.active_rank = rank
    model(torch.randn(5, 24)).square().sum().backward()
    expected = [rank - 1] if frozen else list(range(rank))
    assert dylora.A.grad.any(1).nonzero().flatten().tolist() == expected
    assert dylora.B.grad.any(0).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_components_still_count_in_the_output(frozen):
    model, dylora, _ = shaken(frozen=frozen)
    dylora.active_rank, x = 3, torch.randn(5, 24)
    expected = dylora.base(x) + 16 / 3 * x @ dylora.A[:3].T @ dylora.B[:, :3].T
    assert relative(model(x), expected) < TOLERANCE


@pytest.mark.parametrize(("frozen", "learned"), [(False, [0, 1]), (True, [1])])
def test_a_step_leaves_other_components_and_their_moments_bitwise_alone(frozen, learned):
    model, dylora, adapters = shaken(frozen=frozen)
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=0.1, weight_decay=0.5)
    keep_frozen_parts(optimizer, adapters)

    def step(rank):
        dylora.active_rank = rank
        optimizer.zero_grad()
        model(torch.randn(5, 24)).square().sum().backward()
        optimizer.step()

    def components():
        """Every number of each component: A's row, B's column and both moments of them."""
        states = [
            (dylora.A.detach(), optimizer.state[dylora.A]),
            (dylora.B.detach().T, optimizer.state[dylora.B]),
        ]
        parts = [states[0][0], states[1][0]]
        for name in ("exp_avg", "exp_avg_sq"):
            parts += [states[0][1][name], states[1][1][name].T]
        return torch.cat(parts, dim=1).clone()

    for rank in RANKS:  # moments of all components are there
        step(rank)
    before = components()
    step(2)
    assert (components() != before).any(1).nonzero().flatten().tolist() == learned


def test_active_rank_travels_in_the_state_dict():
    model, dylora, adapters = shaken()
    dylora.active_rank, x = 2, torch.randn(5, 24)
    fresh = linear()
    again, others = adapt(fresh)
    others.load_state_dict(adapters.state_dict())
    assert again.active_rank == 2
    assert torch.equal(fresh(x), model(x))


# Folders --------------------------------------------------------------------------------------------------


def small_bert(**options):
    model = tiny_bert()
    adapters = inject(model, DyLoRASpec(rank=4, alpha=6.0, **options))
    shake(adapters)
    return model, adapters


@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"rslora": True}, {"dropout": 0.1}])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_folder_keeps_every_rank_and_opens_in_peft_at_the_active_one(rank, options, tmp_path):
    model, adapters = small_bert(**options)
    expected = {}
    for active in (1, 3, 4, rank):
        for adapter in adapters:
            adapter.active_rank = active
        expected[active] = logits(model)
    save_adapter(adapters, tmp_path / "adapter", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter")
    assert relative(logits(theirs), expected[rank]) < TOLERANCE
    fresh = tiny_bert()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert {adapter.active_rank for adapter in loaded} == {rank}
    for active, values in expected.items():
        for adapter in loaded:
            adapter.active_rank = active
        assert torch.equal(logits(fresh), values)


def test_folder_keeps_ranks_that_differ_between_sites(tmp_path):
    model, adapters = small_bert(rank_pattern={"value": 7}, alpha_pattern={"query": 3.0})
    for number, adapter in enumerate(adapters):
        adapter.active_rank = 1 + number
    save_adapter(adapters, tmp_path / "adapter", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter")
    assert relative(logits(theirs), logits(model)) < TOLERANCE
    fresh = tiny_bert()
    assert [adapter.active_rank for adapter in load_adapter(fresh, tmp_path / "adapter")] == [1, 2, 3, 4]
    assert torch.equal(logits(fresh), logits(model))


def test_folder_that_went_through_peft_is_a_lora_of_the_active_rank(tmp_path):
    model, adapters = small_bert()
    for adapter in adapters:
        adapter.active_rank = 3
    save_adapter(adapters, tmp_path / "ours", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = tiny_bert()
    loaded = load_adapter(back, tmp_path / "theirs")
    assert loaded.spec.method == "lora"
    assert {adapter.rank for adapter in loaded} == {3}
    assert relative(logits(back), logits(model)) < TOLERANCE


def test_a_lora_folder_of_peft_opens_as_nested_ranks_if_its_spec_says_so(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny_bert(), config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / OWN).write_text("adapter: {method: dylora, rank: 4, alpha: 6, modules_to_save: []}\n")
    model = tiny_bert()
    adapters = load_adapter(model, tmp_path)
    assert {(adapter.max_rank, adapter.active_rank) for adapter in adapters} == {(4, 4)}
    assert relative(logits(model), logits(theirs)) < TOLERANCE


def test_a_folder_without_the_other_components_is_refused(tmp_path):
    _, adapters = small_bert()
    for adapter in adapters:
        adapter.active_rank = 2
    save_adapter(adapters, tmp_path / "adapter")
    file = tmp_path / "adapter" / TENSORS
    whole = load_file(file)
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["rank_pattern"]
    save_file({name: tensor for name, tensor in whole.items() if "idle_A" not in name}, file)
    with pytest.raises(CheckpointError, match=r"has no '.*query.idle_A'"):
        load_adapter(tiny_bert(), tmp_path / "adapter")
    save_file({name: tensor for name, tensor in whole.items() if "idle_" not in name}, file)
    with pytest.raises(CheckpointError, match=r"has no '.*query.idle_"):
        load_adapter(tiny_bert(), tmp_path / "adapter")


def test_convolutions_keep_every_rank_too(tmp_path):
    def convolution():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, (2, 3)))

    model, x = convolution(), torch.randn(2, 3, 7, 9)
    dylora, adapters = adapt(model)
    shake(adapters)
    dylora.active_rank = 3
    expected = nn.functional.conv2d(x, dylora.merged_module().weight, dylora.base.bias)
    assert relative(model(x), expected) < TOLERANCE
    save_adapter(adapters, tmp_path / "adapter")
    fresh = convolution()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model(x))
    theirs = peft.PeftModel.from_pretrained(convolution(), tmp_path / "adapter")
    assert relative(theirs(x), model(x)) < TOLERANCE
    dylora.active_rank = next(iter(loaded)).active_rank = 4
    assert torch.equal(fresh(x), model(x))


# Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 5, -1, 2.5])
def test_a_rank_that_is_not_there_is_refused_and_changes_nothing(rank):
    _, dylora, _ = shaken()
    dylora.active_rank = 3
    with pytest.raises(ConfigError, match=f"active_rank: must be one of 1 to 4 here; got {rank}"):
        dylora.active_rank = rank
    assert dylora.active_rank == 3
    assert dylora.used.tolist() == [True, True, True, False]


def test_a_rank_of_0_is_refused():
    with pytest.raises(ConfigError, match="adapter.rank: must be at least 1; got 0"):
        adapt(linear(), rank=0)
