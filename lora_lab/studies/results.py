"""What is stored of a study, besides its runs.

results.csv        a row for each run
validations.csv    a row for each metric of each validation of each run
study.yaml         the study as it was read
differences.json   the keys beyond the grid in which a cell differs from the baseline
tuning.json        the value that each cell's search chose, and all that it tried
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from lora_lab.documents.reading import flat, yaml_text
from lora_lab.documents.writing import write_text
from lora_lab.experiment.folder import Record
from lora_lab.studies.cells import Job, Study
from lora_lab.studies.worker import Outcome
from lora_lab.tracking import read_metrics

UNFINISHED = {"running": "interrupted", "starting": "interrupted"}
"""Outcome of a run whose process could not record it."""


def write_study(study: Study) -> None:
    """Writes what is known about a study before its first run."""
    write_text(study.folder / "study.yaml", yaml_text(study.resolved()))
    write_text(study.folder / "differences.json", _json(study.differences()))


def write_results(
    study: Study, jobs: Iterable[Job], outcomes: Mapping[Job, Outcome], records: Mapping[Job, Record]
) -> None:
    """Writes the rows of all runs that have started.

    Args:
        study: the study.
        jobs: its runs.
        outcomes: outcomes of those that have ended.
        records: their records; those of other runs are read.
    """
    rows, validations = [], []
    for job in sorted(jobs, key=lambda job: (job.order, repr(job.value))):
        record = records[job] if job in records else job.folder.read() or {}
        row = row_of(study, job, record, outcomes.get(job))
        if row is not None:
            rows.append(row)
            validations += _validations(job)
    columns = ["cell", "phase", "seed", "step", "metric", "value"]
    write_text(study.folder / "results.csv", _csv(pd.DataFrame(rows)))
    write_text(study.folder / "validations.csv", _csv(pd.DataFrame(validations, columns=columns)))


def write_tuning(study: Study, found: Mapping[str, Any]) -> None:
    """Writes the results of the searches, by cell."""
    write_text(study.folder / "tuning.json", _json(found))


def row_of(study: Study, job: Job, record: Record, outcome: Outcome | None) -> dict[str, Any] | None:
    """Returns a run's row of results.csv; None if it has not started."""
    if not record and outcome is None:
        return None
    status, error = state_of(record, outcome)
    row = {
        "cell": job.cell,
        "phase": job.phase,
        "seed": job.seed,
        "status": status,
        "error": error,
        "run": job.config.run,
        "trained_parameters": record.get("trainable_parameters"),
        "adapter_parameters": record.get("method_parameters"),
    }
    settings = flat(job.config.decisive())
    keys = study.cell(job.cell).keys
    row |= {key: _text(keys.get(key, settings.get(key))) for key in study.grid}
    if study.tuning:
        row[study.tuning.key] = _text(settings.get(study.tuning.key))
    if status == "finished":
        row |= {name: value for name, value in record["metrics"].items() if not name.startswith("train/")}
        milliseconds = record.get("median_step_milliseconds")
        row |= {
            "step_seconds": None if milliseconds is None else milliseconds / 1000,
            "peak_megabytes": record.get("peak_memory_megabytes"),
            "seconds": record.get("wall_seconds"),
        }
    return row


def state_of(record: Record, outcome: Outcome | None) -> tuple[str, str | None]:
    """Returns status and error of a run that has started."""
    if outcome is not None and outcome.status != "finished":
        # The outcome also knows errors from before the record was written, and killed processes.
        return outcome.status, outcome.error
    status = str(record["status"])
    return UNFINISHED.get(status, status), record.get("error")


def _validations(job: Job) -> list[dict[str, Any]]:
    own = {"cell": job.cell, "phase": job.phase, "seed": job.seed}
    return [
        {**own, "step": row["step"], "metric": name, "value": value}
        for row in read_metrics(job.folder.path)
        for name, value in row.items()
        if name.startswith("validation/")
    ]


def _text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _csv(frame: pd.DataFrame) -> str:
    text = io.StringIO()
    frame.to_csv(text, index=False, lineterminator="\n")
    return text.getvalue()
