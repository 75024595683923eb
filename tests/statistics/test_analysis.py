"""From tables of runs to what may be said of them; the bootstrap against scipy's and against counting."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lora_lab.errors import ConfigError
from lora_lab.statistics import (
    Resampled,
    analyse,
    example_values,
    higher_is_better,
    rank_interval,
    resample_seeds,
)

VALUES = {"lora": [0.80, 0.82, 0.81], "dora": [0.83, 0.85, 0.85], "head": [0.70, 0.74, 0.75]}


def table(values=VALUES, metric="test/accuracy"):
    rows = [
        {"cell": cell, "seed": seed, "status": "finished", metric: value}
        for cell, numbers in values.items()
        for seed, value in enumerate(numbers)
    ]
    return pd.DataFrame(rows)


def test_cells_comparisons_and_ranks_are_those_worked_by_hand():
    found = analyse(table(), "test/accuracy", baseline="lora", margin=0.1)
    assert [cell.name for cell in found.cells] == ["lora", "dora", "head"]
    dora = found.cell("dora")
    assert (dora.mean, dora.values) == (pytest.approx(0.843333, abs=1e-6), {0: 0.83, 1: 0.85, 2: 0.85})
    # deviation 0.011547, standard error 0.0066667
    assert dora.interval.high - dora.mean == pytest.approx(4.302653 * 0.02 / 3, abs=1e-8)
    compared = found.comparisons["dora"]
    assert compared.differences == pytest.approx([0.03, 0.03, 0.04])
    assert compared.p == pytest.approx(stats.ttest_rel(VALUES["dora"], VALUES["lora"]).pvalue)
    assert compared.outcome == "greater"
    assert found.is_better("dora")
    assert [cell.rank for cell in found.cells] == [2, 1, 3]
    assert [(cell.rank_interval.low, cell.rank_interval.high) for cell in found.cells] == [
        (2, 2),
        (1, 1),
        (3, 3),
    ]


def test_failed_and_diverged_runs_are_counted_and_their_seeds_left_out_of_pairs():
    runs = table()
    runs.loc[(runs["cell"] == "dora") & (runs["seed"] == 1), ["status", "test/accuracy"]] = [
        "diverged",
        np.nan,
    ]
    runs.loc[(runs["cell"] == "head") & (runs["seed"] > 0), "status"] = "failed"
    found = analyse(runs, "test/accuracy", baseline="lora")
    assert found.cell("dora").statuses == {"finished": 2, "diverged": 1}
    assert found.cell("dora").unfinished == 1
    assert found.comparisons["dora"].differences == pytest.approx([0.03, 0.04])
    head = found.cell("head")
    assert (head.interval, head.rank, head.mean) == (None, None, 0.70)
    assert found.comparisons["head"].outcome == "untested"
    runs.loc[runs["seed"] == 0, "test/accuracy"] = np.inf
    assert "finished runs have no finite" in analyse(runs, "test/accuracy").notes[0]


def test_less_is_better_where_the_metric_says_so():
    assert higher_is_better("test/accuracy")
    assert higher_is_better("validation/pearson")
    assert not any(map(higher_is_better, ["loss", "test/mse", "test/perplexity"]))
    found = analyse(table(metric="test/loss"), "test/loss", baseline="lora")
    assert not found.is_better("dora")
    assert found.cell("dora").rank == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": "test/acuracy"}, "no task has a metric 'test/acuracy'; did you mean 'accuracy'"),
        ({"metric": "test/f1"}, "no run logged 'test/f1'"),
        ({"baseline": "lara"}, "no cell 'lara'; did you mean 'lora'"),
        ({"margin": 0.0}, "must be above 0"),
        ({"results": pd.concat([table(), table()])}, "'head': has two runs of seed 2"),
    ],
)
def test_what_cannot_be_analysed_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        analyse(**{"results": table(), "metric": "test/accuracy", "baseline": "lora", **change})


def test_seeds_are_drawn_as_scipy_draws_them():
    values = np.array([0.1, 0.4, 0.2, 0.9, 0.3])
    ours = resample_seeds(values)
    oracle = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(1)
    )
    assert ours.std(ddof=1) == pytest.approx(oracle.standard_error, rel=0.03)
    assert np.quantile(ours, [0.025, 0.975]) == pytest.approx(tuple(oracle.confidence_interval), abs=0.01)


def test_examples_are_drawn_as_scipy_draws_them():
    rows = np.random.default_rng(0).normal(0, 1, 80)
    ids = [f"row {index}" for index in range(80)]
    other = pd.Series(rows[::-1] * 0, index=ids[::-1])
    drawn = Resampled.draw({("a", 0): pd.Series(rows, index=ids), ("b", 0): other})
    ours = drawn.difference("a", "b", [0])
    oracle = stats.bootstrap((rows,), np.mean, method="percentile", rng=np.random.default_rng(1))
    assert ours.std(ddof=1) == pytest.approx(oracle.standard_error, rel=0.03)
    assert np.quantile(ours, [0.025, 0.975]) == pytest.approx(tuple(oracle.confidence_interval), abs=0.02)


@pytest.mark.parametrize("shared", [True, False])
def test_two_layers_have_the_distribution_that_counting_every_draw_gives(shared):
    """With 2 seeds and 2 examples there are few draws: seeds × examples, the latter shared or by seed."""
    rows = np.array([[0.0, 1.0], [3.0, 10.0]])
    ids = [[0, 1], [0, 1] if shared else [2, 3]]
    examples = {
        (cell, seed): pd.Series(rows[seed] * (cell == "a"), ids[seed]) for cell in "ab" for seed in (0, 1)
    }
    ours = Resampled.draw(examples, 40_000).difference("a", "b", [0, 1])
    pairs = list(itertools.product((0, 1), repeat=2))
    counted = [
        np.mean([rows[seed][list(first if seed == 0 else second)].mean() for seed in seeds])
        for seeds in pairs
        for first in pairs
        for second in ([first] if shared else pairs)
    ]
    for value in set(counted):
        share = np.mean(np.isclose(counted, value))
        assert np.mean(np.isclose(ours, value)) == pytest.approx(share, abs=0.012), value


def test_metrics_of_examples_are_means_of_metrics():
    rows = pd.DataFrame({"label": [1, 0, 2], "prediction": [1, 1, 2], "loss": [0.1, 0.9, 0.2]})
    assert example_values(rows, "test/accuracy").tolist() == [1, 0, 1]
    assert example_values(rows, "test/loss").tolist() == [0.1, 0.9, 0.2]
    scored = rows.assign(score=[1.5, 3.0, 2.0])
    assert example_values(scored, "test/mse").tolist() == [0.25, 9, 0]
    assert example_values(scored, "mae").tolist() == [0.5, 3, 0]
    assert example_values(rows, "test/f1") is None


def example_rows(runs, generator, count=1000):
    rows = {}
    for _, run in runs.iterrows():
        wrong = generator.permutation(count) >= round(run["test/accuracy"] * count)
        rows[run["cell"], run["seed"]] = pd.DataFrame(
            {"id": np.arange(count), "label": 1, "prediction": 1 - wrong, "loss": 0.5}
        )
    return rows


def test_an_analysis_uses_examples_that_fit_and_says_why_others_do_not():
    runs, generator = table(), np.random.default_rng(0)
    rows = example_rows(runs, generator)
    found = analyse(runs, "test/accuracy", "lora", examples=rows)
    assert (found.examples, found.notes) == (1000, ())
    compared = found.comparisons["dora"]
    assert compared.resampled.low < compared.mean < compared.resampled.high
    assert found.cell("lora").rank_interval.high == 2
    assert (
        "not a mean over examples"
        in analyse(runs.rename(columns={"test/accuracy": "test/f1"}), "test/f1", "lora", examples=rows).notes[
            0
        ]
    )
    assert (
        "have a mean of"
        in analyse(runs.assign(**{"test/accuracy": 0.5}), "test/accuracy", examples=rows).notes[0]
    )
    # Of another split: other rows with the same ids, and as many of them are right.
    own = rows["dora", 1]
    moved = own.assign(label=1 - own["label"], prediction=1 - own["prediction"])
    split = analyse(runs, "test/accuracy", "lora", examples=rows | {("dora", 1): moved})
    assert "on different ones" in split.notes[0]
    rows["dora", 1] = rows["dora", 1].assign(id=np.arange(1000) + 1)
    assert "on different ones" in analyse(runs, "test/accuracy", "lora", examples=rows).notes[0]
    del rows["dora", 1]
    without = analyse(runs, "test/accuracy", "lora", examples=rows)
    assert without.notes == ("Test examples are not resampled: dora, seed 1, has none.",)
    assert without.comparisons["dora"].resampled is None


def test_ranks_keep_ties_and_their_intervals_hold_the_replicates():
    means = np.array([[0.5, 0.9, 0.5, 0.1], [0.6, 0.9, 0.5, 0.1], [0.5, 0.9, 0.6, 0.95]])
    ranks, intervals = rank_interval(means, descending=True)
    assert ranks.tolist() == [2, 1, 2, 4]
    assert [(found.low, found.high) for found in intervals] == [(2, 4), (1, 2), (3, 3), (1, 4)]
    assert rank_interval(means, descending=False)[0].tolist() == [2, 4, 2, 1]
