"""Output evaluation: adapters kept, shared and dropped by what they add to outputs."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import lightning as L
import pandas as pd
import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from lora_lab import experiment
from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.methods.dylora import DyLoRASpec
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.methods.lora_drop import LoRADropSpec
from lora_lab.adapters.methods.pissa import PiSSASpec
from lora_lab.adapters.protocols import Droppable
from lora_lab.adapters.storage import OWN, TENSORS, load_adapter, save_adapter
from lora_lab.callbacks.controllers.output_energy import output_energy
from lora_lab.callbacks.controllers.output_evaluation import OutputEvaluation, OutputEvaluationSpec
from lora_lab.callbacks.controllers.rank_switching import RankSwitchingSpec
from lora_lab.callbacks.resume_checkpoint import ResumeCheckpoint
from lora_lab.config.compose import Layer, compose, compose_layers
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from lora_lab.experiment import build_parts
from lora_lab.models.build import build_model
from lora_lab.tracking import read_metrics
from lora_lab.training.module import FineTuner
from lora_lab.training.trainer import trainer_arguments
from tests.adapters.tiny import linear, relative, shake
from tests.callbacks.controlled import train
from tests.two_processes import COMMAND, run_in_two_processes

TOLERANCE = 1e-6  # float32, relative to the greatest number
ROWS, BATCH = 64, 6
STEPS = math.ceil(ROWS / BATCH)
"""The last of them has four rows; of two processes each takes two of these."""
WARMUP = 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """64 short texts of unequal length, three quarters of them negative."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(ROWS + 24):
        length = int(torch.randint(3, 14, (1,), generator=generator))
        letters = torch.randint(97, 105, (length,), generator=generator)
        made.append({"text": bytes(letters.tolist()).decode(), "label": "no" if number % 4 else "yes"})
    folder = tmp_path_factory.mktemp("rows")
    pd.DataFrame(made[:ROWS]).to_csv(folder / "train.csv", index=False)
    pd.DataFrame(made[ROWS:]).to_csv(folder / "validation.csv", index=False)
    return folder


def settings(rows, **changes):
    """A run of STEPS steps on a random BERT of four layers of width 32, six texts a step."""
    made = {
        "model": {
            "name": "random:bert",
            "config": {
                "num_hidden_layers": 4,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
        },
        "data": {
            "source": "files",
            "train": str(rows / "train.csv"),
            "validation": str(rows / "validation.csv"),
            "label": "label",
            "batch_size": BATCH,
            "max_length": 16,
        },
        "adapter": {"method": "lora", "rank": 4, "alpha": 16.0},
        "controllers": {"output_evaluation": {"threshold": 0.6, "warmup": WARMUP, "sample_ratio": 0.5}},
        "optimization": {"learning_rate": 0.01, "weight_decay": 0.1},
        "trainer": {"max_epochs": 1, "log_every": 1, "progress_bar": False, "accelerator": "cpu"},
        "tracking": {"wandb": "disabled"},
    }
    for name, change in changes.items():
        made[name] = {**made[name], **change} if name != "controllers" else change
    return made


class Interruption(Exception):
    pass


class Watcher(L.Callback):
    """Ends a run before a step, and keeps what the steps had."""

    def __init__(self, stop=None):
        self.stop, self.trained = stop, []

    def on_train_batch_start(self, trainer, module, batch, number):
        if trainer.global_step == self.stop:
            raise Interruption

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.trained.append(module.adapters.trainable_count())


@dataclass
class Run:
    adapters: object
    controller: OutputEvaluation
    trainer: L.Trainer
    watcher: Watcher

    @property
    def optimizer(self):
        return self.trainer.optimizers[0]

    def tensors(self):
        return {name: tensor.clone() for name, tensor in self.adapters.state_dict().items()}


def fit(config, folder=None, stop=None, resume=False, seed=0, change=None) -> Run:
    """Trains as `experiment.run` does, with a checkpoint before every step where there is a folder."""
    composed = compose_layers([Layer("test", config)])
    L.seed_everything(seed, verbose=False)
    model, data = build_parts(composed)
    adapters = inject(model, composed.adapter, seed)
    if change is not None:
        change(model, adapters)
    module = FineTuner(model.train(), adapters, "sequence_classification", 2, composed.optimization)
    spec = composed.controllers.get("output_evaluation")
    controllers = [OutputEvaluation(spec, adapters, seed)] if spec else []
    watcher = Watcher(stop)
    checkpoints = [ResumeCheckpoint(folder / "last.ckpt", 1)] if folder else []
    arguments = trainer_arguments(composed.trainer, composed.optimization.gradient_clip)
    trainer = L.Trainer(
        **{**arguments, "limit_val_batches": 0},
        callbacks=[*controllers, *checkpoints, watcher],
        logger=False,
        default_root_dir=folder,
    )
    L.seed_everything(seed, verbose=False)
    checkpoint = folder / "last.ckpt" if resume else None
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        assert stop is None
    except Interruption:
        assert trainer.global_step == stop
    return Run(adapters, controllers[0] if controllers else None, trainer, watcher)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


# The decision -----------------------------------------------------------------------------------------------

QUERIES = [f"bert.encoder.layer.{layer}.attention.self.query" for layer in range(4)]
VALUES = [path.replace("query", "value") for path in QUERIES]


@pytest.fixture(scope="module")
def bert(rows):
    """Returns a function that makes a random BERT of four layers, always the same."""
    config = compose_layers([Layer("test", settings(rows))])

    def make():
        torch.manual_seed(0)
        return build_model(config.model, 2).eval()

    return make


def decided(model, energy, adapter=None, **options):
    adapters = inject(model, adapter or LoRASpec(rank=4))
    controller = OutputEvaluation(OutputEvaluationSpec(**options), adapters)
    controller.plan(100)
    controller.decide(torch.tensor(energy, dtype=torch.float64))
    return adapters, controller


# Queries and values take turns in the model's order.
EXAMPLE = [4, 1, 1, 1, 3, 8, 2, 90]


def test_the_fewest_adapters_that_make_up_the_threshold_are_kept_in_each_role(bert):
    adapters, controller = decided(bert(), EXAMPLE)
    # Queries have [4, 1, 3, 2]: one is too few to share with. Of the values' [1, 1, 8, 90] one is enough.
    assert adapters.owners == {VALUES[0]: VALUES[2], VALUES[1]: VALUES[2]}
    assert [controller.importance[path] for path in QUERIES] == pytest.approx([0.4, 0.1, 0.3, 0.2])
    assert sum(controller.importance[path] for path in VALUES) == pytest.approx(1)
    assert controller.settled
    told = controller.statistics()
    assert told["budget/kept"] == 6
    assert told["budget/threshold"] == 0.9
    assert told[f"importance/{VALUES[3]}"] == pytest.approx(0.9)


def test_without_sharing_the_others_are_dropped(bert):
    adapters, controller = decided(bert(), EXAMPLE, share=False)
    dropped = {path for path, adapter in adapters.items() if adapter.dropped}
    assert dropped == {QUERIES[1], *VALUES[:3]}
    assert controller.statistics()["budget/kept"] == 4
    assert adapters.trainable_count(saved=False) == 4 * 4 * 64
    assert not any(p.requires_grad for path in dropped for p in adapters.adapters[path].parameters())


def test_a_random_choice_keeps_as_many_of_each_role_whatever_their_importance(bert):
    kept = []
    for seed in range(40):
        adapters = inject(bert(), LoRASpec(rank=4))
        spec = OutputEvaluationSpec(threshold=0.7, share=False, choose="random")
        controller = OutputEvaluation(spec, adapters, seed)
        controller.plan(100)
        controller.decide(torch.tensor(EXAMPLE, dtype=torch.float64))
        kept.append({path for path, adapter in adapters.items() if not adapter.dropped})
        # Queries have [4, 1, 3, 2] and values [1, 1, 8, 90].
        assert len(kept[-1] & {*QUERIES}) == 2
        assert len(kept[-1] & {*VALUES}) == 1
    # Each is kept by some seed: the chance that this fails is 4 · (3/4)^40 + 4 · (1/2)^40 < 5e-5.
    assert set.union(*kept) == {*QUERIES, *VALUES}


def test_a_threshold_of_one_keeps_every_adapter(bert):
    for share in (True, False):
        adapters, controller = decided(bert(), [4, 0, 3, 2, 0, 1, 1, 1], threshold=1.0, share=share)
        assert not adapters.owners
        assert not any(adapter.dropped for adapter in adapters)
        assert controller.statistics()["budget/kept"] == 8


@pytest.mark.parametrize(
    ("targets", "energy", "kept"),
    [
        # Two targets take turns. Roles and shapes: [4, 1, 3, 2] and [1, 1, 1, 147].
        (["query", "up"], EVERY := [4, 1, 1, 1, 3, 1, 2, 147], {"role": [0, 4, 6, 7], "shape": [0, 4, 6, 7]}),
        # Queries and values have one shape.
        (["query", "value"], EVERY, {"role": [0, 4, 6, 7], "shape": [7], "global": [7]}),
        (["query", "up"], [1, 90, 1, 10, 1, 1, 1, 1], {"shape": [0, 1, 2, 3, 4, 6], "global": [1, 3]}),
    ],
)
def test_groups_are_roles_shapes_or_all(bert, targets, energy, kept):
    for group_by, expected in kept.items():
        spec = LoRASpec(rank=4, targets=targets)
        adapters, _ = decided(bert(), energy, spec, group_by=group_by, share=False)
        assert [number for number, own in enumerate(adapters) if not own.dropped] == expected


def test_only_adapters_of_one_shape_share_whatever_they_are_compared_with(bert):
    spec = LoRASpec(rank=4, targets=["query", "up"])
    # Per layer a query (32 → 32) and an `up` (32 → 64): one of each role is far ahead.
    adapters, controller = decided(bert(), [90, 90, 1, 1, 1, 1, 1, 1], spec, group_by="global")
    shapes = [[tuple(adapters.adapters[p].B.shape) for p in pair] for pair in adapters.owners.items()]
    assert len(shapes) == 4
    assert all(one == other for one, other in shapes)
    assert adapters.trainable_count(saved=False) == 2 * 4 * 64 + 2 * 4 * 96
    assert controller.statistics()["budget/kept"] == 4


def test_roles_of_a_model_without_a_table_are_module_names():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("one", "two"):
                self.add_module(name, nn.ModuleDict({"left": nn.Linear(5, 5), "right": nn.Linear(5, 5)}))

    adapters = inject(Twins(), LoRASpec(rank=2, targets=["left", "right"]))
    controller = OutputEvaluation(OutputEvaluationSpec(), adapters)
    assert controller.groups() == [["one.left", "two.left"], ["one.right", "two.right"]]


PERCEPTRON = {
    "model": {"name": "random:mlp", "task": "regression", "config": {"sizes": [10, 10, 10, 10, 10]}},
    "data": {"source": "toy", "target": "product", "size": 160, "evaluation_batch_size": 7},
    "adapter": {"method": "lora", "rank": 4, "targets": [f"layer{number}" for number in (1, 2, 3, 4)]},
}


# What outputs are worth -------------------------------------------------------------------------------------


def dense_energy(module, batches):
    """Σ over real tokens of ‖ΔW x‖², from inputs that hooks keep and dense ΔW, in float64."""
    inputs = {path: [] for path in module.adapters.adapters}
    hooks = [
        adapter.base.register_forward_pre_hook(lambda own, x, path=path: inputs[path].append(x[0].double()))
        for path, adapter in module.adapters.items()
    ]
    with torch.no_grad():
        for batch in batches:
            module(batch)
    for hook in hooks:
        hook.remove()
    found = {}
    for path, adapter in module.adapters.items():
        delta, total = adapter.delta_weight().detach().double(), 0.0
        for x, batch in zip(inputs[path], batches, strict=True):
            for row, real in zip(x, batch["attention_mask"].sum(1).tolist(), strict=True):
                total += float((row[:real] @ delta.T).square().sum())
        found[path] = total
    return found


def test_energy_is_that_of_dense_updates_on_real_tokens_and_measuring_leaves_no_trace(rows):
    composed = compose_layers([Layer("test", settings(rows, adapter={"dropout": 0.3}))])
    model, data = build_parts(composed)
    model.train()
    frozen = model.bert.encoder.layer[1].eval()
    adapters = inject(model, composed.adapter)
    shake(adapters)
    module = FineTuner(model, adapters, "sequence_classification", 2)
    batches = list(data.training_sample(0.5))
    assert any(not batch["attention_mask"].all() for batch in batches)
    modes = {name: part.training for name, part in model.named_modules()}
    buffers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()

    given = output_energy(module, adapters.adapters, batches)

    assert torch.equal(torch.get_rng_state(), random)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert not frozen.training
    same(dict(model.state_dict()), buffers)
    assert not any(adapter._forward_pre_hooks for adapter in adapters)
    assert all(parameter.grad is None for parameter in adapters.trainable_parameters())
    model.eval()
    expected = dense_energy(module, batches)
    assert given.dtype == torch.float64
    assert dict(zip(adapters.adapters, given.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)


def test_sample_has_every_class_in_its_share_and_at_least_a_batch(rows):
    composed = compose_layers([Layer("test", settings(rows))])
    _, data = build_parts(composed)
    for ratio, counts in ((0.5, [24, 8]), (0.01, [5, 2]), (1.0, [48, 16])):
        labels = torch.cat([batch["labels"] for batch in data.training_sample(ratio)])
        assert labels.bincount().tolist() == counts
        again = torch.cat([batch["labels"] for batch in data.training_sample(ratio)])
        assert torch.equal(labels, again)


def test_processes_measure_each_example_of_the_sample_once(rows):
    composed = compose_layers([Layer("test", settings(rows))])
    _, data = build_parts(composed)

    def texts(*places):
        found = []
        for rank, processes in places:
            data.trainer = SimpleNamespace(global_rank=rank, world_size=processes)
            for batch in data.training_sample(0.5):
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                    found.append(ids[mask.bool()].tolist())
        return sorted(found)

    assert len(texts((0, 1))) == 32
    assert texts((0, 2), (1, 2)) == texts((0, 1))


def test_beside_rank_switching_outputs_are_measured_at_the_rank_of_evaluations(monkeypatch):
    """A step at rank 1 must not be what decides; afterwards the step's rank is back."""
    seen = []

    def measured(module, adapters, batches):
        seen.append([adapter.active_rank for adapter in adapters.values()])
        return output_energy(module, adapters, batches)

    monkeypatch.setattr("lora_lab.callbacks.controllers.output_evaluation.output_energy", measured)

    class After(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 3:
                seen.append([adapter.active_rank for adapter in module.adapters])

    controllers = {
        "output_evaluation": OutputEvaluationSpec(share=False, warmup=3, threshold=0.5, reinit=False),
        "rank_switching": RankSwitchingSpec(policy="gradient_norm", low=0.0, high=1e9, final_rank=4),
    }
    train(DyLoRASpec(rank=4), controllers, 5, extra=[After()])
    assert seen == [[4, 4, 4], [1, 1, 1]]


def test_compiled_models_are_measured_too():
    model = build_model(compose_layers([Layer("test", PERCEPTRON)]).model, 1)
    adapters = inject(model, LoRASpec(rank=2, targets=["layer1", "layer2"], modules_to_save=[]))
    shake(adapters)
    module = FineTuner(model.eval(), adapters, "regression")
    batch = {"features": torch.randn(5, 10), "labels": torch.randn(5, 1)}
    expected = output_energy(module, adapters.adapters, [batch])
    model.compile(backend="eager")
    with torch.no_grad():
        before = module(batch)  # as a validation would: compiled without hooks
    assert torch.equal(output_energy(module, adapters.adapters, [batch]), expected)
    assert expected.all()
    with torch.no_grad():
        assert torch.equal(module(batch), before)


# Through a run ----------------------------------------------------------------------------------------------


def check_forgotten(run, own):
    """The optimizer knows the trained tensors, each once, and the state of no other."""
    trained = {id(parameter) for parameter in run.adapters.trainable_parameters()}
    held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(trained)
    assert {id(parameter) for parameter in run.optimizer.state} <= trained
    assert run.adapters.trainable_count(saved=False) == own * 4 * (32 + 32)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("reinit", [True, False])
def test_counts_fall_to_the_formula_and_the_optimizer_forgets_the_rest(rows, share, reinit):
    options = {"threshold": 0.6, "warmup": WARMUP, "share": share, "reinit": reinit}
    done = fit(settings(rows, controllers={"output_evaluation": options}))
    roles = [[done.controller.importance[path] for path in group] for group in done.controller.groups()]
    own = 0
    for values in roles:
        total, kept = 0.0, 0
        while total < 0.6:
            total, kept = total + sorted(values, reverse=True)[kept], kept + 1
        own += kept + (share and kept < len(values))
    assert 2 <= own < 8
    assert done.controller.statistics()["budget/kept"] == own
    check_forgotten(done, own)
    assert done.watcher.trained[WARMUP - 2] > done.watcher.trained[WARMUP - 1] == done.watcher.trained[-1]


def test_dropped_adapters_are_left_alone_by_decay_and_steps(rows, tmp_path):
    config = settings(
        rows, controllers={"output_evaluation": {"threshold": 0.5, "warmup": WARMUP, "share": False}}
    )
    early, late = fit(config, tmp_path, stop=WARMUP), fit(config)
    dropped = [path for path, adapter in late.adapters.items() if adapter.dropped]
    assert dropped
    for path in dropped:
        for name in ("A", "B"):
            tensors = [getattr(run.adapters.adapters[path], name) for run in (early, late)]
            assert torch.equal(*tensors)
            assert tensors[1].grad is None
    kept = next(path for path in late.adapters.adapters if path not in dropped)
    assert not torch.equal(early.adapters.adapters[kept].B, late.adapters.adapters[kept].B)


def test_a_restart_is_the_runs_own_start_and_clears_the_moments(rows, tmp_path):
    start = fit(settings(rows), tmp_path / "start", stop=0)
    restarted = fit(settings(rows), tmp_path / "restarted", stop=WARMUP)
    options = {"threshold": 0.6, "warmup": WARMUP, "reinit": False}
    trained = fit(
        settings(rows, controllers={"output_evaluation": options}), tmp_path / "trained", stop=WARMUP
    )
    for path, adapter in restarted.adapters.items():
        owner = restarted.adapters.owners.get(path, path)
        assert torch.equal(adapter.A, start.adapters.adapters[owner].A)
        assert not adapter.B.any()
        assert trained.adapters.adapters[path].B.any()
    heads = {id(p) for own in restarted.adapters.saved.values() for p in own.parameters()}
    assert {id(p) for p in restarted.optimizer.state} == heads & {
        id(p) for p in restarted.adapters.trainable_parameters()
    }
    assert len(trained.optimizer.state) == len(trained.adapters.trainable_parameters())


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if issubclass(method, Droppable)]
)
def test_every_method_that_can_be_dropped_starts_again_as_it_did(bert, method):
    adapters = inject(bert(), METHODS[method].Spec(rank_pattern={"query": 4}), seed=3)
    start = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    random = torch.get_rng_state()
    heads = {id(p) for own in adapters.saved.values() for p in own.parameters()}
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            if id(parameter) not in heads:
                parameter.add_(1)
    adapters.restart(3)
    same(adapters.state_dict(), start)
    adapters.restart(4)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in adapters.state_dict().items()) == (
        method != "pissa"  # whose start is that of its base
    )
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("stop", [WARMUP - 1, WARMUP, WARMUP + 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(rows, tmp_path, share, stop):
    options = {"threshold": 0.5, "warmup": WARMUP, "share": share, "reinit": stop != WARMUP + 2}
    config = settings(rows, controllers={"output_evaluation": options})
    whole = fit(config)
    fit(config, tmp_path, stop=stop)
    resumed = fit(config, tmp_path, resume=True)
    assert resumed.trainer.global_step == STEPS
    same(resumed.tensors(), whole.tensors())
    assert resumed.adapters.owners == whole.adapters.owners
    assert bool(whole.adapters.owners) == share
    assert resumed.controller.importance == whole.controller.importance
    check_forgotten(resumed, resumed.controller.statistics()["budget/kept"])
    tied(resumed.adapters)
    states = [run.optimizer.state_dict()["state"] for run in (resumed, whole)]
    assert states[0].keys() == states[1].keys()
    for number in states[0]:
        same(states[0][number], states[1][number])


def tied(adapters):
    for path, owner in adapters.owners.items():
        assert adapters.adapters[path].A is adapters.adapters[owner].A
        assert adapters.adapters[path].B is adapters.adapters[owner].B


def test_shared_adapters_add_up_their_gradients(bert):
    ids = torch.randint(5, 100, (3, 7), generator=torch.Generator().manual_seed(1))
    adapters, _ = decided(bert(), EXAMPLE)
    shake(adapters)
    adapters.model(input_ids=ids).logits.square().sum().backward()
    apart = inject(bert(), LoRASpec(rank=4))
    with torch.no_grad():
        for path, adapter in apart.items():
            for name in ("A", "B"):
                getattr(adapter, name).copy_(getattr(adapters.adapters[path], name))
        for path, head in apart.saved.items():
            for own, other in zip(head.parameters(), adapters.saved[path].parameters(), strict=True):
                own.copy_(other)
    apart.model(input_ids=ids).logits.square().sum().backward()
    users = [VALUES[0], VALUES[1], VALUES[2]]
    for name in ("A", "B"):
        total = sum(getattr(apart.adapters[path], name).grad for path in users)
        assert relative(getattr(adapters.adapters[VALUES[2]], name).grad, total) < 1e-5
    assert len(adapters.trainable_parameters()) == len(apart.trainable_parameters()) - 4


# Two processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("share", ["true", "false"])
def test_two_processes_equal_one_with_the_doubled_batch_before_and_after_the_decision(rows, tmp_path, share):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"name": "drop", "output": str(tmp_path), **settings(rows)}))
    found = []
    for overrides in ([], [f"data.batch_size={BATCH // 2}", "trainer.devices=2"]):
        options = [*overrides, f"run={len(found)}", f"controllers.output_evaluation.share={share}"]
        if len(found) == 0:
            experiment.run(compose(path, options))
        else:
            run_in_two_processes(COMMAND, tmp_path, "train", str(path), *options)
        folder = tmp_path / "drop" / options[-2].removeprefix("run=")
        found.append((load_file(folder / "adapter" / TENSORS), read_metrics(folder), folder))
    (one, rows_of_one, _), (two, rows_of_two, folder) = found
    for name, tensor in one.items():
        # Adam divides a gradient by its size: where that is near zero, a few numbers show how it was rounded.
        error = two[name] - tensor
        assert (error.abs() > 1e-5 * tensor.abs().max()).double().mean() < 0.05, name
        assert error.abs().max() <= 1e-3 * tensor.abs().max(), name
        assert error.norm() <= 1e-4 * tensor.norm(), name
    logged = [row for row in rows_of_one if "train/loss" in row]
    others = [row for row in rows_of_two if "train/loss" in row]
    assert len(logged) == len(others) == STEPS
    assert sum(name.startswith("importance/") for name in logged[-1]) == 8
    for row, other in zip(logged, others, strict=True):
        for name in row:
            if name.startswith(("train/", "importance/", "budget/", "memory/trainable", "memory/optimizer")):
                assert other[name] == pytest.approx(row[name], rel=1e-4), (row["step"], name)
    assert logged[-1]["memory/optimizer_megabytes"] < logged[WARMUP - 2]["memory/optimizer_megabytes"]
    assert ("shared:" if share == "true" else "dropped:") in (folder / "adapter" / OWN).read_text()


# On disk ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model):
    ids = torch.randint(5, 100, (3, 7), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("spec", [LoRASpec(rank=4), LoRADropSpec(rank=4)])
def test_folder_opens_in_peft_and_here_as_it_was(bert, share, spec, tmp_path):
    adapters, _ = decided(bert(), EXAMPLE, spec, share=share)
    shake(adapters)
    save_adapter(adapters, tmp_path / "ours", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path / "ours")
    assert relative(logits(theirs), logits(adapters.model)) < TOLERANCE
    fresh = bert()
    loaded = load_adapter(fresh, tmp_path / "ours")
    assert torch.equal(logits(fresh), logits(adapters.model))
    assert loaded.owners == adapters.owners
    tied(loaded)
    dropped = [[path for path, own in kind.items() if own.dropped] for kind in (loaded, adapters)]
    assert dropped[0] == dropped[1]
    assert loaded.trainable_count() == adapters.trainable_count()
    # Without our own file it is a plain LoRA that computes the same.
    (tmp_path / "ours" / OWN).unlink()
    plain = bert()
    assert not load_adapter(plain, tmp_path / "ours").owners
    assert relative(logits(plain), logits(adapters.model)) < TOLERANCE


def test_dropped_adapters_with_a_subtracted_start_come_back_dropped(bert, tmp_path):
    adapters, _ = decided(bert(), EXAMPLE, PiSSASpec(rank=4), share=False)
    shake(adapters)
    save_adapter(adapters, tmp_path / "ours")
    fresh = bert()
    loaded = load_adapter(fresh, tmp_path / "ours")
    assert relative(logits(fresh), logits(adapters.model)) < TOLERANCE
    assert [own.dropped for own in loaded] == [own.dropped for own in adapters]


@pytest.mark.parametrize("entry", ["shared: {nowhere: bert}", "dropped: [nowhere]", "dropped: 3"])
def test_a_folder_that_names_other_adapters_is_refused(bert, entry, tmp_path):
    adapters, _ = decided(bert(), [1, 1] * 4, threshold=1.0)
    save_adapter(adapters, tmp_path / "ours")
    with (tmp_path / "ours" / OWN).open("a") as file:
        file.write(f"{entry}\n")
    model = bert()
    with pytest.raises(CheckpointError, match="names something that is not an adapter of this model"):
        load_adapter(model, tmp_path / "ours")
    assert "LoRA" not in repr(model)


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"controllers.output_evaluation.threshold: must lie in \(0, 1\]; got 0.0"),
        ({"threshold": 1.1}, r"controllers.output_evaluation.threshold: must lie in \(0, 1\]; got 1.1"),
        ({"sample_ratio": 0.0}, r"controllers.output_evaluation.sample_ratio: must lie in \(0, 1\]"),
        ({"sample_ratio": 2.0}, r"controllers.output_evaluation.sample_ratio: must lie in \(0, 1\]"),
        ({"warmup": 0}, "controllers.output_evaluation.warmup: must be above 0"),
        ({"group_by": "layer"}, "group_by: must be one of role, shape, global"),
    ],
)
def test_faulty_options_are_refused(options, message):
    adapters = inject(linear(), LoRADropSpec(targets=["0"]))
    with pytest.raises(ConfigError, match=message):
        OutputEvaluation(OutputEvaluationSpec(**options), adapters)


@pytest.mark.parametrize(
    ("options", "total", "message"),
    [
        ({"warmup": 10}, 10, "10 steps of a run of 10 leave no step to train the kept"),
        ({"warmup": 0.5}, 1, "1 steps of a run of 1 leave no step"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(options, total, message):
    adapters = inject(linear(), LoRADropSpec(targets=["0"]))
    controller = OutputEvaluation(OutputEvaluationSpec(**options), adapters)
    with pytest.raises(ConfigError, match=message):
        controller.plan(total)
    controller.plan(total + 10)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "pissa",
            {},
            "needs adapters that are Shareable; those of method 'pissa' are not. .*adalora, lora, ",
        ),
        ("oft", {"share": False}, "needs adapters that are Droppable; those of method 'oft' are not"),
    ],
)
def test_methods_that_do_not_fit_are_refused_with_those_that_do(rows, method, options, message):
    config = {**settings(rows, controllers={"output_evaluation": options}), "adapter": {"method": method}}
    with pytest.raises(ConfigError, match=message):
        compose_layers([Layer("test", config)])


def test_subtracted_starts_cannot_share_and_quantised_ones_not_restart(bert, monkeypatch):
    adapters = inject(bert(), LoRASpec(rank=4, init="olora"))
    with pytest.raises(IncompatibleError, match="query subtracts a start .* or share: false"):
        OutputEvaluation(OutputEvaluationSpec(), adapters)
    OutputEvaluation(OutputEvaluationSpec(share=False), adapters).decide(torch.ones(8))
    adapters.spec = LoRASpec(init="loftq")
    with pytest.raises(IncompatibleError, match="reinit: lora starts from weights that no longer exist"):
        OutputEvaluation(OutputEvaluationSpec(share=False), adapters)
    OutputEvaluation(OutputEvaluationSpec(share=False, reinit=False), adapters)


@pytest.mark.parametrize(("energy", "why"), [(0.0, "Raise warmup"), (float("nan"), "Training has diverged")])
def test_outputs_of_zero_or_not_finite_are_told(bert, energy, why):
    with pytest.raises(ConfigError, match=rf"sum of squares of {energy} after 10 steps.*{why}"):
        decided(bert(), [1, energy] * 4)


def test_a_fit_without_data_to_sample_is_refused(bert):
    adapters = inject(bert(), LoRASpec())
    module = FineTuner(adapters.model.train(), adapters, "sequence_classification", 2)
    controller = OutputEvaluation(OutputEvaluationSpec(warmup=1), adapters)
    loader = torch.utils.data.DataLoader([{"labels": torch.tensor(0)}] * 8)
    trainer = L.Trainer(
        callbacks=[controller], logger=False, max_epochs=1, enable_checkpointing=False, accelerator="cpu"
    )
    with pytest.raises(ConfigError, match="samples the training data, and there are none"):
        trainer.fit(module, loader)
