"""Rank switching: what is drawn, what a step leaves alone, adaptive policies, evaluations, resuming."""

import json
from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from lora_lab.adapters import inject
from lora_lab.adapters.methods.dylora import DyLoRASpec
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lab.callbacks.controllers.rank_switching import RankSwitching, RankSwitchingSpec
from lora_lab.config import compose
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.experiment import run
from lora_lab.tracking import read_metrics
from lora_lab.training.module import FineTuner
from lora_lab.training.optimization import OptimizationConfig
from tests.adapters.tiny import linear, relative, tiny_bert
from tests.tracked_run import text_batches
from tests.two_processes import run_in_two_processes

RANKS = range(1, 9)


def switching(adapters=None, seed=0, **options) -> RankSwitching:
    adapters = adapters or inject(linear(), DyLoRASpec(targets=["0"], modules_to_save=[], rank=8))
    return RankSwitching(RankSwitchingSpec(**options), adapters, seed)


class Watch(L.Callback):
    """Keeps the ranks at every batch and step, and all numbers of the adapters before every step."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.steps: list[int] = []
        self.states: list[list[dict[str, torch.Tensor]]] = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.batches.append([adapter.active_rank for adapter in pl_module.adapters])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(max(adapter.active_rank for adapter in pl_module.adapters))
        self.states.append(
            [components(adapter, optimizer) for adapter in pl_module.adapters if optimizer.state]
        )


def components(adapter, optimizer) -> dict[str, torch.Tensor]:
    """Returns every number of each component, (rank, numbers): A's row, B's column, both moments of them."""
    told = {"A": adapter.A.detach(), "B": adapter.B.detach().T}
    for name in ("exp_avg", "exp_avg_sq"):
        for side in ("A", "B"):
            tensor = optimizer.state[getattr(adapter, side)][name]
            told[f"{name} of {side}"] = tensor if side == "A" else tensor.T
    return {name: tensor.clone() for name, tensor in told.items()}


def loader(batches):
    return DataLoader(batches, batch_size=None)


class Fit:
    """A few real steps of a tiny BERT classifier with DyLoRA on query and value."""

    def __init__(
        self, adapter=None, extra=(), batches=8, accumulate=1, spec=None, on_nonfinite="stop", **options
    ):
        self.model = tiny_bert(vocab_size=100)
        self.adapters = inject(self.model, DyLoRASpec(**{"rank": 8, **(adapter or {})}))
        decayed = OptimizationConfig(learning_rate=0.01, weight_decay=0.5)
        self.module = FineTuner(
            self.model.train(), self.adapters, "sequence_classification", 3, decayed, on_nonfinite
        )
        self.controller = switching(self.adapters, **(spec or {}))
        self.watch = Watch()
        count = batches if isinstance(batches, int) else len(batches)
        self.validation = text_batches(count + 3)[count:]
        self.trainer = L.Trainer(
            callbacks=[self.controller, self.watch, *extra],
            logger=False,
            accelerator="cpu",
            accumulate_grad_batches=accumulate,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **{"max_epochs": 1, **options},
        )
        training = text_batches(batches) if isinstance(batches, int) else batches
        self.trainer.fit(self.module, loader(training), loader(self.validation))


# (a) A rank is the LoRA of the first components ------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> Fit:
    torch.manual_seed(0)
    return Fit(max_epochs=2, spec={"evaluation_ranks": [*RANKS]})


@torch.no_grad()
def sliced_lora(fit: Fit, rank: int) -> nn.Module:
    """Returns a LoRA of this rank from the first rows of A and columns of B, scaled by alpha / rank."""
    model = tiny_bert(vocab_size=100)
    adapters = inject(model, LoRASpec(rank=rank, alpha=16))
    for path, adapter in adapters.items():
        nested = fit.adapters.adapters[path]
        adapter.A.copy_(nested.A[:rank])
        adapter.B.copy_(nested.B[:, :rank])
    for name, parameter in adapters.named_parameters().items():
        if "trained" in name:
            parameter.copy_(fit.adapters.named_parameters()[name])
    return model.eval()


def outputs(model, batches) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in batches]
        )


@pytest.mark.parametrize("rank", RANKS)
def test_a_trained_model_at_a_rank_is_the_lora_of_the_first_components(fitted, rank):
    for adapter in fitted.adapters:
        adapter.active_rank = rank
    given = outputs(fitted.model.eval(), fitted.validation)
    for adapter in fitted.adapters:
        adapter.active_rank = 8
    assert relative(given, outputs(sliced_lora(fitted, rank), fitted.validation)) < 1e-6


@pytest.mark.parametrize("rank", RANKS)
def test_the_logged_numbers_of_a_rank_are_those_of_an_evaluation_of_its_own(fitted, rank):
    logits = outputs(sliced_lora(fitted, rank), fitted.validation)
    labels = torch.cat([batch["labels"] for batch in fitted.validation])
    logged = fitted.trainer.callback_metrics
    loss = nn.functional.cross_entropy(logits, labels)
    assert float(logged[f"validation/loss_rank_{rank}"]) == pytest.approx(float(loss), rel=1e-6)
    hits = float((logits.argmax(1) == labels).float().mean())
    assert float(logged[f"validation/accuracy_rank_{rank}"]) == pytest.approx(hits, abs=1e-7)


def test_the_plain_numbers_are_those_of_the_largest_rank_and_ranks_differ(fitted):
    logged = fitted.trainer.callback_metrics
    for name in ("loss", "accuracy", "f1"):
        assert logged[f"validation/{name}"] == logged[f"validation/{name}_rank_8"]
    assert len({float(logged[f"validation/loss_rank_{rank}"]) for rank in RANKS}) == 8


def test_an_evaluation_leaves_the_rank_as_it_was(fitted):
    for adapter in fitted.adapters:
        adapter.active_rank = 3
    found = fitted.trainer.test(fitted.module, loader(fitted.validation), verbose=False)[0]
    assert {adapter.active_rank for adapter in fitted.adapters} == {3}
    assert found["test/loss"] == found["test/loss_rank_3"] != found["test/loss_rank_8"]
    logged = fitted.trainer.validate(fitted.module, loader(fitted.validation), verbose=False)[0]
    assert {adapter.active_rank for adapter in fitted.adapters} == {3}
    for adapter in fitted.adapters:
        adapter.active_rank = 8
    assert all(logged[f"validation/loss_rank_{k}"] == found[f"test/loss_rank_{k}"] for k in RANKS)


def test_one_more_forward_pass_is_made_for_each_other_rank(fitted, monkeypatch):
    passes = []
    forward = FineTuner.forward
    monkeypatch.setattr(FineTuner, "forward", lambda self, batch: (passes.append(1), forward(self, batch))[1])
    fitted.trainer.validate(fitted.module, loader(fitted.validation), verbose=False)
    assert len(passes) == 8 * len(fitted.validation)


# (b) What a step leaves alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_a_fit_under_adamw_moves_nothing_but_the_components_of_the_steps_rank(frozen):
    fit = Fit({"frozen": frozen}, batches=24)
    watch = fit.watch
    assert len(set(watch.steps)) > 4
    # Before the second step there is a state for the first time.
    for rank, before, after in zip(watch.steps[1:], watch.states[1:], watch.states[2:], strict=False):
        learned = [k for k in range(rank) if not frozen or k == rank - 1]
        others = [k for k in range(8) if k not in learned]
        for old, new in zip(before, after, strict=True):
            assert all(torch.equal(old[name][others], new[name][others]) for name in old)
            # A's row has no gradient before B's column has left zero.
            assert all((old[name][learned] != new[name][learned]).any(1).all() for name in old if "B" in name)


# (e) What is drawn -----------------------------------------------------------------------------------------


def chi_square(counts: Counter, expected: dict[int, float], draws: int) -> float:
    assert set(counts) <= set(expected)
    return sum((counts[k] - draws * p) ** 2 / (draws * p) for k, p in expected.items())


GEOMETRIC = {k: 0.15 * 0.85 ** (k - 1) / (1 - 0.85**8) for k in RANKS}
CRITICAL = 24.32
"""The value that chi-square with seven degrees of freedom exceeds once in a thousand times."""


@pytest.mark.parametrize(
    ("policy", "expected"), [("uniform", dict.fromkeys(RANKS, 1 / 8)), ("geometric", GEOMETRIC)]
)
def test_random_policies_draw_ranks_as_often_as_they_say(policy, expected):
    assert sum(expected.values()) == pytest.approx(1)
    controller = switching(policy=policy)
    counts = Counter(controller.draw(step) for step in range(8000))
    assert chi_square(counts, expected, 8000) < CRITICAL
    others = dict.fromkeys(RANKS, 1 / 8) if policy == "geometric" else GEOMETRIC
    assert chi_square(counts, others, 8000) > 10 * CRITICAL


def test_draws_of_neighbouring_steps_are_independent():
    controller = switching(max_rank=3)
    drawn = [controller.draw(step) for step in range(9001)]
    pairs = Counter(zip(drawn, drawn[1:], strict=False))
    expected = dict.fromkeys([(a, b) for a in range(1, 4) for b in range(1, 4)], 1 / 9)
    assert chi_square(pairs, expected, 9000) < 26.12  # 1 in 1000 at eight degrees of freedom


def test_bounds_hold_and_keep_the_proportions():
    controller = switching(policy="geometric", min_rank=3, max_rank=5, geometric_p=0.5)
    counts = Counter(controller.draw(step) for step in range(4000))
    assert chi_square(counts, {3: 4 / 7, 4: 2 / 7, 5: 1 / 7}, 4000) < 13.82  # two degrees of freedom


def test_seeds_draw_differently_and_one_seed_always_alike():
    drawn = {seed: [switching(seed=seed).draw(step) for step in range(50)] for seed in (0, 1)}
    torch.manual_seed(5)
    assert [switching(seed=1).draw(step) for step in range(50)] == drawn[1] != drawn[0]


# (f) Accumulation, validations, the end --------------------------------------------------------------------


def test_batches_of_one_step_share_its_rank_though_a_validation_stands_between():
    # Validations after 3, 6, 9 … batches, steps after 4, 8 …: nearly all fall within a step.
    fit = Fit(batches=24, accumulate=4, val_check_interval=3)
    drawn = [fit.controller.draw(step) for step in range(6)]
    assert fit.watch.steps == drawn
    assert fit.watch.batches == [[drawn[batch // 4]] * 4 for batch in range(24)]
    assert len(set(drawn)) > 2


@pytest.mark.parametrize("final", [None, 2])
def test_the_run_ends_at_the_final_rank_and_is_validated_at_it(final):
    fit = Fit(spec={"final_rank": final})
    assert {adapter.active_rank for adapter in fit.adapters} == {final or 8}
    logged = fit.trainer.callback_metrics
    assert logged["validation/loss"] == logged[f"validation/loss_rank_{final or 8}"]


def test_a_run_without_validations_ends_at_the_final_rank_too():
    fit = Fit(limit_val_batches=0)
    assert fit.watch.steps[-1] != 8
    assert {adapter.active_rank for adapter in fit.adapters} == {8}


@pytest.mark.parametrize(("policy", "final"), [("uniform", None), ("uniform", 2), ("gradient_norm", None)])
def test_the_best_validations_adapters_come_back_with_its_rank(policy, final):
    torch.manual_seed(0)
    probe = inject(tiny_bert(vocab_size=100), DyLoRASpec(rank=8))
    best = AdapterCheckpoint(probe, "best")
    # Up with every step, and so at another rank in every validation.
    options = {"high": 0.0, "low": 0.0} if policy == "gradient_norm" else {}
    seen: dict[int, int] = {}

    class Ranks(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            best.adapters = pl_module.adapters

        def on_validation_epoch_end(self, trainer, pl_module):
            seen[trainer.global_step] = next(iter(pl_module.adapters)).active_rank

    spec = {"policy": policy, "final_rank": final, **options}
    fit = Fit(extra=[Ranks(), best], max_epochs=3, val_check_interval=2, batches=4, spec=spec)
    assert {adapter.active_rank for adapter in fit.adapters} == {seen[best.best_step]}
    if policy == "uniform":
        assert set(seen.values()) == {final or 8}
    else:
        assert [*seen.values()] == [4, 8, 8, 8, 8, 8]


def test_adapters_of_other_ranks_use_all_they_have():
    fit = Fit({"rank": 3, "rank_pattern": {"value": 6}}, batches=12)
    assert fit.controller.ranks == [1, 2, 3, 4, 5, 6]
    assert fit.controller.evaluation_ranks == [1, 2, 4, 6]
    assert fit.watch.batches == [[min(k, 3), k] * 2 for k in map(fit.controller.draw, range(12))]
    logged = fit.trainer.callback_metrics
    assert logged["validation/loss"] == logged["validation/loss_rank_6"] != logged["validation/loss_rank_4"]


# (g) Adaptive policies -------------------------------------------------------------------------------------


class Slide3:
    """The rule of the slides for gradients, as they write it in NumPy."""

    def __init__(self, ranks):
        self.ranks, self.current_rank_idx = ranks, 0

    def adjust_rank(self, loss_gradient):
        gradient_norm = np.linalg.norm(loss_gradient)
        if gradient_norm > 1.0 and self.current_rank_idx < len(self.ranks) - 1:
            self.current_rank_idx += 1
        elif gradient_norm < 0.1 and self.current_rank_idx > 0:
            self.current_rank_idx -= 1


class Slide9:
    """The rule of the slides for losses, as they write it in NumPy."""

    def __init__(self, ranks, eval_interval):
        self.rank_options, self.eval_interval, self.step_counter = ranks, eval_interval, 0
        self.performance_history = {rank: [] for rank in ranks}
        self.current_rank = ranks[0]

    def forward(self):
        self.step_counter += 1

    def evaluate_rank_performance(self, loss):
        self.performance_history[self.current_rank].append(loss)
        if self.step_counter % self.eval_interval == 0:
            recent_performance = np.mean(self.performance_history[self.current_rank][-10:])
            current_idx = self.rank_options.index(self.current_rank)
            if recent_performance > 0.1 and current_idx < len(self.rank_options) - 1:
                self.current_rank = self.rank_options[current_idx + 1]
            elif recent_performance < 0.05 and current_idx > 0:
                self.current_rank = self.rank_options[current_idx - 1]


def test_the_slides_gradients_drive_the_rank_to_the_top():
    """They draw a gradient of 32 × 768 normal numbers, of norm 157, and print 4, 8 and 16."""
    ranks = [4, 8, 16]
    adapters = inject(linear(), DyLoRASpec(targets=["0"], modules_to_save=[], rank=16))
    controller, slide = switching(adapters, policy="gradient_norm", ranks=ranks), Slide3(ranks)
    controller.plan(100)
    printed = []
    gradient = np.random.default_rng(0).standard_normal((32, 768))
    for _ in range(4):
        printed.append(controller.resting_rank)
        assert printed[-1] == ranks[slide.current_rank_idx]
        slide.adjust_rank(gradient)
        controller.decide(float(np.linalg.norm(gradient)))
    assert printed == [4, 8, 16, 16]


def test_gradients_of_a_fit_move_the_rank_as_the_slides_rule_does():
    rising, falling = [2.0, 0.5, 1.5, 1.01, 5.0, 0.99], [0.11, 0.05, 0.09, 0.2, 0.0, 0.01]
    norms = [*rising, *falling, 3.0, 1.1, np.inf, 0.09, 1.1, 0.05]

    class Gradients(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            for parameter in pl_module.adapters.trainable_parameters():
                parameter.grad.fill_(7.0)  # of the head, which does not count
            for adapter in pl_module.adapters:
                adapter.A.grad.fill_(1e-30)  # no part of the norm, but alive
                adapter.B.grad.fill_(1e-30)
            first, *_, last = pl_module.adapters
            norm = norms[trainer.global_step]
            first.A.grad[0, 0], last.B.grad[0, 0] = 0.6 * norm, 0.8 * norm

    spec = {"policy": "gradient_norm", "ranks": [1, 2, 4, 8]}
    # The step of an infinite norm is left out, and moves the rank no more than the weights.
    skipping = {"on_nonfinite": "skip", "gradient_clip_val": 0.01}
    fit = Fit(batches=len(norms), spec=spec, extra=[Gradients()], **skipping)
    assert fit.module.skipped_steps == 1
    slide, expected = Slide3([1, 2, 4, 8]), []
    for norm in norms:
        expected.append(slide.ranks[slide.current_rank_idx])
        if np.isfinite(norm):
            slide.adjust_rank(np.array([norm]))
    assert fit.watch.steps == expected
    assert set(expected) == {1, 2, 4, 8}
    # After the last step nothing is decided.
    assert {adapter.active_rank for adapter in fit.adapters} == {expected[-1]}


def scripted(monkeypatch, losses):
    monkeypatch.setattr(FineTuner, "step_loss", lambda self: torch.tensor(losses[self.trainer.global_step]))


@pytest.mark.parametrize("period", [3, 12])
def test_losses_of_a_fit_move_the_rank_as_the_slides_rule_does(monkeypatch, period):
    random = np.random.default_rng(0)
    losses = np.repeat(random.choice([0.3, 0.01, 0.07], 36), 6) * random.uniform(0.8, 1.2, 216)
    scripted(monkeypatch, losses.tolist())
    fit = Fit(batches=216, spec={"policy": "recent_loss", "period": period})
    slide, expected = Slide9([1, 2, 4, 8], period), []
    for loss in losses:
        slide.forward()
        expected.append(slide.current_rank)
        slide.evaluate_rank_performance(loss)
    assert fit.watch.steps == expected
    assert len(set(expected)) >= 3
    assert any(larger > smaller for larger, smaller in zip(expected, expected[1:], strict=False))


def test_the_slides_losses_leave_the_smallest_rank_in_place(monkeypatch):
    """0.1 exp(−t / 100) is below 0.05 in the last ten of 100 steps: the rank is to fall, and cannot."""
    scripted(monkeypatch, [0.1 * float(np.exp(-step / 100)) for step in range(202)])
    fit = Fit(batches=202, spec={"policy": "recent_loss"})
    assert set(fit.watch.steps) == {1}
    assert fit.controller.statistics()["rank/recent_loss"] == pytest.approx(
        np.mean([0.1 * np.exp(-step / 100) for step in range(190, 200)]), rel=1e-6
    )


def test_a_loss_is_the_mean_over_the_examples_of_its_step():
    """Its batches have four rows, two or one: their own means count in this share."""

    class Losses(L.Callback):
        def __init__(self):
            self.sums = []

        def on_before_backward(self, trainer, module, loss):
            self.sums.append(float(nn.functional.cross_entropy(self.logits, self.labels, reduction="sum")))

        def on_train_batch_start(self, trainer, module, batch, number):
            self.labels = batch["labels"]
            with torch.no_grad():
                self.logits = module(batch)  # at the step's rank; nothing in the model is random

    rows = [4, 2, 1, 4, 1, 1, 4, 2, 4, 4, 1, 2]
    batches = [
        {name: tensor[:count] for name, tensor in batch.items()}
        for count, batch in zip(rows, text_batches(12), strict=True)
    ]
    always_up = {"policy": "recent_loss", "period": 1, "window": 2, "high": 0.0, "low": 0.0}
    losses = Losses()
    fit = Fit(batches=batches, accumulate=4, spec=always_up, extra=[losses])
    assert fit.watch.steps == [1, 2, 4]
    expected = np.reshape(losses.sums, (3, 4)).sum(1) / np.reshape(rows, (3, 4)).sum(1)
    kept = fit.controller.state_dict()["losses"]
    assert [kept[rank] for rank in (1, 2, 4)] == [[pytest.approx(value, rel=1e-6)] for value in expected]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_what_is_no_number_moves_nothing(loss):
    controller = switching(policy="recent_loss")
    controller.plan(1000)
    controller.decide(1.0)
    controller.decide(loss)
    assert controller.resting_rank == 2


# (c), (d) Processes and resumptions ------------------------------------------------------------------------

CONFIG = """
name: switching
model: {name: "random:mlp", task: regression}
data: {source: toy, target: product, size: 160, batch_size: 16, evaluation_batch_size: 7}
adapter: {method: dylora, rank: 4, targets: [layer1, layer2], modules_to_save: [layer3], dropout: DROPOUT}
controllers: {rank_switching: {policy: uniform}}
optimization: {learning_rate: 0.01, weight_decay: 0.1}
trainer: {max_epochs: 3, log_every: 1, checkpoint_every: 5, progress_bar: false, accelerator: cpu}
tracking: {wandb: disabled}
"""
SWITCHED = {
    "uniform": [],
    "frozen": ["adapter.frozen=true", "controllers.rank_switching.policy=geometric", "trainer.keep=best"],
    "gradient_norm": [
        "controllers.rank_switching.policy=gradient_norm",
        "controllers.rank_switching.high=6.0",
        "controllers.rank_switching.low=4.5",
    ],
    "recent_loss": [
        "controllers.rank_switching.policy=recent_loss",
        "controllers.rank_switching.high=1.0",
        "controllers.rank_switching.low=0.95",
        "controllers.rank_switching.period=2",
        "controllers.rank_switching.window=3",
    ],
}


def config_of(folder, run_name, dropout, *overrides):
    path = folder / "experiment.yaml"
    path.write_text(CONFIG.replace("DROPOUT", str(dropout)))
    return compose(path, [f"output={folder}", f"run={run_name}", *overrides])


def rows_of(folder):
    skipped = ("speed/", "memory/peak")
    return [
        {name: value for name, value in row.items() if not name.startswith(skipped)}
        for row in read_metrics(folder)
    ]


@pytest.mark.parametrize("policy", SWITCHED)
def test_a_resumed_run_has_the_same_ranks_rows_and_weights_bit_for_bit(tmp_path, monkeypatch, policy):
    whole = run(config_of(tmp_path, "whole", 0.2, *SWITCHED[policy]))
    stopped = config_of(tmp_path, "stopped", 0.2, *SWITCHED[policy])
    statistics = RankSwitching.statistics
    asked = []

    def stop(self):
        asked.append(1)
        if len(asked) == 18:
            raise RuntimeError("stopped")
        return statistics(self)

    with monkeypatch.context() as patch:
        patch.setattr(RankSwitching, "statistics", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run(stopped)
    resumed = run(stopped, resume=True)
    assert resumed.record["resumptions"] == 1
    assert rows_of(resumed.folder.path) == rows_of(whole.folder.path)
    ranks = [row["rank/active"] for row in rows_of(whole.folder.path) if "rank/active" in row]
    assert len(ranks) == 30
    assert len(set(ranks[15:])) > 1
    ours, theirs = (load_file(r.folder.adapter / "adapter_model.safetensors") for r in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.record["metrics"] == whole.record["metrics"]


PROCESS = """
import json, os, sys
from lora_lab.callbacks.controllers.rank_switching import RankSwitching
from lora_lab.config import compose
from lora_lab.experiment import run

ranks, begin = [], RankSwitching.on_train_batch_start

def watch(self, *arguments):
    begin(self, *arguments)
    ranks.append([adapter.active_rank for adapter in self.controlled.values()])

RankSwitching.on_train_batch_start = watch
run(compose(sys.argv[1], sys.argv[2:]))
json.dump(ranks, open(f"ranks{os.environ.get('LOCAL_RANK', '0')}.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["uniform", "recent_loss"])
def test_two_processes_have_the_ranks_and_numbers_of_one(tmp_path, policy):
    one_config = config_of(tmp_path, "one", 0.0, *SWITCHED[policy])
    (tmp_path / "process.py").write_text(PROCESS)
    settings = [f"output={tmp_path}", "run=two", "data.batch_size=8", "trainer.devices=2", *SWITCHED[policy]]
    script = str(tmp_path / "process.py")
    run_in_two_processes(script, tmp_path, str(tmp_path / "experiment.yaml"), *settings)
    one = run(one_config)
    expected = [int(row["rank/active"]) for row in rows_of(one.folder.path) if "rank/active" in row]
    assert len(set(expected)) > 1
    for process in "01":
        ranks = json.loads((tmp_path / f"ranks{process}.json").read_text())
        assert ranks == [[rank, rank] for rank in expected]
    two = json.loads((tmp_path / "switching" / "two" / "run.json").read_text())["metrics"]
    assert one.record["metrics"].keys() == two.keys()
    assert {
        f"{stage}/mse_rank_{rank}" for stage in ("validation", "test") for rank in (1, 2, 4)
    } <= two.keys()
    for name, value in one.record["metrics"].items():
        assert two[name] == pytest.approx(value, rel=1e-4), name
    weights = load_file(tmp_path / "switching" / "two" / "adapter" / "adapter_model.safetensors")
    for name, weight in load_file(one.folder.adapter / "adapter_model.safetensors").items():
        assert relative(weights[name], weight) < 1e-5


# (i) Refusals ----------------------------------------------------------------------------------------------


def test_a_method_without_nested_ranks_is_refused_with_the_name_of_one_that_has(tmp_path):
    message = "rank_switching: needs adapters that are NestedRank; those of method 'lora' are not.*: dylora"
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, "one", 0.0, "adapter.method=lora")
    with pytest.raises(IncompatibleError, match=message):
        switching(inject(linear(), LoRASpec(targets=["0"], modules_to_save=[])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "chance"}, "policy: must be one of uniform, geometric, gradient_norm, recent_loss"),
        ({"min_rank": 0}, "min_rank: must be at least 1; got 0"),
        ({"min_rank": 5, "max_rank": 4}, "min_rank: must not exceed max_rank: 4; got 5"),
        (
            {"max_rank": 9},
            "max_rank: 9 is not a rank that is trained here; choose among 1, 2, 3, 4, 5, 6, 7, 8",
        ),
        ({"min_rank": 9}, "min_rank: 9 is not a rank"),
        ({"geometric_p": 1.0}, r"geometric_p: must lie in \(0, 1\); got 1.0"),
        ({"policy": "recent_loss", "ranks": []}, "ranks: must rise, from 1 or more"),
        ({"policy": "recent_loss", "ranks": [4, 2]}, r"ranks: must rise, from 1 or more; got \[4, 2\]"),
        ({"policy": "recent_loss", "ranks": [4, 16]}, "ranks: 16 is not a rank that is trained here"),
        (
            {"policy": "recent_loss", "ranks": [1, 4], "min_rank": 2},
            "ranks: 1 is not a rank that is trained here",
        ),
        ({"policy": "recent_loss", "high": 0.01}, "low: must lie in .0, high.; got low 0.05 and high 0.01"),
        ({"policy": "recent_loss", "period": 0}, "period: must be above 0; got 0"),
        ({"window": 0}, "window: must be at least 1; got 0"),
        ({"evaluation_ranks": [0, 4]}, r"evaluation_ranks: must rise, from 1 or more; got \[0, 4\]"),
        (
            {"evaluation_ranks": [4, 9]},
            "evaluation_ranks: 9 is not a rank that is trained here; choose among 1, ",
        ),
        ({"evaluation_ranks": [6], "max_rank": 4}, "evaluation_ranks: 6 is not a rank .* among 1, 2, 3, 4"),
        ({"final_rank": 0}, "final_rank: must be at least 1; got 0"),
        ({"final_rank": 9}, "final_rank: 9 is not a rank that is trained here"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=f"controllers.rank_switching.{message}"):
        switching(**options)


def test_a_run_without_a_single_decision_is_refused():
    controller = switching(policy="recent_loss")
    with pytest.raises(ConfigError, match="the first decision is due after 100 steps of a run of 100"):
        controller.plan(100)
    controller.plan(101)
    switching(policy="uniform").plan(1)


def test_no_rank_is_evaluated_where_none_is_asked_for():
    fit = Fit(batches=2, spec={"evaluation_ranks": []})
    assert not any("_rank_" in name for name in fit.trainer.callback_metrics)
