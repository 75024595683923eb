"""The callbacks of a run, and the order in which they act."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L

from lora_lab.adapters import AdapterSet
from lora_lab.callbacks import Controller, build_controllers
from lora_lab.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lab.callbacks.adapter_statistics import AdapterStatistics
from lora_lab.callbacks.memory_statistics import MemoryStatistics
from lora_lab.callbacks.progress import ProgressBar
from lora_lab.callbacks.resume_checkpoint import ResumeCheckpoint
from lora_lab.callbacks.speed_statistics import SpeedStatistics
from lora_lab.callbacks.test_examples import TestExamples
from lora_lab.config.schema import ExperimentConfig
from lora_lab.experiment.folder import RunFolder
from lora_lab.training.stopping import StopRequest
from lora_lab.training.trainer import planned_steps


@dataclass
class RunCallbacks:
    """The callbacks that every run has, and its controllers."""

    controllers: list[Controller]
    adapters: AdapterStatistics
    memory: MemoryStatistics
    speed: SpeedStatistics
    best: AdapterCheckpoint
    resume: ResumeCheckpoint
    examples: TestExamples

    @classmethod
    def build(
        cls,
        config: ExperimentConfig,
        adapters: AdapterSet,
        batches: int,
        folder: RunFolder,
        stop: StopRequest,
    ) -> RunCallbacks:
        """Builds the callbacks; the controllers fit their schedules to the run.

        Args:
            config: the run's config.
            adapters: the run's adapters.
            batches: number of batches of an epoch in one process.
            folder: the run's folder.
            stop: whether the process was asked to end.

        Raises:
            ConfigError: if a controller's options are invalid, or the run is too short for its schedule.
            IncompatibleError: if the adapters do not have what a controller needs.
        """
        controllers = build_controllers(config.controllers, adapters, config.seed)
        for controller in controllers:
            controller.plan(planned_steps(config.trainer, batches))
        return cls(
            controllers,
            AdapterStatistics(adapters, controllers),
            MemoryStatistics(adapters),
            SpeedStatistics(),
            AdapterCheckpoint(adapters, config.trainer.keep, controllers),
            ResumeCheckpoint(folder.checkpoint, config.trainer.checkpoint_every, stop),
            TestExamples(folder.path if config.tracking.test_examples else None),
        )

    def everything(self, bars: list[L.Callback]) -> list[L.Callback]:
        """Returns all callbacks in their order.

        The statistics come after everything that changes adapters at the end of a step or of the run; the
        clock is last.
        """
        statistics = [self.adapters, self.memory]
        return [*self.controllers, self.best, *statistics, *bars, self.examples, self.resume, self.speed]


def progress_bars(config: ExperimentConfig) -> list[L.Callback]:
    """Returns the progress bar, if the config asks for one."""
    return [ProgressBar()] if config.trainer.progress_bar else []
