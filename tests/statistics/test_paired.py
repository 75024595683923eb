"""Paired comparisons against numbers worked by hand, scipy, statsmodels and simulated studies."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from lora_lab.statistics import (
    Resampled,
    compare_paired,
    detectable_difference,
    holm,
    mean_interval,
)


def test_a_t_interval_is_the_one_worked_by_hand():
    found = mean_interval([1.0, 2.0, 3.0])
    # mean 2, deviation 1, t(0.975, 2) = 4.302653, standard error 1 / √3
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert mean_interval([0.8]) is None
    assert mean_interval([]) is None


def test_a_comparison_is_the_one_worked_by_hand():
    (found,) = compare_paired([[1.0, 2.0, 3.0]], margin=6.0)
    # t = 2 √3 = 3.4641; p = 1 - 2 t / (2 √(2 + t²)) for 2 degrees of freedom = 1 - 3.4641 / √14
    assert found.p == pytest.approx(1 - 12**0.5 / 14**0.5, abs=1e-12)
    assert found.corrected_p == found.p
    # the nearer end is 4 away: t = 4 √3, one-sided p = (1 - t / √(2 + t²)) / 2
    assert found.equivalence_p == pytest.approx((1 - 48**0.5 / 50**0.5) / 2, abs=1e-12)
    assert found.outcome == "equivalent"


def test_comparisons_equal_scipys_and_statsmodels():
    differences = np.random.default_rng(3).normal(0.3, 1.0, (6, 5))
    found = compare_paired(differences, margin=1.5)
    for values, one in zip(differences, found, strict=True):
        oracle = DescrStatsW(values)
        assert one.p == pytest.approx(oracle.ttest_mean(0)[1])
        assert (one.interval.low, one.interval.high) == pytest.approx(oracle.tconfint_mean())
        assert one.interval.level == 0.95
        alpha = 1 - one.corrected_interval.level
        corrected = stats.ttest_1samp(values, 0).confidence_interval(1 - alpha)
        assert (one.corrected_interval.low, one.corrected_interval.high) == pytest.approx(tuple(corrected))
    raw = np.array([DescrStatsW(values).ttost_mean(-1.5, 1.5)[0] for values in differences])
    by_hand = np.maximum.accumulate(np.sort(raw) * np.arange(6, 0, -1)).clip(max=1)
    assert sorted(one.equivalence_p for one in found) == pytest.approx(by_hand)


def test_holm_is_the_one_worked_by_hand_and_its_intervals_agree_with_its_p_values():
    corrected, levels = holm(np.array([0.03, 0.001, 0.02, 0.5]), 0.05)
    assert corrected == pytest.approx([0.06, 0.004, 0.06, 0.5])
    # 0.001 < 0.05/4; 0.02 > 0.05/3 stops the procedure there
    assert levels == pytest.approx([0.05 / 3, 0.05 / 4, 0.05 / 3, 0.05 / 3])
    generator = np.random.default_rng(0)
    for count in (1, 2, 7):
        p = generator.random(count) ** 3
        rejected, oracle, *_ = multipletests(p, 0.05, method="holm")
        corrected, levels = holm(p, 0.05)
        assert corrected == pytest.approx(oracle)
        assert list(p <= levels) == list(rejected)
    seen = set()
    for _ in range(200):
        differences = generator.normal(generator.choice([0, 1.5], (8, 1)), 1, (8, 4))
        for one in compare_paired(differences):
            claimed = one.outcome in ("greater", "less")
            assert claimed == (one.corrected_p < 0.05) == one.corrected_interval.excludes(0)
            seen.add((claimed, one.p < 0.05))
    assert seen == {(True, True), (False, True), (False, False)}


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6, 0.05 / 30])
@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_the_detectable_difference_has_the_power_that_statsmodels_computes(seeds, alpha):
    values = np.arange(seeds) / seeds
    bias = {2: 0.797885, 3: 0.886227, 5: 0.939986, 20: 0.986934}[seeds]  # c4 of tables of control charts
    effect = detectable_difference(values, alpha) / (values.std(ddof=1) / bias)
    if effect * seeds**0.5 < 30:  # beyond, statsmodels' noncentral t is not a number
        power = TTestPower().power(effect, seeds, alpha)
        assert power == pytest.approx(0.8, abs=1e-4)
    generator = np.random.default_rng(seeds)
    drawn = generator.normal(effect, 1, (20_000, seeds))
    found = stats.ttest_1samp(drawn, 0, axis=1).pvalue < alpha
    assert found.mean() == pytest.approx(0.8, abs=0.012)


def test_what_seeds_cannot_show_is_not_claimed():
    none, one, alike, same, spread = compare_paired(
        [[], [0.3], [0.25, 0.25, 0.25], [0, 0, 0], [1, 1.01, 1.02]]
    )
    assert (none.outcome, none.mean) == ("untested", None)
    assert (one.outcome, one.mean, one.interval) == ("untested", 0.3, None)
    assert (alike.outcome, alike.p) == ("untested", None)
    assert (same.outcome, same.p, same.interval.high) == ("undecided", 1.0, 0.0)
    assert spread.outcome == "greater"
    assert spread.corrected_p == pytest.approx(2 * spread.p)  # two were tested


def test_an_effect_that_other_examples_might_not_show_is_not_claimed():
    seeds = [[0.10, 0.11, 0.12]]
    wide = np.random.default_rng(0).normal(0.11, 0.1, 5000)
    narrow = np.random.default_rng(0).normal(0.11, 0.01, 5000)
    (unsure,), (sure,) = compare_paired(seeds, [wide]), compare_paired(seeds, [narrow])
    assert (unsure.outcome, unsure.depends_on_examples) == ("undecided", True)
    assert (sure.outcome, sure.depends_on_examples) == ("greater", False)
    assert unsure.detectable == pytest.approx((1.959964 + 0.841621) * wide.std(ddof=1))
    (equal,), (unequal,) = (compare_paired(seeds, [drawn], margin=0.2) for drawn in (narrow, wide))
    assert (equal.equivalent, unequal.equivalent) == (True, False)


def studies(effect: float, generator, count=1000, cells=5, seeds=5):
    """Yields the paired differences of studies whose cells share a baseline, shape (cells, seeds)."""
    for _ in range(count):
        values = generator.normal(0, 1, (cells + 1, seeds))
        yield values[1:] + effect - values[0]


def test_a_thousand_studies_without_effect_rarely_claim_one_and_find_the_detectable_one():
    generator = np.random.default_rng(13)
    quiet = [compare_paired(differences) for differences in studies(0.0, generator)]
    claims = sum(any(one.outcome in ("greater", "less") for one in study) for study in quiet)
    assert claims <= 60
    assert claims > 10  # the test is not merely blind
    stated = np.mean([one.detectable for study in quiet for one in study])
    loud = [compare_paired(differences) for differences in studies(stated, generator)]
    found = np.mean([one.outcome == "greater" for study in loud for one in study])
    assert found >= 0.75
    assert np.mean([one.outcome == "less" for study in loud for one in study]) < 0.001


def test_studies_with_test_examples_keep_both_promises():
    """Seeds and examples are chance of the same size here; few draws, to be fast."""

    def study(effect):
        examples = generator.normal(0, 1, 60)  # hard for every seed, in one of two cells
        run = generator.normal(0, 0.08, (3, 2, 1)) + generator.normal(0, 0.3, (3, 2, 60))
        rows = run + np.stack([np.zeros(60), effect + 0.5 * examples])[None]
        table = {(cell, seed): rows[seed, place] for seed in range(3) for place, cell in enumerate("ab")}
        drawn = Resampled.draw({key: pd.Series(value) for key, value in table.items()}, 299)
        differences = (rows[:, 1] - rows[:, 0]).mean(1)
        return compare_paired([differences], [drawn.difference("b", "a", [0, 1, 2])])[0]

    generator = np.random.default_rng(5)
    quiet = [study(0.0) for _ in range(400)]
    assert sum(one.outcome in ("greater", "less") for one in quiet) <= 24
    stated = np.mean([one.detectable for one in quiet])
    loud = [study(stated) for _ in range(400)]
    found = np.mean([one.outcome == "greater" for one in loud])
    assert 0.75 <= found <= 0.95
