"""What a study shows in the terminal: its plan, its progress, and its end."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_lab.errors import CheckpointError
from lora_lab.studies.cells import Job, Study, few
from lora_lab.studies.executors import Executor
from lora_lab.studies.worker import Outcome
from lora_lab.tracking import read_metrics

if TYPE_CHECKING:
    from lora_lab.studies.ablation import Progress

METRIC_EVERY = 5.0
"""Seconds between reads of the metrics of running runs."""


class Board:
    """One live table in a terminal; elsewhere a line for each run that has ended.

    Args:
        progress: the study's runs.
        executor: says which are running.
        console: where to show them.
    """

    def __init__(self, progress: Progress, executor: Executor, console: Console):
        self.progress, self.executor, self.console = progress, executor, console
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        )
        self._started = time.monotonic()
        self._ended = 0
        self._seen: dict[Job, tuple[float, str]] = {}

    def __enter__(self) -> Board:
        if self._live:
            self._live.__enter__()
        self.refresh()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.__exit__(*error)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Shows a run that has ended."""
        self._ended += 1
        if not self._live:
            value = self.progress.metric(job, self.progress.study.spec.metric)
            metric = "" if value is None else f"  {self.progress.study.spec.metric} {value:.4f}"
            done = len(self.progress.outcomes)
            line = f"{done}/{self.progress.total()}  {job.config.run}: {outcome.status}{metric}"
            self.console.print(line, soft_wrap=True, highlight=False)

    def refresh(self) -> None:
        """Shows the present state."""
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        progress, study = self.progress, self.progress.study
        running = self.executor.running()
        # On top, because a terminal with fewer lines than cells cuts the table's end.
        title = f"{study.name}: {self._counts(len(running))}"
        table = Table(box=SIMPLE, title=title, title_justify="left")
        table.add_column("cell")
        if study.tuning:
            table.add_column("tuned", justify="right")
            table.add_column(study.tuning.key.rpartition(".")[2], justify="right")
        table.add_column("compared", justify="right")
        table.add_column(study.spec.metric, justify="right")
        table.add_column("now")
        for cell in study.cells:
            row: list[str | Text] = [cell.name]
            if tuning := study.tuning:
                whole = tuning.count() * len(tuning.seeds)
                chosen = progress.chosen.get(cell.name)
                row += [self._count(cell.name, "tune", whole), _short(chosen["value"]) if chosen else ""]
            row.append(self._count(cell.name, "compare", len(study.spec.seeds)))
            row.append(spread(self._metrics(cell.name)))
            row.append(", ".join(self._state(job) for job in running if job.cell == cell.name))
            table.add_row(*row)
        return table

    def _metrics(self, cell: str) -> list[float]:
        jobs = self.progress.of_cell(cell, "compare")
        values = [self.progress.metric(job, self.progress.study.spec.metric) for job in jobs]
        return [value for value in values if value is not None]

    def _count(self, cell: str, phase: str, whole: int) -> Text:
        states = [
            outcome.status
            for job, outcome in self.progress.outcomes.items()
            if (job.cell, job.phase) == (cell, phase)
        ]
        bad = sum(state != "finished" for state in states)
        return Text.assemble(f"{len(states)}/{whole}", (f" ({bad} not finished)" if bad else "", "red"))

    def _state(self, job: Job) -> str:
        seen, text = self._seen.get(job, (-METRIC_EVERY, ""))
        now = time.monotonic()
        if now - seen >= METRIC_EVERY:
            try:
                rows = read_metrics(job.folder.path)
            except CheckpointError:
                rows = []
            last = {name: value for row in rows for name, value in row.items()}
            name = self.progress.study.spec.metric.replace("test/", "validation/")
            value = last.get(name, last.get("train/loss"))
            text = f"step {last.get('step', 0)}" + ("" if value is None else f" {value:.3g}")
            self._seen[job] = (now, text)
        what = _short(job.value) if job.phase == "tune" else f"seed {job.seed}"
        return f"{what}: {text}"

    def _counts(self, running: int) -> str:
        done, total = len(self.progress.outcomes), self.progress.total()
        text = f"{done} of {total} runs done, {running} running"
        if self._ended:
            left = (time.monotonic() - self._started) / self._ended * (total - done)
            text += f", about {duration(left)} left"
        return text


def plan(progress: Progress, slots: int, probed: float | None = None) -> Iterator[Any]:
    """Yields what `--plan` prints: cells, runs, expected time, resets and differences.

    Args:
        progress: the study's runs.
        slots: how many are made at once.
        probed: seconds of a run by `probe`; None where there are finished runs, or nothing was probed.
    """
    study = progress.study
    spec, tuning = study.spec, study.tuning
    yield f"{study.name}: {spec.question}"
    table = Table(box=SIMPLE)
    for column in ("cell", "method", "parameters", "finished", "runs"):
        table.add_column(column, justify="left" if column in ("cell", "method") else "right")
    each = progress.total() // len(study.cells)
    for cell in study.cells:
        size = Text()
        if match := cell.match:
            size.append(f"{match.parameters:,} ({match.field} {match.value})")
            size.append(" misses" if match.misses else "", "red")
        done = sum(job.cell == cell.name for job in progress.outcomes)
        mark = " (baseline)" if cell.name == spec.baseline else ""
        table.add_row(cell.name + mark, cell.config.adapter.method, size, str(done), str(each))
    yield table
    seeds = ", ".join(map(str, spec.seeds))
    yield f"Comparison: {spec.metric}, seeds {seeds}."
    if tuning:
        what = (
            f"{tuning.count()} values" if tuning.values is None else few([_short(v) for v in tuning.values])
        )
        seeds = few([*map(str, tuning.seeds)])
        yield f"Before it, each cell's best {tuning.key} of {what} by {tuning.by}, seeds {seeds}."
    for cell in study.cells:
        for text in cell.resets:
            yield f"{cell.name}: {text}"
        if cell.match and cell.match.misses:
            yield (
                f"{cell.name}: no adapter.{cell.match.field} trains {cell.match.wanted:,} parameters within "
                f"10 %; the nearest trains {cell.match.parameters:,}."
            )
    yield from differences(study)
    left = progress.total() - len(progress.outcomes)
    seconds = [record["wall_seconds"] for record in progress.records.values() if record.get("wall_seconds")]
    time_text = "unknown before the first run has finished"
    if seconds:
        mean = statistics.fmean(seconds)
        time_text = f"about {duration(mean * left / slots)}, as {len(seconds)} finished runs took"
    elif probed is not None:
        time_text = f"about {duration(probed * left / slots)}, by two steps of {spec.baseline}"
    yield f"{left} of {progress.total()} runs to make, {slots} at once; expected time: {time_text}."


def differences(study: Study) -> Iterator[str]:
    """Yields the keys beyond the grid in which each cell differs from the baseline."""
    for row in study.differences():
        if row["keys"]:
            keys = ", ".join(row["keys"])
            yield f"{row['cell']} differs from {row['baseline']} beyond the grid in: {keys}."


def end_lines(progress: Progress) -> Iterator[Any]:
    """Yields what is printed when all runs have ended."""
    study = progress.study
    table = Table(box=SIMPLE, title=study.spec.question)
    table.add_column("cell")
    if study.tuning:
        table.add_column(study.tuning.key, justify="right")
    table.add_column("runs", justify="right")
    table.add_column(study.spec.metric, justify="right")
    for cell in study.cells:
        jobs = progress.of_cell(cell.name, "compare")
        values = [progress.metric(job, study.spec.metric) for job in jobs]
        row = [cell.name]
        if study.tuning:
            chosen = progress.chosen.get(cell.name)
            row.append(_short(chosen["value"]) if chosen else "")
        finished = [value for value in values if value is not None]
        table.add_row(*row, f"{len(finished)}/{len(study.spec.seeds)}", spread(finished))
    yield table
    for cell_name, found in progress.chosen.items():
        if found["value"] is None:
            yield f"{cell_name}: no value of {found['key']} gave a result; the cell is not compared."
        elif found["widen"]:
            again = shlex.join(["lora-lab", "ablate", str(study.source), *study.overrides])
            yield (
                f"{cell_name}: the best {found['key']}, {_short(found['value'])}, is at the edge of the "
                f"search. Widen it: {again} {found['widen']}"
            )
    diverged = [job for job, outcome in progress.outcomes.items() if outcome.status == "diverged"]
    if diverged:
        yield f"{len(diverged)} runs diverged: {few([str(job.config.run) for job in diverged])}."
    yield f"Results: {study.folder / 'results.csv'}"


def spread(values: list[float]) -> str:
    """Returns `mean ± standard deviation`."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def duration(seconds: float) -> str:
    """Returns a readable time."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
