"""Where the runs of a study run: a small interface, and local processes; see `clusters` for others."""

from __future__ import annotations

import heapq
import itertools
import multiprocessing
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from lora_lab.studies.cells import Job
from lora_lab.studies.worker import Outcome, serve

GRACE = 120
"""Seconds that a worker has for its run's checkpoint when it is asked to end."""


class Executor(ABC):
    """Runs runs, and says how each has ended. The results of a run are in its folder."""

    slots: int
    """Largest number of runs at the same time."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Adds a run; those of lower `order` start first."""

    @abstractmethod
    def wait(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """Returns the runs that have ended since the last call; waits this long for the first."""

    @abstractmethod
    def running(self) -> list[Job]:
        """Returns the running runs."""

    @abstractmethod
    def cancel(self) -> None:
        """Drops runs that have not started, asks others to end with a checkpoint, and waits for them."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None


class LocalExecutor(Executor):
    """Processes of this machine, which stay alive from run to run, so that each imports libraries once.

    Cores and GPUs are divided: each worker has `cores / workers` threads (OMP_NUM_THREADS says another
    number) and sees one GPU. The number of threads can change the last digits of sums.

    Args:
        workers: number of processes.
        logs: folder of what the workers print.
        start: how processes are made; a forked one has everything that this one has imported, and cannot use
            its GPU.
    """

    def __init__(self, workers: int, logs: Path, start: Literal["spawn", "fork"] = "spawn"):
        self.slots = workers
        self.logs = logs
        self.start = start
        self._waiting: list[tuple[tuple[int, ...], int, Job]] = []
        self._count = itertools.count()
        self._workers: list[_Worker | None] = [None] * workers

    def submit(self, job: Job) -> None:
        heapq.heappush(self._waiting, (job.order, next(self._count), job))
        self._start()

    def running(self) -> list[Job]:
        return [worker.job for worker in self._workers if worker and worker.job]

    def wait(self, seconds: float) -> list[tuple[Job, Outcome]]:
        busy = {w.connection: place for place, w in enumerate(self._workers) if w and w.job}
        if not busy:
            time.sleep(0 if self._waiting else seconds)
        ended = []
        for connection in wait(list(busy), seconds) if busy else ():
            place = busy[connection]  # type: ignore[index]
            worker = self._workers[place]
            assert worker is not None
            assert worker.job is not None
            try:
                outcome = worker.connection.recv()
            except (EOFError, OSError):
                outcome = Outcome("failed", _death(worker.process))
                self._workers[place] = None
            ended.append((worker.job, outcome))
            worker.job = None
            if outcome.status == "interrupted":
                worker.process.join()
                self._workers[place] = None
        self._start()
        return ended

    def cancel(self) -> None:
        """Cancels as `Executor` says; a second call, or the end of the grace period, ends runs at once."""
        self._waiting.clear()
        workers = [worker for worker in self._workers if worker]
        try:
            for worker in workers:
                if worker.job and worker.process.pid and worker.process.is_alive():
                    os.kill(worker.process.pid, signal.SIGTERM)
                # Ends an idle worker, which may not notice a closed connection: forks hold each other's ends.
                with suppress(OSError):
                    worker.connection.send(None)
                worker.connection.close()
            deadline = time.monotonic() + GRACE
            for worker in workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                if worker.process.is_alive():
                    worker.process.kill()
                worker.process.join()
            self._workers = [None] * self.slots

    def _start(self) -> None:
        for place in range(self.slots):
            worker = self._workers[place]
            if not self._waiting or (worker and worker.job):
                continue
            if worker is None or not worker.process.is_alive():
                worker = self._workers[place] = self._new(place)
            _, _, job = self._waiting[0]
            try:
                worker.connection.send(job.config)
            except OSError:
                self._workers[place] = None  # it has just died; the next call starts another
                continue
            heapq.heappop(self._waiting)
            worker.job = job

    def _new(self, place: int) -> _Worker:
        context: Any = multiprocessing.get_context(self.start)
        self.logs.mkdir(parents=True, exist_ok=True)
        mine, theirs = context.Pipe()
        process = context.Process(
            target=serve,
            args=(theirs, self.logs / f"worker{place}.log", os.getpid()),
            name=f"worker {place}",
        )
        with environment(self._share(place)):
            process.start()
        theirs.close()
        return _Worker(process, mine)

    def _share(self, place: int) -> dict[str, str]:
        """Returns the environment of a worker: its threads, and its GPU."""
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // self.slots))
        share = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if gpus := torch.cuda.device_count():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            share["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % gpus]
        return share


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _death(process: BaseProcess) -> str:
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        return f"its process {how}; if that was SIGKILL, memory may have run out: use fewer --workers"
    return f"its process ended with exit code {code}"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for processes that are started within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
