"""Real processes for tests, which may be killed: they start like new ones, without the seconds of imports.

They are forks of one server, which has imported everything, and has neither run anything nor started W&B.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = [
    "lora_lab.experiment",
    "lora_lab.report.terminal",
    "lora_lab.studies",
    "transformers.models.bert.modeling_bert",
    "wandb.sdk.launch.inputs.internal",  # which every run of W&B's imports
]


@dataclass
class Fork:
    """A process."""

    process: ForkServerProcess
    output: Path
    """What it prints on both streams."""

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """Waits; returns the exit code, negative for a signal, and what was printed."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        assert code is not None, f"hangs: {self.output.read_text()}"
        return code, self.output.read_text()

    def send(self, how: signal.Signals) -> None:
        os.kill(self.process.pid, how)


def fork(target: Callable[..., int | None], *arguments: object, folder: Path, **environment: str) -> Fork:
    """Starts a process.

    Args:
        target: a function of a module; what it returns is the exit code.
        arguments: of the function.
        folder: where the process stands and prints.
        environment: variables, beside those of the test session's start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    number = len(list(folder.glob("output_*")))
    output = folder / f"output_{number}"
    output.touch()
    process = context.Process(target=_run, args=(target, arguments, folder, output, environment))
    process.start()
    return Fork(process, output)


def lora_lab(*arguments: str, folder: Path, **environment: str) -> Fork:
    """Starts `lora-lab` with these arguments."""
    return fork(_command, arguments, folder=folder, **environment)


def _command(arguments: tuple[str, ...]) -> int:
    from lora_lab.cli import main

    return main(arguments)


def _run(target: Callable[..., int | None], arguments, folder: Path, output: Path, environment) -> None:
    import wandb
    from wandb.sdk.data_types._private import MEDIA_TMP

    os.setpgid(0, 0)
    # A shell's background jobs ignore Ctrl-C and hand that down; the process is to meet it as at a terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= environment
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.makedirs(MEDIA_TMP.name, exist_ok=True)  # the server's, which an earlier fork has cleaned up
    try:
        code = target(*arguments)
    finally:
        with suppress(Exception):
            wandb.teardown()  # as at the end of any process; the server's other exit functions are its own
    sys.exit(code)
