"""AdaLoRA's budget on real runs: against PEFT's allocator, worked numbers, and what fails in PEFT."""

import itertools
import json
import math
from contextlib import suppress
from dataclasses import dataclass

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn import functional as F

from lora_lab import compose, run
from lora_lab.adapters import METHODS, AdapterSet, inject
from lora_lab.adapters.protocols import RankAllocatable
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.callbacks import check_controllers
from lora_lab.callbacks.adapter_statistics import AdapterStatistics
from lora_lab.callbacks.controllers.importance_pruning import ImportancePruning, ImportancePruningSpec
from lora_lab.callbacks.resume_checkpoint import ResumeCheckpoint
from lora_lab.data import ToyConfig, build_data
from lora_lab.errors import ConfigError, IncompatibleError, LabError
from lora_lab.linalg.pruning import l1_importance
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.tracking import MetricsFile, read_metrics
from lora_lab.training.module import FineTuner
from lora_lab.training.optimization import OptimizationConfig
from lora_lab.training.trainer import TrainerConfig, trainer_arguments
from tests.adapters.tiny import tiny_bert
from tests.tracked_run import train as train_on_text
from tests.two_processes import COMMAND, run_in_two_processes

STEPS = 40
ADAPTED = ["layer1", "layer2", "layer3"]
SCHEDULE = {"target_rank": 3, "tinit": 4, "tfinal": 10, "deltaT": 2}
"""Of runs of 40 steps: decisions at t = 6, 8, …, 28, the last one at t = 30."""
LAST = STEPS - SCHEDULE["tfinal"]


class Stopped(Exception):
    pass


class Recorder(L.Callback):
    """Keeps what stands in the adapters after every step, and stops or saves a checkpoint where told."""

    def __init__(self, adapters, folder=None, save_at=None, stop_at=None):
        self.adapters, self.folder, self.save_at, self.stop_at = adapters, folder, save_at, stop_at
        self.flags: dict[int, list[list[bool]]] = {}

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.save_at:
            self.save_at = None
            trainer.save_checkpoint(self.folder / "saved.ckpt")

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step:  # of the batches of one step the last has the last word
            self.flags[trainer.global_step - 1] = [adapter.kept.tolist() for adapter in self.adapters]
        if trainer.global_step == self.stop_at:
            raise Stopped


class Trajectory(L.Callback):
    """Keeps weights and gradients before clipping of every step, as they are before the controller acts."""

    def __init__(self, adapters):
        self.adapters = adapters
        self.steps: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
        self.clipped = 0
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, *_):
        named = self.adapters.named_parameters().items()
        self.gradients = {name: p.grad.clone() for name, p in named}

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop._should_accumulate():
            return  # more batches of this step are to come
        named = self.adapters.named_parameters().items()
        self.steps.append({name: (p.detach().clone(), self.gradients[name]) for name, p in named})
        self.clipped += any(not torch.equal(p.grad, self.gradients[name]) for name, p in named)


@dataclass
class Fitted:
    adapters: AdapterSet
    controller: ImportancePruning
    module: FineTuner
    trainer: L.Trainer
    recorder: Recorder
    trajectory: Trajectory

    @property
    def kept(self) -> int:
        return sum(int(adapter.kept.sum()) for adapter in self.adapters)


def model_of_four_layers():
    config = ModelConfig(name="random:mlp", task="regression", config={"sizes": [10, 12, 14, 12]})
    torch.manual_seed(0)
    return build_model(config, 1)


def fit(
    folder,
    method="adalora",
    adapter=None,
    steps=STEPS,
    batch=8,
    accumulate=1,
    clip=1.0,
    precision="32-true",
    resume=False,
    save_at=None,
    stop_at=None,
    extra=lambda adapters, controller: [],
    optimization=None,
    statistics=False,
    **options,
) -> Fitted:
    """Trains on the toy data; `options` are the controller's.

    Args:
        statistics: logs those of adapters and controller, which takes most of such a run's time.
    """
    L.seed_everything(0, verbose=False)
    model = model_of_four_layers()
    size = ToyConfig(size=10 * 16, batch_size=batch, bucket_by_length=False)
    data = build_data(size, None, "regression", 0)
    sizes = {} if method == "svft" else {"rank": 6}
    spec = METHODS[method].Spec(
        **{"targets": ADAPTED, "modules_to_save": ["layer4"], **sizes, **(adapter or {})}
    )
    adapters = inject(model, spec)
    rates = OptimizationConfig(**{"learning_rate": 0.02, "warmup": 0.0, **(optimization or {})})
    module = FineTuner(model.train(), adapters, "regression", 1, rates)
    controller = ImportancePruning(ImportancePruningSpec(**{**SCHEDULE, **options}), adapters)
    config = TrainerConfig(
        max_epochs=1000,
        max_steps=steps,
        log_every=2,
        accumulate=accumulate,
        progress_bar=False,
        accelerator="cpu",
    )
    arguments = trainer_arguments(config, clip)
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        arguments |= {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "precision": None}
    elif precision != "32-true":
        arguments["precision"] = precision
    recorder, trajectory = Recorder(adapters, folder, save_at, stop_at), Trajectory(adapters)
    trainer = L.Trainer(
        **arguments,
        callbacks=[
            trajectory,
            controller,
            recorder,
            *extra(adapters, controller),
            *([AdapterStatistics(adapters, [controller])] if statistics else []),
            ResumeCheckpoint(folder / "never.ckpt", 10**9),
        ],
        logger=MetricsFile(folder),
        default_root_dir=folder,
    )
    with suppress(Stopped):
        checkpoint = folder / "saved.ckpt" if resume else None
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return Fitted(adapters, controller, module, trainer, recorder, trajectory)


def controller_on(adapters, steps=STEPS, **options):
    controller = ImportancePruning(ImportancePruningSpec(**options), adapters)
    controller.plan(steps)
    return controller


def two_matrices(**options):
    model = model_of_four_layers()
    spec = METHODS["adalora"].Spec(targets=["layer1", "layer2"], modules_to_save=[], **{"rank": 6, **options})
    return inject(model, spec)


# The numbers ----------------------------------------------------------------------------------------------


def test_budget_falls_as_in_the_worked_example():
    """Two matrices, 6 → 3 components each, 30 steps, tinit 5, tfinal 8."""
    controller = controller_on(two_matrices(), 30, target_rank=3, tinit=5, tfinal=8, deltaT=2)
    assert [controller.budget(t) for t in range(5, 15)] == [12, 11, 10, 9, 8, 8, 7, 7, 6, 6]
    assert [controller.budget(t) for t in (0, 4, 22, 23, 29)] == [12, 12, 6, 6, 6]


def test_decisions_come_at_the_steps_of_the_worked_example(tmp_path):
    fitted = fit(tmp_path, adapter={"targets": ["layer1", "layer2"]}, steps=30, tinit=5, tfinal=8)
    kept = [sum(map(sum, flags)) for flags in fitted.recorder.flags.values()]
    assert kept[:16] == [12] * 6 + [11, 11, 9, 9, 8, 8, 7, 7, 6, 6]
    assert kept[16:] == [6] * 14


def test_adapters_reach_pefts_masks_at_every_step(tmp_path):
    """Every flag of 40 steps, on the weights and gradients of a real run."""
    fitted = fit(tmp_path, adapter={"rank": 12}, batch=2, target_rank=4)
    config = peft.AdaLoraConfig(
        init_r=12, target_r=4, tinit=4, tfinal=10, deltaT=2, total_step=STEPS, target_modules=ADAPTED
    )
    theirs = peft.get_peft_model(model_of_four_layers(), config).base_model
    compared = 0
    for step, numbers in enumerate(fitted.trajectory.steps):
        for path, name in itertools.product(fitted.adapters.adapters, "AEB"):
            weight, gradient = numbers[f"{path}.{name}"]
            tensor = getattr(theirs.model.get_submodule(path), f"lora_{name}")["default"]
            tensor.data.copy_(weight.view(tensor.shape))
            tensor.grad = gradient.view(tensor.shape)
        theirs.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern
        for path, flags in zip(fitted.adapters.adapters, fitted.recorder.flags[step], strict=True):
            if step < 6:
                assert pattern is None
                assert all(flags)
            else:
                assert flags == pattern[f"{path}.lora_E.default"], (step, path)
                compared += len(flags)
    assert compared == (STEPS - 6) * 3 * 12
    shares = [sorted(map(sum, flags)) for flags in fitted.recorder.flags.values()]
    assert any(share[0] < share[-1] for share in shares[6:])  # adapters are told apart


def test_averages_are_those_of_the_definition(tmp_path):
    """I and U from the recorded |p g|, one number at a time in Python's float64."""
    fitted = fit(tmp_path, stop_at=9, clip=0.05)
    assert fitted.trajectory.clipped == 9  # and yet the gradients are those of the loss
    averages = fitted.controller.state_dict()["averages"]
    names = [f"{path}.{name}" for path in fitted.adapters.adapters for name in "AEB"]
    assert sorted(averages["sensitivity"]) == sorted(averages["uncertainty"]) == sorted(names)
    for name in names:
        mean = uncertainty = torch.zeros_like(averages["sensitivity"][name]).double()
        for numbers in fitted.trajectory.steps:
            weight, gradient = (tensor.double() for tensor in numbers[name])
            now = (weight * gradient).abs()
            mean = 0.85 * mean + 0.15 * now
            uncertainty = 0.85 * uncertainty + 0.15 * (now - mean).abs()
        for kind, expected in {"sensitivity": mean, "uncertainty": uncertainty}.items():
            assert (averages[kind][name] - expected).abs().max() < 1e-6 * expected.max()


@pytest.mark.parametrize(("tfinal", "measured"), [(10, 30), (1, 39), (0, 40)])
def test_the_last_decision_weighs_the_steps_before_it(tmp_path, monkeypatch, tfinal, measured):
    """As PEFT's does; at the run's last step that step counts too."""
    calls, measure = [], ImportancePruning.measure
    monkeypatch.setattr(ImportancePruning, "measure", lambda self: calls.append(1) or measure(self))
    fit(tmp_path, tfinal=tfinal)
    assert len(calls) == measured


def test_a_score_is_the_sum_of_the_means_of_its_parts():
    adapters = two_matrices(rank_pattern={"layer2": 4})
    controller = controller_on(adapters, target_rank=2)
    for seed, parameter in enumerate(adapters.trainable_parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    controller.measure()
    controller.measure()
    averages = controller.state_dict()["averages"]
    expected = []
    for path, adapter in adapters.items():
        s = {
            n: averages["sensitivity"][f"{path}.{n}"] * averages["uncertainty"][f"{path}.{n}"] for n in "AEB"
        }
        for i in range(len(adapter.kept)):
            expected.append(s["E"][i] + s["A"][i].mean() + s["B"][:, i].mean())
    torch.testing.assert_close(controller.scores(), torch.stack(expected), rtol=1e-6, atol=0)


def test_magnitude_and_norm_are_those_of_the_formulas():
    adapters = two_matrices()
    with torch.no_grad():
        for number, adapter in enumerate(adapters):
            adapter.E.copy_(torch.randn(6, generator=torch.Generator().manual_seed(number)))
    lengths = [adapter.B.norm(dim=0) * adapter.A.norm(dim=1) for adapter in adapters]
    strengths = [adapter.E.abs() for adapter in adapters]
    magnitude = controller_on(adapters, target_rank=2, importance="magnitude").scores()
    torch.testing.assert_close(magnitude, torch.cat(strengths))
    norm = controller_on(adapters, target_rank=2, importance="norm", norm_weight=0.3).scores()
    torch.testing.assert_close(norm, torch.cat(strengths) + 0.3 * torch.cat(lengths))


def test_magnitude_and_norm_without_a_coefficient_are_those_of_the_vectors():
    adapters = inject(tiny_bert(), METHODS["lora"].Spec(targets=["query", "word_embeddings"], rank=4))
    for number, parameter in enumerate(adapters.trainable_parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    magnitude = controller_on(adapters, target_rank=2, importance="magnitude").scores()
    torch.testing.assert_close(magnitude, torch.cat([l1_importance(a.rank_components()) for a in adapters]))
    lengths = [adapter.B.norm(dim=0) * adapter.A.norm(dim=1) for adapter in adapters]
    norm = controller_on(adapters, target_rank=2, importance="norm").scores()
    torch.testing.assert_close(norm, torch.cat(lengths))


@pytest.mark.parametrize("importance", ["magnitude", "norm"])
def test_runs_end_with_the_target_whatever_the_importance(tmp_path, importance):
    fitted = fit(tmp_path, importance=importance)
    assert fitted.kept == 9
    assert fitted.controller.state_dict()["averages"] == {}


def test_half_precision_numbers_are_averaged_in_single():
    adapters = two_matrices()
    for adapter in adapters:
        adapter.half()
    for parameter in adapters.trainable_parameters():
        parameter.data = torch.full_like(parameter, 1e-3)
        parameter.grad = torch.full_like(parameter, 1e-3)
    controller = controller_on(adapters, target_rank=2)
    controller.measure()
    scores = controller.scores()
    assert scores.dtype == torch.float32
    assert (scores > 0).all()
    expected = 3 * (0.15 * 1e-6) * (0.15 * 0.85 * 1e-6)
    assert scores.tolist() == pytest.approx(
        [expected] * 12, rel=2e-3
    )  # half's own rounding of 1e-3, four times


# The target -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_target_is_reached_exactly(tmp_path, precision, method):
    fitted = fit(tmp_path, method, precision=precision)
    assert fitted.kept == 9
    assert fitted.trainer.precision == precision
    for adapter in fitted.adapters:
        silenced = adapter.E[~adapter.kept] if method == "adalora" else adapter.B[:, ~adapter.kept]
        assert not silenced.any()
    assert fitted.trajectory.steps[-1]["layer1.A"][0].dtype == torch.float32


def test_gradients_are_unscaled_when_they_are_measured(tmp_path):
    """Under 16-mixed the loss is multiplied by 1024; |p g| of the first step must not be."""
    single = fit(tmp_path, stop_at=1).controller.state_dict()["averages"]["sensitivity"]
    half = fit(tmp_path, precision="16-mixed", stop_at=1).controller.state_dict()["averages"]["sensitivity"]
    for name, values in single.items():
        assert half[name].sum() == pytest.approx(float(values.sum()), rel=0.02), name


@pytest.mark.parametrize(
    ("tinit", "tfinal", "decided"), [(0, 0, 39), (39, 0, 39), (0, 1, 39), (38, 1, 39), (0, 39, 1)]
)
def test_the_last_decision_is_made_whatever_the_schedule(tmp_path, tinit, tfinal, decided):
    fitted = fit(tmp_path, tinit=tinit, tfinal=tfinal, deltaT=100)
    kept = [sum(map(sum, flags)) for flags in fitted.recorder.flags.values()]
    assert kept == [18] * decided + [9] * (STEPS - decided)
    assert fitted.controller.settled


def test_ties_keep_exactly_the_budget():
    """All scores equal, all of them 0, and one that stands out: the first of equals are kept."""
    adapters = two_matrices()
    controller = controller_on(adapters, target_rank=3)
    for parameter in adapters.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    controller.measure()
    for budget in (12, 7, 6, 1):
        controller.allocate(budget)
        assert [flag for adapter in adapters for flag in adapter.kept.tolist()] == [
            i < budget for i in range(12)
        ]
    second = list(adapters)[1]
    second.E.data.fill_(1.0)
    second.E.grad[4] = 1.0
    controller.measure()
    controller.allocate(3)
    assert [i for i, flag in enumerate(f for a in adapters for f in a.kept.tolist()) if flag] == [0, 1, 10]


def test_a_rank_that_is_the_target_already_prunes_nothing(tmp_path):
    fitted = fit(tmp_path, target_rank=6)
    assert all(all(map(all, flags)) for flags in fitted.recorder.flags.values())


def test_a_target_above_the_start_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="target_rank: 7 for each of 3 adapters makes 21 components; .* 18"):
        fit(tmp_path, target_rank=7)
    assert (
        fit(tmp_path, adapter={"rank_pattern": {"layer1": 9}}, target_rank=7, stop_at=1).controller.target
        == 21
    )


def test_silenced_components_may_come_back_until_the_last_decision(tmp_path):
    # Steps so long that a silenced component has grown enough when the next decision comes.
    steps = {"optimization": {"learning_rate": 0.1}, "deltaT": 1, "beta1": 0.3, "beta2": 0.3}
    flags = fit(tmp_path, adapter={"orth_reg_weight": 0.0}, **steps).recorder.flags
    rows = [[flag for adapter in flags[step] for flag in adapter] for step in sorted(flags)]
    came_back = [
        step
        for step in range(1, STEPS)
        if any(now and not before for now, before in zip(rows[step], rows[step - 1], strict=True))
    ]
    assert came_back
    assert max(came_back) <= LAST
    assert all(row == rows[LAST] for row in rows[LAST:])


def test_weight_decay_and_momentum_do_not_revive_what_is_silenced_for_good(tmp_path):
    fitted = fit(tmp_path, "delora", optimization={"weight_decay": 0.1})
    before = fitted.trajectory.steps[-1]  # after the optimizer's step
    for path, adapter in fitted.adapters.items():
        if not adapter.kept.all():
            assert before[f"{path}.B"][0][:, ~adapter.kept].any()
        assert not adapter.B[:, ~adapter.kept].any()


def test_settled_means_that_the_last_decision_is_made(tmp_path):
    class Settled(L.Callback):
        def __init__(self, controller):
            self.controller, self.seen = controller, []

        def on_train_batch_end(self, *_):
            self.seen.append(self.controller.settled)

    seen = []
    fit(tmp_path, extra=lambda adapters, controller: seen.append(Settled(controller)) or seen)
    assert seen[0].seen == [step >= LAST for step in range(STEPS)]


# What fails in PEFT ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Fitted:
    """A run without interruption."""
    return fit(tmp_path_factory.mktemp("whole"), adapter={"dropout": 0.2}, statistics=True)


@pytest.mark.parametrize("saved", [3, 15, LAST, LAST + 1, 35])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, saved, whole):
    """In the warm-up, while the budget falls, on either side of the last decision, and after it."""
    options = {"adapter": {"dropout": 0.2}, "statistics": saved == 15}
    fit(tmp_path, save_at=saved, stop_at=saved + 3, **options)
    resumed = fit(tmp_path, resume=True, **options)
    assert min(resumed.recorder.flags) == saved
    for step, flags in resumed.recorder.flags.items():
        assert flags == whole.recorder.flags[step], step
    expected = whole.adapters.state_dict()
    for name, tensor in resumed.adapters.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert resumed.controller.statistics() == whole.controller.statistics()
    assert resumed.kept == 9


def test_a_checkpoint_holds_the_averages_by_name_and_none_of_them_in_the_end(tmp_path):
    fit(tmp_path, save_at=15, stop_at=16)
    states = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["ImportancePruning"]
    assert states["averages"]["sensitivity"]["layer2.B"].shape == (14, 6)
    fit(tmp_path, save_at=35, stop_at=36)
    states = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["ImportancePruning"]
    assert states["averages"] == {}


def test_a_fit_shorter_than_the_schedule_is_refused_before_it_starts(tmp_path):
    with pytest.raises(
        ConfigError, match="tinit ends at step 30 and tfinal begins at step 30 of a run of 40"
    ):
        fit(tmp_path, tinit=30)
    with pytest.raises(ConfigError, match="tfinal begins at step -10 of a run of 40"):
        fit(tmp_path, tfinal=50)
    with pytest.raises(
        ConfigError, match="tinit ends at step 20 and tfinal begins at step 20 of a run of 40"
    ):
        fit(tmp_path, tinit=0.5, tfinal=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [20, 30])
def test_a_fit_that_is_stopped_before_its_last_decision_says_so(tmp_path, stop):
    class Enough(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= stop

    with pytest.raises(LabError, match=f"after {stop} of 40 steps; the 9 components .* after step 31"):
        fit(tmp_path, extra=lambda adapters, controller: [Enough()])


@pytest.mark.parametrize(
    ("where", "value", "clip"),
    [
        ("layer2.A", math.inf, 1.0),
        ("layer2.A", math.nan, None),
        ("layer4.trained.weight", math.inf, 1.0),
        ("layer4.trained.weight", math.inf, None),
    ],
)
def test_a_step_of_infinite_gradients_leaves_the_averages_alone(tmp_path, where, value, clip):
    """Mixed precision skips such a step; if it is a head's alone, clipping turns the adapters' to 0."""
    averages = []

    class Overflow(L.Callback):
        def __init__(self, adapters, controller):
            self.controller = controller
            self.parameter = adapters.named_parameters()[where]

        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 12:
                self.parameter.grad[0] = value

        def on_train_batch_end(self, *_):
            averages.append(self.controller.state_dict()["averages"])

    fitted = fit(
        tmp_path, precision="16-mixed", clip=clip, extra=lambda *parts: [Overflow(*parts)], deltaT=1, tinit=1
    )
    before, after = averages[11:13]
    for kind, name in itertools.product(before, before["sensitivity"]):
        assert torch.equal(before[kind][name], after[kind][name])
        assert not torch.equal(averages[13][kind][name], after[kind][name])
    assert fitted.kept == 9
    assert fitted.controller.statistics()["budget/threshold"] > 0


def test_logged_losses_are_the_tasks_alone(tmp_path):
    """The penalty moves the weights, yet stands in its own column, and in no validation."""
    expected = {}

    class Check(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                predicted = pl_module(batch).reshape(-1)
            expected[trainer.global_step] = float(F.mse_loss(predicted, batch["labels"].reshape(-1)))

        def on_validation_end(self, trainer, pl_module):
            data = trainer.datamodule.splits["validation"].examples
            with torch.no_grad():
                predicted = pl_module({"features": data.features})
            expected["validation"] = float(F.mse_loss(predicted, data.labels))

    fit(tmp_path, extra=lambda adapters, controller: [Check()])
    rows = read_metrics(tmp_path)
    logged = {row["step"]: row for row in rows if row.get("train/loss") is not None}
    assert len(logged) == STEPS // 2
    for step, row in logged.items():
        assert row["train/loss"] == pytest.approx(expected[step], rel=1e-5)
        assert row["train/penalty"] > 0.1
    validations = [row["validation/loss"] for row in rows if row.get("validation/loss") is not None]
    assert validations[-1] == pytest.approx(expected["validation"], rel=1e-5)


def test_statistics_stand_in_the_rows_of_the_loss(tmp_path):
    fitted = fit(tmp_path, statistics=True)
    rows = {row["step"]: row for row in read_metrics(tmp_path) if row.get("train/loss") is not None}
    assert rows[1]["budget/total"] == rows[1]["budget/kept"] == 18
    assert "importance/mean" not in rows[1] or rows[1]["importance/mean"] is None
    assert rows[15]["budget/total"] == fitted.controller.budget(15)
    assert rows[15]["budget/kept"] == fitted.controller.budget(14)
    each = [rows[15][f"importance/{path}"] for path in ADAPTED]
    assert rows[15]["importance/mean"] == pytest.approx(sum(each) / 3)
    assert 0 < rows[15]["budget/threshold"] < max(each)
    assert rows[39]["budget/total"] == rows[39]["budget/kept"] == 9
    assert rows[39]["importance/layer2"] == rows[LAST + 1]["importance/layer2"]


def test_accumulated_steps_equal_whole_ones(tmp_path):
    """The penalty counts once and not once a batch; steps are counted and not batches."""
    whole, parts = fit(tmp_path, batch=16), fit(tmp_path, batch=4, accumulate=4)
    assert parts.trainer.global_step == STEPS
    assert parts.recorder.flags == whole.recorder.flags
    expected = whole.adapters.state_dict()
    for name, tensor in parts.adapters.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


# Every method, every place --------------------------------------------------------------------------------

FITTING = sorted(name for name, method in METHODS.items() if issubclass(method, RankAllocatable))
OPTIONS = {
    **dict.fromkeys(FITTING, ({}, 18)),
    "pissa residual": ({"mode": "residual"}, 18),
    "svft": ({"pattern": "banded"}, (3 * 10 - 2) + 2 * (3 * 12 - 2)),
}


def test_the_methods_that_fit_are_these():
    assert FITTING == ["adalora", "delora", "lora", "lora_drop", "pissa", "svft"]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_method_that_fits_reaches_the_target_and_is_stored_so(tmp_path, name):
    method, (options, count) = name.partition(" ")[0], OPTIONS[name]
    fitted = fit(tmp_path, method, options)
    assert fitted.controller.stacks.count == count
    assert fitted.kept == 9
    kept = [sum(map(sum, flags)) for flags in fitted.recorder.flags.values()]
    assert kept[0] == count
    assert sorted(kept, reverse=True) == kept
    decided = [step for step in range(LAST) if step > 4 and step % 2 == 0]
    assert [kept[step] for step in decided] == [fitted.controller.budget(step) for step in decided]
    features = torch.randn(5, 10)
    model = fitted.module.model.eval()
    expected = model(features=features).logits
    save_adapter(fitted.adapters, tmp_path / "stored", "random:mlp", "SEQ_CLS")
    fresh = model_of_four_layers().eval()
    load_adapter(fresh, tmp_path / "stored")
    torch.testing.assert_close(fresh(features=features).logits, expected, rtol=1e-5, atol=1e-5)
    with fitted.adapters.merged() as merged:
        torch.testing.assert_close(merged(features=features).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_shares_the_budget():
    spec = METHODS["lora"].Spec(targets=["word_embeddings", "query", "value"], rank=4)
    model = tiny_bert(vocab_size=120)
    held = []

    class Late(L.Callback):
        """Makes the controller when the adapters exist, which `train` makes itself."""

        def setup(self, trainer, pl_module, stage):
            options = ImportancePruningSpec(target_rank=2, tinit=2, tfinal=4, deltaT=1)
            held.append(ImportancePruning(options, pl_module.adapters))
            trainer.callbacks.append(held[0])

    done = train_on_text(model, spec, batches=14, extra=[Late()])
    kept = {path: int(adapter.kept.sum()) for path, adapter in done.adapters.items()}
    assert len(kept) == 5
    assert sum(kept.values()) == 10
    assert "bert.embeddings.word_embeddings" in kept
    assert held[0].settled


@pytest.mark.parametrize("method", ["dylora", "lora_prune", "hra"])
def test_methods_whose_components_cannot_come_back_are_refused(method):
    message = (
        f"controllers.importance_pruning: needs adapters that are RankAllocatable; those of method '{method}'"
    )
    (found,) = check_controllers({"importance_pruning": ImportancePruningSpec()}, METHODS[method])
    assert found.startswith(message)
    assert found.endswith("Methods that are: adalora, delora, lora, lora_drop, pissa, svft")
    adapters = inject(model_of_four_layers(), METHODS[method].Spec(targets=["layer2"], modules_to_save=[]))
    with pytest.raises(IncompatibleError, match=message):
        ImportancePruning(ImportancePruningSpec(), adapters)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"target_rank": 0}, "target_rank: must be at least 1; got 0"),
        ({"tinit": -1}, "tinit: must be at least 0; got -1"),
        ({"tfinal": math.nan}, "tfinal: must be at least 0; got nan"),
        ({"deltaT": 0}, "deltaT: must be at least 1; got 0"),
        ({"beta1": 1.0}, r"beta1: must lie in \(0, 1\); got 1.0"),
        ({"beta2": 0.0}, r"beta2: must lie in \(0, 1\); got 0.0"),
        ({"importance": "size"}, "importance: must be one of sensitivity, magnitude, norm; got 'size'"),
        ({"norm_weight": 0.0}, "norm_weight: must be finite and above 0; got 0.0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, fault):
    with pytest.raises(ConfigError, match=f"controllers.importance_pruning.{fault}"):
        controller_on(two_matrices(), **options)


def test_pefts_name_of_the_target_is_told_to_be_ours(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text("name: x\ncontrollers: {importance_pruning: {target_r: 4}}\n")
    with pytest.raises(ConfigError, match="importance_pruning.target_r: .*it is called 'target_rank' here"):
        compose(path)


# Sliced adapters ------------------------------------------------------------------------------------------


class Slicing(L.Callback):
    """Takes the silenced components out once no more will come, with their moments and gradients."""

    def __init__(self, adapters, controller):
        self.adapters, self.controller = adapters, controller

    def on_train_batch_end(self, trainer, *_):
        if not self.controller.settled:
            return
        (optimizer,) = trainer.optimizers
        for adapter in self.adapters:
            index = adapter.kept.nonzero().flatten()
            for tensor, axis in adapter.rank_components():
                for name in ("exp_avg", "exp_avg_sq"):
                    moment = optimizer.state[tensor][name]
                    optimizer.state[tensor][name] = moment.index_select(axis, index)
                tensor.grad = None
            adapter.select_components(index)


@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_slicing_changes_nothing_and_is_resumed(tmp_path, method):
    """AdaLoRA's penalty and scale see all components, so no penalty here."""
    options = {"adapter": {"orth_reg_weight": 0.0} if method == "adalora" else {}, "clip": None}
    sliced = {**options, "extra": lambda *parts: [Slicing(*parts)]}
    (tmp_path / "plain").mkdir()
    plain, compact = fit(tmp_path / "plain", method, **options), fit(tmp_path, method, **sliced)
    assert sum(len(adapter.kept) for adapter in compact.adapters) == compact.kept == 9
    features = torch.randn(7, 10)
    torch.testing.assert_close(
        compact.module.model(features=features).logits, plain.module.model(features=features).logits
    )
    fit(tmp_path, method, save_at=35, stop_at=37, **sliced)
    resumed = fit(tmp_path, method, resume=True, **sliced)
    expected = compact.adapters.state_dict()
    for name, tensor in resumed.adapters.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert resumed.controller.settled
    assert resumed.controller.statistics() == compact.controller.statistics()


# Processes ------------------------------------------------------------------------------------------------

DISTRIBUTED = """
name: distributed
model: {name: "random:mlp", task: regression}
data: {source: toy, target: product, size: 160, evaluation_batch_size: 7}
adapter: {method: adalora, rank: 6, targets: [layer1, layer2], modules_to_save: [layer3]}
controllers: {importance_pruning: {target_rank: 4, tinit: 3, tfinal: 8, deltaT: 2}}
optimization: {learning_rate: 0.01}
trainer: {max_epochs: 3, log_every: 1, checkpoint_every: 5, progress_bar: false, accelerator: cpu}
tracking: {wandb: disabled}
"""


def test_the_first_process_decides_for_all(monkeypatch):
    adapters = two_matrices()
    controller = controller_on(adapters, target_rank=2, importance="norm")
    told = torch.arange(12) % 3 == 0
    module = "lora_lab.callbacks.controllers.importance_pruning"
    monkeypatch.setattr(f"{module}.from_first_process", lambda flags: told)
    controller.allocate(4)
    assert torch.equal(torch.cat([adapter.kept for adapter in adapters]), told)


@pytest.mark.slow
def test_two_processes_make_the_decisions_of_one_with_the_doubled_batch(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(DISTRIBUTED)
    one = run(compose(path, ["data.batch_size=16", f"output={tmp_path}", "run=one"])).folder.path
    settings = [f"output={tmp_path}", "run=two", "data.batch_size=8", "trainer.devices=2"]
    run_in_two_processes(COMMAND, tmp_path, "train", str(path), *settings)
    two = tmp_path / "distributed" / "two"
    patterns = [
        json.loads((f / "adapter" / "adapter_config.json").read_text())["rank_pattern"] for f in (one, two)
    ]
    assert patterns[0] == patterns[1]
    assert sum(map(sum, patterns[0].values())) == 8
    compared = 0
    for ours, theirs in zip(read_metrics(one), read_metrics(two), strict=True):
        for name, value in ours.items():
            if name.startswith("budget/t") or name.startswith("importance/"):
                assert theirs[name] == pytest.approx(value, rel=1e-3), (ours["step"], name)
                compared += 1
    assert compared > 100
