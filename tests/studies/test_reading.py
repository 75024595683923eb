"""What a study may say: every fault of every cell in one message, before anything is written."""

import re
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml

from lora_lab.adapters import inject
from lora_lab.documents.reading import read_yaml
from lora_lab.errors import ConfigError, LabError
from lora_lab.models.build import build_model
from lora_lab.studies import read_study

EXPERIMENT = {
    "model": {"name": "random:mlp", "task": "regression"},
    "data": {"source": "toy", "size": 16, "batch_size": 8},
    "adapter": {"method": "lora", "targets": "all-linear", "rank": 2},
    "trainer": {"max_epochs": 1},
    "tracking": {"wandb": "disabled"},
}
TABLE = str(next((Path(__file__).parents[2] / "experiments").glob("*/results.csv")))
STUDY = {
    "question": "Which?",
    "experiment": EXPERIMENT,
    "grid": {"adapter.method": ["lora", "dora"], "adapter.rank": [1, 2]},
    "seeds": [0, 1],
    "metric": "test/mse",
    "baseline": "lora-rank1",
}
TUNE = {"key": "optimization.learning_rate", "values": [0.001, 0.01], "seeds": [100]}


def study(tmp_path: Path, changes: dict, *overrides: str):
    path = tmp_path / "which.yaml"
    content = {name: value for name, value in (STUDY | changes).items() if value != "absent"}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_study(path, overrides)


def test_a_grid_is_crossed_and_cells_of_a_list_stand_beside_it(tmp_path):
    listed = {"wide": {"adapter": {"method": "ia3", "targets": ["layer1"]}, "trainer.max_epochs": 2}}
    found = study(tmp_path, {"list": listed}, "trainer.log_every=3")
    assert [cell.name for cell in found.cells] == [
        "lora-rank1", "lora-rank2", "dora-rank1", "dora-rank2", "wide",
    ]  # fmt: skip
    configs = {cell.name: cell.config for cell in found.cells}
    assert (configs["dora-rank2"].adapter.method, configs["dora-rank2"].adapter.rank) == ("dora", 2)
    assert configs["dora-rank2"].adapter.targets == "all-linear"
    assert (configs["wide"].adapter.targets, configs["wide"].trainer.max_epochs) == (["layer1"], 2)
    assert {config.trainer.log_every for config in configs.values()} == {3}
    assert found.cell("wide").resets == [
        "adapter: what was set for lora is reset, as ia3 does not have the same: rank."
    ]
    told = {row["cell"]: row["keys"] for row in found.differences()}
    assert told["dora-rank2"] == []
    assert told["wide"] == ["adapter.targets", "trainer.max_epochs"]


def test_a_controller_that_one_cell_lacks_is_told(tmp_path):
    listed = {"pruned": {"controllers": {"rank_pruning": {"threshold": 0.5}, "compaction": {}}}}
    found = study(tmp_path, {"list": listed})
    (row,) = [row for row in found.differences() if row["cell"] == "pruned"]
    assert row["keys"][-2:] == ["controllers.compaction", "controllers.rank_pruning"]
    before, now = row["values"]["controllers.rank_pruning"]
    assert (before, now["threshold"]) == (None, 0.5)


def test_of_a_correlation_more_is_better(tmp_path):
    found = study(tmp_path, {"metric": "test/pearson", "tune": TUNE | {"by": "validation/pearson"}})
    assert found.tuning.higher_is_better
    assert found.tuning.best({0.001: 0.1, 0.01: 0.7}) == 0.01
    assert found.resolved()["higher_is_better"]


def test_a_run_is_its_cell_with_seed_and_value(tmp_path):
    found = study(tmp_path, {"tune": TUNE})
    jobs = [found.job(found.cells[0], "compare", seed, value) for seed in (0, 1) for value in (0.001, 0.01)]
    assert [job.config.seed for job in jobs] == [0, 0, 1, 1]
    assert [job.config.optimization.learning_rate for job in jobs] == [0.001, 0.01] * 2
    assert len({job.folder.path for job in jobs}) == 4
    assert {job.folder.path.parent for job in jobs} == {Path("runs/which")}
    assert {(job.config.tracking.group, job.config.tracking.job_type) for job in jobs} == {
        ("which", "compare")
    }


BAD = {
    "unknown key in a grid": (
        {"grid": {"adapter.rnak": [1, 2]}},
        "adapter.rnak: no such key; did you mean 'rank'?",
    ),
    "key of one method alone": (
        {"grid": {"adapter.method": ["lora", "ia3"], "adapter.rank": [1, 2]}},
        "adapter.rank: no such key",
    ),
    "cell that cannot compose": (
        {"list": {"none": {"adapter.rank": 0}}},
        "rank: must be at least 1; got 0 (cell none)",
    ),
    "unknown method": (
        {"grid": {"adapter.method": ["lora", "lara"]}},
        "no method 'lara'; did you mean 'lora'?",
    ),
    "empty grid": ({"grid": {}}, "grid: must hold keys, each with a list of values"),
    "no cells": ({"grid": "absent"}, "grid: a study needs cells"),
    "empty values": ({"grid": {"adapter.rank": []}}, "grid.adapter.rank: is empty"),
    "values no list": (
        {"grid": {"adapter.rank": 4}},
        "grid.adapter.rank: must be a list of values; write [4]",
    ),
    "a value twice": ({"grid": {"adapter.rank": [1, 2, 1]}}, "grid.adapter.rank: 1 occurs twice"),
    "a value without a name": (
        {"grid": {"adapter": [{"method": "lora"}]}},
        "grid.adapter: a value with several settings needs a name",
    ),
    "two cells alike": (
        {"list": {"same": {"adapter.rank": 1}}},
        "cells lora-rank1, same are the same run; keep one of them",
    ),
    "two cells of one name": (
        {"list": {"lora-rank1": {"adapter.rank": 5}}},
        "list.lora-rank1: a cell of the grid has the same name",
    ),
    "baseline no cell": ({"baseline": "lora"}, "baseline: no cell 'lora'"),
    "no baseline": ({"baseline": "absent"}, "baseline: is required"),
    "metric not logged": ({"metric": "test/accuracy"}, "metric: no run logs 'test/accuracy'"),
    "test metric without test rows": (
        {
            "experiment": EXPERIMENT
            | {
                "model": {"name": "random:bert", "task": "regression"},
                "data": {"source": "files", "train": TABLE, "label": "x"},
                "adapter": {"method": "lora"},
            }
        },
        "has no test rows; name them, set data.test_fraction, or compare by a validation metric",
    ),
    "seeds twice": ({"seeds": [0, 1, 0]}, "seeds: 0 occurs twice"),
    "no seeds": ({"seeds": []}, "seeds: give at least one seed"),
    "negative seed": ({"seeds": [-1]}, "seeds: must lie from 0"),
    "seed in a cell": (
        {"list": {"five": {"seed": 5}}},
        "seed: is set by the study itself, see seeds and name (cell five)",
    ),
    "run in the experiment": ({"experiment": EXPERIMENT | {"run": "one"}}, "run: is set by the study itself"),
    "tune on test data": (
        {"tune": TUNE | {"by": "test/mse"}},
        "tune.by: test/mse is of test data, which must not decide",
    ),
    "tune by what is not logged": (
        {"tune": TUNE | {"by": "validation/f1"}},
        "tune.by: no run logs 'validation/f1'",
    ),
    "compare where tuned": ({"tune": TUNE, "metric": "validation/mse"}, "data that the search used"),
    "tuning seeds of the comparison": ({"tune": TUNE | {"seeds": [1]}}, "tune.seeds: 1 is also a seed"),
    "tuning without seeds": ({"tune": TUNE | {"seeds": []}}, "tune.seeds: give at least one seed"),
    "tune a key of the grid": (
        {"tune": TUNE | {"key": "adapter.rank"}},
        "'lora-rank1' sets adapter.rank itself",
    ),
    "tune a key that is none": (
        {"tune": TUNE | {"key": "optimization.rate"}},
        "optimization.rate: no such key",
    ),
    "tune the data": (
        {"tune": TUNE | {"key": "data.max_length"}},
        "is not a setting that a search on validation can choose",
    ),
    "a value that does not fit": (
        {"tune": TUNE | {"values": [-1.0, 1.0]}},
        "learning_rate: must be above 0 and finite; got -1.0",
    ),
    "one value": ({"tune": TUNE | {"values": [0.1]}}, "tune.values: a search needs at least two values"),
    "values and a range": ({"tune": TUNE | {"low": 0.1}}, "tune.values: excludes low, high and trials"),
    "half a range": (
        {"tune": {"key": "optimization.learning_rate", "low": 0.1, "seeds": [9]}},
        "needs `values`, or `low`",
    ),
    "range upside down": (
        {"tune": {"key": "optimization.learning_rate", "low": 1.0, "high": 0.1, "trials": 3, "seeds": [9]}},
        "tune.low: must be below high",
    ),
    "range of whole numbers": (
        {
            "grid": {"adapter.method": ["lora", "dora"]},
            "baseline": "lora",
            "tune": {"key": "adapter.rank", "low": 2, "high": 8, "trials": 3, "seeds": [9]},
        },
        "tune.low: adapter.rank takes whole numbers; list them in `values` (cell lora, dora)",
    ),
    "unknown key of tune": ({"tune": TUNE | {"seed": [3]}}, "tune.seed: no such key; did you mean 'seeds'?"),
    "no size to match": (
        {"grid": {"adapter.method": ["lora", "ia3"]}, "match_parameters": 500, "baseline": "lora"},
        "cell 'ia3': ia3 has no field that sets its size",
    ),
    "a size to match in addition to its own": (
        {"match_parameters": 500},
        "sets adapter.rank itself, which the match would",
    ),
    "a size that all methods miss": (
        {"grid": {"adapter.method": ["lora", "dora"]}, "match_parameters": 1, "baseline": "lora"},
        "no cell comes within 10% of 1; the nearest are lora 267, dora 396",
    ),
    "a size beyond the model": (
        {"grid": {"adapter.method": ["lora", "dora"]}, "match_parameters": 10**9, "baseline": "lora"},
        "cell 'dora': the model itself has 4,929 parameters",
    ),
    "a size to match and to tune": (
        {
            "grid": {"adapter.method": ["lora", "dora"]},
            "match_parameters": 500,
            "baseline": "lora",
            "tune": TUNE | {"key": "adapter.rank", "values": [1, 2]},
        },
        "cell 'dora': tune.key sets its size",
    ),
    "seeds no list": ({"seeds": 3}, "seeds: must be a list; write [3]"),
    "seeds no whole numbers": ({"seeds": [0.5]}, "seeds: Value '0.5'"),
    "seed in the experiment": ({"experiment": EXPERIMENT | {"seed": 3}}, "seed: is set by the study itself"),
    "cell in the experiment": (
        {"experiment": EXPERIMENT | {"tracking": {"cell": "x"}}},
        "tracking.cell: is set by the study itself",
    ),
    "extends what is missing": ({"extends": ["nothing.yaml"]}, "extends: no file"),
    "metric no text": ({"metric": ["test/mse"]}, "metric: "),
    "baseline of nothing": ({"baseline": None}, "baseline: "),
    "no question": ({"question": " "}, "question: is empty"),
    "endless margin": ({"equivalence": float("inf")}, "equivalence: must be above 0 and finite"),
    "cell name no file name": (
        {"list": {"a\a": {"adapter.rank": 7}}},
        "the name of a cell must be plain text",
    ),
    "cell name too long": ({"list": {"a" * 201: {"adapter.rank": 7}}}, "a cell's name must have at most 200"),
    "study name no folder": ({"name": "a/b"}, "name: must be a plain folder name"),
    "grid key within another": (
        {"grid": {"adapter": ["lora"], "adapter.rank": [1]}},
        "grid.adapter.rank: lies within grid.adapter",
    ),
    "what only tracking sees": ({"grid": {"tracking.project": ["a", "b"]}}, "cells a, b are the same run"),
    "tuned value of another type": (
        {"tune": TUNE | {"values": ["fast", 0.1]}},
        "optimization.learning_rate: Value 'fast'",
    ),
    "one tuned value in two ways": ({"tune": TUNE | {"values": [1, 1.0]}}, "1, 1.0 are the same run"),
    "tuned devices": (
        {"tune": TUNE | {"key": "trainer.devices", "values": [1, 2]}},
        "'trainer.devices' is not a setting that a search",
    ),
    "margin of nothing": ({"equivalence": 0.0}, "equivalence: must be above 0"),
    "several devices": (
        {"experiment": EXPERIMENT | {"trainer": {"devices": 2}}},
        "each run of a study has one device",
    ),
    "unknown key": ({"sedes": [1]}, "sedes: no such key; did you mean 'seeds'?"),
    "reference in a cell": (
        {"list": {"x": {"name": "${oc.env:HOME}"}}},
        "grid, list and tune hold no `${…}`",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_study_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, message = BAD[kind]
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, changes)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["which.yaml"]


def test_all_faults_of_all_cells_are_told_at_once(tmp_path):
    listed = {
        "none": {"adapter.rank": 0},
        "odd": {"adapter.rank": 3, "trainer.max_epochs": 0},
        "x": {"data.sice": 1},
    }
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, {"list": listed, "seeds": [1, 1], "metric": "test/f1", "baseline": "lara"})
    text = str(caught.value)
    for part in ("(cell none)", "(cell odd)", "data.sice", "seeds: 1", "metric: no run", "baseline: no cell"):
        assert part in text
    assert len(text.split("\n")) == 6


def test_the_command_line_changes_study_and_experiment_but_not_what_is_compared(tmp_path):
    found = study(tmp_path, {"tune": TUNE}, "seeds=[7]", "tune.values=[0.1, 0.2, 0.3]", "data.size=24")
    assert (found.spec.seeds, found.tuning.values, found.tuning.key) == ([7], [0.1, 0.2, 0.3], TUNE["key"])
    assert found.cells[3].config.data.size == 24
    with pytest.raises(ConfigError, match="command line: adapter.rank: is what the study compares"):
        study(tmp_path, {}, "adapter.rank=3")
    listed = {"list": {"wide": {"adapter.rank": 7}}, "baseline": "wide"}
    assert [cell.name for cell in study(tmp_path, listed, "grid=null").cells] == ["wide"]
    for given in ("grid=5", "grid=[1]", "grid={}", "list={}"):
        with pytest.raises(ConfigError, match=rf"(?m){given[:4]}: must hold .*; got {re.escape(given[5:])}$"):
            study(tmp_path, listed, given)


RANGE = {"values": "absent", "low": 0.001, "high": 1.0, "trials": 3}


@pytest.mark.parametrize(
    ("tune", "losses", "advice"),
    [
        ({}, {0.001: 0.5, 0.01: 0.6}, "'tune.values=[0.0001, 0.001, 0.01]'"),
        ({}, {0.001: 0.5, 0.01: None}, "'tune.values=[0.0001, 0.001, 0.01]'"),
        ({}, {0.001: 0.5, 0.01: 0.504}, None),
        ({"values": [0.001, 0.01, 0.1]}, {0.001: 0.7, 0.01: 0.5, 0.1: 0.6}, None),
        ({"values": [1.01, 1.02]}, {1.01: 0.7, 1.02: 0.5}, "'tune.values=[1.01, 1.02, 1.03]'"),
        ({"key": "optimization.weight_decay", "values": [0, 0.01]}, {0: 0.5, 0.01: 0.6}, None),
        ({"values": [1, 2]}, {1: 0.5, 2: 0.6}, "'tune.values=[0.5, 1, 2]'"),
        ({"key": "adapter.rank", "values": [3, 4]}, {3: 0.5, 4: 0.6}, "'tune.values=[2, 3, 4]'"),
        ({"key": "adapter.rank", "values": [1, 2]}, {1: 0.5, 2: 0.6}, None),
        (RANGE, {0.9: 0.5, 0.8: 0.5, 0.1: 0.6}, "tune.high=10"),
        (RANGE, {0.9: 0.5, 0.1: 0.504, 0.01: 0.6}, None),
        (RANGE | {"key": "optimization.weight_decay", "low": 0, "log": False}, {0.01: 0.5, 0.4: 0.6}, None),
    ],
)
def test_a_search_is_widened_where_its_end_is_really_better_and_more_is_valid(tmp_path, tune, losses, advice):
    tune = {name: value for name, value in (TUNE | tune).items() if value != "absent"}
    grid = {"adapter.method": ["lora", "dora"]}
    found = study(tmp_path, {"grid": grid, "baseline": "lora", "tune": tune | {"by": "validation/loss"}})
    best = found.tuning.best(losses)
    fits = partial(found.cells[0].fits, found.tuning.key)
    assert found.tuning.at_edge(best, losses, None, fits) == advice


@pytest.mark.parametrize("method", ["lora", "hra", "oft", "fourierft", "loha"])
def test_matched_methods_train_as_many_numbers(tmp_path, method):
    wanted = 500
    changes = {
        "grid": {"adapter.method": [method, "delora"]},
        "experiment": EXPERIMENT | {"adapter": {"method": "lora", "targets": "all-linear"}},
        "match_parameters": wanted,
        "baseline": "delora",
    }
    cell = study(tmp_path, changes).cells[0]
    model = build_model(cell.config.model, 1)

    def trained_by(spec) -> int:
        adapters = inject(model, spec)
        adapters.remove()
        return adapters.trainable_count(saved=False)

    trained = trained_by(cell.config.adapter)
    assert trained == cell.match.parameters
    # By brute force: no other size comes nearer.
    spec, field = cell.config.adapter, cell.match.field
    others = []
    for size in range(1, 80):
        setattr(spec, field, size)
        with suppress(LabError):
            others.append(trained_by(spec))
    assert abs(trained - wanted) == min(abs(count - wanted) for count in others)
    assert cell.match.misses == (abs(trained - wanted) > wanted / 10)


def test_a_shipped_study_is_whole():
    for path in (Path(__file__).parents[2] / "experiments").glob("*/study.yaml"):
        assert read_yaml(path)
        read_study(path, ["match_parameters=null"])
