"""A run's loggers, from first row to last.

After training has begun, an error of tracking costs only rows at W&B: there is one warning, and training
continues.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from wandb.errors import AuthenticationError, UsageError

from lora_lab.documents.writing import writable
from lora_lab.errors import ConfigError
from lora_lab.tracking.config import Mode, TrackingConfig, wandb_mode
from lora_lab.tracking.metrics_file import NAME, MetricsFile

STEP = "trainer/global_step"
"""W&B's horizontal axis, with Lightning's name."""
FINISH_SECONDS = 60
"""How long the end of a run waits for W&B's server and for its complete file."""
ANSWER_SECONDS = 90
"""How long a call waits for W&B's service; longer than the end of a run, which has its own limit."""


class TolerantWandbLogger(WandbLogger):
    """Lightning's logger, but no call of it can end a run."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._failed = False

    def attempt(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Calls the function; warns of the first error, not of others.

        W&B waits without a limit for a service that hangs; if the service is ended, it is an error like
        others.
        """
        watch = threading.Timer(ANSWER_SECONDS, _end_service)
        watch.daemon = True
        watch.start()
        try:
            call(*arguments, **options)
        except Exception as error:  # W&B's service has exceptions of many kinds
            if not self._failed:
                warnings.warn(
                    f"tracking: W&B failed ({_words(error)}). Training continues; {NAME} has every row.",
                    stacklevel=2,
                )
            self._failed = True
        finally:
            watch.cancel()

    @rank_zero_only
    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        """Logs a row."""
        self.attempt(super().log_metrics, *arguments, **options)

    @rank_zero_only
    def summarise(self, values: Mapping[str, Any]) -> None:
        """Writes numbers into the run's summary."""
        self.attempt(lambda: self.experiment.summary.update(values))

    @rank_zero_only
    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """Adds to the run's config."""
        self.attempt(super().log_hyperparams, *arguments, **options)

    @rank_zero_only
    def log_table(self, *arguments: Any, **options: Any) -> None:
        """Logs a table."""
        self.attempt(super().log_table, *arguments, **options)

    @rank_zero_only
    def log_image(self, *arguments: Any, **options: Any) -> None:
        """Logs pictures."""
        self.attempt(super().log_image, *arguments, **options)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Records the end of training."""
        self.attempt(super().finalize, status)


def build_loggers(
    config: TrackingConfig, folder: Path, experiment: str, run: str, settings: dict[str, Any]
) -> list[Logger]:
    """Makes a run's loggers: `<folder>/metrics.csv` always, and W&B in `<folder>/wandb/` unless disabled.

    W&B starts at once, prints nothing and never asks for a login. Other processes than the first one get the
    same loggers, which write nothing.

    Args:
        config: whether and how W&B tracks.
        folder: the run's folder.
        experiment: name of the experiment.
        run: name of the run; together they decide W&B's id, which a resumed run keeps.
        settings: the composed config as plain values, which W&B shows as the run's config.

    If W&B does not start for another reason than the settings, there is a warning; an online run is then
    tracked offline, and an offline one only by the CSV file.

    Raises:
        ConfigError: if W&B refuses the names or the API key.
        CheckpointError: if the folder cannot be written to.
    """
    mode = wandb_mode(config)
    folder = folder.resolve()
    with writable(folder):
        loggers: list[Logger] = [MetricsFile(folder)]
    if mode == "disabled":
        return loggers
    own_id = _agents_id() or run_id(config, experiment, run)
    # W&B's service keeps the id of a run that it could not start.
    attempts: list[tuple[Mode, str]] = [(mode, own_id)]
    if mode == "online":
        attempts.append(("offline", f"{own_id}-offline"))
    for tried, name in attempts:
        try:
            started = _start(config, tried, folder, experiment, run, name, settings)
        except (UsageError, AuthenticationError) as error:
            raise ConfigError(
                f"tracking: W&B refuses to start ({_words(error)}). Change the names under tracking, log in "
                "again, or use tracking.wandb=offline and `wandb sync` later."
            ) from error
        except Exception as error:  # some exceptions of W&B's service are not WandbErrors
            then = "tracked offline" if tried == "online" else f"tracked only by {NAME}"
            warnings.warn(f"tracking: W&B does not start ({_words(error)}); the run is {then}.", stacklevel=2)
        else:
            own = TolerantWandbLogger(run, save_dir=folder, project=config.project, experiment=started)
            return [*loggers, own]
    return loggers


@rank_zero_only
def summarise(loggers: Iterable[Logger], values: Mapping[str, Any]) -> None:
    """Writes single numbers of a run into W&B's summary, where runs are compared in a table.

    Args:
        loggers: what `build_loggers` made.
        values: name → number or text; None is left out.
    """
    known = {name: value for name, value in values.items() if value is not None}
    for logger in loggers:
        if isinstance(logger, TolerantWandbLogger):
            logger.summarise(known)


@rank_zero_only
def log_adapter(loggers: Iterable[Logger], folder: Path, lineage: Mapping[str, Any]) -> None:
    """Logs an adapter's folder as an output artifact of type `adapter` of the W&B run.

    Args:
        loggers: what `build_loggers` made.
        folder: the adapter's.
        lineage: where it comes from; the artifact's metadata.
    """

    def log(run: Any) -> None:
        artifact = wandb.Artifact(f"adapter-{run.id}", type="adapter", metadata=dict(lineage))
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)

    for logger in loggers:
        if isinstance(logger, TolerantWandbLogger):
            logger.attempt(lambda logger=logger: log(logger.experiment))


@rank_zero_only
def log_page(
    loggers: Iterable[Logger], page: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Logs a table as `cells` and a page of HTML as `report`.

    Args:
        loggers: what `build_loggers` made.
        page: the page, which needs no other files.
        columns: names of the table's columns.
        rows: its rows of plain values.
    """

    def log(run: Any) -> None:
        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        run.log({"cells": table, "report": wandb.Html(page, inject=False)})

    for logger in loggers:
        if isinstance(logger, TolerantWandbLogger):
            logger.attempt(log, logger.experiment)


@rank_zero_only
def close_loggers(loggers: Iterable[Logger], failed: bool = False) -> None:
    """Ends the W&B run, if there is one, and waits until W&B's file is complete.

    Args:
        loggers: what `build_loggers` made.
        failed: whether the run counts as failed.
    """
    for logger in loggers:
        if isinstance(logger, TolerantWandbLogger):
            logger.attempt(_finish, logger.experiment, failed)
        elif isinstance(logger, MetricsFile):
            logger.close()


def run_id(config: TrackingConfig, experiment: str, run: str) -> str:
    """Returns W&B's id of a run: a function of the names, with characters that W&B allows."""
    names = "/".join([config.entity or "", config.project, experiment, run])
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _agents_id() -> str | None:
    """Returns the id that `wandb agent` gave the run of a sweep; None if no agent started this process."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


@rank_zero_only
def _start(
    config: TrackingConfig,
    mode: Mode,
    folder: Path,
    experiment: str,
    run: str,
    name: str,
    settings: dict[str, Any],
) -> wandb.Run:
    # Lightning would start W&B with an obsolete argument, for which W&B prints a warning.
    started = wandb.init(
        dir=folder,
        mode=mode,
        project=config.project,
        entity=config.entity,
        group=config.group or experiment,
        job_type=config.job_type,
        name=run,
        id=name,
        tags=config.tags,
        config=settings,
        # Offline there is no server to resume on; `replay` does it.
        resume="allow" if mode == "online" else None,
        # create_new: a run that the user's script has open is neither joined nor ended.
        settings=wandb.Settings(
            silent=True, console="off", reinit="create_new", finish_timeout=FINISH_SECONDS
        ),
    )
    started.define_metric(STEP)
    started.define_metric("*", step_metric=STEP, step_sync=True)
    return started


def _finish(run: wandb.Run, failed: bool) -> None:
    """Ends W&B's run, and waits for its service, which writes the last rows after `finish` has returned."""
    path = Path(run.settings.sync_file).resolve()
    deadline = time.monotonic() + FINISH_SECONDS
    run.finish(exit_code=int(failed))
    while _is_open(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    if run.offline:
        # Again, since the service of a killed process still writes for a moment.
        delete_earlier(path.parent, run.id)


def delete_earlier(current: Path, own_id: str) -> None:
    """Deletes the offline folders that earlier processes left for the same run.

    Args:
        current: this process's folder, which stays.
        own_id: W&B's id of the run.
    """
    # W&B numbers the folders of processes that started in the same second.
    for name in (own_id, f"{own_id}-[0-9]*"):
        for folder in current.parent.glob(f"offline-run-*-{name}"):
            if folder.resolve() != current.resolve():
                shutil.rmtree(folder, ignore_errors=True)


def _end_service() -> None:
    """Ends W&B's service, which is no longer needed; the process's next run starts another."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has already ended
            if child.name() == "wandb-core":
                child.kill()
                child.wait(5)
    with suppress(Exception):  # the connection is lost
        wandb.teardown()


def _is_open(path: Path) -> bool:
    """Whether a process that this one has started has the file open."""
    for child in psutil.Process().children(recursive=True):
        try:
            if any(file.path == str(path) for file in child.open_files()):
                return True
        except psutil.Error:  # it has just ended, or belongs to another user
            continue
    return False


def _words(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
