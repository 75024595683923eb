"""What the history says about rank and sparsity."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from lora_lab.adapters import inject
from lora_lab.adapters.methods.bitfit import BitFitSpec
from lora_lab.adapters.methods.head import HeadSpec
from lora_lab.adapters.methods.ia3 import IA3Spec
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.callbacks.adapter_rows import adapter_rows, sparsity
from lora_lab.callbacks.adapter_statistics import final_statistics
from lora_lab.callbacks.heatmaps import history_heatmap, rank_heatmap
from lora_lab.tracking import read_metrics
from tests.tracked_run import train
from tests.wandb_file import offline_folders, read_offline_run

SPEC = LoRASpec(rank=4, targets=["query", "value"], rank_pattern={"value": 2})


@pytest.fixture(scope="module")
def tracked(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    run = train(make_model("bert"), SPEC, folder, max_epochs=2)
    return run, read_metrics(folder), read_offline_run(*offline_folders(folder))


def test_statistics_stand_in_the_row_of_the_validation(tracked):
    run, rows, _ = tracked
    validations = [row for row in rows if "validation/accuracy" in row]
    assert [row["step"] for row in validations] == [7, 15]
    for row in validations:
        assert row["rank/mean"] == 3
        assert {path: row[f"rank/{path}"] for path in run.adapters.adapters} == {
            path: 2 if path.endswith("value") else 4 for path in run.adapters.adapters
        }
        assert 0 < row["rank/effective_mean"] <= 4
        assert row["sparsity/mean"] == 0


def test_start_and_end_have_rows_of_their_own(tracked):
    _, rows, _ = tracked
    own = [row for row in rows if "rank/mean" in row and "validation/loss" not in row]
    assert [row["step"] for row in own] == [0, 15]
    assert own[0]["rank/effective_mean"] == 0  # the update starts at zero
    assert own[1]["rank/effective_mean"] > 0


def test_wandb_was_given_the_same_rows_as_the_csv(tracked):
    _, rows, offline = tracked
    scalars = [
        {name: value for name, value in row.items() if not name.startswith("_")}
        for row in offline.history
        if not any(name.startswith(("rank/table", "rank/heatmap")) for name in row)
    ]
    assert [{"trainer/global_step": row.pop("step"), **row} for row in map(dict, rows)] == [
        {"trainer/global_step": row.pop("trainer/global_step"), **row} for row in scalars
    ]


def test_table_has_a_row_for_each_adapter(tracked):
    run, _, offline = tracked
    (path,) = [path for path in offline.media if path.name.endswith(".table.json")]
    table = json.loads(path.read_text())
    names = "path role layer rank effective_rank stable_rank sparsity dropped trainable shared".split()
    assert table["columns"] == names
    found = [dict(zip(names, row, strict=True)) for row in table["data"]]
    assert [row["path"] for row in found] == list(run.adapters.adapters)
    assert [row["role"] for row in found] == ["query", "value"] * (len(found) // 2)
    assert [row["layer"] for row in found] == [layer for layer in range(len(found) // 2) for _ in "qv"]
    adapters = list(run.adapters)
    assert [row["trainable"] for row in found] == [a.A.numel() + a.B.numel() for a in adapters]
    for row in found:
        assert 1 <= row["stable_rank"] <= row["effective_rank"] <= row["rank"]


def test_picture_is_there_and_not_empty(tracked):
    _, _, offline = tracked
    (path,) = [path for path in offline.media if path.suffix == ".png"]
    assert np.asarray(Image.open(path).convert("L")).std() > 10


def test_final_statistics_are_those_of_the_last_row(tracked):
    run, rows, _ = tracked
    final = final_statistics(adapter_rows(run.adapters))
    assert final == {
        "final_rank_mean": rows[-1]["rank/mean"],
        "effective_rank_mean": rows[-1]["rank/effective_mean"],
        "sparsity_mean": rows[-1]["sparsity/mean"],
    }


def test_effective_rank_is_that_of_the_dense_update(tracked):
    run, _, _ = tracked
    for row, adapter in zip(adapter_rows(run.adapters), run.adapters, strict=True):
        values = np.linalg.svd((adapter.B @ adapter.A).detach().double().numpy(), compute_uv=False)
        share = values[values > 1e-9] / values.sum()
        assert row.effective_rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "absent"),
    [
        (IA3Spec(), {"final_rank_mean"}),
        (BitFitSpec(), {"final_rank_mean", "effective_rank_mean"}),
        (HeadSpec(), {"final_rank_mean", "effective_rank_mean", "sparsity_mean"}),
    ],
    ids=lambda value: getattr(value, "method", None),
)
def test_names_without_a_meaning_do_not_appear(make_model, tmp_path, spec, absent):
    run = train(make_model("bert"), spec, tmp_path, tracking="disabled", batches=2)
    final = final_statistics(adapter_rows(run.adapters))
    assert {name for name, value in final.items() if value is None} == absent
    logged = {name for row in read_metrics(tmp_path) for name in row}
    named = {"final_rank_mean": "rank/mean", "effective_rank_mean": "rank/effective_mean"}
    named |= {"sparsity_mean": "sparsity/mean"}
    assert {name for name in final if named[name] not in logged} == absent
    assert not any(name.startswith("rank/bert") for name in logged)


def test_silenced_and_dropped_units_count_as_sparse(make_model):
    adapters = inject(make_model("bert"), SPEC)
    first, second, *_ = adapters
    first.keep_components(torch.tensor([True, False, False, False]))
    second.drop()
    rows = adapter_rows(adapters)
    assert (rows[0].rank, rows[0].sparsity) == (1, 0.75)
    assert (rows[1].rank, rows[1].sparsity) == (0, 1.0)


def test_without_units_of_rank_zeros_are_counted(make_model):
    adapters = inject(make_model("bert"), BitFitSpec(targets=["query"]))
    adapter = next(iter(adapters))
    assert sparsity(adapter) == 1.0
    adapter.delta.data[: len(adapter.delta) // 4] = 1.0
    assert sparsity(adapter) == 0.75


def test_a_diverged_adapter_gives_nan_and_no_error(make_model):
    adapters = inject(make_model("bert"), SPEC)
    next(iter(adapters)).A.data.fill_(math.nan)
    assert math.isnan(final_statistics(adapter_rows(adapters))["effective_rank_mean"])
    places = [(row.layer, row.role, row.path, row.effective_rank) for row in adapter_rows(adapters)]
    assert rank_heatmap(places) is not None


def test_a_run_without_loggers_passes(make_model):
    run = train(make_model("bert"), SPEC, batches=2)
    assert run.trainer.callback_metrics["rank/mean"] == 3


def test_heat_map_separates_equal_roles_of_two_stacks():
    places = [
        (layer, "query", f"{stack}.block.{layer}.layer.0.q", 1.0)
        for layer in (0, 1)
        for stack in ("encoder", "decoder")
    ]
    one = rank_heatmap([place for place in places if place[2].startswith("encoder")])
    both = rank_heatmap(places)
    assert both.shape[1] > one.shape[1]
    assert both.shape[0] >= one.shape[0]
    assert rank_heatmap([(None, "x", "x", 1.0), (0, "y", "y", None)]) is None


def test_a_heat_map_reads_no_name_as_a_formula():
    places = [(0, "x$^$", "x$^$", 1.0)]
    assert rank_heatmap(places) is not None
    assert history_heatmap(places, [0, 1], np.array([[1.0], [2.0]])) is not None
