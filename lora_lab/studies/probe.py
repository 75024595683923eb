"""How long a study will take, where no run of it has finished yet."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace

from lora_lab.experiment import run
from lora_lab.experiment.loaded import LoadedData
from lora_lab.studies.cells import Study
from lora_lab.training.trainer import planned_steps


def probe(study: Study) -> float:
    """Makes two optimizer steps of the baseline with one validation and test, and returns seconds per run.

    Nothing is kept. The estimate has one validation, no controllers, and the baseline's cost for all
    cells.

    Raises:
        LabError: if the run cannot be made.
    """
    config = study.cell(study.spec.baseline).config
    loaded = LoadedData()
    batches = loaded.of(config).batches_per_epoch(config.trainer.devices)
    trainer = replace(config.trainer, max_steps=2, max_epochs=2, validate_every=1.0, progress_bar=False)
    tracking = replace(config.tracking, wandb="disabled")
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        short = replace(
            config, output=folder, run="probe", trainer=trainer, tracking=tracking, controllers={}
        )
        result = run(short, loaded=loaded)
        whole = time.monotonic() - started
    step = float(result.record["median_step_milliseconds"] or 0) / 1000
    steps = planned_steps(config.trainer, batches)
    return whole + max(0, steps - result.record["steps"]) * step
