"""Executors on other machines: Ray's cluster, and Slurm by submitit.

Both need what the study's process has: the same packages and the same folders, by the same paths. A run whose
worker or node is lost is made again, from its last checkpoint, up to `RETRIES` times.
"""

from __future__ import annotations

import heapq
import importlib.util
import itertools
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_lab.config.schema import ExperimentConfig
from lora_lab.errors import ConfigError, StudyError
from lora_lab.experiment.loaded import LoadedData
from lora_lab.studies.cells import Job
from lora_lab.studies.executors import GRACE, Executor, environment
from lora_lab.studies.worker import Outcome, execute, print_to

RETRIES = 3
"""How often a run is made again whose worker or node was lost."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Keeps a cluster on 127.0.0.1; Ray would replace that address by one that the network reaches."""
POLL = 2.0
"""Seconds between looks into Slurm's queue."""
UNSEEN = 3
"""So many looks in a row must miss a job in the queue before it counts as lost: files may appear late."""

_loaded = LoadedData()
"""Data of the earlier runs of a worker of Ray's, which lives on from run to run."""


class RayExecutor(Executor):
    """Tasks of a Ray cluster, whose workers stay alive from run to run.

    Args:
        workers: runs that are under way at once; cores and GPUs of the cluster are shared out to them.
        logs: folder of what the workers print, seen from every node.
        address: of a running cluster, `auto` or `host:port`; None starts one on this machine alone.

    Raises:
        ConfigError: if Ray is not installed, or no cluster answers.
    """

    def __init__(self, workers: int, logs: Path, address: str | None = None):
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("--executor: ray is not installed; pip install 'lora_lab[ray]'")
        logs.mkdir(parents=True, exist_ok=True)
        with environment({} if address else LOOPBACK):
            import ray

            self._started_here = not ray.is_initialized()
            if self._started_here:
                local = {} if address else {"num_cpus": workers, "include_dashboard": False}
                try:
                    ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **local)
                except (ConnectionError, ValueError, RuntimeError) as error:
                    raise ConfigError(f"--address: no Ray cluster at '{address}': {error}") from error
        self.slots = workers
        self._ray = ray
        self._waiting: list[tuple[tuple[int, ...], int, Job]] = []
        self._count = itertools.count()
        self._running: dict[Any, Job] = {}
        found = ray.cluster_resources()
        cpus = max(1, int(found.get("CPU", 1)) // workers)
        options: dict[str, Any] = {"num_cpus": cpus, "max_retries": RETRIES, "retry_exceptions": False}
        if found.get("GPU"):
            options["num_gpus"] = min(1.0, found["GPU"] / workers)
        self._task = ray.remote(**options)(_on_ray)
        self._place = (str(Path.cwd()), str(logs.resolve()))

    def submit(self, job: Job) -> None:
        """See `Executor.submit`."""
        heapq.heappush(self._waiting, (job.order, next(self._count), job))
        self._start()

    def running(self) -> list[Job]:
        """See `Executor.running`."""
        return list(self._running.values())

    def wait(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """See `Executor.wait`."""
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        ended = [(self._running.pop(task), self._outcome(task)) for task in done]
        self._start()
        return ended

    def cancel(self) -> None:
        """See `Executor.cancel`."""
        self._waiting.clear()
        for task in self._running:
            self._ray.cancel(task, force=False)
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=GRACE)
        self._running.clear()
        if self._started_here:
            self._ray.shutdown()

    def _start(self) -> None:
        while self._waiting and len(self._running) < self.slots:
            _, _, job = heapq.heappop(self._waiting)
            self._running[self._task.remote(job.config, *self._place)] = job

    def _outcome(self, task: Any) -> Outcome:
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        try:
            status, error = self._ray.get(task)
        except TaskCancelledError:
            return Outcome("interrupted", "the process was asked to end")
        except RayTaskError as fault:  # its text is a traceback
            return Outcome("failed", _last_line(fault))
        except RayError as fault:
            lines = str(fault).strip().splitlines() or [type(fault).__name__]
            return Outcome("failed", f"{type(fault).__name__}: {lines[0]}")
        return Outcome(status, error)


def _on_ray(config: ExperimentConfig, folder: str, logs: str) -> tuple[str, str | None]:
    """Makes a run in a worker of Ray's."""
    os.chdir(folder)  # paths of the config may be relative
    print_to(Path(logs) / f"ray-{os.uname().nodename}-{os.getpid()}.log")
    outcome = execute(config, _loaded)
    return outcome.status, outcome.error


class SlurmExecutor(Executor):
    """Tasks of one job array of Slurm, by submitit; runs that become known later are another array.

    Args:
        workers: tasks of the array that run at once.
        logs: folder for submitit's files, seen from every node.
        options: submitit's parameters, `timeout_min`, `slurm_partition` or `gpus_per_node` say.

    Raises:
        ConfigError: if submitit or Slurm is missing, or a parameter is unknown.
    """

    def __init__(self, workers: int, logs: Path, options: Mapping[str, Any] | None = None):
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError("--executor: submitit is not installed; pip install 'lora_lab[slurm]'")
        import submitit

        self.slots = workers
        self._pending: list[Job] = []
        self._running: dict[Any, Job] = {}
        self._tries: dict[Job, int] = {}
        self._unseen: dict[Any, int] = {}
        self._looked = 0.0
        try:
            self._executor = submitit.AutoExecutor(folder=str(logs.resolve() / "slurm"), cluster="slurm")
            self._executor.update_parameters(
                **{"timeout_min": 24 * 60, "cpus_per_task": 1, **(options or {})},
                slurm_array_parallelism=workers,
            )
        except (RuntimeError, NameError, ValueError, TypeError) as error:
            raise ConfigError(f"--executor: slurm: {error}") from error

    def submit(self, job: Job) -> None:
        """See `Executor.submit`."""
        self._pending.append(job)

    def running(self) -> list[Job]:
        """See `Executor.running`."""
        return list(self._running.values())

    def wait(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """See `Executor.wait`."""
        self._start()
        deadline = time.monotonic() + seconds
        while True:
            if ended := self._ended():
                return ended
            if time.monotonic() >= deadline:
                return []
            time.sleep(min(0.2, seconds))

    def cancel(self) -> None:
        """See `Executor.cancel`. Slurm sends SIGTERM, and SIGKILL after its own KillWait."""
        self._pending.clear()
        for task in self._running:
            task.cancel(check=False)
        deadline = time.monotonic() + GRACE
        while self._running and time.monotonic() < deadline:
            alive = _in_queue()
            self._running = {task: job for task, job in self._running.items() if task.job_id in alive}
            time.sleep(0.2)
        self._running.clear()

    def _start(self) -> None:
        if not self._pending:
            return
        jobs = sorted(self._pending, key=lambda job: job.order)
        self._pending.clear()
        with self._executor.batch():
            tasks = [self._executor.submit(_on_slurm, job.config, str(Path.cwd())) for job in jobs]
        self._running |= dict(zip(tasks, jobs, strict=True))

    def _ended(self) -> list[tuple[Job, Outcome]]:
        ended = []
        for task in [task for task in self._running if task.paths.result_pickle.exists()]:
            job, error = self._running.pop(task), task.exception()
            outcome = Outcome(*task.result()) if error is None else Outcome("failed", _last_line(error))
            if outcome.status != "interrupted" or not self._again(job):  # preempted, or its time was over
                ended.append((job, outcome))
        if time.monotonic() - self._looked < POLL:
            return ended
        self._looked = time.monotonic()
        alive = _in_queue()
        for task in list(self._running):
            self._unseen[task] = 0 if task.job_id in alive else self._unseen.get(task, 0) + 1
            if self._unseen[task] >= UNSEEN:
                job = self._running.pop(task)
                if not self._again(job):
                    what = f"its job {task.job_id} was lost {self._tries[job]} times; see {task.paths.stderr}"
                    ended.append((job, Outcome("failed", what)))
        self._start()
        return ended

    def _again(self, job: Job) -> bool:
        """Makes a lost run once more, if it may be."""
        self._tries[job] = self._tries.get(job, 0) + 1
        if self._tries[job] <= RETRIES:
            self._pending.append(job)
        return self._tries[job] <= RETRIES


def slurm_options(texts: Sequence[str]) -> dict[str, Any]:
    """Reads `key=value` parameters of submitit's.

    Raises:
        ConfigError: if a text has no such form, sets what the executor sets, or a key stands twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--slurm: must be key=value; got '{text}'")
        if key in found or key == "slurm_array_parallelism":
            why = "is what --workers says" if key not in found else "stands twice"
            raise ConfigError(f"--slurm: {key} {why}; leave it out")
        found[key] = yaml.safe_load(value)
    return found


def _on_slurm(config: ExperimentConfig, folder: str) -> tuple[str, str | None]:
    """Makes a run in a task of Slurm's."""
    os.chdir(folder)
    outcome = execute(config)
    return outcome.status, outcome.error


def _in_queue() -> set[str]:
    """Returns the ids of this user's jobs that wait or run, array tasks one by one.

    submitit would ask Slurm's accounting, which not every cluster keeps.

    Raises:
        StudyError: if Slurm does not answer.
    """
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise StudyError(f"Slurm does not answer: {' '.join(command)}: {error}") from error
    return set(answer.stdout.split())


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"
