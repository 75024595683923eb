"""A study as a sweep of W&B: `wandb agent` starts the runs, one by one, on any machine.

The sweep's parameters are cell and seed; for a study that tunes, cell, value and seed of the search. Each
run is `lora-lab ablate STUDY --run cell=… seed=…`. Afterwards `lora-lab ablate STUDY` makes the remaining
runs, such as the comparison after a search, and writes the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.documents.reading import yaml_text
from lora_lab.documents.writing import write_text
from lora_lab.errors import ConfigError, StudyError, suggest
from lora_lab.studies.cells import Job, Study
from lora_lab.studies.worker import execute

MAKER = ["lora-lab", "ablate"]


def sweep(study: Study, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what a sweep's file says.

    Args:
        study: the study.
        overrides: what the command line has changed in it; each run's command repeats them.

    Raises:
        ConfigError: if the study searches a range, whose values Optuna chooses one after the other.
    """
    tuning, tracking = study.tuning, study.cells[0].config.tracking
    parameters: dict[str, Any] = {"cell": {"values": [cell.name for cell in study.cells]}}
    metric, higher, seeds = study.spec.metric, study.resolved()["higher_is_better"], study.spec.seeds
    if tuning:
        if tuning.values is None:
            raise ConfigError(
                "--sweep: tune.low, tune.high: Optuna chooses these values one after the other; give the "
                "search `values`, or run it by `lora-lab ablate`"
            )
        parameters["value"] = {"values": tuning.values}
        metric, higher, seeds = str(tuning.by), tuning.higher_is_better, tuning.seeds
    parameters["seed"] = {"values": list(seeds)}
    found = {
        "name": study.name,
        "description": study.spec.question,
        "project": tracking.project,
        "method": "grid",
        "metric": {"name": metric, "goal": "maximize" if higher else "minimize"},
        "command": [*MAKER, str(study.source.resolve()), *overrides, "--run", "${args_no_hyphens}"],
        "parameters": parameters,
    }
    return found | ({"entity": tracking.entity} if tracking.entity else {})


def write_sweep(study: Study, path: Path, overrides: Sequence[str] = ()) -> None:
    """Writes the file that `wandb sweep` takes.

    Raises:
        ConfigError: as `sweep`.
        CheckpointError: if the file cannot be written.
    """
    write_text(path, yaml_text(sweep(study, overrides)))


def job_of(study: Study, texts: Sequence[str]) -> Job:
    """Returns the run that the agent's arguments name.

    Args:
        study: the study.
        texts: `cell=NAME` and `seed=N`; with `value=V` a run of the search.

    Raises:
        ConfigError: if they name no run of the study.
    """
    given = dict(text.partition("=")[::2] for text in texts)
    wrong = [name for name in given if name not in ("cell", "seed", "value")]
    if wrong or not {"cell", "seed"} <= {*given}:
        raise ConfigError(
            f"--run: must be cell=NAME seed=N, and value=V for the search; got {' '.join(texts)}"
        )
    names = [cell.name for cell in study.cells]
    if given["cell"] not in names:
        raise ConfigError(f"--run: no cell '{given['cell']}'{suggest(given['cell'], names)}")
    tuning, cell = study.tuning, study.cell(given["cell"])
    if (tuning is None) == ("value" in given):
        why = "has no search; leave out value" if tuning is None else "has a search, whose runs need value=V"
        raise ConfigError(f"--run: the study {why}")
    seeds = tuning.seeds if tuning else study.spec.seeds
    if given["seed"] not in map(str, seeds):
        raise ConfigError(f"--run: seed: must be one of {', '.join(map(str, seeds))}; got {given['seed']}")
    if tuning is None:
        return study.job(cell, "compare", int(given["seed"]))
    for value in tuning.values or []:
        if str(value) == given["value"]:
            return study.job(cell, "tune", int(given["seed"]), value)
    raise ConfigError(f"--run: value: must be one of {tuning.values}; got {given['value']}")


def run_one(study: Study, texts: Sequence[str]) -> Job:
    """Makes one run, as W&B's agent asks for it.

    Raises:
        ConfigError: as `job_of`.
        StudyError: if the run failed.
    """
    job = job_of(study, texts)
    outcome = execute(job.config)
    if outcome.status not in ("finished", "diverged"):
        raise StudyError(f"{job.folder.path}: {outcome.status}: {outcome.error}")
    return job
