"""A worker process: one run after the other, until it is asked to end or its study has died."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from lora_lab.config.schema import ExperimentConfig
from lora_lab.errors import LabError
from lora_lab.experiment import run
from lora_lab.experiment.folder import RunFolder
from lora_lab.experiment.loaded import LoadedData

PATIENCE = 120
"""Seconds to wait for the worker of a study that was killed, which still writes a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """How a run has ended."""

    status: str
    """finished, failed, diverged or interrupted."""
    error: str | None = None


def execute(config: ExperimentConfig, loaded: LoadedData | None = None) -> Outcome:
    """Runs a run; returns its outcome, also after an error.

    Args:
        config: of the run.
        loaded: data of the worker's earlier runs.
    """
    forget_peak_memory()
    try:
        RunFolder.of(config).wait_until_free(PATIENCE)
        run(config, loaded=loaded)
    except LabError as error:
        return Outcome(error.status, f"{type(error).__name__}: {error}")
    except (SystemExit, KeyboardInterrupt):
        return Outcome("interrupted", "the process was asked to end")
    except Exception as error:
        traceback.print_exc()
        return Outcome("failed", f"{type(error).__name__}: {error}")
    finally:
        gc.collect()  # a model and its trainer refer to each other
    return Outcome("finished")


def serve(connection: Connection, log: Path, study: int) -> None:
    """Runs the configs from the connection and returns their outcomes, until it ends.

    Args:
        connection: source of configs, with None at the end, and target of outcomes.
        log: file for everything that is printed.
        study: the study's process.
    """
    # Ctrl-C at the terminal also reaches the study, which asks its workers to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the study's handler
    print_to(log)
    threading.Thread(target=_end_with, args=(study,), daemon=True).start()
    loaded = LoadedData()
    gc.freeze()  # modules stay: collections after each run need not look at them
    while True:
        try:
            config = connection.recv()
        except (EOFError, OSError):
            return
        if config is None:
            return
        outcome = execute(config, loaded)
        try:
            connection.send(outcome)
        except OSError:
            return
        if outcome.status == "interrupted":
            return


def forget_peak_memory() -> None:
    """Resets this process's peak of resident memory, so that a run does not show that of an earlier one."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux: the peak is that of all runs so far


def _end_with(study: int) -> None:
    """Asks this process to end when the study's process has died: a run writes a checkpoint first."""
    while os.getppid() == study:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def print_to(path: Path) -> None:
    """Sends all that this process prints from now on to the end of a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
