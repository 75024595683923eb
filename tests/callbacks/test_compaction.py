"""Compaction: what sliced adapters still do, and runs that go on through it."""

import copy
import pickle
from dataclasses import dataclass

import lightning as L
import peft
import pytest
import torch

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.families.embedding import LowRankEmbedding
from lora_lab.adapters.methods.adalora import AdaLoRASpec
from lora_lab.adapters.methods.delora import DeLoRASpec
from lora_lab.adapters.methods.lora import LoRA, LoRASpec
from lora_lab.adapters.methods.lora_drop import LoRADrop, LoRADropSpec
from lora_lab.adapters.methods.lora_prune import LoRAPruneSpec
from lora_lab.adapters.methods.pissa import PiSSASpec
from lora_lab.adapters.methods.svft import SVFTSpec
from lora_lab.adapters.protocols import Droppable, Prunable
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.callbacks import Controller, ControllerSpec, check_controllers
from lora_lab.callbacks.adapter_rows import adapter_rows
from lora_lab.callbacks.controllers.compaction import Compaction, CompactionSpec
from lora_lab.callbacks.controllers.dropout_schedule import DropoutScheduleSpec
from lora_lab.callbacks.controllers.output_evaluation import OutputEvaluationSpec
from lora_lab.callbacks.controllers.rank_pruning import RankPruningSpec
from lora_lab.callbacks.controllers.structure import structure_changed
from lora_lab.callbacks.memory_statistics import optimizer_bytes, size
from tests.adapters.tiny import logits, relative, shake, tiny_bert, tokens
from tests.callbacks.controlled import LAYERS, assert_equal, from_two_processes, hand_back, train

TOLERANCE = 1e-6  # float32, relative to the greatest output
LONG_TOLERANCE = 1e-5  # of weights, over 10 or 20 steps of Adam: sums in another order
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*(rank_pattern keys|invalid shape|zero_b starts)")
CASES = {
    "lora": LoRASpec(),
    "lora, bias": LoRASpec(lora_bias=True),
    "lora, rslora": LoRASpec(rslora=True),
    "lora, embedding": LoRASpec(targets=["query", "word_embeddings"]),
    "lora, olora": LoRASpec(init="olora"),
    "lora, pissa": LoRASpec(init="pissa", rslora=True),
    "adalora": AdaLoRASpec(),
    "delora": DeLoRASpec(),
    "delora, zero_b": DeLoRASpec(init="zero_b"),
    "delora, current": DeLoRASpec(residual_lambda="current"),
    "lora_prune": LoRAPruneSpec(),
    "pissa": PiSSASpec(),
    "pissa, residual": PiSSASpec(mode="residual"),
    "pissa, rank 2": PiSSASpec(rank=2),
    "svft": SVFTSpec(),
    "svft, random": SVFTSpec(pattern="random"),
    "lora_drop": LoRADropSpec(),
}


def spec_of(case):
    spec = copy.deepcopy(CASES[case])
    if not isinstance(spec, SVFTSpec) and "rank 2" not in case:
        spec.rank = 4
    if "embedding" not in case:
        spec.targets = ["query", "value"]
    return spec


def silenced(case):
    """A model whose adapters have 2, 1, 0 and all of their components left, and moved ones."""
    model = tiny_bert()
    adapters = inject(model, spec_of(case))
    shake(adapters)
    for number, adapter in enumerate(adapters):
        count = len(adapter.kept)
        left = [[count - 1, 0], [1], [], list(range(count))][number % 4]
        adapter.keep_components(torch.tensor([index in left for index in range(count)]))
    return model, adapters


def compacted(case):
    model, adapters = silenced(case)
    before = logits(model), [row for row in adapter_rows(adapters)]
    objects = [id(p) for p in adapters.trainable_parameters()]
    for adapter in adapters:
        adapter.select_components(adapter.kept_components().nonzero().flatten())
    assert [id(p) for p in adapters.trainable_parameters()] == objects
    return model, adapters, *before


def step(model, adapters):
    """Runs forward and backward in training mode, and returns the gradients by name."""
    model.train().zero_grad()
    torch.manual_seed(4)
    (model(input_ids=tokens()).logits.square().sum() + adapters.penalty()).backward()
    return {name: p.grad for name, p in adapters.named_parameters().items()}


def test_every_method_that_can_be_compacted_is_tried():
    prunable = {name for name, method in METHODS.items() if issubclass(method, Prunable)}
    assert prunable == {spec.method for spec in CASES.values()}


@PEFT_WARNS
@pytest.mark.parametrize("case", CASES)
def test_a_sliced_adapter_computes_trains_merges_and_copies_as_before(case):
    model, adapters, expected, rows = compacted(case)
    assert relative(logits(model), expected) < TOLERANCE
    for adapter, row, now in zip(adapters, rows, adapter_rows(adapters), strict=True):
        count = int(adapter.kept.sum())
        assert all(tensor.shape[axis] == count for tensor, axis in adapter.rank_components())
        assert (now.rank, now.sparsity) == (row.rank, row.sparsity)
        assert now.effective_rank == pytest.approx(row.effective_rank, rel=1e-4)
    with adapters.merged():
        assert relative(logits(model), expected) < 1e-5
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), logits(model))
    gradients = step(model, adapters)
    assert all(gradient is not None for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())
    for adapter in adapters:
        for parameter, frozen in adapter.frozen_parts():
            torch.broadcast_shapes(parameter.shape, frozen.shape)


@PEFT_WARNS
@pytest.mark.parametrize("case", [case for case in CASES if "lora_drop" not in case and case != "adalora"])
def test_gradients_of_what_is_left_are_those_from_before_the_slicing(case):
    # Not of adalora, whose penalty counts silenced vectors too, nor of lora_drop, which draws other masks.
    model, adapters = silenced(case)
    before = step(model, adapters)
    kept = {name: adapter.kept.clone() for name, adapter in adapters.items()}
    for adapter in adapters:
        adapter.select_components(adapter.kept.nonzero().flatten())
    largest = max(float(gradient.abs().max()) for gradient in before.values())
    for path, adapter in adapters.items():
        axes = {id(tensor): axis for tensor, axis in adapter.rank_components()}
        for name, parameter in adapter.named_parameters(recurse=False):
            expected = before[f"{path}.{name}"]
            if id(parameter) in axes:
                expected = expected.index_select(axes[id(parameter)], kept[path].nonzero().flatten())
            before[f"{path}.{name}"] = expected
    after = step(model, adapters)
    for name, gradient in after.items():
        torch.testing.assert_close(gradient, before[name], rtol=1e-4, atol=1e-6 * largest)


@PEFT_WARNS
@pytest.mark.parametrize("case", CASES)
def test_a_sliced_state_goes_into_a_fresh_set(case):
    model, adapters, *_ = compacted(case)
    fresh = tiny_bert()
    others = inject(fresh, spec_of(case), seed=9)
    others.load_state_dict(adapters.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    assert [adapter.rank for adapter in others] == [adapter.rank for adapter in adapters]


@PEFT_WARNS
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_sliced_adapters_opens_here_and_in_peft(case, dropped, tmp_path):
    model, adapters, *_ = compacted(case)
    if dropped:
        for adapter in list(adapters.implementing(Droppable).values())[:1]:
            adapter.drop()
    expected = logits(model)
    save_adapter(adapters, tmp_path / "adapter", task_type="SEQ_CLS")
    fresh = tiny_bert()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert relative(logits(fresh), expected) < TOLERANCE
    # A dropped adapter's file holds no more than PEFT needs; the others come back with what they have.
    first = int(dropped)
    assert [len(a.kept) for a in loaded][first:] == [len(a.kept) for a in adapters][first:]
    if not dropped:
        assert [row.sparsity for row in adapter_rows(loaded)] == [
            row.sparsity for row in adapter_rows(adapters)
        ]
    save_adapter(loaded, tmp_path / "again", task_type="SEQ_CLS")
    again = tiny_bert()
    load_adapter(again, tmp_path / "again")
    assert relative(logits(again), expected) < TOLERANCE
    if METHODS[adapters.spec.method].peft.peft_type:
        theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter")
        assert relative(logits(theirs), expected) < TOLERANCE


# Runs ---------------------------------------------------------------------------------------------------

HALF = {"threshold": 0.9999, "min_rank": 2, "start": 6, "period": 2, "end": 10}
"""Half of four components are left after the first pruning; the last of three is at step 10."""


def controllers(compacted=True):
    pruning = {"rank_pruning": RankPruningSpec(**HALF)}
    return pruning | {"compaction": CompactionSpec()} if compacted else pruning


class EveryStep(L.Callback):
    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.look(pl_module.adapters, trainer))


def test_half_the_components_take_half_the_memory_from_the_step_at_which_pruning_ends():
    def bytes_of(adapters, trainer):
        trained = adapters.trainable_parameters()
        return size(trained), size(p.grad for p in trained), optimizer_bytes(trainer.optimizers)

    look = EveryStep(bytes_of)
    run = train(LoRAPruneSpec(rank=4), controllers(), extra=[look])
    numbers, head, tensors = 4 * (6 + 8 + 8 + 8 + 8 + 8), 8 + 1, 8
    before = 4 * (numbers + head), 4 * (numbers + head), 8 * (numbers + head) + 4 * tensors
    after = 4 * (numbers // 2 + head), 4 * (numbers // 2 + head), 8 * (numbers // 2 + head) + 4 * tensors
    assert look.seen == [before] * 9 + [after] * 11
    assert [row.sparsity for row in adapter_rows(run.adapters)] == [0.5] * 3
    assert all(adapter.scale == 2 for adapter in run.adapters)


@pytest.mark.parametrize(
    "spec",
    [LoRASpec(rank=4), LoRAPruneSpec(rank=4), AdaLoRASpec(rank=4), DeLoRASpec(rank=4), PiSSASpec(rank=4)],
    ids=lambda spec: spec.method,
)
def test_the_model_computes_the_same_before_and_after(spec, monkeypatch):
    x, found = torch.randn(5, 6), []
    compact = Compaction.compact

    def watched(self, trainer):
        model = self.adapters.model
        with torch.no_grad():
            before = model(x).logits
            compact(self, trainer)
            found.append((before, model(x).logits))

    monkeypatch.setattr(Compaction, "compact", watched)
    train(spec, controllers(), learning_rate=0.05)
    ((before, after),) = found
    assert relative(after, before) < TOLERANCE


@pytest.mark.parametrize(
    "spec",
    [
        LoRASpec(rank=4),
        LoRASpec(rank=4, lora_bias=True),
        LoRAPruneSpec(rank=4),
        DeLoRASpec(rank=4),
        PiSSASpec(rank=4),
        SVFTSpec(),
    ],
    ids=lambda spec: spec.method,
)
def test_steps_and_moments_after_it_are_those_of_the_run_without_it(spec):
    def rates(adapters, trainer):
        return [group["lr"] for group in trainer.optimizers[0].param_groups]

    looks = [EveryStep(rates), EveryStep(rates)]
    with_it, without = (
        train(copy.deepcopy(spec), controllers(own), extra=[look], weight_decay=0.1, loraplus_ratio=ratio)
        for own, look in zip((True, False), looks, strict=True)
        for ratio in (1 if isinstance(spec, SVFTSpec) else 2,)
    )
    assert looks[0].seen == looks[1].seen
    (ours,), (theirs,) = with_it.trainer.optimizers, without.trainer.optimizers
    for path in LAYERS:
        adapter, other = with_it.adapters.adapters[path], without.adapters.adapters[path]
        index = other.kept.nonzero().flatten()
        assert len(index) == len(adapter.kept) < len(other.kept)
        axes = {name: axis for name, axis in other.components.items()}
        for name, parameter in adapter.named_parameters(recurse=False):
            whole = getattr(other, name)
            own, other_state = ours.state[parameter], theirs.state[whole]
            # A mean of gradients may cancel to almost nothing; a step divides it by a root of squares.
            size = other_state["exp_avg_sq"].sqrt().max()
            pairs = [(parameter, whole, whole.abs().max())]
            pairs += [(own["exp_avg"], other_state["exp_avg"], size)]
            pairs += [(own["exp_avg_sq"], other_state["exp_avg_sq"], other_state["exp_avg_sq"].max())]
            for given, expected, greatest in pairs:
                expected = expected.index_select(axes[name], index) if name in axes else expected
                assert (given - expected).abs().max() < LONG_TOLERANCE * greatest, (path, name)


@pytest.mark.parametrize("stopped", [4, 7, 9, 10, 15])
def test_a_run_resumed_before_or_after_it_equals_the_uninterrupted_one(tmp_path, stopped):
    whole = train(LoRAPruneSpec(rank=4), controllers(), keep="best")
    train(LoRAPruneSpec(rank=4), controllers(), keep="best", stop_after=stopped, folder=tmp_path)
    resumed = train(LoRAPruneSpec(rank=4), controllers(), keep="best", folder=tmp_path, resume=True)
    assert_equal(resumed.adapters, whole.adapters)
    assert all(len(adapter.kept) == 2 for adapter in resumed.adapters)
    assert resumed.checkpoint.best_step == whole.checkpoint.best_step
    assert whole.checkpoint.best_step in (10, 15, 20)


class Takes(Controller):
    """After four steps layer1 is dropped, and layer3 shares the tensors of layer2, half of them silenced."""

    @dataclass
    class Spec(ControllerSpec):
        def needs(self):
            return Prunable

    name = "takes"
    done = False

    @property
    def settled(self):
        return self.done

    def on_train_batch_end(self, trainer, *_):
        if self.step_ended(trainer) and trainer.global_step == 4:
            self.done = True
            self.controlled["layer1"].drop()
            self.adapters.share("layer3", "layer2")
            for path, keep in {
                "layer2": [True, True, False, False],
                "layer3": [False, True, True, False],
            }.items():
                self.controlled[path].keep_components(torch.tensor(keep))
            structure_changed(trainer, self.adapters)

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state_dict):
        self.done = state_dict["done"]


def test_dropped_adapters_vanish_and_shared_tensors_are_sliced_once(register, tmp_path):
    register(Takes)
    both = {"takes": Takes.Spec(), "compaction": CompactionSpec()}
    look = EveryStep(lambda adapters, trainer: [len(adapter.kept) for adapter in adapters])
    whole = train(LoRASpec(rank=4), both, extra=[look])
    # `takes` stands behind compaction here, which acts one step later.
    assert look.seen == [[4, 4, 4]] * 4 + [[0, 3, 3]] * 16
    first, second, third = whole.adapters
    assert second.A is third.A
    assert second.A.shape == (3, 8)
    assert first.A.shape == (0, 6)
    # Two are kept in each; the next steps fill the third again, which the other one keeps.
    assert [int(adapter.kept.sum()) for adapter in whole.adapters] == [0, 2, 2]
    assert [adapter.rank for adapter in whole.adapters] == [0, 3, 3]
    for stopped in (3, 4, 9):
        train(LoRASpec(rank=4), both, stop_after=stopped, folder=tmp_path)
        assert_equal(train(LoRASpec(rank=4), both, folder=tmp_path, resume=True).adapters, whole.adapters)


@pytest.mark.parametrize(
    ("others", "method"),
    [
        ({}, LoRA),
        ({"output_evaluation": OutputEvaluationSpec()}, LoRA),
        ({"dropout_schedule": DropoutScheduleSpec()}, LoRADrop),
    ],
)
def test_it_is_refused_where_no_other_controller_silences_anything(others, method):
    (fault,) = check_controllers({**others, "compaction": CompactionSpec()}, method)
    assert fault.startswith("controllers.compaction: has nothing to compact")
    assert not check_controllers(controllers(), LoRA)
    dropping = {"output_evaluation": OutputEvaluationSpec(share=False), "compaction": CompactionSpec()}
    assert not check_controllers(dropping, LoRA)


def test_it_is_refused_for_methods_without_components():
    faults = check_controllers(controllers(), METHODS["ia3"])
    assert any(
        fault.startswith("controllers.compaction: needs adapters that are Prunable") for fault in faults
    )


@pytest.mark.slow
def test_two_processes_go_through_it_as_one_does(tmp_path):
    given = from_two_processes(__file__, tmp_path)
    expected = train(LoRAPruneSpec(rank=4), controllers()).adapters.state_dict()
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].shape == tensor.shape
        if tensor.is_floating_point():
            assert relative(given[name], tensor) < LONG_TOLERANCE, name


def test_the_embedding_is_among_the_cases():
    assert any(isinstance(adapter, LowRankEmbedding) for adapter in silenced("lora, embedding")[1])


@pytest.mark.parametrize("left", [[0, 3], [1], []])
@pytest.mark.parametrize("spec", [LoRASpec, LoRAPruneSpec, LoRADropSpec, AdaLoRASpec])
def test_sliced_adapters_of_convolutions_compute_train_and_are_stored(spec, left, tmp_path):
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, stride=2, padding=1))

    model, x = make(), torch.randn(2, 3, 7, 6)
    adapters = inject(model, spec(rank=4, targets=["0"], modules_to_save=[]))
    shake(adapters)
    (adapter,) = adapters
    adapter.keep_components(torch.tensor([index in left for index in range(4)]))
    expected = model.eval()(x).detach()
    adapter.select_components(torch.tensor(left, dtype=torch.long))
    assert relative(model(x), expected) < TOLERANCE
    model.train()(x).square().sum().backward()
    assert adapter.A.grad.shape == (len(left), 27)
    save_adapter(adapters, tmp_path / "adapter")
    fresh = make()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert relative(fresh.eval()(x), expected) < TOLERANCE
    assert len(next(iter(loaded)).kept) == len(left)
    with adapters.merged():
        assert relative(model(x), expected) < 1e-5


if __name__ == "__main__":
    hand_back(train(LoRAPruneSpec(rank=4), controllers(), devices=2).adapters.state_dict())
