"""A short share of `python -m tests.survival`: real processes, really killed."""

import os

import pytest

from tests import survival

pytestmark = pytest.mark.slow


def test_killed_runs_lose_nothing_and_no_record_is_false(tmp_path):
    environment = dict(os.environ)
    try:
        trials = survival.survive(tmp_path, kills=6)
    finally:
        os.environ.clear()
        os.environ.update(environment)
    assert not trials.faults, "\n\n".join(trials.faults)
    assert trials.seen["kills"] >= 6
