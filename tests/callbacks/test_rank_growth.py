"""Rank growth: what moves where; values and optimizer state are kept, resumed and alike in two processes."""

from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import peft
import pytest
import torch
from torch.optim import AdamW

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.methods.lora_drop import LoRADropSpec
from lora_lab.adapters.protocols import Growable
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.callbacks.controllers.rank_growth import RankGrowth, RankGrowthSpec
from lora_lab.callbacks.controllers.structure import extend_components
from lora_lab.errors import ConfigError
from tests.adapters.tiny import linear, relative, shake, tiny_bert
from tests.callbacks.controlled import assert_equal, from_two_processes, hand_back, train

GROWABLE = [name for name, method in METHODS.items() if issubclass(method, Growable)]
TOLERANCE = 1e-5  # float32 sums in another order over some steps of AdamW


def test_the_methods_that_can_grow_are_these():
    assert sorted(GROWABLE) == ["lora", "lora_drop"]


# One adapter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LoRASpec(rank=3), LoRASpec(rank=3, init="olora"), LoRADropSpec(rank=3)])
def test_added_components_change_nothing_and_learn(spec):
    adapters = inject(linear(), replace(spec, targets=["0"], modules_to_save=[]))
    shake(adapters)
    model, (adapter,) = adapters.model.eval(), adapters
    x = torch.randn(4, 24)
    before, old = (
        model(x).detach(),
        {name: t.detach().clone() for name, t in adapter.adapter_tensors().items()},
    )
    same = {id(t) for t in adapter.adapter_tensors().values()}
    adapter.extend_components(2)
    assert {id(t) for t in adapter.adapter_tensors().values()} == same
    assert relative(model(x), before) < 1e-6
    assert adapter.rank == 5
    for name, axis in adapter.components.items():
        if (tensor := getattr(adapter, name)) is not None:
            assert torch.equal(tensor.narrow(axis, 0, 3), old[name])
    model(x).square().sum().backward()
    assert adapter.B.grad[:, 3:].any(0).all()
    adapter.extend_components(
        1,
        {"A": torch.ones(1, 24), "B": torch.ones(len(adapter.B), 1)}
        | ({"start_A": torch.zeros(1, 24), "start_B": torch.zeros(len(adapter.B), 1)}),
    )
    assert not torch.equal(model(x), before)


def test_an_embedding_grows_too():
    model = tiny_bert(vocab_size=50)
    adapters = inject(model, LoRASpec(rank=2, targets=["word_embeddings"], modules_to_save=[]))
    shake(adapters)
    (adapter,) = adapters
    ids = torch.randint(0, 50, (2, 5))
    before = model.eval()(input_ids=ids).logits
    adapter.extend_components(3)
    assert adapter.rank == 5
    assert relative(model(input_ids=ids).logits, before) < 1e-6


def test_the_optimizers_state_is_padded_with_zeros_and_the_step_goes_on():
    adapters = inject(linear(), LoRASpec(rank=3, targets=["0"], modules_to_save=[]))
    (adapter,) = adapters
    optimizer = AdamW(adapters.trainable_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapters.model(torch.randn(4, 24)).square().sum().backward()
        optimizer.step()
    old = {name: optimizer.state[adapter.B][name].clone() for name in ("exp_avg", "exp_avg_sq", "step")}
    gradient = adapter.A.grad.clone()
    extend_components(SimpleNamespace(optimizers=[optimizer]), adapter, 2)
    for name in ("exp_avg", "exp_avg_sq"):
        padded = optimizer.state[adapter.B][name]
        assert padded.shape == adapter.B.shape
        assert torch.equal(padded[:, :3], old[name])
        assert not padded[:, 3:].any()
    assert optimizer.state[adapter.B]["step"] == old["step"]
    assert torch.equal(adapter.A.grad[:3], gradient)
    assert not adapter.A.grad[3:].any()
    adapters.model(torch.randn(4, 24)).square().sum().backward()
    optimizer.step()


# Decisions --------------------------------------------------------------------------------------------------


def planned(total=20, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)])
    adapters = inject(model, LoRASpec(rank=4, targets=["0", "1", "2"], modules_to_save=[]))
    controller = RankGrowth(RankGrowthSpec(**options), adapters)
    controller.plan(total)
    return controller


def test_the_lowest_scores_go_and_the_highest_means_grow():
    controller = planned(moved=0.25, min_rank=2)
    scores = torch.tensor([0.1, 0.2, 0.3, 5.0, 0.4, 0.5, 0.6, 0.7, 3.0, 3.0, 0.25, 3.0])
    removed = controller.weakest(scores)
    # Of the first, two may go; then the lowest of the others.
    assert removed.nonzero().flatten().tolist() == [0, 1, 10]
    means = {"0": 2.65, "1": 0.55, "2": 3.0}
    assert controller.grown(means, removed) == {"0": 1, "1": 1, "2": 1}
    assert planned(moved=0.1).grown(means, torch.arange(12) < 2) == {"0": 1, "1": 0, "2": 1}
    full = planned(moved=0.25, max_rank=4)
    assert full.grown(means, torch.arange(12) < 2) == {"0": 2, "1": 0, "2": 0}


def test_new_components_stay_for_their_grace():
    controller = planned(moved=0.25, grace=2)
    controller._ages = torch.tensor([0, 1, 2, 2] * 3)
    assert controller.weakest(torch.arange(12.0)).nonzero().flatten().tolist() == [2, 3, 6]


class Look(L.Callback):
    def __init__(self):
        self.ranks, self.states = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.ranks.append([adapter.rank for adapter in module.adapters])
        (optimizer,) = trainer.optimizers
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in held:
            assert all(value.shape in (parameter.shape, ()) for value in optimizer.state[parameter].values())


OPTIONS = {"moved": 0.2, "start": 4, "period": 4, "end": 14, "grace": 1}


def run(method="lora", look=None, **options):
    spec = METHODS[method].Spec(rank=4, **({"drop_prob": 0.0} if method == "lora_drop" else {}))
    extra = [look] if look else []
    return train(spec, {"rank_growth": RankGrowthSpec(**OPTIONS)}, extra=extra, **options)


@pytest.mark.parametrize("method", GROWABLE)
def test_the_total_stays_and_ranks_move_at_the_decisions(method):
    look = Look()
    done = run(method, look)
    assert {sum(ranks) for ranks in look.ranks} == {12}
    changes = [step + 1 for step in range(1, 20) if look.ranks[step] != look.ranks[step - 1]]
    assert changes
    assert set(changes) <= {4, 8, 12}
    controller = done.controllers["rank_growth"]
    assert controller.settled
    assert controller.last == 12
    assert not controller._averages
    assert controller.statistics()["budget/kept"] == 12
    assert len(set(look.ranks[-1])) > 1


@pytest.mark.parametrize("stopped", [3, 5, 13])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stopped):
    whole = run()
    run(stop_after=stopped, folder=tmp_path)
    resumed = run(folder=tmp_path, resume=True)
    assert_equal(resumed.adapters, whole.adapters)
    ours, theirs = (own.controllers["rank_growth"].state_dict() for own in (resumed, whole))
    assert torch.equal(ours.pop("ages"), theirs.pop("ages"))
    assert ours == theirs


@pytest.mark.slow
def test_two_processes_move_the_same_components(tmp_path):
    two, one = from_two_processes(__file__, tmp_path), run().adapters.state_dict()
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        assert two[name].shape == tensor.shape
        if tensor.is_floating_point():
            assert (two[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), name


def test_a_grown_folder_opens_in_peft_and_here(tmp_path):
    model = tiny_bert(vocab_size=50)
    adapters = inject(model, LoRASpec(rank=3, targets=["query", "value"], modules_to_save=[]))
    first, second, *_ = adapters
    first.extend_components(2)
    second.select_components(torch.tensor([1]))
    shake(adapters)
    ids = torch.randint(0, 50, (2, 5))
    expected = model.eval()(input_ids=ids).logits
    save_adapter(adapters, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_bert(vocab_size=50), tmp_path).eval()
    assert relative(theirs(input_ids=ids).logits, expected) < 1e-5
    fresh = tiny_bert(vocab_size=50).eval()
    loaded = load_adapter(fresh, tmp_path)
    assert [own.rank for own in loaded][:3] == [5, 1, 3]
    assert torch.equal(fresh(input_ids=ids).logits, expected)


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moved": 0.0}, r"controllers.rank_growth.moved: must lie in \(0, 1\); got 0.0"),
        ({"beta2": 1.0}, r"beta2: must lie in \(0, 1\); got 1.0"),
        ({"period": 0}, "period: must be above 0"),
        ({"min_rank": 3, "max_rank": 2}, "max_rank: must be at least 3"),
        ({"min_rank": 5}, "0 starts with 4 components; they must lie between min_rank: 5 and max_rank: 8"),
        ({"max_rank": 3}, "0 starts with 4 components"),
        ({"start": 15, "end": 10}, "from step 15 to step 10 of a run of 20"),
        ({"end": 20}, "to step 20 of a run of 20"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        planned(**options)


if __name__ == "__main__":
    hand_back(run(devices=2).adapters.state_dict())
