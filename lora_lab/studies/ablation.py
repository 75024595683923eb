"""A study from its lock to its end: which runs to start, their outcomes, and the output."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_lab.adapters.lineage import Lineage
from lora_lab.config.compose import compose
from lora_lab.documents.console import plain_console
from lora_lab.documents.reading import plain, read_yaml
from lora_lab.errors import ConfigError, DataError, StudyError
from lora_lab.experiment import check_base, folder_base
from lora_lab.experiment.folder import Record, RunFolder
from lora_lab.experiment.loaded import LoadedData
from lora_lab.report.search import search_margin
from lora_lab.studies.cells import Cell, Job, Study, jobs_of
from lora_lab.studies.display import Board, end_lines
from lora_lab.studies.executors import Executor
from lora_lab.studies.results import state_of, write_results, write_study, write_tuning
from lora_lab.studies.summary import NAME as SUMMARY, log_summary
from lora_lab.studies.worker import Outcome
from lora_lab.training.stopping import StopRequest

BEAT = 1.0
"""Seconds between checks of the runs."""


@dataclass
class Progress:
    """The runs of a study and their outcomes."""

    study: Study
    folder: Path | None
    """Where Optuna's searches are stored; None does not use Optuna."""
    jobs: dict[Job, None] = field(default_factory=dict)
    """All runs that are known so far; searches add to them."""
    outcomes: dict[Job, Outcome] = field(default_factory=dict)
    """Outcomes of runs that do not have to run again."""
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Cell → the result of its search."""

    records: dict[Job, Record] = field(default_factory=dict)
    """The record of each run that has ended."""

    def __post_init__(self) -> None:
        self.settle()

    def end(self, job: Job, outcome: Outcome) -> None:
        """Records how a run has ended."""
        self.outcomes[job] = outcome
        self.records[job] = job.folder.read() or {}

    def due(self) -> list[Job]:
        """Returns the known runs that have to run."""
        return [job for job in self.jobs if job not in self.outcomes]

    def total(self) -> int:
        """Returns the total number of runs of the study."""
        tuning, spec = self.study.tuning, self.study.spec
        each = len(spec.seeds) + (tuning.count() * len(tuning.seeds) if tuning else 0)
        return each * len(self.study.cells)

    def settle(self) -> None:
        """Adds the runs that follow from the results so far, and takes over those that are finished."""
        while any(self._advance(cell) for cell in self.study.cells):
            pass

    def of_cell(self, cell: str, phase: str) -> list[Job]:
        """Returns the known runs of a cell in a phase."""
        return [job for job in self.jobs if job.cell == cell and job.phase == phase]

    def metric(self, job: Job, name: str) -> float | None:
        """Returns a final metric of a run; None if it is not finished."""
        outcome = self.outcomes.get(job)
        finished = outcome is not None and outcome.status == "finished"
        return self.records[job]["metrics"].get(name) if finished else None

    def _advance(self, cell: Cell) -> bool:
        """Adds a cell's newly known runs; returns whether one of them had ended before."""
        found = False
        for job in self._known(cell):
            if job not in self.jobs:
                self.jobs[job] = None
                found |= self._look_up(job)
        return found

    def _look_up(self, job: Job) -> bool:
        """Takes over an earlier run if it does not have to run again: the same config would do the same."""
        record = job.folder.read()
        if record is None or record["status"] not in ("finished", "diverged"):
            return False
        if record["status"] == "diverged" and _handled_otherwise(job):
            return False
        self.end(job, Outcome(*state_of(record, None)))
        return True

    def _known(self, cell: Cell) -> list[Job]:
        tuning = self.study.tuning
        if tuning is None:
            return list(jobs_of(self.study, "compare", cell, [None]))
        scores = self._scores(cell)
        values = tuning.proposals(cell.name, scores, self.folder)
        found = list(jobs_of(self.study, "tune", cell, values))
        if len(values) < tuning.count() or any(value not in scores for value in values):
            return found
        scores = {value: scores[value] for value in values}
        best, fits = tuning.best(scores), partial(cell.fits, tuning.key)
        margin = search_margin(str(tuning.by), self.study.spec.metric, self.study.spec.equivalence)
        tried = [{"value": value, tuning.by: scores[value]} for value in values]
        self.chosen[cell.name] = {
            "key": tuning.key,
            "value": best,
            "by": tuning.by,
            "tried": tried,
            "widen": None if best is None else tuning.at_edge(best, scores, margin, fits),
        }
        return found if best is None else [*found, *jobs_of(self.study, "compare", cell, [best])]

    def _scores(self, cell: Cell) -> dict[Any, float | None]:
        """Returns the mean of the deciding metric for each value whose runs have all ended."""
        tuning = self.study.tuning
        assert tuning is not None
        by_value: dict[Any, list[Job]] = {}
        for job in self.of_cell(cell.name, "tune"):
            by_value.setdefault(job.value, []).append(job)
        scores: dict[Any, float | None] = {}
        for value, jobs in by_value.items():
            ends = [self.outcomes[job].status for job in jobs if job in self.outcomes]
            if len(ends) < len(tuning.seeds) or "interrupted" in ends:
                continue
            metrics = [self.metric(job, str(tuning.by)) for job in jobs]
            known = [metric for metric in metrics if metric is not None]
            scores[value] = statistics.fmean(known) if len(known) == len(metrics) else None
        return scores


def ablate(study: Study, executor: Callable[[Path], Executor], console: Console | None = None) -> Progress:
    """Runs all runs of a study that are not finished, and writes its results.

    Args:
        study: what `read_study` returned.
        executor: makes the executor, with a folder for its logs.
        console: where to show the progress; None shows it in the terminal.

    Returns:
        All runs, each with its outcome.

    Raises:
        StudyError: if runs have failed, after all others have run.
        DataError: if runs that had finished before were trained on other data.
        CheckpointError: if another process is running the study, or its folder cannot be written to.
        Interruption, KeyboardInterrupt: if the process was asked to end; all runs can be continued then.
    """
    console = console or plain_console()
    stop = StopRequest()
    with RunFolder(study.folder).owned("give the study another name=…"), stop.watched():
        progress = Progress(study, study.folder)
        before = len(progress.outcomes)
        check_folder(study)
        check_sources(progress)
        write_study(study)
        workers = executor(study.folder / "logs")
        try:
            _run_all(progress, workers, console)
        finally:
            workers.cancel()
            _write(progress)
        if len(progress.outcomes) > before or not (study.folder / SUMMARY).exists():
            log_summary(study)
    console.print(*end_lines(progress), sep="\n", soft_wrap=True, highlight=False)
    failed = {
        job: outcome
        for job, outcome in progress.outcomes.items()
        if outcome.status in ("failed", "interrupted")
    }
    if failed:
        lines = [f"  {job.folder.path}: {outcome.error}" for job, outcome in failed.items()]
        raise StudyError(
            f"{len(failed)} of {progress.total()} runs failed; the same command tries them again:\n"
            + "\n".join(lines)
        )
    return progress


def _handled_otherwise(job: Job) -> bool:
    """Whether a run's steps that are not finite are to be handled in another way than they were."""
    stored, now = compose(job.folder.config, stored=True).trainer, job.config.trainer
    return (stored.on_nonfinite, stored.max_skipped_steps) != (now.on_nonfinite, now.max_skipped_steps)


def check_folder(study: Study) -> None:
    """Checks that the study's folder is not that of another study, whose results it would replace.

    Raises:
        ConfigError: if it is.
    """
    stored = study.folder / "study.yaml"
    if not stored.is_file():
        return
    found = plain(read_yaml(stored))
    source = found.get("source") if isinstance(found, dict) else None
    if source != study.resolved()["source"]:
        raise ConfigError(
            f"{study.folder}: holds the results of another study, {source}. Give this one another name=… or "
            f"output=…; if its file was only moved, delete {stored}"
        )


def check_sources(progress: Progress) -> None:
    """Checks that runs that are not repeated had the same data and bases.

    Raises:
        DataError: if a run had other data.
        CheckpointError: if a run had a base, from a folder, with other weights.
    """
    today, bases = LoadedData(), dict[str, Lineage]()
    for job, record in progress.records.items():
        data = today.of(job.config)
        if record.get("data_fingerprint") != data.fingerprint:
            raise DataError(
                f"{job.folder.path}: was trained on other data: a file, or how it is read, has changed. "
                "Give the study another name=…, or restore the former data."
            )
        if record["status"] == "finished":
            model = repr(job.config.model)
            if model not in bases:
                bases[model] = folder_base(job.config, data)
            check_base(job.folder, job.config, bases[model])


def _run_all(progress: Progress, executor: Executor, console: Console) -> None:
    submitted: set[Job] = set()
    with Board(progress, executor, console) as board:
        while True:
            for job in progress.due():
                if job not in submitted:
                    submitted.add(job)
                    executor.submit(job)
            if not progress.due():
                return
            ended = executor.wait(BEAT)
            for job, outcome in ended:
                progress.end(job, outcome)
                board.ended(job, outcome)
            if ended:
                progress.settle()
                _write(progress)
            board.refresh()


def _write(progress: Progress) -> None:
    write_results(progress.study, progress.jobs, progress.outcomes, progress.records)
    if progress.study.tuning:
        write_tuning(progress.study, progress.chosen)
