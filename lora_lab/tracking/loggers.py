"""A run's loggers, from first row to last."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lora_lab.errors import ConfigError
from lora_lab.files import writable
from lora_lab.tracking.config import Mode, TrackingConfig, wandb_mode
from lora_lab.tracking.metrics_file import MetricsFile

STEP = "trainer/global_step"
"""W&B's horizontal axis, by the name that Lightning gives it."""


def build_loggers(
    config: TrackingConfig, folder: Path, experiment: str, run: str, settings: dict[str, Any]
) -> list[Logger]:
    """Makes a run's loggers: `<folder>/metrics.csv` always, and W&B in `<folder>/wandb/` unless disabled.

    W&B starts at once, prints nothing and never asks for a login. Processes other than the first one get the
    same loggers, which write nothing.

    Args:
        config: whether and how W&B tracks.
        folder: the run's folder.
        experiment: name of the experiment.
        run: name of the run; together they decide W&B's id, so that a resumed run keeps it.
        settings: the composed config, of plain values; W&B shows it as the run's config.

    Raises:
        ConfigError: if W&B refuses the names, or cannot be reached.
        CheckpointError: if the folder cannot be written to.
    """
    mode = wandb_mode(config)
    folder = folder.resolve()
    with writable(folder):
        loggers: list[Logger] = [MetricsFile(folder)]
    if mode == "disabled":
        return loggers
    started = _start(config, mode, folder, experiment, run, settings)
    return [*loggers, WandbLogger(run, save_dir=folder, project=config.project, experiment=started)]


@rank_zero_only
def close_loggers(loggers: Iterable[Logger], failed: bool = False) -> None:
    """Ends the W&B run, if there is one.

    Offline, W&B may still write its last rows when this returns; the process does not exit before it is done.

    Args:
        loggers: what `build_loggers` made.
        failed: whether the run shall count as failed.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=int(failed))


def run_id(config: TrackingConfig, experiment: str, run: str) -> str:
    """Returns W&B's id of a run: a function of names alone, of characters that W&B allows."""
    names = "/".join([config.entity or "", config.project, experiment, run])
    return hashlib.sha256(names.encode()).hexdigest()[:16]


@rank_zero_only
def _start(
    config: TrackingConfig, mode: Mode, folder: Path, experiment: str, run: str, settings: dict[str, Any]
) -> wandb.Run:
    # Lightning would start W&B with an obsolete argument, about which W&B complains on the terminal.
    try:
        started = wandb.init(
            dir=folder,
            mode=mode,
            project=config.project,
            entity=config.entity,
            group=config.group or experiment,
            name=run,
            id=run_id(config, experiment, run),
            tags=config.tags,
            config=settings,
            # Offline there is no server to resume on; `replay` does it.
            resume="allow" if mode == "online" else None,
            # create_new: a run that the user's own script has open is neither joined nor ended.
            settings=wandb.Settings(silent=True, console="off", reinit="create_new"),
        )
    except Exception as error:  # W&B's service has exceptions that are no WandbError
        raise ConfigError(
            f"tracking: W&B does not start ({error}). Mend the names under tracking, or use "
            "tracking.wandb=offline and `wandb sync` later."
        ) from error
    started.define_metric(STEP)
    started.define_metric("*", step_metric=STEP, step_sync=True)
    return started
