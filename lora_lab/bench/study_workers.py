"""How long 8 runs take by one worker and by two, and a run from its start to its first step.

    OMP_NUM_THREADS=1 python -m lora_lab.bench.study_workers OUTPUT.csv

The study trains LoRA on the embedded sentence encoder and a few film reviews, 24 steps a run. One and two
workers take turns, each with a study folder of its own, and their time includes the start of the workers.
Wall time: the machine has to be quiet, with two cores free. The first steps are those of one process that
makes three runs; the second and third find libraries imported and data loaded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lora_lab.bench.results import about, write_rows
from lora_lab.experiment.loaded import LoadedData
from lora_lab.studies import Study, ablate, read_study
from lora_lab.studies.executors import LocalExecutor
from lora_lab.studies.worker import execute
from lora_lab.training.module import FineTuner

ROUNDS = 2
STUDY: dict[str, Any] = {
    "question": "How long do eight runs take?",
    "experiment": {
        "model": {"name": "embedded:minilm", "pooling": "mean"},
        "data": {
            "source": "embedded",
            "name": "movie_reviews",
            "train_limit": 384,
            "validation_limit": 150,
            "test_limit": 400,
            "batch_size": 16,
            "max_length": 24,
        },
        "adapter": {"method": "lora", "targets": ["query", "value"]},
        "trainer": {"max_epochs": 1, "checkpoint_every": 100},
        "tracking": {"wandb": "disabled"},
    },
    "grid": {"adapter.rank": [4, 8]},
    "seeds": [0, 1, 2, 3],
    "metric": "test/accuracy",
    "baseline": "rank4",
}


def study_in(folder: Path) -> Study:
    """Returns the study with its runs in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "workers.yaml"
    experiment = {**STUDY["experiment"], "output": str(folder / "runs")}
    path.write_text(yaml.safe_dump({**STUDY, "experiment": experiment}, sort_keys=False))
    return read_study(path)


def seconds(folder: Path, workers: int) -> float:
    """Returns how long all runs of the study take."""
    study = study_in(folder)
    begin = time.monotonic()
    ablate(study, lambda logs: LocalExecutor(workers, logs), Console(quiet=True))
    return time.monotonic() - begin


@contextmanager
def _first_steps(found: list[float]) -> Iterator[None]:
    """Notes the time of every training step while inside."""
    original = FineTuner.training_step

    def noted(self: FineTuner, *given: Any, **named: Any) -> Any:
        found.append(time.monotonic())
        return original(self, *given, **named)

    FineTuner.training_step = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        FineTuner.training_step = original  # type: ignore[method-assign]


def starts(folder: Path, runs: int = 3) -> list[float]:
    """Returns the seconds from start to first step of some runs of one process."""
    study, loaded, found = study_in(folder), LoadedData(), []
    for seed in range(runs):
        job = study.job(study.cells[0], "compare", seed)
        steps: list[float] = []
        begin = time.monotonic()
        with _first_steps(steps):
            short = replace(job.config.trainer, max_steps=1)
            outcome = execute(replace(job.config, trainer=short), loaded)
        if outcome.status != "finished":
            raise RuntimeError(outcome.error)
        found.append(steps[0] - begin)
    return found


def main() -> None:
    """Measures all rounds and writes a row for each measurement."""
    parser = argparse.ArgumentParser(description="Measures what workers of a study save.")
    parser.add_argument("output", type=Path, help="CSV file to write")
    output = parser.parse_args().output
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, value in enumerate(starts(folder / "starts")):
            rows.append(
                {"what": "start to first step", "workers": 1, "round": number, "seconds": round(value, 2)}
            )
        for number in range(ROUNDS):
            for workers in (1, 2) if number % 2 else (2, 1):
                value = seconds(folder / f"{number}-{workers}", workers)
                rows.append(
                    {"what": "8 runs", "workers": workers, "round": number, "seconds": round(value, 1)}
                )
    write_rows(output, [row | about(["torch", "lightning"]) for row in rows])


if __name__ == "__main__":
    main()
