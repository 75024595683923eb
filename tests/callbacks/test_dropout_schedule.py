"""Dropout schedules: the probability of every step, and what it means for training."""

import itertools
import math

import lightning as L
import pytest
import torch

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.methods.lora_drop import LoRADropSpec
from lora_lab.callbacks.controllers.dropout_schedule import DropoutSchedule, DropoutScheduleSpec
from lora_lab.config.compose import Layer, compose, compose_layers
from lora_lab.errors import ConfigError
from tests.adapters.tiny import linear, relative, shake
from tests.callbacks.controlled import assert_equal, train


def planned(total=11, drop_prob=0.5, **options):
    adapters = inject(linear(), LoRADropSpec(targets=["0"], drop_prob=drop_prob))
    controller = DropoutSchedule(DropoutScheduleSpec(**options), adapters)
    controller.plan(total)
    return controller


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"course": "constant"}, [0.5] * 11),
        ({"course": "constant", "start_prob": 0.2}, [0.2] * 11),
        ({}, [0.5 - 0.05 * step for step in range(11)]),
        ({"start_prob": 0.1, "end_prob": 0.6}, [0.1 + 0.05 * step for step in range(11)]),
        ({"start": 2, "end": 4}, [0.5, 0.5, 0.5, 0.25, 0, 0, 0, 0, 0, 0, 0]),
        ({"start": 0.1, "end": 0.3}, [0.5, 0.5, 0.5, 0.25, 0, 0, 0, 0, 0, 0, 0]),
        (
            {"course": "cosine", "end_prob": 0.1},
            [0.1 + 0.4 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)],
        ),
    ],
)
def test_probability_follows_its_course(options, expected):
    controller = planned(**options)
    assert [controller.probability(step) for step in range(11)] == pytest.approx(expected, abs=1e-12)


class Seen(L.Callback):
    def __init__(self):
        self.probabilities = []

    def on_train_batch_start(self, trainer, module, batch, number):
        self.probabilities.append(next(iter(module.adapters)).drop_prob)


def run(drop_prob=0.6, steps=5, accumulate=2, **options):
    """Trains DropLoRA under a schedule; returns run and probability of each batch."""
    seen = Seen()
    spec = LoRADropSpec(rank=4, drop_prob=drop_prob)
    specs = {"dropout_schedule": DropoutScheduleSpec(**options.pop("schedule", {}))}
    return train(spec, specs, steps, accumulate=accumulate, extra=[seen], **options), seen.probabilities


def test_every_batch_of_a_step_has_the_steps_probability_and_a_resumed_run_goes_on_with_it(tmp_path):
    whole, seen = run(schedule={"end": 4})
    expected = [0.6, 0.45, 0.3, 0.15, 0.0]
    assert seen == pytest.approx([p for p in expected for _ in range(2)])
    assert whole.controllers["dropout_schedule"].settled
    assert whole.controllers["dropout_schedule"].statistics() == {"budget/drop_prob": 0.0}
    run(schedule={"end": 4}, stop_after=2, folder=tmp_path)
    resumed, seen = run(schedule={"end": 4}, folder=tmp_path, resume=True)
    assert seen == pytest.approx([p for p in expected[2:] for _ in range(2)])
    assert_equal(resumed.adapters, whole.adapters)


def test_a_probability_of_zero_is_bitwise_lora_through_a_fit():
    never = {"dropout_schedule": DropoutScheduleSpec(start_prob=0.0)}
    dropping = train(LoRADropSpec(rank=4, drop_prob=0.5), never, 5)
    plain = train(LoRASpec(rank=4), {}, 5)
    assert_equal(dropping.adapters, plain.adapters)
    falling = train(LoRADropSpec(rank=4, drop_prob=0.5), {"dropout_schedule": DropoutScheduleSpec()}, 5)
    assert not torch.equal(next(iter(falling.adapters)).A, next(iter(plain.adapters)).A)


def test_mean_over_all_masks_is_evaluation_at_any_probability(monkeypatch):
    model, x = linear(dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)
    adapters = inject(model, LoRADropSpec(targets=["0"], rank=4, drop_prob=0.5))
    shake(adapters)
    (adapter,) = adapters
    expected = model.eval()(x)
    controller = DropoutSchedule(DropoutScheduleSpec(), adapters)
    controller.plan(11)
    model.train()
    for step in (0, 3, 9):
        adapter.drop_prob = p = controller.probability(step)
        mean = torch.zeros_like(expected)
        for bits in itertools.product([0.0, 1.0], repeat=4):
            mask = torch.tensor(bits, dtype=torch.float64)
            monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p, mask=mask: self.copy_(mask))
            mean += p ** (4 - sum(bits)) * (1 - p) ** sum(bits) * model(x)
        assert relative(mean, expected) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end_prob": 1.0}, r"controllers.dropout_schedule.end_prob: must lie in \[0, 1\); got 1.0"),
        ({"start_prob": -0.1}, r"start_prob: must lie in \[0, 1\); got -0.1"),
        ({"start": -1}, "start: must be at least 0"),
        ({"course": "square"}, "course: must be one of constant, linear, cosine"),
        ({"course": "constant", "end_prob": 0.5}, "constant has no end_prob, start and end; remove them"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        planned(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.5, "end": 5}, "from step 5 to step 5 of a run of 10"),
        ({"end": 10}, "from step 0 to step 10 of a run of 10"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        planned(10, **options)
    planned(8 if "start" in options else 20, **options)


CONFIG = {
    "model": {"name": "random:mlp", "task": "regression"},
    "data": {"source": "toy", "target": "product"},
    "adapter": {"method": "lora_drop", "targets": ["layer1"]},
}


def test_other_methods_are_refused_with_those_that_fit():
    config = {**CONFIG, "adapter": {"method": "lora"}, "controllers": {"dropout_schedule": {}}}
    with pytest.raises(ConfigError, match="RandomlyDropped; .* Methods that are: lora_drop"):
        compose_layers([Layer("test", config)])


# Both had one id before -------------------------------------------------------------------------------------


def test_stored_configs_open_under_the_former_name_and_new_ones_name_todays(tmp_path):
    former = """
model: {name: "random:mlp", task: regression}
data: {source: toy, target: product}
adapter: {method: METHOD, targets: [layer1]}
controllers:
  lora_drop: {strategy: STRATEGY, threshold: 0.75, warmup: 0.1, sample_ratio: 0.1, group_by: role,
    share: true, reinit: true, start_prob: START, end_prob: 0.0, course: linear, start: 0.0, end: null}
"""
    path = tmp_path / "config.yaml"
    path.write_text(
        former.replace("METHOD", "lora").replace("STRATEGY", "output_evaluation").replace("START", "null")
    )
    (name,) = (config := compose(path, stored=True)).controllers
    assert name == "output_evaluation"
    assert config.controllers[name].threshold == 0.75
    text = former.replace("METHOD", "lora_drop").replace("STRATEGY", "stochastic").replace("START", "0.25")
    path.write_text(text)
    (name,) = (config := compose(path, stored=True)).controllers
    assert name == "dropout_schedule"
    assert config.controllers[name].start_prob == 0.25
    with pytest.raises(ConfigError) as error:
        compose(path)
    assert "controllers.lora_drop: no such controller; it is 'output_evaluation' (was strategy: " in str(
        error.value
    )
