"""A run of the study itself at W&B, with the table of its cells and the page of its report."""

from __future__ import annotations

import warnings
from dataclasses import replace

from lora_lab.errors import LabError
from lora_lab.studies.cells import Study
from lora_lab.tracking import build_loggers, close_loggers, log_page, summarise, wandb_mode

NAME = "summary"
"""Name of the run, its job type, and its folder in the study's."""


def log_summary(study: Study) -> None:
    """Logs a study's table and report as one W&B run, which replaces the one of an earlier call.

    Does nothing if the study's runs are not tracked. An error only warns: the results are already written.
    """
    config = study.cells[0].config.tracking
    tracking = replace(config, group=config.group or study.name, job_type=NAME)
    try:
        if wandb_mode(tracking) == "disabled":
            return
        # Here, since its packages are optional: without them the study itself still runs.
        from lora_lab.report.pages import report

        made = report([study.folder])
        page = made.html()
        cells = made.cells.astype(object).where(made.cells.notna(), None)
        folder = study.folder / NAME
        folder.mkdir(exist_ok=True)
        loggers = build_loggers(tracking, folder, study.name, NAME, study.resolved())
    except (LabError, OSError, ImportError) as error:
        warnings.warn(f"tracking: no summary of the study at W&B ({error})", stacklevel=2)
        return
    summarise(loggers, {"question": study.spec.question, "verdict": made.verdict})
    log_page(loggers, page, [str(name) for name in cells], cells.to_numpy().tolist())
    close_loggers(loggers)
