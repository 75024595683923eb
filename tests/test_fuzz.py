"""A short share of `tests.fuzz`: broken input of every kind raises errors of ours alone, and in time."""

from tests.fuzz import KINDS, fuzz


def test_broken_input_raises_nothing_but_errors_of_ours(tmp_path):
    counts, faults, longest = fuzz(seed=1, first=0, cases=200, place=tmp_path)
    assert not faults, faults[0]
    assert {outcome.partition(" ")[0] for outcome in counts} == {*KINDS}
    assert longest < 5
