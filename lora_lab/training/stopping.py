"""Signals that ask a process to end, turned into an orderly stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
"""Ctrl-C, the end of a terminal, and what schedulers such as SLURM send before they end a job."""

PREEMPTED = 128 + signal.SIGTERM
DOUBLE_PRESS = 0.5
"""Seconds in which a second Ctrl-C counts as the first, since launchers also forward what the terminal
sends."""


class Interruption(SystemExit):
    """The process was asked to end; `code` is the exit code that a shell expects.

    130 after Ctrl-C, 129 if the terminal was closed, 143 after SIGTERM and what schedulers send.
    """

    code: int

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        shown = (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT))
        super().__init__(128 + number if number in shown else PREEMPTED)


class StopRequest:
    """Whether this process was asked to end, and when it may.

    Outside training an `Interruption` is raised at once. During training (`patient`) the request waits until
    a checkpoint is written; only a second Ctrl-C acts at once. While the end of a run is written (`ending`)
    every request waits.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that asked to end."""
        self.patient = False
        self.ending = False
        self._process = os.getpid()
        self._received_at = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handles the signals within the block; those that the process ignores stay ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can handle signals
            return
        before = {number: signal.getsignal(number) for number in STOPPING}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def listen(self) -> None:
        """Installs the handlers, also over those of a library."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._handle)

    def check(self) -> None:
        """Raises an Interruption if there was a request."""
        if self.received is not None:
            raise Interruption(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader's worker: it ends with its parent
        again = self.received is not None
        insists = again and number == signal.SIGINT and time.monotonic() - self._received_at > DOUBLE_PRESS
        if not again:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        # A launcher may forward a signal that this process also got, so only Ctrl-C can be repeated.
        if self.ending or (again and not insists) or (self.patient and not insists):
            return
        self.check()


def _leave_terminal() -> None:
    """Discards all further output: writing to a closed terminal is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None and os.isatty(stream.fileno()):
                os.dup2(nowhere, stream.fileno())
        except (OSError, ValueError):
            continue  # it has no descriptor
    os.close(nowhere)
