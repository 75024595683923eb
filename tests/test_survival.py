"""A short share of `python -m tests.survival`: real processes, really killed."""

import json
from pathlib import Path

import pytest

from tests.forks import fork
from tests.survival import survive

pytestmark = pytest.mark.slow

KILLS = 2
"""One anywhere in a run and one at its end; two writers are tried in test_run_life.py."""


def kill(folder: Path, report: Path) -> bool:
    trials = survive(folder, KILLS, report=report)
    print("\n\n".join(trials.faults))
    return bool(trials.faults)


def test_killed_runs_lose_nothing_and_no_record_is_false(tmp_path):
    """In a process of its own: what it forks must not inherit threads and W&B's service from other tests."""
    report = tmp_path / "seen.json"
    (tmp_path / "runs").mkdir()
    code, told = fork(kill, tmp_path / "runs", report, folder=tmp_path).end(600)
    assert code == 0, told
    assert json.loads(report.read_text())["kills"] >= KILLS
