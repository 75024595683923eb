"""What experiments share, and that the figures in their READMEs are those of their results."""

import importlib.util
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from statsmodels.stats.multitest import multipletests

from lora_lab.config import compose
from lora_lab.experiment import run_all
from lora_lab.report.comparison import markdown_table, picture, spread
from lora_lab.report.experiments import measured, study_folders, written
from lora_lab.studies import read_study

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def script(path: Path):
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_readmes_table_is_that_of_the_results():
    folder = EXPERIMENTS / "mixed_tasks"
    table = script(folder / "run.py").table(pd.read_csv(folder / "results.csv"))
    assert len(table.splitlines()) >= 10
    assert table in (folder / "README.md").read_text()


def test_all_that_is_made_from_the_results_of_studies_is_that_of_today():
    made = dict(written(EXPERIMENTS))
    assert [str(path) for path, text in made.items() if path.read_text() != text] == []
    assert {EXPERIMENTS / "README.md", EXPERIMENTS / "claims" / "README.md"} < {*made}


STUDIES = study_folders(EXPERIMENTS)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_a_studys_figures_are_those_of_its_results(folder):
    """By hand, beside the statistics that have written them."""
    study, results = read_study(folder / "study.yaml"), pd.read_csv(folder / "results.csv")
    runs = results[results["phase"] == "compare"].assign(cell=lambda rows: rows["cell"].astype(str))
    assert (results["status"] == "finished").all()
    assert sorted(runs.groupby("cell").size().items()) == sorted(
        (cell.name, len(study.spec.seeds)) for cell in study.cells
    )
    values = runs.pivot(index="seed", columns="cell", values=study.spec.metric)
    rows = {}
    for line in (folder / "README.md").read_text().splitlines():
        name, _, rest = line.strip("| ").partition(" | ")
        rows.setdefault(name, rest)
    for cell in values:
        shown = [float(text.replace("−", "-")) for text in re.findall(r"[−+]?\d+\.\d+", rows[cell])]
        low, high = ttest_1samp(values[cell], values[cell].mean()).confidence_interval()
        expected = [values[cell].mean(), low, high]
        if cell != study.spec.baseline:
            expected.append((values[cell] - values[study.spec.baseline]).mean())
        assert shown[: len(expected)] == pytest.approx(expected, abs=1e-4)


def test_a_claim_is_judged_by_its_study(tmp_path):
    study = tmp_path / "one"
    study.mkdir()
    (study / "study.yaml").write_text(
        "question: Which?\nmetric: test/accuracy\nbaseline: base\nequivalence: 0.05\nseeds: [0, 1, 2]\n"
    )
    # By hand: a paired difference of mean 0.2, 0 and 0.1, with spreads of 0.01, 0.002 and 0.3.
    cells = {
        "base": [0.5, 0.6, 0.7],
        "up": [0.71, 0.8, 0.89],
        "same": [0.502, 0.6, 0.698],
        "vague": [0.9, 0.7, 0.5],
    }
    rows = [(c, "compare", s, "finished", c, v) for c, found in cells.items() for s, v in enumerate(found)]
    columns = ["cell", "phase", "seed", "status", "run", "test/accuracy"]
    pd.DataFrame(rows, columns=columns).to_csv(study / "results.csv", index=False)

    def judged(cells, expects, study="one"):
        return measured(tmp_path, {"study": study, "cells": cells, "expects": expects})[1]

    assert judged(["up"], "better") == "holds here"
    assert judged(["up"], "equivalent") == "does not hold here: up is better"
    assert judged(["same"], "equivalent") == "holds here"
    assert judged(["same"], "better") == "does not hold here: same is equivalent"
    assert judged(["vague"], "better") == "undecided at this size"
    assert judged(["same", "vague"], "equivalent") == "undecided at this size; holds for same"
    assert judged(["up"], "better", "none") == "not run"
    assert judged(["later"], "better") == "not run"
    tried = [{"value": value} for value in (0.1, 0.3, 1.0)]
    tuning = {cell: {"key": "rate", "value": value, "tried": tried} for cell, value in
              {"base": 0.1, "up": 1.0, "same": 0.3, "vague": 0.1}.items()}  # fmt: skip
    (study / "tuning.json").write_text(json.dumps(tuning))
    assert judged(["up"], {"ratio": 10}) == "holds here, to a factor of 3.3"
    assert judged(["up", "vague"], {"ratio": 10}) == "does not hold here: up 10 times, vague 1 times"


@pytest.fixture
def ranked(tmp_path):
    """A study of two methods at two ranks, validated after 6, 13, 25 and 50 of 50 steps."""
    study = tmp_path / "ranked"
    study.mkdir()
    (study / "study.yaml").write_text("metric: test/loss\nbaseline: a-1\nseeds: [0, 1, 2]\n")
    cells = {"a-1": [5.0, 5.4, 5.1], "b-1": [4.1, 4.4, 4.15], "a-8": [3.0, 3.3, 3.1], "b-8": [3.2, 3.1, 3.0]}
    tests, validations = [], []
    for cell, values in cells.items():
        for seed, value in enumerate(values):
            tests.append((cell, "compare", seed, "finished", f"{cell}-{seed}", value))
            for step, early in ((5, 2.0), (12, 1.5), (24, 1.2), (49, 1.0)):
                # At first b is worse by as much as it is better in the end.
                shown = (
                    value if cell.startswith("a") or step > 12 else 2 * cells["a" + cell[1:]][seed] - value
                )
                validations.append((cell, "compare", seed, step, "validation/loss", early * shown))
    columns = ["cell", "phase", "seed", "status", "run", "test/loss"]
    pd.DataFrame(tests, columns=columns).to_csv(study / "results.csv", index=False)
    columns = ["cell", "phase", "seed", "step", "metric", "value"]
    pd.DataFrame(validations, columns=columns).to_csv(study / "validations.csv", index=False)
    return cells


def test_a_claim_about_pairs_compares_each_cell_with_its_own(tmp_path, ranked):
    pairs = {"b-1": "a-1", "b-8": "a-8"}
    told, judged = measured(tmp_path, {"study": "ranked", "pairs": pairs, "expects": "better"})
    assert judged == "undecided at this size; holds for b-1"
    # By hand: statsmodels' Holm over scipy's two tests; the first is at 1 - 0.05 / 2, the other at 1 - 0.05.
    differences = {cell: [x - y for x, y in zip(ranked[cell], ranked[other], strict=True)]
                   for cell, other in pairs.items()}  # fmt: skip
    tests = [ttest_1samp(found, 0) for found in differences.values()]
    assert multipletests([one.pvalue for one in tests], method="holm")[0].tolist() == [True, False]
    for (cell, other), one, level in zip(pairs.items(), tests, (0.975, 0.95), strict=True):
        low, high = one.confidence_interval(level)
        mean = sum(differences[cell]) / 3
        assert f"{cell} against {other} {mean:+.3f} ({low:+.3f} to {high:+.3f})" in told.replace("−", "-")


def test_a_claim_about_the_start_of_training_reads_validations(tmp_path, ranked):
    def found(shares):
        early = {"metric": "validation/loss", "shares": shares}
        return measured(
            tmp_path, {"study": "ranked", "pairs": {"b-1": "a-1"}, "expects": "better", "early": early}
        )

    told, judged = found([0.1, 0.25, 0.5])
    # Steps count from 0: 6, 13 and 25 of 50. Differences -0.9, -1 and -0.95, reversed at first.
    for text in ("10% +1.9", "25% +1.4", "50% -1.1"):
        assert f"a-1 after {text}" in told.replace("−", "-")
    assert judged == "does not hold here: b-1 after 10% is worse, b-1 after 25% is worse"
    assert found([0.5])[1] == "holds here"
    assert found([0.8]) == ("[ranked](../ranked/README.md) has no validation so early", "not run")


def test_sum_to_products_figures_are_those_of_its_results():
    text = (EXPERIMENTS / "sum_to_product" / "README.md").read_text()
    for _, row in pd.read_csv(EXPERIMENTS / "sum_to_product" / "results.csv").iterrows():
        shown = next(line for line in text.splitlines() if line.startswith(f"| {row['network']} |"))
        name, trained, errors = shown.strip("| ").split(" | ")[0], *_numbers(shown)
        assert (name, trained) == (row["network"], row["trained_parameters"])
        for told, value in zip(errors, (row["mse_sum"], row["mse_product"]), strict=True):
            assert float(told) == pytest.approx(value, abs=0.5 * 10 ** -len(told.partition(".")[2]))


def _numbers(line: str) -> tuple[int, list[str]]:
    trained, *errors = (cell.strip() for cell in line.strip("| ").split("|")[1:])
    return int(trained.replace(",", "")), errors


def test_all_runs_of_a_comparison_run_once_and_spread_into_a_table(tmp_path):
    (tmp_path / "toy.yaml").write_text(
        f"name: toy\noutput: {tmp_path / 'runs'}\nmodel: {{name: 'random:mlp', task: regression}}\n"
        "data: {source: toy, size: 64}\nadapter: {method: lora, targets: all-linear}\n"
        "trainer: {max_steps: 2, progress_bar: false}\ntracking: {wandb: disabled}\n"
    )
    configs = [compose(tmp_path / "toy.yaml", [f"seed={seed}"]) for seed in (3, 4)]
    first = list(run_all(configs))
    assert [config.seed for config, _ in first] == [3, 4]
    assert [result.fresh for _, result in first] == [True, True]
    again = list(run_all(configs))
    assert [result.fresh for _, result in again] == [False, False]
    assert [result.record for _, result in again] == [result.record for _, result in first]


def test_a_spread_is_mean_lowest_and_highest_and_nothing_of_nothing():
    assert spread(pd.Series([0.25, 1.0, 0.7]), ".2f") == "0.65 (0.25 to 1.00)"
    assert spread(pd.Series([], dtype=float)) == ""
    assert markdown_table(["a", "b"], [[1, "x"]]) == "| a | b |\n|---|---|\n| 1 | x |"


def test_a_picture_is_written_when_its_context_ends(tmp_path):
    with picture(tmp_path / "two.png", 2, (4, 2)) as (left, right):
        left.plot([0, 1], [1, 0])
        right.set(xlabel="step")
        assert not (tmp_path / "two.png").exists()
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
