"""Rank pruning: the rule at every pruning of real runs, the schedule, what dead components do, resumption."""

from itertools import pairwise

import lightning as L
import numpy as np
import pytest
import torch

from lora_lab.adapters import inject
from lora_lab.adapters.methods.adalora import AdaLoRASpec
from lora_lab.adapters.methods.delora import DeLoRASpec
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.methods.lora_prune import LoRAPruneSpec
from lora_lab.adapters.methods.pissa import PiSSASpec
from lora_lab.adapters.methods.svft import SVFTSpec
from lora_lab.callbacks import check_controllers
from lora_lab.callbacks.controllers.rank_pruning import RankPruning, RankPruningSpec
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.linalg.pruning import l1_importance
from tests.adapters.tiny import linear, relative, shake
from tests.callbacks.controlled import LAYERS, assert_equal, from_two_processes, hand_back, train

RATE = 0.05
SPEC = {"threshold": 0.4, "start": 4, "period": 3, "end": 12}
TOLERANCE = 1e-4
"""Relative to the largest weight, over 20 steps of Adam at the rate above: sums in another order."""


@pytest.fixture
def prunings(monkeypatch):
    """Every pruning of a run: step, and by path A, B and flags before it, and flags after it."""
    found, original = [], RankPruning.prune

    def prune(self):
        before = {
            path: [tensor.detach().double().numpy().copy() for tensor in (own.A, own.B, own.kept)]
            for path, own in self.controlled.items()
        }
        original(self)
        after = {path: own.kept.tolist() for path, own in self.controlled.items()}
        found.append((self._done, before, after))

    monkeypatch.setattr(RankPruning, "prune", prune)
    return found


class EveryStep(L.Callback):
    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.look(pl_module.adapters, trainer))


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("min_rank", [0, 1, 3])
def test_every_flag_of_every_pruning_follows_the_rule(prunings, scope, min_rank):
    spec = RankPruningSpec(**SPEC | {"threshold": 0.6}, scope=scope, min_rank=min_rank)
    run = train(LoRAPruneSpec(rank=5), {"rank_pruning": spec}, learning_rate=RATE)
    assert [step for step, *_ in prunings] == [4, 7, 10]
    died = 0
    for _, before, after in prunings:
        importance = {path: abs(A).sum(1) * abs(B).sum(0) for path, (A, B, _) in before.items()}
        if scope == "model":
            sizes = {path: A.shape[1] * B.shape[0] for path, (A, B, _) in before.items()}
            importance = {path: values / sizes[path] for path, values in importance.items()}
            largest = dict.fromkeys(importance, max(values.max() for values in importance.values()))
        else:
            largest = {path: values.max() for path, values in importance.items()}
        for path, values in importance.items():
            kept = before[path][2].astype(bool)
            expected = kept & (values > 0.6 * largest[path])
            for unit in sorted(np.flatnonzero(kept), key=lambda unit: -values[unit])[:min_rank]:
                expected[unit] = True
            assert after[path] == expected.tolist()
            died += int((kept & ~expected).sum())
    assert died > 0
    assert all(adapter.rank >= min_rank for adapter in run.adapters)
    statistics = run.controllers["rank_pruning"].statistics()
    assert statistics["budget/kept"] == sum(adapter.rank for adapter in run.adapters)
    _, before, after = prunings[-1]
    values = np.concatenate([(abs(A).sum(1) * abs(B).sum(0)) for A, B, _ in before.values()])
    if scope == "layer":
        left = values[np.concatenate(list(after.values()))]
        assert statistics["importance/threshold"] == pytest.approx(left.min(), rel=1e-5)


def pruning_of(spec, fill=None, **options):
    model = linear()
    spec.targets, spec.modules_to_save = ["0"], []
    adapters = inject(model, spec)
    if fill is not None:
        fill(adapters)
    controller = RankPruning(RankPruningSpec(**options), adapters)
    return controller, next(iter(adapters))


def test_nothing_dies_while_nothing_was_learned():
    controller, adapter = pruning_of(LoRASpec(rank=4), threshold=0.9)
    controller.prune()
    assert adapter.kept.all()


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_dies_of_numbers_that_cannot_be_compared(bad, scope):
    controller, adapter = pruning_of(LoRASpec(rank=4), shake, threshold=0.9, scope=scope)
    adapter.B.data[0, 2] = bad
    controller.prune()
    assert adapter.kept.all()


def test_a_second_pruning_of_the_same_numbers_changes_nothing():
    controller, adapter = pruning_of(LoRASpec(rank=8), shake, threshold=0.8)
    controller.prune()
    kept = adapter.kept.clone()
    assert 0 < kept.sum() < 8
    controller.prune()
    assert torch.equal(adapter.kept, kept)


def silent(adapters, trainer):
    """What is left of dead components, how many have died, and the gradients of theirs in this step."""
    left, died, gradients = 0.0, [], 0.0
    for adapter in adapters:
        dead = ~adapter.kept
        died.append(dead.clone())
        left += float(l1_importance(adapter.rank_components())[dead].sum())
        if trainer.global_step > 12:
            for tensor, axis in adapter.rank_components():
                gradients += float(tensor.grad.movedim(axis, 0)[dead].abs().sum())
    return left, torch.cat(died), gradients


@pytest.mark.parametrize(
    "spec",
    [
        LoRAPruneSpec(rank=5),
        LoRASpec(rank=5),
        AdaLoRASpec(rank=5),
        DeLoRASpec(rank=5),
        PiSSASpec(rank=5),
        SVFTSpec(off_diag=2),
    ],
    ids=lambda spec: spec.method,
)
def test_the_dead_stay_exactly_zero_under_momentum_and_decay(spec):
    look = EveryStep(silent)
    options = RankPruningSpec(**SPEC | {"threshold": 0.97})
    train(spec, {"rank_pruning": options}, extra=[look], learning_rate=RATE, weight_decay=0.1)
    assert all(left == 0 for left, *_ in look.seen)
    assert all(gradients == 0 for *_, gradients in look.seen)
    deaths = [dead for _, dead, _ in look.seen]
    assert all((later | ~earlier).all() for earlier, later in pairwise(deaths))
    assert deaths[2].sum() == 0 < deaths[-1].sum()


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"start": 0.2, "period": 0.1, "end": 0.8}, [4, 6, 8, 10, 12, 14, 16]),
        ({"start": 5, "period": 4, "end": 16}, [5, 9, 13]),
        ({"start": 0, "period": 8, "end": 0.99 * 0.9}, [8, 16]),
        ({"start": 6, "period": 1, "end": 6}, [6]),
        ({"start": 3, "period": 0.01, "end": 5}, [3, 4, 5]),
    ],
)
def test_prunings_come_at_the_steps_of_the_schedule_and_then_it_has_settled(prunings, schedule, steps):
    look = EveryStep(lambda adapters, trainer: trainer.callbacks[0].settled)
    train(LoRAPruneSpec(rank=4), {"rank_pruning": RankPruningSpec(**schedule)}, extra=[look])
    assert [step for step, *_ in prunings] == steps
    assert look.seen == [step >= steps[-1] for step in range(1, 21)]


def test_with_accumulated_batches_the_schedule_counts_optimizer_steps(prunings):
    train(LoRAPruneSpec(rank=4), {"rank_pruning": RankPruningSpec(**SPEC)}, accumulate=4)
    assert [step for step, *_ in prunings] == [4, 7, 10]


@pytest.mark.parametrize(
    "schedule",
    [
        {"start": 12, "end": 10},
        {"start": 2, "end": 20},
        {"start": 0, "period": 10, "end": 5},
    ],
)
def test_schedules_that_do_not_fit_the_run_are_refused(schedule):
    controller, _ = pruning_of(LoRASpec(rank=4), **schedule)
    with pytest.raises(ConfigError, match="of a run of 20"):
        controller.plan(20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, r"threshold: must lie in \[0, 1\)"),
        ({"period": 0}, "period: must be above 0"),
        ({"start": -1}, "start: must be at least 0"),
        ({"min_rank": 4}, "min_rank: must be below 4"),
        ({"scope": "whole"}, "scope: must be one of layer, model"),
    ],
)
def test_options_at_fault_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        pruning_of(LoRASpec(rank=4), **options)


def test_methods_that_cannot_be_pruned_are_refused():
    from lora_lab.adapters.methods.ia3 import IA3, IA3Spec

    (fault,) = check_controllers({"rank_pruning": RankPruningSpec()}, IA3)
    assert "needs adapters that are Prunable" in fault
    with pytest.raises(IncompatibleError, match="lora_prune"):
        RankPruning(RankPruningSpec(), inject(linear(), IA3Spec(targets=["0"], modules_to_save=[])))


@pytest.mark.parametrize("stopped", [2, 5, 10, 14])
@pytest.mark.parametrize("spec", [LoRAPruneSpec, LoRASpec])
def test_a_run_resumed_within_the_schedule_equals_the_uninterrupted_one(tmp_path, spec, stopped):
    controllers = {"rank_pruning": RankPruningSpec(**SPEC)}
    options = {"learning_rate": RATE, "weight_decay": 0.1}
    whole = train(spec(rank=5), controllers, **options)
    train(spec(rank=5), controllers, stop_after=stopped, folder=tmp_path, **options)
    resumed = train(spec(rank=5), controllers, folder=tmp_path, resume=True, **options)
    assert_equal(resumed.adapters, whole.adapters)
    ours, theirs = (run.controllers["rank_pruning"] for run in (resumed, whole))
    assert ours.statistics() == theirs.statistics()
    assert ours.settled
    assert ours.statistics()["budget/kept"] < 15


def test_only_validations_after_the_last_pruning_count_for_the_best():
    run = train(LoRAPruneSpec(rank=5), {"rank_pruning": RankPruningSpec(**SPEC)}, keep="best")
    assert run.checkpoint.best_step in (10, 15, 20)


def pruned(devices=1):
    return train(
        LoRAPruneSpec(rank=5),
        {"rank_pruning": RankPruningSpec(**SPEC)},
        devices=devices,
        learning_rate=RATE,
        weight_decay=0.1,
    ).adapters.state_dict()


@pytest.mark.slow
def test_two_processes_prune_as_one_does(tmp_path):
    given, expected = from_two_processes(__file__, tmp_path), pruned()
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            assert relative(given[name], tensor) < TOLERANCE, name
        else:
            assert torch.equal(given[name], tensor), name
    assert sum(int((~expected[f"{layer}.kept"]).sum()) for layer in LAYERS) > 0


if __name__ == "__main__":
    hand_back(pruned(devices=2))
