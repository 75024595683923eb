"""Callbacks: in this folder those that every run has; in `controllers` those that change adapters.

Every controller's class and spec can be imported from here: `from lora_lab.callbacks import RankPruningSpec`.
"""

from typing import TYPE_CHECKING

from lora_lab.callbacks.adapter_checkpoint import AdapterCheckpoint as AdapterCheckpoint
from lora_lab.callbacks.adapter_statistics import AdapterStatistics as AdapterStatistics
from lora_lab.callbacks.controllers import (
    CONTROLLERS as CONTROLLERS,
    Controller as Controller,
    ControllerSpec as ControllerSpec,
    build_controllers as build_controllers,
    check_controllers as check_controllers,
)
from lora_lab.callbacks.memory_statistics import MemoryStatistics as MemoryStatistics
from lora_lab.callbacks.resume_checkpoint import ResumeCheckpoint as ResumeCheckpoint
from lora_lab.callbacks.speed_statistics import SpeedStatistics as SpeedStatistics

if TYPE_CHECKING:
    from lora_lab.callbacks.controllers import *  # noqa: F403
else:  # the same names, without those of the modules that they come from
    _parts = {part.__name__: part for kind in CONTROLLERS.own.values() for part in (kind, kind.Spec)}
    globals().update(_parts)
    __all__ = [
        "CONTROLLERS",
        "AdapterCheckpoint",
        "AdapterStatistics",
        "Controller",
        "ControllerSpec",
        "MemoryStatistics",
        "ResumeCheckpoint",
        "SpeedStatistics",
        "build_controllers",
        "check_controllers",
        *_parts,
    ]
