"""SVD truncation: the optimum of a rank, alone and at the end of runs, which then are of the cut adapter."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.methods.lora_drop import LoRADropSpec
from lora_lab.adapters.methods.lora_prune import LoRAPruneSpec
from lora_lab.adapters.methods.pissa import PiSSASpec
from lora_lab.adapters.protocols import Truncatable
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.callbacks import CONTROLLERS, check_controllers
from lora_lab.callbacks.adapter_rows import adapter_rows
from lora_lab.callbacks.controllers.compaction import CompactionSpec
from lora_lab.callbacks.controllers.svd_truncation import SVDTruncation, SVDTruncationSpec
from lora_lab.errors import ConfigError, IncompatibleError
from tests.adapters.tiny import gpt_oss, linear, relative, shake, tiny_bert
from tests.callbacks.controlled import LAYERS, assert_equal, train

TOLERANCE = 1e-6  # float32: one rounding of each factor
SPECS = {
    "lora": LoRASpec(rank=5, alpha=7.0),
    "lora, rslora": LoRASpec(rank=5, alpha=7.0, rslora=True),
    "lora, alpha below 0": LoRASpec(rank=5, alpha=-7.0),
    "lora, bias": LoRASpec(rank=5, lora_bias=True),
    "lora, olora": LoRASpec(rank=5, init="olora"),
    "lora_drop": LoRADropSpec(rank=5),
    "lora_prune": LoRAPruneSpec(rank=5),
    "pissa": PiSSASpec(rank=5, alpha=7.0),
    "pissa, residual": PiSSASpec(rank=5, mode="residual"),
}


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Returns the closest matrix of a rank, by a dense decomposition."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def cut_to(rank: int, adapters) -> SVDTruncation:
    controller = SVDTruncation(SVDTruncationSpec(rank), adapters)

    class Trainer:
        optimizers, callbacks, strategy = (), (), type("Strategy", (), {"model": None})

    controller.cut(Trainer)
    return controller


def test_every_method_that_can_be_cut_is_tried():
    able = {name for name, method in METHODS.items() if issubclass(method, Truncatable)}
    assert able == {spec.method for spec in SPECS.values()} == {"lora", "lora_drop", "lora_prune", "pissa"}


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("case", SPECS)
def test_the_cut_is_the_dense_optimum(case, rank, tmp_path):
    def make():
        return linear() if "residual" in case else linear().double()

    adapters = inject(make(), replace(SPECS[case], targets=["0"], modules_to_save=[]))
    shake(adapters)
    (adapter,) = adapters
    before = adapter.delta_weight().detach().double()
    S = torch.linalg.svdvals(before)
    lost = cut_to(rank, adapters).statistics()["importance/lost"]
    after, tolerance = adapter.delta_weight().detach(), 1e-5 if "residual" in case else 1e-10
    assert relative(after.double(), best(before, rank)) < tolerance
    eckart_young = S[rank:].square().sum().sqrt()
    assert (before - after).norm() == pytest.approx(float(eckart_young), rel=tolerance)
    assert lost == pytest.approx(float(eckart_young / S.norm()), rel=tolerance)
    assert adapter.rank == adapter_rows(adapters)[0].rank == len(adapter.A) == rank
    x = torch.randn(3, adapter.in_features, dtype=before.dtype).to(after.dtype)
    expected = adapters.model.eval()(x).detach()
    with adapters.merged():
        assert relative(adapters.model(x), expected) < max(tolerance, TOLERANCE)
    save_adapter(adapters, tmp_path / "adapter")
    fresh = make()
    (loaded,) = load_adapter(fresh, tmp_path / "adapter")
    assert loaded.rank == rank
    assert relative(fresh.eval()(x), expected) < max(tolerance, TOLERANCE)


def test_embeddings_convolutions_and_patterns_are_cut_too():
    model = tiny_bert()
    spec = LoRASpec(rank=5, targets=["word_embeddings", "query", "value"], rank_pattern={"value": 2})
    adapters = inject(model, spec)
    adapters_2d = inject(
        nn.Sequential(nn.Conv2d(3, 5, 3)), LoRASpec(rank=5, targets=["0"], modules_to_save=[])
    )
    for found in (adapters, adapters_2d):
        shake(found)
        before = {path: adapter.update().matrix() for path, adapter in found.items()}
        cut_to(3, found)
        for path, adapter in found.items():
            least = 2 if path.endswith("value") else 3
            assert adapter.rank == least
            assert relative(adapter.update().matrix(), best(before[path], least).float()) < 1e-5


def test_an_update_of_zero_or_of_a_lower_rank_stays_as_it_is():
    adapters = inject(linear(), LoRASpec(rank=4, targets=["0"], modules_to_save=[]))
    (adapter,) = adapters
    controller = cut_to(2, adapters)
    assert not adapter.delta_weight().any()
    assert controller.statistics() == {"budget/kept": 2, "importance/lost": 0.0}


# Runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_run_is_that_without_it_and_cut_after_the_last_step(method, keep):
    spec = METHODS[method].Spec
    whole = train(spec(rank=4), {})
    cut = train(spec(rank=4), {"svd_truncation": SVDTruncationSpec(2)}, keep=keep)
    for path in LAYERS:
        adapter, other = cut.adapters.adapters[path], whole.adapters.adapters[path]
        assert relative(adapter.delta_weight(), best(other.delta_weight(), 2).float()) < 1e-5
    assert [adapter.rank for adapter in cut.adapters] == [2, 2, 2]
    assert cut.checkpoint.best_step == 20 or keep == "last"
    assert not cut.checkpoint.metrics_are_old(cut.trainer)
    x = torch.randn(5, 6)
    cut.adapters.model.eval()
    loss = cut.trainer.callback_metrics["validation/loss"]
    cut.trainer.validate(cut.trainer.lightning_module, cut.trainer.datamodule, verbose=False)
    assert cut.trainer.callback_metrics["validation/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert torch.isfinite(cut.adapters.model(features=x).logits).all()


@pytest.mark.parametrize("stopped", [5, 18])
def test_a_resumed_run_ends_like_the_uninterrupted_one(stopped, tmp_path):
    controllers = {"svd_truncation": SVDTruncationSpec(1)}
    whole = train(LoRASpec(rank=4), controllers)
    train(LoRASpec(rank=4), controllers, stop_after=stopped, folder=tmp_path)
    resumed = train(LoRASpec(rank=4), controllers, folder=tmp_path, resume=True)
    assert_equal(resumed.adapters, whole.adapters)
    assert (
        resumed.controllers["svd_truncation"].statistics() == whole.controllers["svd_truncation"].statistics()
    )


def test_it_is_refused_beside_what_decides_the_same():
    for name in ("rank_pruning", "rank_growth", "output_evaluation"):
        both = {"svd_truncation": SVDTruncationSpec(1), name: CONTROLLERS[name].Spec()}
        (fault,) = check_controllers(both, METHODS["lora"])
        assert "decides which components are kept" in fault
    (fault,) = check_controllers(
        {"svd_truncation": SVDTruncationSpec(1), "compaction": CompactionSpec()}, METHODS["lora"]
    )
    assert "has nothing to compact" in fault


def test_what_cannot_be_cut_is_refused():
    for rank, message in ((4, "must be below 4"), (0, "must be at least 1")):
        with pytest.raises(ConfigError, match=message):
            train(LoRASpec(rank=4), {"svd_truncation": SVDTruncationSpec(rank)}, steps=1)
    for method in ("dora", "dylora", "adalora"):
        (fault,) = check_controllers({"svd_truncation": SVDTruncationSpec()}, METHODS[method])
        assert "Methods that are: lora, lora_drop, lora_prune, pissa" in fault
    adapters = inject(gpt_oss(), LoRASpec(rank=4, targets=["q_proj", "experts"]))
    with pytest.raises(IncompatibleError, match="experts is none"):
        SVDTruncation(SVDTruncationSpec(), adapters)
