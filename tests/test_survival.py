"""A short share of `python -m tests.survival`: real processes, really killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KILLS = 2
"""One anywhere in a run and one at its end; two writers are tried in test_run_life.py."""


def test_killed_runs_lose_nothing_and_no_record_is_false(tmp_path):
    """In a process of its own: what it forks must not inherit threads and W&B's service from other tests."""
    root, report = Path(__file__).parents[1], tmp_path / "seen.json"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.survival", str(KILLS), str(report)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["kills"] >= KILLS
