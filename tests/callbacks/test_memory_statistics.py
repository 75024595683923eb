"""Memory is counted, not estimated."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.callbacks.controllers.output_evaluation import OutputEvaluationSpec
from lora_lab.callbacks.memory_statistics import MemoryStatistics, is_compiled, resident_peak_bytes
from lora_lab.callbacks.saved_tensors import SavedTensors
from lora_lab.tracking import read_metrics
from lora_lab.training.module import FineTuner
from tests.callbacks.controlled import from_two_processes, hand_back, train as train_controlled
from tests.tracked_run import train
from tests.wandb_file import offline_folders, read_offline_run

SPEC = LoRASpec(rank=4, targets=["query", "value"])
NAMES = {
    f"memory/{name}_megabytes"
    for name in ("base", "trainable", "optimizer", "gradient", "saved_activation", "peak")
}


def logged(folder):
    return [row for row in read_metrics(folder) if "train/loss" in row]


@pytest.fixture(scope="module")
def tracked(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    run = train(make_model("bert"), SPEC, folder, log_every=3, max_epochs=2)
    return run, folder


def test_all_names_stand_in_the_rows_of_the_loss(tracked):
    _, folder = tracked
    rows = read_metrics(folder)
    assert [row["step"] for row in logged(folder)] == [2, 5, 8, 11, 14]
    assert all(row.keys() >= NAMES for row in logged(folder))
    assert all(("train/loss" in row) == bool(NAMES & row.keys()) for row in rows)
    offline = read_offline_run(*offline_folders(folder))
    assert [row for row in offline.history if NAMES <= row.keys()] == [
        row for row in offline.history if "train/loss" in row
    ]


def test_bytes_of_tensors_are_exact(tracked):
    run, folder = tracked
    trained = run.adapters.trainable_parameters()
    numbers = sum(parameter.numel() for parameter in trained)
    for row in logged(folder):
        assert row["memory/trainable_megabytes"] == pytest.approx(4 * numbers / 1e6)
        assert row["memory/gradient_megabytes"] == pytest.approx(4 * numbers / 1e6)
        # AdamW keeps a mean and a square of each number, and a step count in float32 for each tensor.
        assert row["memory/optimizer_megabytes"] == pytest.approx((8 * numbers + 4 * len(trained)) / 1e6)


def test_peak_is_the_resident_set_of_this_process(tracked):
    run, folder = tracked
    peaks = [row["memory/peak_megabytes"] for row in logged(folder)]
    assert peaks == sorted(peaks)
    assert 100 < peaks[-1] <= run.memory.peak_megabytes * (1 + 1e-6)
    assert run.memory.peak_kind == "process_resident"
    before = resident_peak_bytes()
    held = torch.ones(30_000_000)
    assert resident_peak_bytes() >= before
    assert resident_peak_bytes() * 2 > held.nbytes


def test_saved_activations_of_a_linear_network_are_the_known_ones():
    network = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5), nn.Tanh())
    network[0].requires_grad_(False)
    x = torch.randn(8, 10, requires_grad=True)
    saved = SavedTensors()
    saved.start()
    y = network(x)
    saved.stop()
    # ReLU and the second linear map share one (8, 20) tensor, tanh keeps its (8, 5) output; the frozen map
    # keeps nothing of its input, and weights are not activations.
    assert saved.count(network.parameters()) == 4 * (8 * 20 + 8 * 5)
    y.sum().backward()
    assert network[2].weight.grad is not None
    assert saved.count() == 0


def test_hooks_change_no_gradient_and_forgotten_graphs_do_not_count():
    layer = nn.Linear(6, 6)
    x = torch.randn(3, 6)
    (expected,) = torch.autograd.grad(layer(x).exp().sum(), layer.weight)
    saved = SavedTensors()
    saved.start()
    layer(x).exp().sum()  # dies at once
    y = layer(x).exp().sum()
    saved.stop()
    assert saved.count(layer.parameters()) == 4 * (3 * 6 + 3 * 6)  # x and the output of exp
    (found,) = torch.autograd.grad(y, layer.weight)
    assert torch.equal(found, expected)


class Single(nn.Module):
    """One linear map, in the form that FineTuner trains."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(10, 1)

    def forward(self, features):
        return SimpleNamespace(logits=self.map(features))


def test_a_run_counts_what_one_adapted_map_keeps():
    adapters = inject(Single(), LoRASpec(rank=3, targets=["map"]))
    memory = MemoryStatistics(adapters)
    data = DataLoader([{"features": torch.randn(8, 10), "labels": torch.randn(8, 1)}] * 2, batch_size=None)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[memory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(FineTuner(adapters.model, adapters, "regression"), data)
    # x for A, s x Aᵀ for B and its factor s; predictions and labels for the squared error, flags of the
    # labels that count and the factor of their sum
    assert memory.saved_activation_bytes == 4 * (8 * 10 + 8 * 3 + 1 + 8 + 8 + 1) + 8


def test_gradient_checkpointing_is_seen():
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)])
    counts = []
    for recompute in (False, True):
        x = torch.randn(16, 8, requires_grad=True)
        saved = SavedTensors()
        saved.start()
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False) if recompute else block(y)
        saved.stop()
        counts.append(saved.count(blocks.parameters()))
        y.sum().backward()
    assert counts[1] < counts[0]


def test_the_probe_is_made_once_and_a_resumed_run_keeps_it(make_model, tmp_path):
    run = train(make_model("bert"), SPEC, tmp_path / "a", tracking="disabled", max_epochs=2)
    count = run.memory.saved_activation_bytes
    path = tmp_path / "run.ckpt"
    run.trainer.save_checkpoint(path)
    (value,) = {row["memory/saved_activation_megabytes"] for row in logged(tmp_path / "a")}
    assert value == pytest.approx(count / 1e6)

    resumed = MemoryStatistics(run.adapters)
    resumed.load_state_dict(run.memory.state_dict())
    resumed.on_train_batch_start(run.trainer, run.trainer.lightning_module, {}, 0)
    assert resumed._probe is None
    state = torch.load(path, weights_only=True)["callbacks"]
    assert state["MemoryStatistics"] == {"saved_activation_bytes": count}


def test_a_compiled_model_is_not_probed(make_model, tmp_path):
    model = make_model("bert")
    model.compile(backend="eager")
    assert is_compiled(model)
    run = train(model, SPEC, tmp_path, tracking="disabled", batches=2)
    assert run.memory.saved_activation_bytes is None
    (row,) = logged(tmp_path)
    assert NAMES - row.keys() == {"memory/saved_activation_megabytes"}


def test_a_failed_first_batch_leaves_no_hooks(make_model):
    model = make_model("bert")
    model.classifier.forward = lambda *arguments: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(model, SPEC)
    assert not torch._C._autograd._top_saved_tensors_default_hooks(False)


def test_accumulated_batches_make_one_row(make_model, tmp_path):
    train(make_model("bert"), SPEC, tmp_path, tracking="disabled", accumulate_grad_batches=2, log_every=1)
    assert [row["step"] for row in logged(tmp_path)] == [0, 1, 2, 3]
    assert all(row.keys() >= NAMES for row in logged(tmp_path))


def test_the_base_is_counted_without_adapters_and_heads(tracked, make_model):
    run, folder = tracked
    plain = make_model("bert")
    total = sum(t.numel() * t.element_size() for t in [*plain.parameters(), *plain.buffers()])
    for row in logged(folder):
        assert row["memory/base_megabytes"] == pytest.approx(total / 1e6)


class Look(L.Callback):
    """Keeps the count of saved activations, and what is logged, after each step."""

    def __init__(self, memory):
        self.memory, self.counts, self.rows = memory, [], []

    def on_train_batch_end(self, trainer, *_):
        self.counts.append(self.memory.saved_activation_bytes)
        self.rows.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def looked_at(controllers, steps=6, **options):
    found = []

    def memory(adapters):
        found.append(MemoryStatistics(adapters))
        return found[0]

    def look(adapters):
        found.append(Look(found[0]))
        return found[1]

    train_controlled(LoRASpec(rank=4), controllers, steps, extra=[memory, look], log_every=1, **options)
    return found[1]


def test_activations_are_counted_again_once_the_structure_has_changed(tmp_path):
    """Adapters that were dropped keep nothing for backward; a resumed run counts again too."""
    dropping = OutputEvaluationSpec(share=False, threshold=0.1, group_by="global", warmup=3, sample_ratio=1.0)
    specs = {"output_evaluation": dropping}
    counts = looked_at(specs).counts
    assert len(set(counts[:3])) == 1
    assert len(set(counts[3:])) == 1
    assert counts[3] < counts[2]
    looked_at(specs, stop_after=3, folder=tmp_path)
    assert looked_at(specs, folder=tmp_path, resume=True).counts == counts[3:]


@pytest.mark.slow
def test_every_process_counts_its_own(tmp_path):
    row = from_two_processes(__file__, tmp_path)
    for name in NAMES:
        most, total = row[name], row[name.replace("memory/", "memory/all/")]
        if name == "memory/peak_megabytes":
            assert 1.2 * most < total <= 2 * most
        else:
            assert total == pytest.approx(2 * most)


if __name__ == "__main__":
    hand_back(looked_at({}, steps=10, devices=2).rows[-1])
